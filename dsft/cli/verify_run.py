"""``dsft data verify-run`` for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dsft.train.verify_run import RunReport


MOST_EPOCHS = 10
"""Passes over a source that are shown one by one."""


def print_report(report: RunReport) -> None:
    """Steps by attempt, passes over each source, and what is wrong."""
    for attempt in report.attempts:
        click.echo(
            f"attempt {str(attempt['id'])[:8]}: steps {attempt['first_step']:,} to {attempt['last_step']:,} "
            f"on {attempt['world_size']} rank(s)"
        )
    if report.superseded_steps:
        click.echo(f"{report.superseded_steps:,} logged steps do not count: they were run again, or never committed")
    if report.steps_without_update:
        click.echo(
            f"{report.steps_without_update:,} steps made no update (not finite, or nothing to learn): what they were "
            "given was not learned"
        )
    for part in report.passed_over:
        click.echo(
            f"passed over on purpose after step {part.after_step:,}: {part.steps:,} steps of the plan, {part.tokens:,} "
            f"tokens ({part.cause})"
        )
    for name, epochs in report.sources.items():
        for epoch in epochs[:MOST_EPOCHS]:
            state = "complete, every document once" if epoch.is_complete else "begun"
            partly = f" (and {epoch.partly_used:,} in part)" if epoch.partly_used else ""
            click.echo(
                f"{name}: epoch {epoch.epoch}: {epoch.documents:,} of {epoch.documents_of_pass:,} documents{partly}, "
                f"{epoch.tokens:,} tokens: {state}"
            )
        if len(epochs) > MOST_EPOCHS:
            complete = sum(epoch.is_complete for epoch in epochs)
            click.echo(f"{name}: {len(epochs):,} epochs begun, {complete:,} of them complete")
    for problem in report.problems:
        click.echo(f"problem: {problem}")
    if report.num_problems > len(report.problems):
        click.echo(f"and {report.num_problems - len(report.problems):,} more")
    until = "the last logged step (the run has no checkpoint)" if report.checkpoint is None else report.checkpoint
    if report.is_proved:
        click.echo(f"proved: {report.steps:,} steps, {report.tokens:,} tokens, as planned, up to {until}")
    else:
        click.echo(f"NOT proved: {report.num_problems:,} problems in {report.steps:,} steps, up to {until}")
