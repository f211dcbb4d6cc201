"""Simulates a run on growing numbers of nodes: step time, images/s, efficiency and GPU-hours of each strategy.

Computation is the plan's estimate, or measured steps of one GPU; communication is counted bytes over a network's
bandwidth. Nothing is measured here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.schema import PretrainConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.planning.devices import Cluster, Device
from ijepa_scale.planning.finetune_plan import plan_run
from ijepa_scale.planning.plan import Plan, PlannedStrategy

NETWORKS = (12.5e9, 25e9, 50e9)  # bytes/s per GPU and direction: adapters of 100, 200 and 400 Gb/s
MOST_COUNTS = 64
_RANGE = re.compile(r"nodes=(\d+)\.\.(\d+)")
_LIST = re.compile(r"nodes=(\d+(?:,\d+)*)")
_MEASURED = re.compile(r"(\d+):(\d+(?:\.\d+)?)")


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the simulation takes as given."""

    networks: tuple[float, ...] = NETWORKS
    overlap: float = 1.0  # share of the communication that can be hidden which is
    mfu: float | None = None  # None: estimated
    measured: MeasuredSteps | None = None  # instead of `mfu`
    num_images: int | None = None  # of the training set; None: as in `plan`

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 1:
            raise ConfigError(
                f"--overlap is {self.overlap:g}; give a share from 0 (none is hidden) to 1 (all that can be)"
            )
        if self.mfu is not None and self.measured is not None:
            raise ConfigError(f"--mfu is {self.mfu:g} and --measured says how fast steps are; give one of them")


@dataclass(frozen=True)
class MeasuredSteps:
    """Seconds that one GPU computes on a micro-batch, by its number of images, ascending."""

    points: tuple[tuple[int, float], ...]

    def seconds(self, images: float) -> float:
        """Returns the seconds of a micro-batch: on the line through the two nearest points, or in proportion to one."""
        if len(self.points) == 1:
            return self.points[0][1] * images / self.points[0][0]
        after = next((i for i, (count, _) in enumerate(self.points) if images <= count), len(self.points) - 1)
        (low, low_s), (high, high_s) = self.points[max(1, after) - 1], self.points[max(1, after)]
        return low_s + (images - low) * (high_s - low_s) / (high - low)

    def text(self) -> str:
        """Returns the points in words."""
        return ", ".join(f"{count} images in {1e3 * seconds:g} ms" for count, seconds in self.points)


def parse_measured(words: Sequence[str]) -> MeasuredSteps:
    """Parses words such as `128:600`, images at once and milliseconds.

    Raises:
        ConfigError: a word has another form, or more images don't take longer, down to none.
    """
    points = []
    for word in words:
        match = _MEASURED.fullmatch(word)
        if match is None or not int(match[1]) or not float(match[2]):
            raise ConfigError(f"--measured is {word!r}; give images:milliseconds of a step on one GPU, such as 128:171")
        points.append((int(match[1]), float(match[2]) / 1e3))
    points.sort()
    for (low, low_s), (high, high_s) in zip(points, points[1:], strict=False):
        if low == high or high_s <= low_s or low_s / low < (high_s - low_s) / (high - low):
            raise ConfigError(
                f"--measured says {low}:{1e3 * low_s:g} and {high}:{1e3 * high_s:g}; more images take longer, and each "
                "of them less: measure again, or give one of them"
            )
    return MeasuredSteps(tuple(points))


def parse_sweep(text: str) -> list[int]:
    """Parses `nodes=1..128`, which doubles from the first to the last, or `nodes=1,2,6`.

    Raises:
        ConfigError: it has another form.
    """
    if match := _RANGE.fullmatch(text):
        first, last = int(match[1]), int(match[2])
        if 1 <= first <= last:
            return sorted({min(first << power, last) for power in range((last // first).bit_length() + 1)})
    elif match := _LIST.fullmatch(text):
        counts = sorted({int(number) for number in match[1].split(",")})
        if counts[0] >= 1 and len(counts) <= MOST_COUNTS:
            return counts
    raise ConfigError(f"--sweep is {text!r}; give nodes=1..128, which doubles, or up to {MOST_COUNTS} as nodes=1,2,6")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One strategy on one number of nodes, with one network."""

    nodes: int
    num_gpus: int
    network: float  # bytes/s per GPU and direction
    strategy: str  # without the numbers of replicas and shards
    configured: bool  # whether the run would use it
    fits: bool
    micro_batch: int
    wire_bytes: float
    compute_s: float
    step_s: float
    images_per_s: float
    gpu_hours: float  # of the whole run
    efficiency: float = math.nan  # images/s of a GPU, relative to `Sweep.baseline`


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A run on growing numbers of nodes."""

    config: PretrainConfig | FinetuneConfig
    device: Device
    gpus_per_node: int
    assumptions: Assumptions
    points: tuple[Point, ...]
    baseline: Point
    skipped: dict[int, str]  # number of nodes -> why
    plans: dict[int, Plan]  # at the last network

    def at(self, nodes: int, network: float) -> list[Point]:
        """Returns the strategies on so many nodes with a network."""
        return [point for point in self.points if (point.nodes, point.network) == (nodes, network)]


def sweep(
    config: PretrainConfig | FinetuneConfig,
    device: Device,
    counts: Sequence[int],
    assumptions: Assumptions,
    *,
    gpus_per_node: int,
    zero: Mapping[str, Any] | None = None,
) -> Sweep:
    """Returns the simulation for these numbers of nodes; what is impossible on one of them is skipped, with the reason.

    Efficiency relates the images/s of a GPU to those under the fastest strategy that fits, on the fewest nodes that
    have one, with the fastest network.

    Raises:
        ConfigError: the run is impossible on every number of nodes, or fits on none.
    """
    points: list[Point] = []
    skipped: dict[int, str] = {}
    plans: dict[int, Plan] = {}
    for nodes in counts:
        try:
            for network in assumptions.networks:
                cluster = Cluster(device, nodes * gpus_per_node, gpus_per_node, network)
                plan = _plan(config, cluster, assumptions, zero)
                points += [_point(plan, each, assumptions.overlap) for each in plan.strategies]
                plans[nodes] = plan
        except ConfigError as error:
            skipped[nodes] = "; ".join(error.problems)
    fitting = [point for point in points if point.fits]
    if not points:
        raise ConfigError(*dict.fromkeys(skipped.values()))
    if not fitting:
        plan = plans[max(plans)]
        least = min(plan.strategies, key=lambda each: each.footprint.peak)
        raise ConfigError(
            f"no strategy fits on {min(plans)} to {max(plans)} nodes: the least is {least.footprint.peak / 1e9:.1f} GB "
            f"per GPU ({least.spread.label}, {plan.micro_batch} images at once) on a {device.name}; raise "
            "engine.accumulation, or set engine.checkpointing=full"
        )
    fewest = min(point.nodes for point in fitting)
    baseline = max((point for point in fitting if point.nodes == fewest), key=lambda point: point.images_per_s)
    one = baseline.images_per_s / baseline.num_gpus
    rated = [dataclasses.replace(each, efficiency=each.images_per_s / each.num_gpus / one) for each in points]
    return Sweep(
        config=config, device=device, gpus_per_node=gpus_per_node, assumptions=assumptions, points=tuple(rated),
        baseline=dataclasses.replace(baseline, efficiency=1.0), skipped=skipped, plans=plans,
    )  # fmt: skip


def _plan(
    config: PretrainConfig | FinetuneConfig,
    cluster: Cluster,
    assumptions: Assumptions,
    zero: Mapping[str, Any] | None,
) -> Plan:
    options: dict[str, Any] = {"num_images": assumptions.num_images, "zero": zero}
    plan = plan_run(config, cluster, mfu=assumptions.mfu, **options)
    if assumptions.measured is None:
        return plan
    assumed = sum(plan.chosen.mfu) / 2
    wanted = config.engine.accumulation * assumptions.measured.seconds(plan.micro_batch)
    mfu = assumed * plan.chosen.time.compute_s / wanted  # with which computation takes the measured time
    if mfu > 1:
        raise ConfigError(
            f"--measured says {1e3 * wanted / config.engine.accumulation:.3g} ms for {plan.micro_batch} images, "
            f"{mfu:.1f} times the peak of {cluster.device.name}; check its images and milliseconds"
        )
    return plan_run(config, cluster, mfu=mfu, **options)


def _point(plan: Plan, each: PlannedStrategy, overlap: float) -> Point:
    time, cluster = each.time, plan.cluster
    exposed = time.communication_s - overlap * (time.communication_s - time.exposed_s)
    step_s = time.compute_s + exposed
    return Point(
        nodes=cluster.num_nodes,
        num_gpus=cluster.num_gpus,
        network=cluster.network_bandwidth,
        strategy=re.sub(r" \d+x\d+", "", each.spread.label),
        configured=each is plan.chosen,
        fits=each.fits,
        micro_batch=plan.micro_batch,
        wire_bytes=time.wire_bytes,
        compute_s=time.compute_s,
        step_s=step_s,
        images_per_s=time.images / step_s,
        gpu_hours=plan.steps * step_s * cluster.num_gpus / 3600,
    )


__all__ = ["NETWORKS", "Assumptions", "MeasuredSteps", "Point", "Sweep", "parse_measured", "parse_sweep", "sweep"]
