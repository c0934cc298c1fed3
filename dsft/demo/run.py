"""The demonstration: corpus, tokenizer, training in three stages, export, answers, and a verdict."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dsft import fsio
from dsft.config.load import load_config
from dsft.demo.answers import Answered, Scores, answer_questions, score
from dsft.demo.bigram import bits_per_byte
from dsft.demo.corpus import make_corpus, read_records
from dsft.demo.crash import Crash, read_crash, run_until_killed
from dsft.demo.processes import PeakMemory, deepspeed_command, launch_environment, run_streaming
from dsft.demo.run_config import LOG_EVERY_STEPS, SAVE_EVERY_STEPS, TEXT_SET, write_run_config
from dsft.demo.summary import Summary, judge, read_measurements, show, to_json
from dsft.demo.tokenizer import VOCAB_TOKENS, make_tokenizer
from dsft.errors import TrainingError
from dsft.metrics.recorder import METRICS_NAME

if TYPE_CHECKING:
    from rich.console import Console

_NUM_RANKS = 2
_KILL_STEP = SAVE_EVERY_STEPS + 3 * LOG_EVERY_STEPS
_NUM_QUESTIONS = 120
_NUM_EXAMPLES = 3
_PAIRS_A_TEXT = 5


class Stopwatch:
    """Seconds of each part of the demonstration, and a line on the console when one begins."""

    def __init__(self, console: Console) -> None:
        self.seconds: dict[str, float] = {}
        self._console = console
        self._started = time.perf_counter()

    @contextmanager
    def part(self, name: str, line: str) -> Iterator[None]:
        """Time the block under ``name``."""
        self._console.print(f"[bold]{name}[/bold]: {line}", highlight=False)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def stop(self) -> dict[str, float]:
        """All seconds, with the total."""
        return {**self.seconds, "total": time.perf_counter() - self._started}


def run_demo(folder: Path, console: Console) -> Summary:
    """Run the demonstration in ``folder``; corpus and tokenizer that are there and unchanged are used again.

    The training run of an earlier demonstration in the same folder is removed.

    Raises:
        DsftError: any part failed; the message says which.
    """
    corpus, tokenizer, run_dir, exported = (folder / name for name in ("corpus", "tokenizer", "train", "model"))
    for old in (run_dir, exported):
        shutil.rmtree(old, ignore_errors=True)
    watch = Stopwatch(console)
    with PeakMemory() as memory:
        with watch.part("corpus", "raw text and questions from this Python's standard library"):
            folder.mkdir(parents=True, exist_ok=True)
            counts = make_corpus(corpus)["counts"]
            console.print("  " + ", ".join(f"{name} {count:,}" for name, count in counts.items()), highlight=False)
        with watch.part("tokenizer", f"SentencePiece, {VOCAB_TOKENS:,} pieces, from the training split"):
            _make_tokenizer(corpus, tokenizer)
        config = folder / "run.yaml"
        write_run_config(config, corpus=corpus, tokenizer=tokenizer, run_dir=run_dir)
        crash, device = _train(config, run_dir / METRICS_NAME, watch)
        with watch.part("bigram", "the baseline over the same tokens"):
            bigram = _bigram(folder / "store")
        with watch.part("export", f"dsft export {run_dir} {exported} --dtype fp32"):
            _export(run_dir, exported)
        with watch.part("answers", f"{_NUM_QUESTIONS} held-out questions, in plain transformers"):
            scores, examples = _answer(exported, corpus)
    measured = read_measurements(run_dir / METRICS_NAME)
    summary = Summary(
        corpus=counts,
        bigram_bits_per_byte=bigram,
        measured=measured,
        scores=scores,
        examples=examples,
        crash=crash,
        claims=judge(measured, bigram, scores, crash),
        seconds=watch.stop(),
        peak_bytes=memory.peak_bytes,
        device=device,
    )
    fsio.write_json(folder / "summary.json", to_json(summary))
    show(summary, console)
    return summary


def _make_tokenizer(corpus: Path, folder: Path) -> None:
    """Train on raw text and pairs in turn, so that the part that is used holds both."""
    texts = [record["text"] for record in read_records(corpus / "text" / "train")]
    pairs = [
        message["content"] for record in read_records(corpus / "pairs" / "train") for message in record["messages"]
    ]
    mixed = [
        text
        for number in range(len(texts))
        for text in (texts[number], *pairs[number * _PAIRS_A_TEXT : (number + 1) * _PAIRS_A_TEXT])
    ]
    make_tokenizer(mixed, folder, (corpus / "manifest.json").read_text())


def _train(config: Path, metrics: Path, watch: Stopwatch) -> tuple[Crash, str]:
    """The training run, killed in its last stage and resumed on fewer ranks; also returns the name of the device."""
    import torch

    load_config(config, ())  # a bad configuration is said here, not by two ranks
    num_gpus = torch.cuda.device_count()
    device = torch.cuda.get_device_name(0) if num_gpus else "cpu"
    num_ranks = min(_NUM_RANKS, num_gpus) if num_gpus else _NUM_RANKS
    command = deepspeed_command(["train", str(config)], num_ranks)
    with watch.part("training", _shown(command)):
        run_until_killed(command, launch_environment(num_gpus, 1), metrics, _KILL_STEP)
    command = deepspeed_command(["train", str(config), "--resume", "auto"], 1)
    with watch.part("after kill -9", _shown(command)):
        exit_code = run_streaming(command, launch_environment(num_gpus, _NUM_RANKS))
    if exit_code != 0:
        raise TrainingError(f"the training run ended with exit code {exit_code}; its output above says why.")
    return read_crash(metrics, num_ranks, 1), device


def _shown(command: Sequence[str]) -> str:
    """As a person would type it."""
    return shlex.join(["deepspeed", *(word for word in command[command.index("--num_gpus") :])])


def _bigram(store: Path) -> float:
    from dsft.store.reader import SourceStore

    stores = {opened.name: opened for opened in map(SourceStore, sorted(p for p in store.iterdir() if p.is_dir()))}
    return bits_per_byte(stores["library"], stores[TEXT_SET], VOCAB_TOKENS)


def _export(run_dir: Path, out: Path) -> None:
    from dsft.export.hugging_face import export_checkpoint
    from dsft.export.resolve import checkpoint_of

    export_checkpoint(checkpoint_of(run_dir), out, "fp32")


def _answer(model_folder: Path, corpus: Path) -> tuple[Scores, tuple[Answered, ...]]:
    """Scores, and one example of each kind of question."""
    answered = answer_questions(model_folder, read_records(corpus / "pairs" / "held_out")[:_NUM_QUESTIONS])
    first_of_kind = {item.kind: item for item in reversed(answered)}
    return score(answered), tuple(first_of_kind[kind] for kind in sorted(first_of_kind))[:_NUM_EXAMPLES]
