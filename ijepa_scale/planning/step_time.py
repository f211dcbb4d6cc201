"""How long a step takes: computation at a stated share of the peak, and communication beside it."""

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

    compute_s: float  # recomputation included
    communication_s: float  # all of it, hidden or not
    exposed_s: float  # what no computation hides
    transfers: tuple[Transfer, ...]
    images: float  # of all GPUs

    @property
    def step_s(self) -> float:
        """Computation and what isn't hidden behind it."""
        return self.compute_s + self.exposed_s

    @property
    def images_per_s(self) -> float:
        """Training images per second of all GPUs."""
        return self.images / self.step_s

    @property
    def wire_bytes(self) -> float:
        """Bytes that one GPU sends."""
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

    `flops` are per image; full checkpointing adds a forward of the trained parts, selective only what isn't
    counted. A transfer hides behind the part of the step in which it can run: forward, backward, or the last
    micro-batch's backward; what takes longer than that part is exposed.
    """
    seconds = micro_batch * spread.accumulation / (mfu * cluster.device.peak_flops)
    again = (flops.context + flops.predictor) / 3  # their forward
    forward = seconds * (flops.target + again)
    backward = seconds * (2 * again + (again if checkpointing == "full" else 0.0))
    moved = transfers(model, spread)
    reduced = _seconds(moved, "last backward", cluster)  # in the last micro-batch's backward only
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
