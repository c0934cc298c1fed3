"""Log-likelihood of texts that are in no token store: each rank takes some packs, every rank gets all results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from dsft.errors import DataError
from dsft.evaluate.mode import evaluating
from dsft.evaluate.stopping import end_if_asked

if TYPE_CHECKING:
    from dsft.corpus.tokenizer import Tokenizer
    from dsft.dist import Groups
    from dsft.launch.stop import StopFlag
    from dsft.model.packed import PackedCausalLM

_FILLER_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Continuation:
    """A text of which the likelihood is asked, after a context that is only read (empty: nothing stands before)."""

    context: str
    text: str


@dataclass(frozen=True, slots=True)
class Scored:
    """Token ids; those from ``first`` on are scored (``first`` >= 1)."""

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """Equal on all ranks. float64[n]: nats; scored tokens; those of them to which the model gave the largest score."""

    log_likelihood: npt.NDArray[np.float64]
    num_tokens: npt.NDArray[np.float64]
    num_correct: npt.NDArray[np.float64]

    @property
    def per_token(self) -> npt.NDArray[np.float64]:
        """float64[n] nats a token."""
        return self.log_likelihood / np.maximum(self.num_tokens, 1)


def encode(one: Continuation, tokenizer: Tokenizer) -> Scored:
    """Ids of context and text, tokenised as one string; a token that holds characters of both belongs to the context.

    Before them stands what the tokenizer puts before a text, or the end-of-text token where it puts nothing: what
    stands before a document in pretraining.
    """
    encoding: Any = tokenizer.encode_batch_with_offsets([one.context + one.text])[0]
    before = tokenizer.prefix_ids or (tokenizer.eos_id,)
    inside = sum(start < len(one.context) for start, _ in encoding.offsets)
    return Scored((*before, *encoding.ids), len(before) + inside)


def log_likelihoods(
    model: PackedCausalLM,
    sequences: Sequence[Scored],
    groups: Groups,
    *,
    device: torch.device,
    pack_tokens: int,
    pad_id: int,
    what: str,
    stop: StopFlag | None = None,
) -> Likelihoods:
    """Measure every sequence; collective, with as many forwards on every rank.

    Args:
        pack_tokens: most tokens of one forward. what: for messages. stop: ends it between two forwards.

    Raises:
        DataError: a sequence is longer than ``pack_tokens``. StoppedEarly: a rank was asked to stop.
    """
    longest = max((len(one.ids) for one in sequences), default=0)
    if longest > pack_tokens:
        raise DataError(f"{what}: a text has {longest:,} tokens, more than data.pack_tokens ({pack_tokens:,}); cut it.")
    packs = _packs(sequences, pack_tokens)
    rank, num_ranks = groups.world.rank, groups.world.size
    totals = np.zeros((3, len(sequences)))
    with evaluating(model):
        for begin in range(0, len(packs), num_ranks):
            end_if_asked(stop, groups)
            numbers = packs[begin + rank] if begin + rank < len(packs) else []
            inputs, owner = _inputs([sequences[number] for number in numbers], pad_id)
            output = model(**{key: _to(value, device) for key, value in inputs.items()})
            owners = np.array(numbers, np.int64)[owner] if numbers else owner
            np.add.at(totals[0], owners, -output.row_nll.double().cpu().numpy())
            np.add.at(totals[1], owners, 1.0)
            np.add.at(totals[2], owners, output.row_correct.double().cpu().numpy())
    return Likelihoods(*groups.sum(totals.reshape(-1)).reshape(totals.shape))


def _packs(sequences: Sequence[Scored], pack_tokens: int) -> list[list[int]]:
    """Numbers of the sequences of each forward, in order."""
    packs: list[list[int]] = []
    room = 0
    for number, one in enumerate(sequences):
        if len(one.ids) > room:
            packs.append([])
            room = pack_tokens
        packs[-1].append(number)
        room -= len(one.ids)
    return packs


def _inputs(sequences: Sequence[Scored], pad_id: int) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """Arguments of the model for one row, and the position in ``sequences`` of each scored row."""
    ids: list[int] = []
    positions: list[int] = []
    borders, rows, targets, owner = [0], [], [], []
    for number, one in enumerate(sequences):
        for at in range(one.first, len(one.ids)):
            rows.append(len(ids) + at - 1)
            targets.append(one.ids[at])
            owner.append(number)
        ids.extend(one.ids)
        positions.extend(range(len(one.ids)))
        borders.append(len(ids))
    if not sequences:  # a rank without texts runs a short document that nothing is asked of
        ids, positions, borders = [pad_id] * _FILLER_TOKENS, list(range(_FILLER_TOKENS)), [0, _FILLER_TOKENS]
    inputs = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "cu_seqlens": torch.tensor(borders, dtype=torch.int32),
        "max_seqlen": max(np.diff(borders).tolist()),
        "rows": torch.tensor(rows, dtype=torch.int64),
        "targets": torch.tensor(targets, dtype=torch.int64),
        "row_weight": torch.ones(len(rows), dtype=torch.float32),
        "num_tokens": len(ids) if sequences else 0,
    }
    return inputs, np.array(owner, np.int64)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
