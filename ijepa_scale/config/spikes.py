"""The section `spikes`: what a run does about losses and gradient norms that leap. Knows no component."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ijepa_scale.config import form
from ijepa_scale.config.section import Section

LEAST_WINDOW = 20  # values that a median is taken of, at least


class SpikesConfig(Section, at="spikes"):
    """What to do about a step whose loss or gradient norm is far above the running median, or isn't finite."""

    action: Literal["none", "warn", "skip", "rollback", "stop"] = Field(
        "warn",
        description="At a spike: nothing, a warning, leave out the step, leave out all steps since the newest "
        "checkpoint and go back to it, or end the run.",
    )
    loss_factor: float = Field(3.0, gt=1, description="A loss above this many running medians is a spike.")
    norm_factor: float = Field(10.0, gt=1, description="A gradient norm above this many running medians is a spike.")
    window: form.Steps = Field(
        100, ge=LEAST_WINDOW, description=f"Steps of the running median; nothing is judged before {LEAST_WINDOW} steps."
    )
    most: form.Count = Field(
        5, description="Spikes in a row, or rollbacks to one checkpoint, that end a run with skip or rollback."
    )
    skip_nonfinite: int = Field(
        0, ge=0, description="Steps in a row with a NaN or infinity that are skipped before one ends the run."
    )

    @property
    def prevents(self) -> bool:
        """Whether a step with a spike changes nothing."""
        return self.action in ("skip", "rollback", "stop")
