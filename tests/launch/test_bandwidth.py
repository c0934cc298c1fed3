"""The tournament of pairs, and who is named as slow."""

from __future__ import annotations

from itertools import combinations

import pytest

from dsft.launch.bandwidth import judge_bandwidth, rounds


@pytest.mark.parametrize("num_hosts", [2, 3, 4, 7, 8])
def test_each_pair_meets_once_and_no_host_is_twice_in_a_round(num_hosts: int) -> None:
    plan = rounds(num_hosts)
    assert len(plan) == num_hosts - 1 + num_hosts % 2
    for pairs in plan:
        together = [host for pair in pairs for host in pair]
        assert len(together) == len(set(together))
    assert sorted(pair for pairs in plan for pair in pairs) == list(combinations(range(num_hosts), 2))


def test_a_slow_pair_is_named_and_the_host_that_all_slow_pairs_share() -> None:
    speeds = [[0.0, 1e9, 1e8], [1e9, 0.0, 2e8], [1e8, 2e8, 0.0]]
    (finding,) = judge_bandwidth({"all_reduce": 1e8, "all_gather": 1e8, "pairs": speeds}, ["a", "b", "c"])
    assert finding.level == "failure"
    assert "slow: a and c 100 MB/s, b and c 200 MB/s" in finding.text
    assert "the network of c" in finding.fix
    fast = [[5e8] * 3] * 3
    assert judge_bandwidth({"all_reduce": 1.0, "all_gather": 1.0, "pairs": fast}, ["a", "b", "c"])[0].level == "ok"
