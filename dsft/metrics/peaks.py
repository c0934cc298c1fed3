"""Peak arithmetic of known devices, for the share of it that training uses (MFU)."""

from __future__ import annotations

BF16_PEAK_FLOPS: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
"""Part of the device's name -> dense bf16 FLOP/s with fp32 accumulation, from the vendor's data sheets."""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak of a device; None where it is not known (also for fp32, whose peak depends on the TF32 setting)."""
    if dtype != "bf16":
        return None
    matching = [name for name in BF16_PEAK_FLOPS if name in device_name]
    return BF16_PEAK_FLOPS[max(matching, key=len)] if matching else None
