"""A table of the peak speeds of accelerators, with sources. Queries no device."""

from __future__ import annotations

import re

# Dense bf16 matrix products with fp32 accumulation, TFLOP/s, without sparsity. The first match counts.
# Sources: NVIDIA's data sheets of each product (halved if a sheet only states figures with sparsity)
# and white papers (Ampere GA102, Ada); AMD's product pages.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bB200\b", 2250.0),  # HGX B200: 36 PFLOP/s with sparsity over 8
    (r"\bGH200\b", 989.0),
    (r"\bH200 NVL\b", 835.5),  # 1671 with sparsity
    (r"\bH200\b", 989.0),  # 1979 with sparsity
    (r"\bH100 NVL\b", 835.5),  # 1671 with sparsity
    (r"\bH100 PCIe\b", 756.0),  # 1513 with sparsity
    (r"\bH100\b", 989.0),  # SXM: 1979 with sparsity
    (r"\bH800 PCIe\b", 756.0),
    (r"\bH800\b", 989.0),
    (r"\bH20\b", 148.0),
    (r"\bA100\b", 312.0),  # SXM and PCIe
    (r"\bA800\b", 312.0),
    (r"\bA30\b", 165.0),
    (r"\bA40\b", 149.7),
    (r"\bA10G\b", 70.0),  # AWS's variant of the A10
    (r"\bA10\b", 125.0),
    (r"\bL40S\b", 362.0),
    (r"\bL40\b", 181.0),
    (r"\bL4\b", 121.0),  # 242 with sparsity
    (r"\bRTX A6000\b", 154.8),
    (r"\bRTX 4090$", 165.2),  # Ada white paper, fp32 accumulation
    (r"\bRTX 3090$", 71.0),  # GA102 white paper, fp32 accumulation
    (r"\bMI300X\b", 1307.4),
    (r"\bMI250X\b", 383.0),  # both dies
)
# A MIG slice has no data sheet; laptop GPUs differ by maker.
_WITHOUT_PEAK = re.compile(r"\bMIG\b|\bLaptop\b", re.IGNORECASE)


def peak_flops(device_name: str) -> float | None:
    """Returns the peak of dense bf16 products in FLOP/s, or None if it isn't known (CPUs, unknown names).

    `device_name` is what `torch.cuda.get_device_name` returns. Without a peak no MFU is reported, because a wrong one
    would be worse than none.
    """
    if _WITHOUT_PEAK.search(device_name):
        return None
    name = re.sub(r"[-_/]", " ", device_name).strip()
    for pattern, teraflops in _PEAKS:
        if re.search(pattern, name, re.IGNORECASE):
            return teraflops * 1e12
    return None
