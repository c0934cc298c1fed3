"""What the demonstration found: figures, claims, and the table that people read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.demo.answers import NUM_SHUFFLES, Answered, Scores
from dsft.demo.crash import Crash
from dsft.demo.run_config import PAIRS_SET, STAGES, TEXT_SET
from dsft.errors import TrainingError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SECONDS_PROMISED = 360.0
BYTES_PROMISED = 4 * 2**30
MAX_LOSS_DIFFERENCE = 1e-4
"""Relative, between the losses before and after the crash: other ranks add in another order, in fp32, and training
amplifies it; a lost or repeated batch differs by a tenth."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The model at one moment: the untrained one, or after a stage.

    Attributes:
        text_bits_per_byte: of the held-out raw text.
        response_loss: mean negative log-likelihood (nats) of a token of the held-out answers.
    """

    name: str
    step: int
    tokens_trained: int
    text_bits_per_byte: float
    response_loss: float


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement and whether this run bears it out."""

    text: str
    holds: bool


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything ``summary.json`` holds."""

    corpus: dict[str, int]
    bigram_bits_per_byte: float
    measured: tuple[Measured, ...]
    scores: Scores
    examples: tuple[Answered, ...]
    crash: Crash
    claims: tuple[Claim, ...]
    seconds: dict[str, float]
    peak_bytes: int
    device: str

    @property
    def holds(self) -> bool:
        """Whether every claim does."""
        return all(claim.holds for claim in self.claims)


def read_measurements(metrics: Path) -> tuple[Measured, ...]:
    """The evaluations of a run's ``metrics.jsonl``: before the first step and after each stage.

    Raises:
        TrainingError: there are more or fewer than that; the run did not go through all its stages.
    """
    records = [json.loads(line) for line in metrics.read_bytes().split(b"\n") if line]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    text = [record for record in evaluations if record["set"] == TEXT_SET]
    pairs = [record for record in evaluations if record["set"] == PAIRS_SET]
    names = ["untrained", *(f"after {name}" for name, _ in STAGES)]
    if not len(text) == len(pairs) == len(names):
        raise TrainingError(
            f"{metrics} has {len(text)} evaluations of {TEXT_SET} and {len(pairs)} of {PAIRS_SET}, and the "
            f"demonstration makes {len(names)} of each (before training and after each stage). Look at the training "
            "output above."
        )
    return tuple(
        Measured(name, of_text["step"], of_text["tokens_trained"], of_text["bits_per_byte"], of_pairs["loss"])
        for name, of_text, of_pairs in zip(names, text, pairs, strict=True)
    )


def judge(measured: Sequence[Measured], bigram_bits_per_byte: float, scores: Scores, crash: Crash) -> tuple[Claim, ...]:
    """The demonstration's claims."""
    untrained, *stages = measured
    before, after = measured[-2:]
    return (
        *(
            Claim(
                f"{stage.name}: held-out bits per byte ({stage.text_bits_per_byte:.3f}) below the bigram model's "
                f"({bigram_bits_per_byte:.3f}) and the untrained model's ({untrained.text_bits_per_byte:.3f})",
                stage.text_bits_per_byte < min(bigram_bits_per_byte, untrained.text_bits_per_byte),
            )
            for stage in stages
        ),
        Claim(
            f"response loss after the last stage ({after.response_loss:.3f}) below that before it "
            f"({before.response_loss:.3f})",
            after.response_loss < before.response_loss,
        ),
        Claim(
            f"answer F1 after the last stage ({scores.f1:.3f}) above that of the same answers in each of "
            f"{NUM_SHUFFLES} shuffles (highest {scores.shuffled_f1_max:.3f})",
            scores.f1 > scores.shuffled_f1_max,
        ),
        Claim(
            f"after kill -9 the steps from {crash.resumed_from_step} to {crash.killed_after_step}, trained again on "
            f"{crash.num_ranks_after} rank(s) instead of {crash.num_ranks_before}, have the same losses (relative "
            f"difference {crash.max_relative_difference:.1e}, at most {MAX_LOSS_DIFFERENCE:.0e})",
            crash.max_relative_difference <= MAX_LOSS_DIFFERENCE,
        ),
    )


def to_json(summary: Summary) -> dict[str, Any]:
    """``summary.json``'s content."""
    return {**asdict(summary), "passed": summary.holds}


def show(summary: Summary, console: Console) -> None:
    """Print examples, table and claims."""
    from rich.table import Table

    console.rule("Three answers to held-out questions, greedy, by the exported model in plain transformers")
    for example in summary.examples:
        for label, text in (("Q", example.question), ("model", example.answer), ("Python", example.reference)):
            console.print(f"{label:>7}: {text}", markup=False, highlight=False)
        console.print()
    table = Table(title="Held-out measurements")
    for heading in ("", "steps", "tokens trained", "text: bits per byte", "answers: loss per token"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("bigram model, add-one", "", "", f"{summary.bigram_bits_per_byte:.3f}", "", end_section=True)
    for row in summary.measured:
        figures = (
            f"{row.step:,}",
            f"{row.tokens_trained:,}",
            f"{row.text_bits_per_byte:.3f}",
            f"{row.response_loss:.3f}",
        )
        table.add_row(row.name, *figures)
    console.print(table)
    console.print(_twice_trained(summary.crash))
    scores = summary.scores
    kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in scores.f1_by_kind.items())
    console.print(
        f"Answers to {scores.num_questions} held-out questions: F1 {scores.f1:.3f} ({kinds}), exact "
        f"{scores.exact_match:.3f}; shuffled {scores.shuffled_f1_mean:.3f}, shuffled within a kind "
        f"{scores.same_kind_f1_mean:.3f}.",
        highlight=False,
    )
    for claim in summary.claims:
        mark = "[green]holds[/green]" if claim.holds else "[bold red]FAILS[/bold red]"
        console.print(f"{mark}  {claim.text}", highlight=False)
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in summary.seconds.items() if name != "total")
    console.print(
        f"{summary.crash.num_ranks_before} rank(s) on {summary.device}: {summary.seconds['total']:.0f} s ({parts}); "
        f"peak memory of all processes {summary.peak_bytes / 2**30:.2f} GiB.",
        highlight=False,
    )


def _twice_trained(crash: Crash) -> Table:
    from rich.table import Table

    table = Table(title=f"kill -9 after step {crash.killed_after_step}, resumed from step {crash.resumed_from_step}")
    ranks = crash.num_ranks_before, crash.num_ranks_after
    for heading in ("step", f"loss, {ranks[0]} rank(s)", f"loss again, {ranks[1]} rank(s)"):
        table.add_column(heading, justify="right")
    for step in crash.steps:
        table.add_row(f"{step.step:,}", f"{step.loss_before:.6f}", f"{step.loss_after:.6f}")
    return table
