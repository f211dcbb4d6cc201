"""A table of GPUs by common name: memory, its bandwidth, links and networks, with sources. Doesn't query devices.

Sizes come from the makers' data sheets, in decimal GB, and are a few percent below what `torch.cuda` reports. Link
bandwidths count one direction, half of what data sheets state. Peaks of matrix products are in `hardware`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ijepa_scale.errors import ConfigError
from ijepa_scale.nearest import nearest
from ijepa_scale.planning.hardware import peak_flops
from ijepa_scale.plurals import counted

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Device:
    """One kind of GPU. Bandwidths are bytes per second in one direction."""

    name: str  # as on the command line
    title: str  # roughly what `torch.cuda.get_device_name` returns
    memory_bytes: float
    memory_bandwidth: float  # bytes per second, both directions together
    link_bandwidth: float  # to the other GPUs of a node
    network_bandwidth: float  # between nodes, per GPU, in typical nodes

    @property
    def has_fp8(self) -> bool:
        """Whether it has the fp8 products that the target uses: NVIDIA's since compute capability 8.9."""
        return self.name in _FP8

    @property
    def peak_flops(self) -> float:
        """The peak of dense bf16 products with fp32 accumulation, FLOP/s."""
        peak = peak_flops(self.title)
        assert peak is not None, f"{self.title} has no peak in hardware.py"
        return peak


@dataclass(frozen=True)
class Cluster:
    """A number of GPUs of one kind, in nodes of equal size."""

    device: Device
    num_gpus: int
    gpus_per_node: int = GPUS_PER_NODE
    network_bandwidth: float = None  # type: ignore[assignment]  # bytes/s per GPU and direction; None: the device's

    def __post_init__(self) -> None:
        problems = []
        if self.network_bandwidth is None:
            object.__setattr__(self, "network_bandwidth", self.device.network_bandwidth)
        for name, value in (("--gpus", self.num_gpus), ("--gpus-per-node", self.gpus_per_node)):
            if value < 1:
                problems.append(f"{name} is {counted(value, 'GPU')}; give at least 1")
        if not self.network_bandwidth > 0:
            problems.append(f"--network is {self.network_bandwidth / 1e9:g} GB/s; give a number above 0, such as 50")
        if not problems and self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            whole = self.num_gpus // self.gpus_per_node * self.gpus_per_node
            problems.append(
                f"{counted(self.num_gpus, 'GPU')} don't fill nodes of {self.gpus_per_node}; take {whole} or "
                f"{whole + self.gpus_per_node}, or give --gpus-per-node"
            )
        if problems:
            raise ConfigError(*problems)

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return max(1, self.num_gpus // self.gpus_per_node)

    @property
    def local_gpus(self) -> int:
        """The number of GPUs used in each node."""
        return min(self.num_gpus, self.gpus_per_node)


# One network adapter per GPU. 400 Gb/s: NVIDIA's data sheets of DGX H100, DGX H200 and DGX B200 (8 ConnectX-7 each),
# and Microsoft's page of ND MI300X v5. 200 Gb/s: NVIDIA's data sheet of DGX A100 (8 ConnectX-6 for computing). Nodes
# with other GPUs differ; their PCIe 4.0 x16 can feed an adapter of 200 Gb/s at most.
_400_GBIT, _200_GBIT = 50.0, 25.0
_G5 = 1.6  # AWS's instance page of G5: 100 Gb/s for all 8 GPUs

# name, title, memory in GB, its bandwidth in GB/s, link and network bandwidth in GB/s and one direction. GPUs without
# NVLink to all others in the node use PCIe: 32 GB/s for 4.0 x16, 64 GB/s for 5.0 x16 (PCI-SIG); bridges between pairs
# aren't counted.
_GIGABYTES: tuple[tuple[str, str, float, float, float, float], ...] = (
    ("a100-40gb", "NVIDIA A100-SXM4-40GB", 40, 1555, 300, _200_GBIT),  # NVIDIA A100 data sheet: NVLink 600 both ways
    ("a100-80gb", "NVIDIA A100-SXM4-80GB", 80, 2039, 300, _200_GBIT),  # the same
    ("a100-40gb-pcie", "NVIDIA A100-PCIE-40GB", 40, 1555, 32, _200_GBIT),  # the same, PCIe 4.0
    ("a100-80gb-pcie", "NVIDIA A100 80GB PCIe", 80, 1935, 32, _200_GBIT),  # the same
    ("a800-80gb", "NVIDIA A800-SXM4-80GB", 80, 2039, 200, _200_GBIT),  # NVIDIA A800 data sheet: NVLink 400 GB/s
    ("h100", "NVIDIA H100 80GB HBM3", 80, 3350, 450, _400_GBIT),  # NVIDIA H100 data sheet, SXM: NVLink 900 GB/s
    ("h100-pcie", "NVIDIA H100 PCIe", 80, 2000, 64, _400_GBIT),  # NVIDIA H100 PCIe product brief, PCIe 5.0
    ("h100-nvl", "NVIDIA H100 NVL", 94, 3900, 64, _400_GBIT),  # NVIDIA H100 data sheet, NVL
    ("h800", "NVIDIA H800", 80, 3350, 200, _400_GBIT),  # NVIDIA H800 data sheet, SXM: NVLink 400 GB/s
    ("h20", "NVIDIA H20", 96, 4000, 450, _400_GBIT),  # NVIDIA H20 data sheet: NVLink 900 GB/s
    ("h200", "NVIDIA H200", 141, 4800, 450, _400_GBIT),  # NVIDIA H200 data sheet, SXM
    ("h200-nvl", "NVIDIA H200 NVL", 141, 4800, 64, _400_GBIT),  # the same, NVL; its bridges join 2 or 4
    ("b200", "NVIDIA B200", 180, 8000, 900, _400_GBIT),  # NVIDIA DGX B200 data sheet: 1440 GB over 8, NVLink 1.8 TB/s
    ("a30", "NVIDIA A30", 24, 933, 32, _200_GBIT),  # NVIDIA A30 data sheet
    ("a40", "NVIDIA A40", 48, 696, 32, _200_GBIT),  # NVIDIA A40 data sheet
    ("a10", "NVIDIA A10", 24, 600, 32, _200_GBIT),  # NVIDIA A10 data sheet
    ("a10g", "NVIDIA A10G", 24, 600, 32, _G5),  # AWS's instance page of G5
    ("l4", "NVIDIA L4", 24, 300, 32, _200_GBIT),  # NVIDIA L4 data sheet
    ("l40", "NVIDIA L40", 48, 864, 32, _200_GBIT),  # NVIDIA L40 data sheet
    ("l40s", "NVIDIA L40S", 48, 864, 32, _200_GBIT),  # NVIDIA L40S data sheet
    ("rtx-a6000", "NVIDIA RTX A6000", 48, 768, 32, _200_GBIT),  # NVIDIA RTX A6000 data sheet
    ("rtx-4090", "NVIDIA GeForce RTX 4090", 24, 1008, 32, _200_GBIT),  # Ada white paper
    ("rtx-3090", "NVIDIA GeForce RTX 3090", 24, 936, 32, _200_GBIT),  # GA102 white paper
    ("mi300x", "AMD Instinct MI300X", 192, 5300, 448, _400_GBIT),  # AMD MI300X data sheet: 7 links of 128 both ways
)
# Compute capability 8.9 and more, NVIDIA's list "CUDA GPU Compute Capability"
_FP8 = {"l4", "l40", "l40s", "rtx-4090", "h100", "h100-pcie", "h100-nvl", "h800", "h20", "h200", "h200-nvl", "b200"}
_OTHER_NAMES = {"a100": "a100-80gb", "a100-pcie": "a100-80gb-pcie", "a800": "a800-80gb", "a6000": "rtx-a6000"}
_FORMS = re.compile(r"-(sxm\d?|hbm\d?e?|nvidia|amd|instinct|geforce)(?=-|$)")


def devices() -> dict[str, Device]:
    """Returns the known GPUs by name."""
    return {name: Device(name, title, *(1e9 * each for each in figures)) for name, title, *figures in _GIGABYTES}


def device_with_title(title: str) -> Device | None:
    """Returns the known GPU that `torch.cuda.get_device_name` calls `title`; None if there is none."""
    return next((device for device in devices().values() if device.title == title), None)


def find_device(name: str) -> Device:
    """Returns the GPU called `name`; ignores case, spaces, `nvidia`, `sxm` and a correct memory size.

    Raises:
        ConfigError: the name is unknown; the message suggests the nearest one.
    """
    known = devices()
    key = re.sub(r"[\s_/-]+", "-", name.strip().lower())
    key = re.sub(r"(?<=\d)(-gb|g)\b", "gb", key)
    key = re.sub(r"\brtx(?=\w)", "rtx-", key)
    key = _FORMS.sub("", f"-{key}").strip("-")
    parts = key.split("-")
    if (size := next((part for part in parts if re.fullmatch(r"\d+gb", part)), None)) and key not in known:
        rest = "-".join(part for part in parts if part != size)
        swapped = [rest, *(f"{first}-{size}-{second}" for first, _, second in (rest.partition("-"),))]
        for alternative in swapped:
            found = known.get(_OTHER_NAMES.get(alternative, alternative))
            if found is not None and found.memory_bytes == int(size[:-2]) * 1e9:
                return found
    key = _OTHER_NAMES.get(key, key)
    if key not in known:
        near = nearest(key, list(known))
        hint = f"did you mean {near}? " if near else ""
        raise ConfigError(f"--gpus names {name!r}, which isn't known; {hint}choose one of {', '.join(known)}")
    return known[key]


def parse_gpus(text: str) -> tuple[int, Device]:
    """Parses `8x a100-80gb`, `16 x H100-PCIe`, `4 rtx-4090`, `h100x8` or `h200` (one GPU) into a number and a kind.

    Raises:
        ConfigError: the name or the number is missing or zero, or the name is unknown.
    """
    name_first = re.fullmatch(r"\s*([a-z].*?)(?<!rt)\s*[x×*]\s*(\d+)\s*", text, re.IGNORECASE)  # rtx4090 is a name
    text = f"{name_first[2]}x {name_first[1]}" if name_first else text
    match = re.fullmatch(r"\s*(?:([-+]?\d+)\s*(?:[x×*]\s*|\s))?\s*(\S.*?)\s*", text, re.IGNORECASE)
    if match is None or re.fullmatch(r"[-+\d\sx×*]+", match[2], re.IGNORECASE):
        raise ConfigError(f"--gpus is {text.strip()!r}; give a number and a name, such as 8x a100-80gb")
    count = int(match[1] or 1)
    if count < 1:
        raise ConfigError(f"--gpus is {text.strip()!r}, a number of {count}; give at least 1 GPU")
    return count, find_device(match[2])
