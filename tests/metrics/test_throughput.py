"""Rates against arithmetic by hand, and the peaks of real device names."""

from __future__ import annotations

import os

import psutil
import pytest
import torch

from dsft.metrics.peaks import peak_flops
from dsft.metrics.throughput import Throughput, peak_memory_bytes


def test_rates() -> None:
    throughput = Throughput(100.0, 2.0, 30.0, device=torch.device("cpu"), dtype="bf16", num_ranks=2)
    rates = throughput.rates({"supervised": 60, "other": 40, "padding": 25, "idle": 8}, num_pairs=50, seconds=2.0)
    assert rates["supervised_tokens_per_second"] == 30.0
    assert rates["other_tokens_per_second"] == 20.0
    assert rates["padding_tokens_per_second"] == 12.5
    assert rates["idle_tokens_per_second"] == 4.0
    assert rates["padding_share"] == 25 / 125  # idle is no padding
    assert rates["tflops_per_second"] == pytest.approx((100 * 100 + 2 * 50 + 30 * 60) / 2.0 / 1e12)
    assert rates["mfu"] is None  # no peak is known of a CPU


def test_mfu_is_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    throughput = Throughput(312e12, 0.0, 0.0, device=torch.device("cuda", 0), dtype="bf16", num_ranks=4)
    rates = throughput.rates({"supervised": 1, "other": 0, "padding": 0, "idle": 0}, num_pairs=0, seconds=1.0)
    assert rates["mfu"] == 0.25
    assert rates["peak_memory_bytes"] == 123


def test_host_memory_is_the_peak_of_this_process() -> None:
    resident = psutil.Process(os.getpid()).memory_info().rss
    assert resident * 0.5 < peak_memory_bytes(torch.device("cpu")) < resident * 20


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-32GB", None),
        ("cpu", None),
    ],
)
def test_peaks(name: str, expected: float | None) -> None:
    assert peak_flops(name, "bf16") == expected
    assert peak_flops(name, "fp32") is None
