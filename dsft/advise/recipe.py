"""The run that follows from a recommendation: token budgets, replay, learning rates, schedule, held-out sets.

Every number below is a starting point with its reason beside it, not the result of a search on the user's data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft.advise.evidence import Method, Sensitivity
from dsft.advise.rules import ENOUGH_PAIRS, MIN_UPDATES, SMALLEST_BATCH_TOKENS, TEXT_PASSES
from dsft.advise.split import SplitSource

PRETRAINING_LR = (
    (100e6, 1e-3), (300e6, 6e-4), (1.2e9, 3e-4), (2e9, 2e-4), (4e9, 1.6e-4), (math.inf, 1.2e-4),
)  # fmt: skip
"""Parameters up to which -> the largest learning rate of pretraining (Pythia, arXiv 2304.01373, table 1)."""
TEXT_LR_SHARE, TEXT_LR_SHARE_WITHOUT_REPLAY = 0.5, 0.25
"""The learning rate is warmed up again; the higher, the more is learned and the more forgotten (Ibrahim et al. 2024,
arXiv 2403.08763). Half of the pretraining's with replay against forgetting, a quarter without. Chosen."""
PAIRS_LR_SHARE = 0.1
"""1.2e-5 for a 7B model, where LIMA took 1e-5 and Alpaca 2e-5."""
WEAK_SHIFT, STRONG_SHIFT, STRONG_SHIFT_RATIO = 0.05, 0.25, 1.25
"""Replay: 5 % of the tokens where the text is near to what the model knows, 25 % where it is far (Ibrahim et al. 2024:
two English corpora against English and German). That far begins at 1.25 times the bits per byte is chosen."""
PAIR_PASSES, FEW_PAIR_PASSES = 3, 5
"""Alpaca took 3 passes over 52,000 pairs, LIMA 15 over 1,000 with early stopping."""
PAIRS_SHARE = 0.6
"""Of the second stage's tokens; the rest is text and replay, so that neither is forgotten. Chosen."""
LARGE_TEXT_TOKENS = 100_000_000
"""From here one pass. Chosen: what is large is expensive, and repetition is learned by heart."""
MOST_BATCH_TOKENS = 1_000_000
_PROBE_TOKENS = 64
"""Beginning and continuation by which memorisation is probed."""
_UPDATES = 2 * MIN_UPDATES


@dataclass(frozen=True, slots=True)
class Part:
    """A split source and its training part's size.

    Attributes:
        tokens: of the training part. p95_tokens: 95 % of the documents are not longer.
    """

    split: SplitSource
    tokens: int
    p95_tokens: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What the recipe is made from.

    Attributes:
        model: as the user named it. num_parameters, max_positions: of it.
        chat: keys of ``data`` and ``model`` for a model without a chat template.
        surprise: bits per byte of the text over those of general text, None where it is not known.
        deepspeed: the run's DeepSpeed section. num_ranks: a batch has at least a pack a rank.
        folder: where the run writes.
    """

    model: str
    num_parameters: int
    max_positions: int
    dtype: str
    chat_template: str | None
    add_tokens: tuple[str, ...]
    text: Part | None
    pairs: Part | None
    general: Part | None
    surprise: float | None
    sensitivity: Sensitivity
    folder: Path
    deepspeed: str | dict[str, Any]
    num_ranks: int = 1


def learning_rate(method: Method, facts: Facts) -> float:
    """Peak learning rate, two significant digits."""
    full = next(rate for parameters, rate in PRETRAINING_LR if facts.num_parameters <= parameters)
    text = TEXT_LR_SHARE_WITHOUT_REPLAY if facts.general is None else TEXT_LR_SHARE
    return float(f"{full * (PAIRS_LR_SHARE if method == 'supervised' else text):.2g}")


def replay_share(facts: Facts) -> float:
    """Share of the tokens that is general text; 0 without any."""
    if facts.general is None:
        return 0.0
    strong = facts.surprise is not None and facts.surprise >= STRONG_SHIFT_RATIO
    return STRONG_SHIFT if strong else WEAK_SHIFT


def stages(method: Method, facts: Facts, scale: float = 1.0) -> list[dict[str, Any]]:
    """Stages with their ends in tokens and their weights; one stage for one method.

    Args:
        scale: share of the tokens that the budget allows.
    """
    replay = replay_share(facts)
    general = {} if facts.general is None else {"general": replay}
    passes = 1 if facts.sensitivity == "medium" else TEXT_PASSES
    text_tokens = 0.0
    if facts.text is not None:
        text_tokens = scale * facts.text.tokens * (1 if facts.text.tokens >= LARGE_TEXT_TOKENS else passes)
    pair_tokens = 0.0
    if facts.pairs is not None:
        few = facts.pairs.split.train_documents < ENOUGH_PAIRS
        pair_tokens = scale * facts.pairs.tokens * (FEW_PAIR_PASSES if few else PAIR_PASSES)
    if method == "unsupervised":
        return [_stage("text", text_tokens / (1 - replay), {"text": 1 - replay, **general})]
    if method == "supervised":
        return [_stage("pairs", pair_tokens / (1 - replay), {"pairs": 1 - replay, **general})]
    second = pair_tokens / PAIRS_SHARE
    text_in_second = (1 - PAIRS_SHARE) * (1 - replay)
    first = max(0.0, text_tokens - second * text_in_second) / (1 - replay)
    mixed = {"text": text_in_second, "pairs": PAIRS_SHARE}
    if general:
        mixed["general"] = (1 - PAIRS_SHARE) * replay
    if first < second / 10:  # hardly any text would be left for a stage of its own
        return [_stage("mixed", first + second, mixed)]
    return [
        _stage("text", first, {"text": 1 - replay, **general}),
        _stage("mixed", first + second, mixed),
    ]


def run_config(method: Method, facts: Facts, scale: float = 1.0) -> dict[str, Any]:
    """The YAML's content. ``method`` is not "none"."""
    chosen = stages(method, facts, scale)
    tokens = chosen[-1]["until_tokens"]
    used = [part for part in (facts.text, facts.pairs, facts.general) if part and _name(part) in chosen[-1]["weights"]]
    pack_tokens = _pack_tokens(used, facts.max_positions)
    packs = max(facts.num_ranks, round(min(tokens / _UPDATES, MOST_BATCH_TOKENS) / pack_tokens), 1)
    steps = max(1, tokens // (packs * pack_tokens))
    data: dict[str, Any] = {"pack_tokens": pack_tokens, "bad_records": "skip"}
    if facts.chat_template is not None:
        data["chat_template"] = facts.chat_template
    data["store_dir"] = str(facts.folder / "store")
    data["sources"] = [_source(part, chosen) for part in used]
    if len(chosen) > 1:
        data["stages"] = chosen
    model: dict[str, Any] = {"path": facts.model, "dtype": facts.dtype}
    if facts.add_tokens:
        model["add_tokens"] = list(facts.add_tokens)
    return {
        "run": {"name": f"advised-{method}", "dir": str(facts.folder / "run")},
        "model": model,
        "data": data,
        "train": {
            "tokens": tokens,
            "global_batch_packs": packs,
            "lr": learning_rate(method, facts),
            "weight_decay": 0.0 if method == "supervised" else 0.1,
            "schedule": _schedule(chosen),
        },
        "deepspeed": facts.deepspeed,
        "checkpoint": {"every_steps": max(1, steps // 5), "keep_last": 3},
        "evaluate": _evaluate(method, facts, steps),
    }


def _stage(name: str, until: float, weights: dict[str, float]) -> dict[str, Any]:
    rounded = {source: round(weight, 4) for source, weight in weights.items()}
    return {"name": name, "until_tokens": max(SMALLEST_BATCH_TOKENS, round(until)), "weights": rounded}


def _source(part: Part, chosen: list[dict[str, Any]]) -> dict[str, Any]:
    section = part.split.section
    source: dict[str, Any] = {"name": section.name, "path": section.path, "format": section.format}
    if section.text_field != "text":
        source["text_field"] = section.text_field
    if len(chosen) == 1:
        source["weight"] = chosen[0]["weights"][section.name]
    return source


def _schedule(chosen: list[dict[str, Any]]) -> dict[str, Any]:
    """Warm up over 2 % of the tokens; then a cosine, or constant until the second stage and down in it."""
    tokens = chosen[-1]["until_tokens"]
    if len(chosen) == 1:
        return {"kind": "cosine", "warmup_tokens": tokens // 50, "min_lr_ratio": 0.1}
    decay = tokens - chosen[0]["until_tokens"]
    return {
        "kind": "warmup_stable_decay", "warmup_tokens": min(tokens // 50, tokens - decay), "decay_tokens": decay,
        "min_lr_ratio": 0.1,
    }  # fmt: skip


def _evaluate(method: Method, facts: Facts, steps: int) -> dict[str, Any]:
    sets: list[dict[str, Any]] = []
    linked = {"text": method != "supervised", "pairs": method != "unsupervised", "general": False}
    for part in (facts.text, facts.pairs, facts.general):
        if part is None:
            continue
        section = part.split.section
        name = section.name
        one: dict[str, Any] = {"name": f"held-out-{name}", "path": str(part.split.held_out), "format": section.format}
        if section.text_field != "text":
            one["text_field"] = section.text_field
        if linked[name]:
            one["source"] = name
        if name == "pairs":
            one |= {"generate": 64, "max_new_tokens": min(128, facts.max_positions // 8)}
        if name == "general":
            one["max_rise"] = 0.1  # nats a token: perplexity times 1.11
        sets.append(one)
    is_probed = facts.text is not None and facts.text.p95_tokens >= 2 * _PROBE_TOKENS
    if is_probed and facts.text is not None and method != "supervised" and facts.sensitivity != "low":
        path = facts.text.split.section.path
        probe = {
            "documents": 100,
            "prefix_tokens": _PROBE_TOKENS // 2,
            "continue_tokens": _PROBE_TOKENS // 2,
            "max_share": 0.01,
        }
        by_heart = {"name": "learned-by-heart", "path": path, "max_documents": 100, "memorisation": probe}
        sets.append(by_heart)
    return {
        "at_start": True,
        "every_steps": max(1, steps // 5),
        "early_stop": {"patience": 2},
        "sets": sets,
        "bias": [{"name": "occupations", "kind": "templates", "max_rise": 0.1}],
    }


def _pack_tokens(used: list[Part], max_positions: int) -> int:
    """A power of two that holds 95 % of the documents, from 256 to 8,192, and within the model's positions."""
    longest = max(part.p95_tokens for part in used)
    wanted = min(max(256, 1 << max(longest - 1, 1).bit_length()), 8192)
    return min(wanted, 1 << (max_positions.bit_length() - 1))


def _name(part: Part) -> str:
    return part.split.section.name
