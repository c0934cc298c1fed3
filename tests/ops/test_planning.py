"""The native parts of the plan against their references in dsft/sampling, on every output."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.ops import backend, planning
from dsft.sampling.mixture import merge_by_tag_reference
from dsft.sampling.order import SourceOrder
from dsft.sampling.packing import (
    PackingMethod,
    best_fit_decreasing_reference,
    concat_and_split_reference,
    next_fit_reference,
)
from dsft.sampling.permutation import Permutation
from dsft.sampling.plan import Planner
from dsft.sampling.types import PlannedSource, Stage

KEYS = st.integers(0, 2**64 - 1)


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    backend.choose("native")
    yield
    backend.choose("native")


def assert_same(found: object, expected: object) -> None:
    """Equal arrays (or tuples of them), dtypes included."""
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    elif isinstance(expected, tuple):
        assert isinstance(found, tuple)
        for left, right in zip(found, expected, strict=True):
            assert_same(left, right)
    else:
        assert found == expected


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 5000), key=KEYS)
def test_permutation(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    positions = np.arange(size, dtype=np.int64)
    image = planning.permute(size, permutation.base, permutation.round_keys, positions)
    assert_same(image, permutation.permute_reference(positions))
    assert np.array_equal(np.sort(image), positions)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), key=KEYS)
def test_permutation_of_huge_domains(data: st.DataObject, key: int) -> None:
    size = data.draw(st.one_of(st.integers(1, 2**62 - 1), st.integers(2**62 - 9, 2**62 - 1), st.integers(1, 99)))
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=50)), dtype=np.int64)
    permutation = Permutation(size, key)
    assert_same(permutation(positions), permutation.permute_reference(positions))


def test_permutation_of_strided_positions() -> None:
    permutation = Permutation(1000, 3)
    for positions in (np.arange(1000)[::7], np.zeros(0, dtype=np.int64)):
        assert_same(permutation(positions), permutation.permute_reference(positions))


@settings(max_examples=200, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(0, 30), max_size=60), min_size=1, max_size=6).filter(any),
    pack_tokens=st.integers(1, 30),
    overlong=st.sampled_from(["split", "truncate", "drop"]),
    data=st.data(),
)
def test_reading_documents(shards: list[list[int]], pack_tokens: int, overlong: str, data: st.DataObject) -> None:
    columns = [np.array(shard, dtype=np.int32) for shard in shards]
    source = PlannedSource("s", len(columns), columns.__getitem__)
    order = SourceOrder(source, seed=1, group_shards=3, pack_tokens=pack_tokens, overlong=overlong)  # type: ignore[arg-type]
    group = order._load(data.draw(st.integers(0, 3)), data.draw(st.integers(0, (len(shards) - 1) // 3)))
    if not len(group.lengths):
        return
    begin = data.draw(st.integers(0, len(group.lengths) - 1))
    end = data.draw(st.integers(begin + 1, len(group.lengths)))
    assert_same(
        group.read(begin, end, pack_tokens, overlong),  # type: ignore[arg-type]
        group.read_reference(begin, end, pack_tokens, overlong),  # type: ignore[arg-type]
    )


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=80).map(lambda x: np.array(x, dtype=np.int32))


@settings(max_examples=300, deadline=None)
@given(
    planned=st.lists(LENGTHS, min_size=1, max_size=5),
    data=st.data(),
    max_documents=st.integers(1, 200),
    max_tokens=st.integers(1, 4000),
)
def test_merging(
    planned: list[npt.NDArray[np.int32]], data: st.DataObject, max_documents: int, max_tokens: int
) -> None:
    count = len(planned)
    weight = st.one_of(st.sampled_from([0.25, 0.5, 1.0]), st.floats(1e-3, 1e3))  # the former make equal tags
    weights = data.draw(st.lists(weight, min_size=count, max_size=count))
    before = st.one_of(st.integers(0, 20), st.integers(2**53 - 9, 2**53 + 99))  # above 2^53 tags of neighbours collide
    drawn = data.draw(st.lists(before, min_size=count, max_size=count))
    assert_same(
        planning.merge_by_tag(planned, drawn, weights, max_documents, max_tokens),
        merge_by_tag_reference(planned, drawn, weights, max_documents, max_tokens),
    )


@settings(max_examples=300, deadline=None)
@given(data=st.data(), pack_tokens=st.one_of(st.integers(1, 300), st.sampled_from([4095, 4096, 4097, 300_000])))
def test_best_fit_decreasing(data: st.DataObject, pack_tokens: int) -> None:
    length = st.one_of(st.integers(1, pack_tokens), st.integers(max(1, pack_tokens - 3), pack_tokens))
    lengths = np.array(data.draw(st.lists(length, max_size=200)), dtype=np.int32)
    expected = best_fit_decreasing_reference(lengths, pack_tokens)
    assert_same(planning.best_fit_decreasing(lengths, pack_tokens), (expected.pieces, expected.offsets))


@pytest.mark.parametrize(("lengths", "pack_tokens"), [([4, 4], 7), ([4, 4], 8), ([1, 1], 1), ([3, 3, 2, 2, 2], 6)])
def test_equal_pieces_fill_a_pack_and_no_more(lengths: list[int], pack_tokens: int) -> None:
    column = np.array(lengths, dtype=np.int32)
    expected = best_fit_decreasing_reference(column, pack_tokens)
    assert_same(planning.best_fit_decreasing(column, pack_tokens), (expected.pieces, expected.offsets))


@pytest.mark.parametrize("pack_tokens", [2048, 8192, 65_536])
def test_best_fit_decreasing_of_a_whole_window(pack_tokens: int) -> None:
    rng = np.random.default_rng(pack_tokens)
    lengths = np.clip(rng.lognormal(6, 1, 30_000), 1, pack_tokens).astype(np.int32)
    expected = best_fit_decreasing_reference(lengths, pack_tokens)
    assert_same(planning.best_fit_decreasing(lengths, pack_tokens), (expected.pieces, expected.offsets))


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 200), max_size=120), pack_tokens=st.integers(1, 250))
def test_packings_in_order(lengths: list[int], pack_tokens: int) -> None:
    column = np.array(lengths, dtype=np.int32)
    assert_same(planning.concat_and_split(column, pack_tokens), concat_and_split_reference(column, pack_tokens))
    fitting = np.minimum(column, pack_tokens)
    assert_same(planning.next_fit(fitting, pack_tokens), next_fit_reference(fitting, pack_tokens))


@pytest.mark.parametrize("lengths", [[3, 0, 2], [3, 9, 2], [-1]])
@pytest.mark.parametrize("pack", [planning.best_fit_decreasing, planning.next_fit])
def test_lengths_that_cannot_be_are_named(lengths: list[int], pack: Callable[[object, int], object]) -> None:
    with pytest.raises(AssertionError, match=r"piece \d has (0|9|-1) tokens, not 1 to 8"):
        pack(np.array(lengths, dtype=np.int32), 8)


def test_a_document_without_tokens_cannot_be_concatenated() -> None:
    with pytest.raises(AssertionError, match="document 1 has no token"):
        planning.concat_and_split(np.array([3, 0, 2], dtype=np.int32), 8)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_sources=st.integers(1, 3),
    pack_tokens=st.integers(3, 50),
    overlong=st.sampled_from(["split", "truncate", "drop"]),
    window_documents=st.integers(5, 200),
    packing=st.sampled_from(["best_fit_decreasing", "next_fit", "concat_and_split"]),
)
def test_the_whole_plan(
    seed: int, num_sources: int, pack_tokens: int, overlong: str, window_documents: int, packing: PackingMethod
) -> None:
    rng = np.random.default_rng(seed)
    shards = [[rng.integers(0, 60, 40).astype(np.int32) for _ in range(4)] for _ in range(num_sources)]
    for of_source in shards:
        of_source[0][0] = 1  # a document that any policy keeps
    weights = tuple(rng.uniform(0.1, 1, num_sources).tolist())
    results = []
    for kernels in ("reference", "native"):
        backend.choose(kernels)  # type: ignore[arg-type]
        planner = Planner(
            [PlannedSource(f"s{i}", 4, column.__getitem__) for i, column in enumerate(shards)],
            [Stage("a", 900, weights), Stage("b", None, weights[::-1])],
            seed=seed,
            pack_tokens=pack_tokens,
            global_batch_packs=7,
            window_documents=window_documents,
            window_tokens=2000,
            group_shards=2,
            overlong=overlong,  # type: ignore[arg-type]
            train_tokens=3000,
            packing=packing,
        )
        steps = [(step.plan_hash, step.cursor_after, step.num_tokens) for step in planner.steps(planner.start())]
        results.append((steps, planner.stats()))
    assert results[0] == results[1]


def test_the_order_of_this_version_is_what_it_was() -> None:
    """Hashes of a plan of order version 2: a change must raise ORDER_VERSION."""
    lengths = [np.array([(7 * i * i + shard) % 97 + 1 for i in range(300)], dtype=np.int32) for shard in range(5)]
    sources = [PlannedSource("a", 5, lengths.__getitem__), PlannedSource("b", 3, lengths.__getitem__)]
    planner = Planner(
        sources,
        [Stage("one", 20_000, (0.7, 0.3)), Stage("two", None, (0.2, 0.8))],
        seed=17,
        pack_tokens=64,
        global_batch_packs=100,
        window_documents=500,
        window_tokens=10_000,
        group_shards=2,
        overlong="split",
        train_tokens=60_000,
    )
    steps = list(planner.steps(planner.start()))
    assert [step.plan_hash for step in steps[:3]] == EXPECTED_HASHES
    assert sum(step.num_tokens for step in steps) == steps[-1].tokens_trained


EXPECTED_HASHES = [6378197166030032666, 8006329623912182646, 195739615515710313]
