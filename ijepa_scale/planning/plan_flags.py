"""The flags of `launch/plan.py`, and what they ask for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ijepa_scale import terminal
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.schema import PretrainConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.planning.devices import GPUS_PER_NODE, Cluster, Device, parse_gpus
from ijepa_scale.planning.reading import read_planned
from ijepa_scale.planning.sweep import NETWORKS, Assumptions, parse_measured, parse_sweep

SWEPT = "h100"  # the GPU of a sweep that names none


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to plan."""

    config: PretrainConfig | FinetuneConfig
    device: Device
    num_gpus: int
    gpus_per_node: int
    network: float | None  # bytes/s per GPU and direction between nodes; None: the device's
    nodes: list[int] | None  # to sweep over; None: one plan
    assumptions: Assumptions

    @property
    def cluster(self) -> Cluster:
        """The GPUs of a single plan."""
        network = self.device.network_bandwidth if self.network is None else self.network
        return Cluster(self.device, self.num_gpus, self.gpus_per_node, network)


def add_flags(parser: terminal.Parser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    config_help = "YAML file of this package or in the published layout"
    add("--config", "--fname", type=terminal.path, required=True, help=config_help)
    gpus = f"number and kind of GPUs, such as 8x a100-80gb; with --sweep those of a node (default 8x {SWEPT})"
    add("--gpus", nargs="+", help=gpus)
    add("--gpus-per-node", type=int, help=f"(default {GPUS_PER_NODE})")
    network = "GB/s per GPU and direction between nodes (default: usual for the GPU, e.g. 25 for A100, 50 for H100)"
    add("--network", type=float, help=network)
    add("--mfu", type=float, help="share of the peak FLOP/s (default: estimated)")
    add("--images", type=int, help="number of training images (default: ImageNet-1k's or -22k's)")
    add("--json", action="store_true", help="print the plan as JSON")
    add("--sweep", metavar="nodes=1..128", help="simulate numbers of nodes, doubled or listed (nodes=1,2,6)")
    add("--to", type=terminal.path, metavar="FILE.png", help="with --sweep: picture of the efficiency")
    measured = "with --sweep: a step on one GPU without others, as images:milliseconds; several are joined by lines"
    add("--measured", nargs="+", metavar="IMAGES:MS", help=measured)
    add("--overlap", type=float, help="with --sweep: share of the hideable communication that is hidden (default 1)")
    parser.add_plugins()
    add("overrides", nargs="*", help="dotted settings, e.g. engine.accumulation=4")


def request_of(flags: argparse.Namespace) -> Request:
    """Returns what the flags ask for.

    Raises:
        ConfigError: they don't fit together, or the configuration is wrong.
        SystemExit: the GPUs are missing.
    """
    words = [*(flags.gpus or ()), *(flags.measured or ())]  # both also collect the settings after them
    config = read_planned(flags.config, flags.overrides + [word for word in words if "=" in word])
    gpus = " ".join(word for word in flags.gpus or () if "=" not in word)
    measured = [word for word in flags.measured or () if "=" not in word]
    if flags.sweep is None:
        if not gpus:
            terminal.Parser(prog="plan.py").error("the following arguments are required: --gpus")
        for name, value in (("--to", flags.to), ("--measured", flags.measured), ("--overlap", flags.overlap)):
            if value is not None:
                raise ConfigError(f"{name} is part of a sweep; add --sweep nodes=1..128, or drop it")
    count, device = parse_gpus(gpus or SWEPT)
    per_node = GPUS_PER_NODE if flags.gpus_per_node is None else flags.gpus_per_node
    if flags.sweep is not None and count > 1:
        if flags.gpus_per_node not in (None, count):
            raise ConfigError(f"--gpus names {count} GPUs of a node and --gpus-per-node {per_node}; give one of them")
        per_node = count
    network = None if flags.network is None else flags.network * 1e9
    assumptions = Assumptions(
        networks=NETWORKS if network is None else (network,),
        overlap=1.0 if flags.overlap is None else flags.overlap,
        mfu=flags.mfu,
        measured=parse_measured(measured) if measured else None,
        num_images=flags.images,
    )
    return Request(
        config=config,
        device=device,
        num_gpus=count,
        gpus_per_node=per_node,
        network=network,
        nodes=None if flags.sweep is None else parse_sweep(flags.sweep),
        assumptions=assumptions,
    )


__all__ = ["SWEPT", "Request", "add_flags", "request_of"]
