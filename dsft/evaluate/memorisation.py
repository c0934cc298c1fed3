"""Memorisation: the share of documents that the model continues word for word, given their beginning.

Greedy extraction with a prefix of the document itself (Carlini et al. 2023, arXiv 2202.07646, section 3). Measured on
training documents it says how much can be read out of the model; on documents that it never saw, how much of that is
only text that anyone would continue so (licences, formulas).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsft.config.evaluation import EvaluationSetSection
from dsft.errors import DataError
from dsft.evaluate.answers import ask, spread
from dsft.evaluate.bootstrap import interval
from dsft.store.reader import SourceStore

if TYPE_CHECKING:
    from dsft.corpus.tokenizer import Tokenizer
    from dsft.dist import Groups
    from dsft.launch.stop import StopFlag
    from dsft.model.packed import PackedCausalLM


@dataclass(frozen=True, slots=True)
class Memorisation:
    """What was reproduced, equal on all ranks.

    Attributes:
        memorised_share: of the documents probed; memorised_interval: 95 %, by bootstrap over them.
        num_probed: documents that are long enough, at most as many as were asked for.
    """

    memorised_share: float
    memorised_interval: tuple[float, float]
    num_probed: int


def measure_memorisation(
    model: PackedCausalLM,
    store: SourceStore,
    tokenizer: Tokenizer,
    groups: Groups,
    section: EvaluationSetSection,
    *,
    seed: int,
    stop: StopFlag | None = None,
) -> Memorisation:
    """Continue the beginnings of documents spread evenly over the store; collective.

    Raises:
        DataError: no document is long enough. StoppedEarly: a rank was asked to stop.
    """
    probe = section.memorisation
    assert probe is not None
    beginnings = choose_beginnings(store, probe.documents, probe.prefix_tokens + probe.continue_tokens)
    generated = ask(
        model,
        [ids[: probe.prefix_tokens] for ids in beginnings],
        groups,
        max_new_tokens=probe.continue_tokens,
        eos_ids=[tokenizer.eos_id],
        pad_id=tokenizer.pad_id,
        stop=stop,
    )
    same = [
        float(list(ids[probe.prefix_tokens :]) == answer) for ids, answer in zip(beginnings, generated, strict=True)
    ]
    found = interval(same, None, seed=seed, purpose=f"{section.name}/memorisation")
    return Memorisation(sum(same) / len(same), found, len(same))


def choose_beginnings(store: SourceStore, num_documents: int, num_tokens: int) -> list[tuple[int, ...]]:
    """The first ``num_tokens`` tokens of at most ``num_documents`` documents, spread evenly over those that are longer.

    Raises:
        DataError: there is none.
    """
    candidates = [
        (shard, int(document))
        for shard in range(store.num_shards)
        for document in np.flatnonzero(store.index(shard).lengths >= num_tokens)
    ]
    if not candidates:
        raise DataError(
            f"held-out set {store.name!r}: no document has {num_tokens} tokens, so memorisation cannot be probed; "
            "lower prefix_tokens or continue_tokens."
        )
    beginnings = []
    for shard, document in spread(candidates, num_documents):
        first = int(store.index(shard).token_offsets[document])
        beginnings.append(tuple(store.tokens(shard)[first : first + num_tokens].tolist()))
    return beginnings
