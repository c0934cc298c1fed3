"""``dsft``: finds the verb, imports only that verb's module, and turns errors into messages and exit codes."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from dsft import __version__
from dsft.constants import EXIT_OK
from dsft.errors import DsftError

EXIT_INTERRUPTED = 130
"""128 + SIGINT, what a shell reports for a program that Ctrl-C ended."""

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("dsft.cli.demo:command", "Train, evaluate and export a small model on an embedded corpus."),
    "prepare": ("dsft.cli.prepare:command", "Turn the raw data of a run into token stores."),
    "advise": ("dsft.cli.advise:command", "Supervised or unsupervised? Measures, says why, writes the run."),
    "estimate": ("dsft.cli.estimate:command", "Memory, time and cost of a run, before it is started."),
    "train": ("dsft.cli.train:command", "Train as a YAML file says; the same command under every launcher."),
    "launch": ("dsft.cli.launch:command", "Run deepspeed; start it again when it fails or hangs."),
    "doctor": ("dsft.cli.doctor:command", "Check the hosts of a run; every failing line says what to do."),
    "slurm": ("dsft.cli.slurm:command", "Write the batch script of a run: saved, requeued, resumed."),
    "logs": ("dsft.cli.logs:command", "What the ranks of a run said; followed, filtered."),
    "ckpt": ("dsft.cli.ckpt:command", "List, check, show and compare checkpoints; import DeepSpeed's."),
    "eval": ("dsft.cli.evaluate:command", "Measure held-out sets on a model or checkpoint; compare two."),
    "export": ("dsft.cli.export:command", "Write a checkpoint as a Hugging Face folder."),
    "report": ("dsft.cli.report:command", "Write one page about a run: curves, verdicts, answers."),
    "config": ("dsft.cli.config:command", "Show or check a configuration, or print its JSON schema."),
    "data": ("dsft.cli.data:command", "Statistics and previews of data; proof of what was trained."),
    "ops": ("dsft.cli.ops:command", "Build dsft's native operations, or say which are in use."),
}
"""Verb -> (module:attribute of its click command, one line of help). A module is imported when its verb is run."""

_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class LazyGroup(click.Group):
    """A group whose help lists the verbs of ``VERBS`` without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of ``VERBS``."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a verb and return its command; None for an unknown verb."""
        if cmd_name not in VERBS:
            return None
        module, attribute = VERBS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of verbs from the help lines in ``VERBS``."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, help_line) for verb, (_, help_line) in VERBS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="dsft")
@click.option("--local_rank", "--local-rank", "local_rank", type=int, hidden=True)
@click.pass_context
def cli(context: click.Context, local_rank: int | None) -> None:
    """Continued pretraining and supervised fine-tuning of large language models on DeepSpeed."""
    context.obj = {"local_rank": local_rank}


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    ``deepspeed --module dsft`` puts ``--local_rank=N`` before the verb; verbs find it in ``ctx.obj["local_rank"]``.
    A :class:`DsftError` becomes a message on stderr and its class's exit code; any other exception keeps its traceback.
    """
    try:
        result = cli.main(args=list(arguments), prog_name="dsft", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{speaker()}interrupted", err=True)
        return EXIT_INTERRUPTED
    except DsftError as error:
        click.echo(f"{speaker()}{error}", err=True)
        return error.exit_code
    return result if isinstance(result, int) else EXIT_OK


def speaker() -> str:
    """``"[host, rank 3] "`` on a rank other than 0, so that its error says whose it is; empty on rank 0 and alone."""
    for variable in _RANK_VARIABLES:
        if variable in os.environ:
            rank = os.environ[variable]
            return "" if rank == "0" else f"[{socket.gethostname()}, rank {rank}] "
    return ""


def main() -> NoReturn:
    """Entry point of the ``dsft`` script and of ``python -m dsft``."""
    sys.exit(run(sys.argv[1:]))
