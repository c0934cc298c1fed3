"""ZeRO-3 with wildly uneven numbers of supervised rows: gradients of the whole model, and the same collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dsft.dist import Groups
from dsft.launch.native_ops import needed_ops, prepare_deepspeed_ops
from dsft.model.parameters import freeze, parameter_groups
from tests.support.models import CONFIGS, VOCAB, random_row
from tests.support.ranks import run_ranks
from tests.support.zero3 import ZERO3, load

CHUNK_ROWS = 3
"""So that a rank with all its rows runs through 6 chunks, and one with none through none."""
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_reduce", "all_reduce_coalesced")
COLLECTIVES += ("reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast", "barrier")
VARIANTS = [
    # model, activation checkpointing, frozen
    ("llama", False, ()),
    ("llama-tied", True, ()),
    ("llama", True, ("lm_head.*",)),
]
SHARES = {  # of one micro-batch, by rank
    2: [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1.0, 1.0)],
    3: [(1.0, 0.0, 0.1), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)],
}


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """(name, elements of its largest tensor) of each collective that DeepSpeed starts, in order."""
    from deepspeed.comm import comm

    seen: list[tuple[str, int]] = []

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            seen.append((name, max((tensor.numel() for tensor in tensors), default=0)))
            return function(*args, **kwargs)

        return call

    names = [name for name in COLLECTIVES if hasattr(comm.cdb, name)]
    originals = {name: getattr(comm.cdb, name) for name in names}
    for name, function in originals.items():
        setattr(comm.cdb, name, counted(name, function))
    try:
        yield seen
    finally:
        for name in names:
            delattr(comm.cdb, name)  # the class's own comes to light again


def compare(groups: Groups) -> list[list[list[tuple[str, int]]]]:
    """The collectives of every variant and step; the gradients are checked here."""
    prepare_deepspeed_ops(needed_ops("cpu", cpu_adam=False), "cpu")
    return [train(groups, *variant) for variant in VARIANTS]


def train(groups: Groups, name: str, checkpointing: bool, frozen: tuple[str, ...]) -> list[list[tuple[str, int]]]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    config = {"model_type": name, **CONFIGS[name]}
    whole, sliced = (
        load(partitioned, config=config, activation_checkpointing=checkpointing) for partitioned in (False, True)
    )
    for model in (whole, sliced):
        freeze(model, frozen)
        model.head().logits_bytes = 4 * VOCAB * CHUNK_ROWS
    optimizer = torch.optim.SGD(parameter_groups(sliced, 0.0), lr=0.0)  # every step sees the same weights
    engine, *_ = deepspeed.initialize(
        model=sliced, optimizer=optimizer, config={**ZERO3, "gradient_accumulation_steps": 2}
    )
    steps = []
    by_step = [SHARES[groups.size][:2], SHARES[groups.size][:2], SHARES[groups.size][2:], SHARES[groups.size][3:] * 2]
    for number, micro_batches in enumerate(by_step):
        rows = [
            [
                random_row((8, 12), supervised=share, seed=100 * number + 10 * micro + rank)
                for rank, share in enumerate(s)
            ]
            for micro, s in enumerate(micro_batches)
        ]
        with collectives() as seen:
            for micro_batch in rows:
                engine.set_gradient_accumulation_boundary(micro_batch is rows[-1])
                loss = engine(**micro_batch[groups.rank].inputs()).loss
                engine.backward(loss * groups.size, scale_wrt_gas=False)  # ZeRO takes the mean over ranks
        whole.zero_grad()
        for row in [row for micro_batch in rows for row in micro_batch]:
            whole(**row.inputs()).loss.backward()
        for (key, one), other in zip(whole.named_parameters(), engine.module.parameters(), strict=True):
            if one.requires_grad:
                gradient = safe_get_full_grad(other)
                error = (gradient - one.grad).norm()
                assert error <= 1e-5 * one.grad.norm() + 1e-6, f"{name}, step {number}: {key}: {error}"
        engine.step()
        steps.append(seen)
    return steps


@pytest.mark.launch
@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_rows_gives_the_whole_models_gradients_with_the_same_collectives(num_ranks: int) -> None:
    ranks = run_ranks(compare, num_ranks, timeout_seconds=360)
    assert all(rank == ranks[0] for rank in ranks)
    for steps in ranks[0]:
        gathers = [[event for event in step if event[0].startswith("all_gather")] for step in steps]
        assert len(gathers[0]) > 0
        # Once the order of the layers is known, the rows make no difference: few, none or all of them.
        assert gathers[1] == gathers[2] == gathers[3]
