"""The section `health`: what is measured of the training itself, and when to raise an alarm. Knows no component."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from typing_extensions import override

from ijepa_scale.config import form
from ijepa_scale.config.data import Reader
from ijepa_scale.config.section import Section


class HealthConfig(Section, at="health"):
    """Metrics that need no labels, measured on a few fixed images, and alarms that say what to change."""

    every: form.Steps = Field(100, ge=0, description="Steps between measurements; 0: never.")
    data: form.PathText | None = Field(
        None, description="Held-out images; null: those of evaluate.test, or else of data.train."
    )
    reader: Reader = Field("shards", description="How the images of data are stored, as in data.reader; not stream.")
    images: int = Field(256, ge=2, description="Images that are measured, evenly spread over the set.")
    least_std: form.Fraction = Field(
        0.6, description="Alarm if feature_std falls below this share of its highest value."
    )
    least_rank: form.Fraction = Field(0.6, description="Alarm if RankMe - 1 falls below this share of the first one.")
    least_std_ever: form.AtLeast0 = Field(
        0.02, description="Alarm if feature_std is below this, whatever its earlier values."
    )
    on_collapse: Literal["warn", "stop"] = Field(
        "warn",
        description="What the alarm does: log a warning, or end the run; resuming doesn't use that state.",
    )
    keep_best: Literal["none", "knn", "linear", "rank_me", "lidar"] = Field(
        "knn", description="Metric whose highest value after the start decides which checkpoint is in best."
    )

    @override
    def _problems(self) -> Iterator[str]:
        if self.every:
            return
        if self.on_collapse == "stop":
            yield "on_collapse is stop but every is 0, which raises no alarm; set every, e.g. 100, or on_collapse=warn"
        if self.keep_best in ("rank_me", "lidar"):
            yield f"keep_best is {self.keep_best} but every is 0, which never measures it; set every, or keep_best=none"
