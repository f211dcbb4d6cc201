"""The GPU-hours of a planned run, and the published ones of the run that a configuration repeats. Knows no file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ijepa_scale.config.schema import PretrainConfig
from ijepa_scale.planning.plan import IMAGENET_1K, Plan


@dataclass(frozen=True, kw_only=True)
class PublishedCost:
    """What a paper says that a run took: at most `hours` on `num_gpus`."""

    num_gpus: int
    gpu: str
    hours: float
    source: str

    @property
    def gpu_hours(self) -> float:
        """The most GPU-hours that it took."""
        return self.num_gpus * self.hours


# Of ViT-H/14 at 224 pixels, 300 epochs of ImageNet-1k. The paper states no number for its other runs.
HUGE = PublishedCost(num_gpus=16, gpu="A100", hours=72.0, source="arXiv 2301.08243, abstract")


def gpu_hours(plan: Plan, step_s: float) -> float:
    """Returns the GPU-hours of the whole run if a step takes `step_s`, without evaluation and checkpoints."""
    return plan.steps * step_s * plan.cluster.num_gpus / 3600


def published_cost(plan: Plan) -> PublishedCost | None:
    """Returns the published cost of the run that this plan repeats; None if there is none."""
    config = plan.config
    if not isinstance(config, PretrainConfig):
        return None
    model, epochs = config.model, plan.steps * plan.batch_size / plan.num_images
    is_huge = (model.name, model.patch_size, model.image_size) == ("vit_huge", 14, (224, 224))
    return HUGE if is_huge and plan.num_images == IMAGENET_1K and round(epochs) == 300 else None


def cost_lines(plan: Plan) -> Iterator[str]:
    """Yields the lines of the plan about its cost."""
    fast, slow = (gpu_hours(plan, step_s) for step_s in plan.chosen.range_s)
    middle = gpu_hours(plan, plan.chosen.time.step_s)
    span = "" if fast == slow else f" ({_rounded(fast)} to {_rounded(slow)} over that range of the peak)"
    yield f"cost       {_rounded(middle)} GPU-hours{span}"
    found = published_cost(plan)
    if found is not None:
        yield (
            f"           published: under {found.hours:g} hours on {found.num_gpus} {found.gpu}s, so below "
            f"{_rounded(found.gpu_hours)} GPU-hours ({found.source})"
        )


def _rounded(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
