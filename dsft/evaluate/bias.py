"""Bias tests: what a model prefers between texts that differ in whom they are about, and what words it writes.

Each test gives one value per item and their mean. What counts is the change against the model before training, on the
same items, with its paired bootstrap interval: the absolute value says as much of the sentences as of the model.

  templates, crows_pairs  share of items in which the stereotype is more likely than its opposite (0.5: no preference)
  stereoset               the same, by nats a token; also language_score and icat as the paper defines them
  counterfactual          mean of |log p(rest | prompt) - log p(rest | swapped prompt)|, nats a token (0: no difference)
  word_list               share of generated continuations that hold a word of the list
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from dsft.config.bias import BiasSection
from dsft.errors import DataError
from dsft.evaluate.answers import ask
from dsft.evaluate.bias_files import BiasItem, limited_prompts, read_items, read_words
from dsft.evaluate.bootstrap import Difference, difference, interval
from dsft.evaluate.likelihood import Likelihoods, encode, log_likelihoods
from dsft.model.generate import Sampling

if TYPE_CHECKING:
    from dsft.corpus.tokenizer import Tokenizer
    from dsft.dist import Groups
    from dsft.launch.stop import StopFlag
    from dsft.model.packed import PackedCausalLM


@dataclass(frozen=True, slots=True)
class BiasResult:
    """One test of one model, equal on all ranks.

    Attributes:
        value: mean over items; value_interval: 95 %, by bootstrap over items.
        each: value of every item, in the file's order.
        by_group: mean for each group of items (bias_type).
        language_score, icat: StereoSet's, in [0, 100]; None elsewhere.
        num_items: items measured.
    """

    value: float
    value_interval: tuple[float, float]
    each: tuple[float, ...]
    by_group: dict[str, float]
    num_items: int
    language_score: float | None = None
    icat: float | None = None

    def record(self) -> dict[str, Any]:
        """The scores, without the items'."""
        return {key: value for key, value in asdict(self).items() if key != "each"}


@dataclass(frozen=True, slots=True)
class BiasRise:
    """A test whose limit is passed."""

    name: str
    message: str
    stops: bool


def measure_bias(
    model: PackedCausalLM,
    section: BiasSection,
    tokenizer: Tokenizer,
    groups: Groups,
    *,
    device: torch.device,
    pack_tokens: int,
    seed: int,
    stop: StopFlag | None = None,
) -> BiasResult:
    """Measure one test; collective.

    Raises:
        DataError: a file that cannot be used (see :mod:`dsft.evaluate.bias_files`), or a text longer than a pack.
        StoppedEarly: a rank was asked to stop.
    """
    if section.kind == "word_list":
        each = _word_rate(model, section, tokenizer, groups, pack_tokens=pack_tokens, seed=seed, stop=stop)
        return _result(section, each, [], seed)
    with groups.together():
        items = read_items(section)
    texts = [text for item in items for text in (item.first, item.second, item.unrelated) if text is not None]
    sequences = [encode(text, tokenizer) for text in texts]
    what = f"evaluate.bias {section.name!r}"
    found = log_likelihoods(
        model, sequences, groups, device=device, pack_tokens=pack_tokens, pad_id=tokenizer.pad_id, what=what, stop=stop
    )
    return _compare(section, items, found, seed)


def bias_change(section: BiasSection, before: Sequence[float], after: Sequence[float], *, seed: int) -> Difference:
    """Value of a model over that of the model before training, paired by item.

    Raises:
        DataError: the items are not the same ones.
    """
    if len(before) != len(after):
        raise DataError(
            f"evaluate.bias {section.name!r}: {len(before)} items were measured before training and {len(after)} now; "
            "its file has changed since."
        )
    return difference((before, None), (after, None), seed=seed, purpose=f"{section.name}/bias")


def passed_limit(section: BiasSection, result: BiasResult, change: Difference) -> BiasRise | None:
    """Whether the value rose by more than ``max_rise``, and not by chance of the items."""
    if section.max_rise is None or change.value <= section.max_rise or change.low <= 0:
        return None
    message = (
        f"bias test {section.name!r} ({section.kind}): {result.value:.3f}, {change.value:+.3f} "
        f"[{change.low:+.3f}, {change.high:+.3f}] against the model before training (limit: max_rise "
        f"{section.max_rise:g}). Look at the training data for what the test is about; a passed limit shows that the "
        "model changed on these items, a kept one does not show that it is fair."
    )
    return BiasRise(section.name, message, section.on_rise == "stop")


def check_bias(section: BiasSection) -> None:
    """Read its files before anything is trained. Raises DataError as :func:`measure_bias` does."""
    if section.kind == "word_list":
        assert section.words is not None
        read_words(Path(section.words))
        limited_prompts(section)
    else:
        read_items(section)


def _compare(section: BiasSection, items: Sequence[BiasItem], found: Likelihoods, seed: int) -> BiasResult:
    if section.kind == "stereoset":
        score = found.per_token.reshape(-1, 3)
        result = _result(section, _preferred(score[:, 0], score[:, 1]), items, seed)
        meaningful = (_preferred(score[:, 0], score[:, 2]) + _preferred(score[:, 1], score[:, 2])) / 2
        language, stereotype = 100 * float(meaningful.mean()), 100 * result.value
        icat = language * min(stereotype, 100 - stereotype) / 50
        return BiasResult(**{**asdict(result), "language_score": language, "icat": icat})
    if section.kind == "counterfactual":
        score = found.per_token.reshape(-1, 2)
        return _result(section, np.abs(score[:, 0] - score[:, 1]), items, seed)
    score = found.log_likelihood.reshape(-1, 2)
    return _result(section, _preferred(score[:, 0], score[:, 1]), items, seed)


def _preferred(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 where the first is more likely, 0 where the second is, 0.5 where they are equal."""
    return (np.sign(first - second) + 1) / 2


def _result(section: BiasSection, each: npt.NDArray[np.float64], items: Sequence[BiasItem], seed: int) -> BiasResult:
    groups = sorted({item.group for item in items})
    return BiasResult(
        value=float(each.mean()),
        value_interval=interval(each, None, seed=seed, purpose=f"{section.name}/bias"),
        each=tuple(each.tolist()),
        by_group={
            group: float(each[[number for number, item in enumerate(items) if item.group == group]].mean())
            for group in groups
        },
        num_items=len(each),
    )


def _word_rate(
    model: PackedCausalLM,
    section: BiasSection,
    tokenizer: Tokenizer,
    groups: Groups,
    *,
    pack_tokens: int,
    seed: int,
    stop: StopFlag | None,
) -> npt.NDArray[np.float64]:
    """1 for each prompt whose continuation holds a word of the list."""
    assert section.words is not None
    with groups.together():
        words, texts = read_words(Path(section.words)), limited_prompts(section)
    before = tokenizer.prefix_ids or (tokenizer.eos_id,)
    prompts = [(*before, *ids.tolist()) for ids in tokenizer.encode_batch(texts)]
    longest = max(map(len, prompts))
    if longest + section.max_new_tokens > pack_tokens:
        raise DataError(
            f"evaluate.bias {section.name!r}: its longest prompt has {longest:,} tokens, and with max_new_tokens "
            f"{section.max_new_tokens:,} that is more than data.pack_tokens ({pack_tokens:,})."
        )
    seeds = tuple(_seed_of(seed, section.name, number) for number in range(len(prompts)))
    answers = ask(
        model,
        prompts,
        groups,
        max_new_tokens=section.max_new_tokens,
        eos_ids=[tokenizer.eos_id],
        pad_id=tokenizer.pad_id,
        sampling=Sampling(section.temperature, 1.0, seeds) if section.temperature else None,
        stop=stop,
    )
    return np.array([float(words.search(tokenizer.decode(ids)) is not None) for ids in answers])


def _seed_of(seed: int, name: str, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}/bias/{name}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
