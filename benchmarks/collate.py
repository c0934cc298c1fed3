"""One packed row out of documents: ``pack_sequences`` against the flattening collators of transformers and TRL.

64k tokens in documents of lognormal lengths around 700, each a prompt without loss and an answer. Every side starts
from what it takes: ``pack_sequences`` from one int32 buffer with borders and supervised spans, as they lie in a token
store; the collators from a list of examples, each with its ids and labels (``transformers`` and ``trl``: Python lists,
as ``datasets`` gives them; ``transformers_arrays``: numpy arrays). All make input ids, position ids and document
borders; the collators make a label for every position, ``pack_sequences`` the list of supervised rows with target and
document, and padding to the row's end. That they are the same is checked before anything is timed.

All sides run in each round, in another order each time; each round gives one ratio. ``speedup`` is the median ratio to
the fastest of transformers' and TRL's collators in that round (TRL where it is installed) and ``interval`` the lowest
and highest tenth of the ratios. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithFlattening

from dsft.ops import backend
from dsft.ops.pack import pack_sequences
from dsft.ops.reference import PackedRow

MEAN_TOKENS, SIGMA, VOCAB, PAD_ID = 700, 1.0, 50_000, 0
ROUNDS, FULL_ROUNDS = 40, 400
SIZES_TOKENS, FULL_SIZES_TOKENS = (65_536,), (65_536, 8192, 524_288)


def documents(num_tokens: int) -> list[dict[str, Any]]:
    """Examples of ``num_tokens`` tokens in all: int64 arrays ``input_ids`` and ``labels`` (-100 in the prompt)."""
    generator, left, examples = np.random.default_rng(0), num_tokens, []
    while left:
        length = min(left, max(2, int(generator.lognormal(np.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA))))
        length = left if left - length < 2 else length
        ids = generator.integers(1, VOCAB, length)
        labels = np.where(np.arange(length) < generator.integers(1, length), -100, ids)
        examples.append({"input_ids": ids, "labels": labels})
        left -= length
    return examples


def stored(examples: list[dict[str, Any]], row_tokens: int) -> tuple[Any, ...]:
    """The same documents as the token store has them: arguments of ``pack_sequences``."""
    lengths = [len(example["input_ids"]) for example in examples]
    prompts = [int((example["labels"] == -100).sum()) for example in examples]
    return (
        torch.from_numpy(np.concatenate([example["input_ids"] for example in examples]).astype(np.int32)),
        torch.tensor(np.cumsum([0, *lengths])),
        torch.zeros(len(examples), dtype=torch.bool),
        torch.tensor(list(zip(prompts, lengths, strict=True)), dtype=torch.int32),
        torch.arange(len(examples) + 1),
        row_tokens,
        PAD_ID,
    )


def check(packed: PackedRow, batch: dict[str, Any]) -> None:
    """Both hold the same row. A collator's label stands at the token's own place, a target at the place before."""
    input_ids, position_ids, borders, rows, targets, _ = packed
    assert torch.equal(batch["input_ids"][0], input_ids)
    assert torch.equal(batch["position_ids"][0], position_ids)
    assert batch["cu_seq_lens_q"].tolist() == borders[:-1].tolist()
    labels = torch.full_like(input_ids, -100)
    labels[rows + 1] = targets
    assert torch.equal(batch["labels"][0], labels)


def peers(examples: list[dict[str, Any]]) -> dict[str, Callable[[], Any]]:
    """The collators that can be run here, each over its examples."""
    as_lists = [{name: column.tolist() for name, column in example.items()} for example in examples]
    flattening = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    found: dict[str, Callable[[], Any]] = {
        "transformers": lambda: flattening(as_lists),
        "transformers_arrays": lambda: flattening(examples),
    }
    if importlib.util.find_spec("trl") is not None:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        trls = DataCollatorForLanguageModeling(pad_token_id=PAD_ID, padding_free=True)
        found["trl"] = lambda: trls(as_lists)
    return found


def seconds(call: Callable[[], object], repetitions: int) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    for _ in range(repetitions):
        call()
    return (time.perf_counter() - start) / repetitions


def measure(num_tokens: int, num_rounds: int) -> dict[str, Any]:
    """Figures of one size."""
    examples = documents(num_tokens)
    arguments = stored(examples, num_tokens)
    calls: dict[str, Callable[[], Any]] = {"ours": lambda: pack_sequences(*arguments), **peers(examples)}
    for name in list(calls)[1:]:
        check(calls["ours"](), calls[name]())
    rounds: list[dict[str, float]] = []
    for number in range(num_rounds + 1):
        order = list(calls) if number % 2 else list(calls)[::-1]
        rounds.append({name: seconds(calls[name], 20 if name == "ours" else 1) for name in order})
    del rounds[0]
    ratios = sorted(min(times[name] for name in times if name != "ours") / times["ours"] for times in rounds)
    tenth = len(ratios) // 10
    return {
        "speedup": round(statistics.median(ratios), 1),
        "interval": [round(ratios[tenth], 1), round(ratios[-1 - tenth], 1)],
        "milliseconds": {name: round(statistics.median(times[name] for times in rounds) * 1e3, 3) for name in calls},
        "documents": len(examples),
        "supervised_rows": len(calls["ours"]()[3]),
    }


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="more rounds and other row lengths")
    full = parser.parse_args().full
    backend.choose("native")
    found = {}
    for num_tokens in FULL_SIZES_TOKENS if full else SIZES_TOKENS:
        found[num_tokens] = measure(num_tokens, FULL_ROUNDS if full else ROUNDS)
        print(num_tokens, "tokens:", *(f"{name} {ms} ms" for name, ms in found[num_tokens]["milliseconds"].items()))
    result: dict[str, Any] = {"benchmark": "collate", "tokens": SIZES_TOKENS[0], **found.pop(SIZES_TOKENS[0])}
    print(json.dumps({**result, **({"other_tokens": found} if found else {})}))


if __name__ == "__main__":
    main()
