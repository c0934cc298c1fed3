"""Loss over a held-out token store: every document exactly once, packed, dealt over the ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from dsft.batch.collate import BatchSpec, collate, filler
from dsft.batch.types import PackedBatch, model_inputs
from dsft.errors import DataError
from dsft.evaluate.bootstrap import interval
from dsft.evaluate.mode import evaluating
from dsft.evaluate.stopping import end_if_asked
from dsft.sampling.plan import plan_once
from dsft.sampling.types import Pieces
from dsft.store.reader import SourceStore

if TYPE_CHECKING:
    from dsft.dist import Groups
    from dsft.launch.stop import StopFlag
    from dsft.model.packed import PackedCausalLM


@dataclass(frozen=True, slots=True)
class LossResult:
    """Loss of a held-out set, equal on all ranks.

    Attributes:
        loss: mean negative log-likelihood of a supervised token in nats, every token with the same weight (so that it
            does not change with a ``loss_weight``).
        perplexity: exp(loss); infinite where that is too large for a float.
        bits_per_byte: total negative log-likelihood in bits over the UTF-8 bytes of the supervised text, which does
            not depend on the tokenizer. A document's first token is never predicted and costs nothing, as everywhere
            in dsft; its bytes count.
        token_accuracy: share of the supervised tokens that are the model's first choice.
        loss_interval, bits_per_byte_interval, token_accuracy_interval: 95 %, by bootstrap over documents.
        num_tokens: supervised tokens; num_bytes: their UTF-8 bytes; num_documents: documents measured.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    token_accuracy: float
    loss_interval: tuple[float, float]
    bits_per_byte_interval: tuple[float, float]
    token_accuracy_interval: tuple[float, float]
    num_tokens: int
    num_bytes: int
    num_documents: int


@dataclass(frozen=True, slots=True)
class DocumentLosses:
    """What was measured of each document, equal on all ranks; columns in the store's order.

    Attributes:
        nll: float64, summed over its supervised tokens, in nats. num_tokens: how many. num_correct: first choices.
        num_bytes: of its supervised text.
    """

    nll: npt.NDArray[np.float64]
    num_tokens: npt.NDArray[np.float64]
    num_correct: npt.NDArray[np.float64]
    num_bytes: npt.NDArray[np.float64]


def measure_documents(
    model: PackedCausalLM,
    store: SourceStore,
    spec: BatchSpec,
    groups: Groups,
    *,
    device: torch.device,
    max_documents: int | None = None,
    stop: StopFlag | None = None,
) -> DocumentLosses:
    """Loss of every document; every rank calls it and makes the same number of forwards (ZeRO-3 gathers).

    The packs do not depend on the world size, so the result does not either, up to the order of an fp64 sum.

    Args:
        spec: how a batch is laid out; its only source is ``store``.
        max_documents: measure this many documents, spread evenly over the store; None: all.
        stop: ends the evaluation between two batches.

    Raises:
        DataError: the set has no supervised token. StoppedEarly: a rank was asked to stop.
    """
    chosen = choose_documents(store, max_documents)
    packs = _packs_of(store, chosen, spec.pack_tokens)
    rank, num_ranks = groups.world.rank, groups.world.size
    totals = np.zeros((3, sum(len(documents) for documents in chosen)))
    with evaluating(model):
        for first in range(0, len(packs), num_ranks):
            end_if_asked(stop, groups)
            mine = first + rank
            batch = collate([packs[mine]], spec) if mine < len(packs) else filler(spec)
            output = model(**model_inputs(batch, device))
            _add_rows(totals, batch, chosen, output.row_nll, output.row_correct)
    nll, num_tokens, num_correct = groups.sum(totals.reshape(-1)).reshape(totals.shape)
    if num_tokens.sum() == 0:
        raise DataError(
            f"held-out set {store.name!r} has no supervised token to measure; check its format and records."
        )
    num_bytes = [store.index(shard).num_bytes[documents] for shard, documents in enumerate(chosen)]
    return DocumentLosses(nll, num_tokens, num_correct, np.concatenate(num_bytes).astype(np.float64))


def summarise(documents: DocumentLosses, *, seed: int, purpose: str) -> LossResult:
    """Scores of the set, with intervals whose draws come from ``seed`` and ``purpose`` (the set's name)."""
    nll, num_tokens = math.fsum(documents.nll), math.fsum(documents.num_tokens)
    num_bytes = math.fsum(documents.num_bytes)
    loss = nll / num_tokens
    bits = documents.nll / math.log(2)
    return LossResult(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=nll / math.log(2) / max(num_bytes, 1),
        token_accuracy=math.fsum(documents.num_correct) / num_tokens,
        loss_interval=interval(documents.nll, documents.num_tokens, seed=seed, purpose=purpose),
        bits_per_byte_interval=interval(bits, documents.num_bytes, seed=seed, purpose=purpose),
        token_accuracy_interval=interval(documents.num_correct, documents.num_tokens, seed=seed, purpose=purpose),
        num_tokens=int(num_tokens),
        num_bytes=int(num_bytes),
        num_documents=len(documents.nll),
    )


def _add_rows(
    totals: npt.NDArray[np.float64],
    batch: PackedBatch,
    chosen: list[npt.NDArray[np.int64]],
    row_nll: torch.Tensor,
    row_correct: torch.Tensor,
) -> None:
    """Add the rows of a batch to their documents' columns: nll, tokens, first choices."""
    if batch.is_filler:
        return
    pieces = batch.pieces
    piece_of_row = np.searchsorted(np.cumsum(pieces.length), batch.rows.numpy(), side="right")
    before = np.concatenate([[0], np.cumsum([len(documents) for documents in chosen])])
    column_of_piece = np.array(
        [
            before[shard] + np.searchsorted(chosen[shard], document)
            for shard, document in zip(pieces.shard, pieces.document, strict=True)
        ],
        dtype=np.int64,
    )
    columns = column_of_piece[piece_of_row]
    np.add.at(totals[0], columns, row_nll.double().cpu().numpy())
    np.add.at(totals[1], columns, 1.0)
    np.add.at(totals[2], columns, row_correct.double().cpu().numpy())


def choose_documents(store: SourceStore, max_documents: int | None) -> list[npt.NDArray[np.int64]]:
    """Document numbers to measure, per shard: all, or ``max_documents`` spread evenly over the whole store."""
    counts = [len(store.index(shard).lengths) for shard in range(store.num_shards)]
    total = sum(counts)
    num_chosen = total if max_documents is None else min(max_documents, total)
    numbers = np.arange(num_chosen, dtype=np.int64) * total // max(num_chosen, 1)
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return [numbers[(numbers >= a) & (numbers < b)] - a for a, b in itertools.pairwise(starts)]


def _packs_of(store: SourceStore, chosen: list[npt.NDArray[np.int64]], pack_tokens: int) -> list[Pieces]:
    """Packs of the chosen documents, each document once."""
    lengths = [store.index(shard).lengths[documents] for shard, documents in enumerate(chosen)]
    return [_renumbered(pack, chosen) for pack in plan_once(lengths, pack_tokens)]


def _renumbered(pack: Pieces, chosen: list[npt.NDArray[np.int64]]) -> Pieces:
    """The plan numbers the chosen documents of a shard from 0; the store knows them by their own number."""
    document = np.array(
        [chosen[shard][number] for shard, number in zip(pack.shard, pack.document, strict=True)], dtype=np.int64
    )
    return replace(pack, document=document)
