from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsft.sampling.mixture import DrawnDocuments, Mixture
from dsft.sampling.order import SourceOrder
from dsft.sampling.types import PlannedSource, SourcePosition

START = SourcePosition(epoch=0, group=0, ordinal=0, tokens_drawn=0)


def make_orders(max_lengths: list[int], num_documents: int = 50) -> list[SourceOrder]:
    rng = np.random.default_rng(7)
    orders = []
    for number, longest in enumerate(max_lengths):
        shards = [rng.integers(1, longest + 1, num_documents).astype(np.int32) for _ in range(3)]
        source = PlannedSource(f"s{number}", 3, lambda shard, shards=shards: shards[shard])
        orders.append(SourceOrder(source, seed=1, group_shards=2, pack_tokens=10**6, overlong="split"))
    return orders


def draw(max_lengths: list[int], weights: list[float], num_documents: int) -> DrawnDocuments:
    mixture = Mixture(make_orders(max_lengths), [START] * len(weights))
    return some(mixture.draw(weights, [0] * len(weights), num_documents, 10**12, 10**12))


def some(drawn: DrawnDocuments | None) -> DrawnDocuments:
    assert drawn is not None
    return drawn


def one_by_one(max_lengths: list[int], weights: list[float], num_documents: int) -> list[tuple[int, int, int, int]]:
    """The rule of the module's docstring, document by document."""
    orders = make_orders(max_lengths)
    positions = [(0, 0, 0)] * len(weights)
    tokens = [0] * len(weights)
    drawn = []
    for _ in range(num_documents):
        active = [s for s, weight in enumerate(weights) if weight > 0]
        source = min(active, key=lambda s: (tokens[s] / weights[s], s))
        chunk = orders[source].read(*positions[source])
        positions[source] = (chunk.epoch, chunk.group, int(chunk.ordinal[0]) + 1)
        tokens[source] += int(chunk.planned[0])
        drawn.append((source, chunk.epoch, int(chunk.shard[0]), int(chunk.document[0])))
    return drawn


@pytest.mark.parametrize("weights", [[0.8, 0.15, 0.05], [1.0, 1.0, 1.0], [3.0, 0.0, 1e-3]])
def test_blocks_equal_drawing_one_by_one(weights: list[float]) -> None:
    found = draw([40, 7, 300], weights, 2000)
    columns = (found.source, found.epoch, found.shard, found.document)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == one_by_one([40, 7, 300], weights, 2000)


@settings(max_examples=60, deadline=None)
@given(
    max_lengths=st.lists(st.integers(1, 500), min_size=1, max_size=5),
    weights=st.lists(st.floats(0.001, 1.0), min_size=5, max_size=5),
)
def test_the_error_is_never_more_than_a_document_per_source(max_lengths: list[int], weights: list[float]) -> None:
    weights = weights[: len(max_lengths)]
    shares = np.array(weights) / sum(weights)
    found = draw(max_lengths, weights, 1000)
    tokens = np.zeros((len(found.source), len(weights)))
    tokens[np.arange(len(found.source)), found.source] = found.planned
    drawn = tokens.cumsum(axis=0)
    error = drawn - drawn.sum(axis=1, keepdims=True) * shares
    longest = np.array(max_lengths)
    assert (error <= longest + 1e-6).all()
    assert (-error <= shares * longest.sum() + 1e-6).all()


def test_draws_in_parts_equal_one_draw() -> None:
    weights = [0.5, 0.3, 0.2]
    whole = draw([40, 7, 300], weights, 500)
    positions: tuple[SourcePosition, ...] = (START,) * 3
    tokens = [0, 0, 0]
    parts = []
    for size in (1, 2, 97, 300, 100):
        mixture = Mixture(make_orders([40, 7, 300]), positions)  # a fresh one from the positions, as a resume makes
        part = mixture.draw(weights, tokens, size, 10**12, 10**12)
        parts.append(part)
        positions = mixture.positions
        for source in range(3):
            tokens[source] += int(part.planned[part.source == source].sum())
    assert [position.tokens_drawn for position in positions] == tokens
    for name in ("source", "epoch", "shard", "document", "length"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


def test_a_draw_ends_with_the_document_that_reaches_the_tokens() -> None:
    weights = [0.5, 0.5]
    for limit in (1, 2, 50, 333, 1000):
        mixture = Mixture(make_orders([40, 7]), [START] * 2)
        found = mixture.draw(weights, [0, 0], 10**9, limit, 10**12)
        assert found.num_tokens >= limit
        assert found.num_tokens - int(found.planned[-1]) < limit


def test_a_source_without_weight_is_not_read() -> None:
    def lengths(shard: int) -> np.ndarray:
        raise AssertionError("read")

    orders = make_orders([10])
    silent = SourceOrder(PlannedSource("x", 3, lengths), seed=1, group_shards=1, pack_tokens=10, overlong="split")
    found = Mixture([orders[0], silent], [START] * 2).draw([1.0, 0.0], [0, 0], 400, 10**9, 10**12)
    assert set(found.source.tolist()) == {0}
    assert found.epoch.max() == 2


def windows_one_by_one(weights: list[float], sizes: list[int], epoch_tokens: int) -> list[list[tuple[int, ...]]]:
    """Windows of at most ``sizes`` documents, document by document. Of sources that are equally far behind, one that is
    at its epoch's end ends the window, or begins its next epoch where the window has too little."""
    orders = make_orders([40, 7, 300])
    positions, tokens = [(0, 0, 0)] * len(weights), [0] * len(weights)
    windows = []
    for size in sizes:
        window: list[tuple[int, ...]] = []
        drawn = 0
        last_epoch = [position[0] for position in positions]
        while len(window) < size:
            tags = [tokens[s] / weights[s] for s in range(len(weights))]
            chunks = [orders[s].read(*positions[s]) for s in range(len(weights))]
            is_next = [tag == min(tags) for tag in tags]
            ended = [s for s, follows in enumerate(is_next) if follows and chunks[s].epoch > last_epoch[s]]
            if ended and drawn >= epoch_tokens:
                break
            if ended:
                last_epoch[ended[0]] += 1
                continue
            source = is_next.index(True)
            chunk = chunks[source]
            positions[source] = (chunk.epoch, chunk.group, int(chunk.ordinal[0]) + 1)
            tokens[source] += int(chunk.planned[0])
            drawn += int(chunk.planned[0])
            window.append((source, chunk.epoch, int(chunk.shard[0]), int(chunk.document[0])))
        windows.append(window)
    return windows


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.5, 0.1, 1.0, 0.25]), min_size=1, max_size=3),
    sizes=st.lists(st.sampled_from([1, 60, 300, 500]), min_size=2, max_size=4),
    epoch_tokens=st.sampled_from([1, 500, 3000, 10**9]),
    continued=st.booleans(),
)
@example(weights=[0.5, 0.5], sizes=[300, 60], epoch_tokens=1, continued=False)  # a tie at an epoch's end
def test_windows_end_with_an_epoch(weights: list[float], sizes: list[int], epoch_tokens: int, continued: bool) -> None:
    """Where it ends does not depend on the chunks read ahead: the same from a fresh mixture, as a resume makes it."""
    mixture = Mixture(make_orders([40, 7, 300])[: len(weights)], [START] * len(weights))
    tokens = [0] * len(weights)
    found = []
    for size in sizes:
        if not continued:
            mixture = Mixture(make_orders([40, 7, 300])[: len(weights)], mixture.positions)
        window = some(mixture.draw(weights, tokens, size, 10**12, epoch_tokens))
        for source in range(len(weights)):
            tokens[source] += int(window.planned[window.source == source].sum())
        columns = (window.source, window.epoch, window.shard, window.document)
        found.append(list(zip(*(column.tolist() for column in columns), strict=True)))
    assert found == windows_one_by_one(weights, sizes, epoch_tokens)
    assert all(found)


def test_passes_over_one_source_do_not_share_a_window() -> None:
    mixture = Mixture(make_orders([40]), [START])
    tokens = 0
    for epoch in range(4):
        window = mixture.draw([1.0], [tokens], 10**6, 10**12, 1000)
        assert len(set(zip(window.shard.tolist(), window.document.tolist(), strict=True))) == 150
        assert set(window.epoch.tolist()) == {epoch}
        tokens += window.num_tokens
