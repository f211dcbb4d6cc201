"""Health of a pretraining run: when to measure, on which images, and which state is the best so far."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.schema import KnnConfig
from ijepa_scale.data.sources.fetch import scheme_of
from ijepa_scale.data.sources.open import build_source
from ijepa_scale.data.sources.source import SampleSource, check_problems
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.engine.protocol import Engine
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError, UserError
from ijepa_scale.evaluate.alarms import CollapseAlarm
from ijepa_scale.evaluate.evaluator import image_settings
from ijepa_scale.evaluate.health import HealthCheck
from ijepa_scale.metrics.sinks import BLOCK_NORM
from ijepa_scale.objectives.protocol import Objective

logger = logging.getLogger(__name__)


class RunHealth:
    """Measures a run's health, raises its alarm, and compares its states."""

    def __init__(self, config: PretrainConfig, first_step: int, last_step: int) -> None:
        self._config, self._ends = config, (first_step, last_step)
        self.alarm = CollapseAlarm(config)
        self.best: float | None = None
        self._before: float | None = None  # the best before that
        self._check: HealthCheck | None = None

    def open(self, source: SampleSource | StreamSource, objective: Objective, world: World, micro_batch: int) -> None:
        """Reads the images, unless health is off or there are none to read in any order, which is logged.

        Raises:
            DataError: the images can't be read.
        """
        config = self._config
        chosen = _images_of(config, source) if config.health.every else None
        if chosen is None:
            return
        name, images = chosen
        self._check = HealthCheck(
            config,
            images,
            name,
            images=image_settings(config),
            objective=objective,
            world=world,
            chunk=micro_batch,
        )
        share = self._check.share(micro_batch * world.size * config.engine.accumulation)
        logger.info(
            "health is measured on %d fixed images of %s every %d steps: %.2g%% of the run's FLOPs",
            self._check.total, name, config.health.every, 100 * share,
        )  # fmt: skip

    def is_due(self, done: int) -> bool:
        """Returns whether to measure after `done` steps: at both ends of the run, and every `health.every`."""
        return self._check is not None and (done % self._config.health.every == 0 or done in self._ends)

    def measure(self, engine: Engine) -> dict[str, float]:
        """Returns the figures. Synchronises and communicates, so every process must call it."""
        assert self._check is not None
        return self._check.measure(engine)

    def is_best(self, figures: Mapping[str, float], done: int) -> bool:
        """Returns whether the state after `done` steps is the best so far, and remembers it. The first state isn't."""
        value = figures.get(self._config.health.keep_best)
        if value is None or done == self._ends[0] or self.alarm.is_on or (self.best is not None and value <= self.best):
            return False
        self._before, self.best = self.best, value
        return True

    def forget_best(self) -> None:
        """Call if the last best state couldn't be saved."""
        self.best = self._before

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint stores."""
        return {"alarm": self.alarm.state(), "best": self.best}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        self.alarm.load_state(state["alarm"])
        self.best = state["best"]


def describe(figures: Mapping[str, float]) -> str:
    """Returns the figures that a person should watch, in a few words."""
    return f"RankMe {figures['rank_me']:.3g}, feature_std {figures['feature_std']:.2g}"


def block_figures(norms: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Returns the norms of the gradient in each block under the names of their columns. Synchronises."""
    return {f"{BLOCK_NORM}{name}": float(norm) for name, norm in norms.items()}


def _images_of(config: PretrainConfig, source: SampleSource | StreamSource) -> tuple[str, SampleSource] | None:
    """Returns the setting that names the images and their source."""
    health, evaluate = config.health, config.evaluate
    members, verify = image_settings(config).members, config.data.verify
    if health.data is not None:
        try:
            images = build_source(health.reader, health.data, members=members, verify=verify)
            check_problems(images.problems(), images.num_samples, config.data.max_bad_fraction)
        except UserError as error:
            raise DataError(f"health.data can't be used: {error}") from None
        return "health.data", images
    if isinstance(evaluate, KnnConfig) and evaluate.every and evaluate.test is not None:
        return "evaluate.test", build_source(evaluate.reader, evaluate.test, members=members, verify=verify)
    if isinstance(source, StreamSource) or (config.data.train is not None and scheme_of(config.data.train) is not None):
        logger.warning(
            "health isn't measured: the images of data.train can't be read in any order on this machine; name a few "
            "local ones with health.data, or set health.every=0"
        )
        return None
    return "data.train", source
