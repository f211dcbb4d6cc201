"""Writes rows to Weights & Biases (optional dependency `wandb`). Must not know what the numbers mean."""

from __future__ import annotations

import importlib
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ijepa_scale.config import form
from ijepa_scale.config.schema import SinkConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.metrics.sinks import kept_id
from ijepa_scale.metrics.stored_rows import is_number
from ijepa_scale.no_answer import NoAnswer, within

logger = logging.getLogger(__name__)

ID_FILE = "wandb_id.txt"
_SPARE_S = 10.0  # for W&B's own limit, which older versions don't have


class WandbConfig(SinkConfig):
    """Weights & Biases: project and name of the run."""

    project: str = Field("ijepa_scale", description="Project of the run.")
    entity: str | None = Field(None, description="User or team; null means the account's default.")
    name: str | None = Field(None, description="Name of the run; null means the name of its folder.")
    mode: Literal["online", "offline"] = Field(
        "online", description="Offline writes into the run's folder; `wandb sync` uploads it later."
    )
    finish_timeout: form.Seconds = Field(
        300.0, gt=0, description="Longest upload at the end of the run; `wandb sync` uploads what is left."
    )


class WandbSink:
    """Logs the numbers of each row over `step`. A resumed run continues the same W&B run.

    W&B can't delete rows: steps that are repeated after a crash appear twice, with the same `step`.
    """

    Config = WandbConfig

    def __init__(self, config: WandbConfig, folder: Path, *, drop_from: int | None, run: Mapping[str, Any]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                f"logging.sinks names wandb, which can't be imported ({error}); pip install wandb, or remove it"
            ) from None
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or folder.resolve().name,
            id=kept_id(folder / ID_FILE, resumed=bool(drop_from), make=lambda: uuid.uuid4().hex),
            resume="allow",
            mode=config.mode,
            dir=str(folder),
            config=dict(run),
            settings=_limits(wandb, config.finish_timeout),
        )
        self._finish_timeout = config.finish_timeout
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        """Logs each finite number of the row."""
        self._run.log({name: value for name, value in row.items() if is_number(value)})

    def close(self) -> None:
        """Uploads or writes buffered rows, for at most `finish_timeout` seconds."""
        try:
            within(self._finish_timeout + _SPARE_S, self._run.finish)
        except (TimeoutError, NoAnswer):
            place = Path(self._run.dir).parent
            logger.warning(
                "W&B hasn't taken all rows within %g s (logging.sinks.wandb.finish_timeout); they are on disk, and "
                "`wandb sync %s` uploads them once the network is back",
                self._finish_timeout,
                place,
            )


def _limits(wandb: Any, seconds: float) -> dict[str, Any]:
    """Returns the settings that bound the end of a run, and of the process, where this version of W&B has them."""
    limits = {"finish_timeout": seconds, "finish_timeout_raises": True}
    known = getattr(wandb.Settings, "model_fields", {})
    return {name: value for name, value in limits.items() if name in known}
