"""Estimates the time of a step: computation at a stated share of the peak, overlapped with communication."""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_scale.config.schema import ModelConfig
from ijepa_scale.planning.communication import Transfer, transfers
from ijepa_scale.planning.devices import Cluster
from ijepa_scale.planning.flops import FlopCount
from ijepa_scale.planning.spread import Spread


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimiser step."""

    compute_s: float  # with recomputation
    communication_s: float  # all communication, hidden or not
    exposed_s: float  # communication that isn't hidden behind computation
    transfers: tuple[Transfer, ...]
    images: float  # summed over all GPUs

    @property
    def step_s(self) -> float:
        """Computation plus the communication that isn't hidden behind it."""
        return self.compute_s + self.exposed_s

    @property
    def images_per_s(self) -> float:
        """Training images per second, summed over all GPUs."""
        return self.images / self.step_s

    @property
    def wire_bytes(self) -> float:
        """Bytes that one GPU sends in a step."""
        return sum(each.bytes for each in self.transfers)


def step_time(
    model: ModelConfig,
    cluster: Cluster,
    spread: Spread,
    *,
    flops: FlopCount,
    micro_batch: float,
    checkpointing: str,
    mfu: float,
) -> StepTime:
    """Returns the time of one step if all computation reaches `mfu` of the peak.

    `flops` are per image. Full checkpointing adds a forward of the trained parts; selective checkpointing only
    repeats operations that aren't counted. A transfer is hidden behind the part of the step in which it can run:
    forward, backward, or the last micro-batch's backward. The time by which it exceeds that part is exposed.
    """
    return time_of(
        transfers(model, spread),
        cluster,
        spread,
        flops=flops,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        mfu=mfu,
    )


def time_of(
    moved: list[Transfer],
    cluster: Cluster,
    spread: Spread,
    *,
    flops: FlopCount,
    micro_batch: float,
    checkpointing: str,
    mfu: float,
) -> StepTime:
    """Returns the same for these transfers."""
    seconds = micro_batch * spread.accumulation / (mfu * cluster.device.peak_flops)
    again = (flops.context + flops.predictor) / 3  # the forward of the trained parts
    forward = seconds * (flops.target + again)
    backward = seconds * (2 * again + (again if checkpointing == "full" else 0.0))
    reduced = _seconds(moved, "last backward", cluster)  # only in the last micro-batch's backward
    late = max(0.0, reduced - backward / spread.accumulation)
    exposed = _seconds(moved, "nothing", cluster) + max(0.0, _seconds(moved, "forward", cluster) - forward)
    exposed += max(late, _seconds(moved, "backward", cluster) + reduced - backward)
    return StepTime(
        compute_s=forward + backward,
        communication_s=sum(each.seconds(cluster) for each in moved),
        exposed_s=exposed,
        transfers=tuple(moved),
        images=micro_batch * spread.accumulation * spread.world,
    )


def _seconds(moved: list[Transfer], behind: str, cluster: Cluster) -> float:
    return sum(each.seconds(cluster) for each in moved if each.behind == behind)
