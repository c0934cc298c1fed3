"""Peak arithmetic of known devices, for the share of it that training uses (MFU)."""

from __future__ import annotations

import re

BF16_PEAK_FLOPS: dict[str, float] = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
"""Words in the device's name -> dense bf16 FLOP/s with fp32 accumulation, from the vendor's data sheets (which often
print the number with sparsity, twice as much). The first that fits counts."""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak of a device; None where it is not known (also for fp32, whose peak depends on the TF32 setting).

    Names are compared word by word, so that an "A1000" is not taken for an "A10", nor a laptop's part for the card's.
    """
    if dtype != "bf16" or re.search(r"\b(Laptop|Max-Q)\b", device_name):
        return None
    for words, peak in BF16_PEAK_FLOPS.items():
        if all(re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", device_name) for word in words.split()):
            return peak
    return None
