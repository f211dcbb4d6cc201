"""Writes rows to MLflow (optional dependency `mlflow-skinny` or `mlflow`). Must not know what the numbers mean."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from ijepa_scale.config import form
from ijepa_scale.config.schema import SinkConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.metrics.sinks import kept_id
from ijepa_scale.metrics.stored_rows import is_number

ID_FILE = "mlflow_id.txt"
_LONGEST_PARAM = 500  # characters; longer values are cut


class MlflowConfig(SinkConfig):
    """MLflow: server, experiment and name of the run."""

    uri: form.PathText | None = Field(
        None, description="Tracking server; null means MLflow's settings (MLFLOW_TRACKING_URI)."
    )
    experiment: str = Field("ijepa_scale", description="Experiment of the run.")
    name: str | None = Field(None, description="Name of the run; null means the name of its folder.")


class MlflowSink:
    """Logs the numbers of each row at their `step`. A resumed run continues the same MLflow run."""

    Config = MlflowConfig

    def __init__(self, config: MlflowConfig, folder: Path, *, drop_from: int | None, run: Mapping[str, Any]) -> None:
        try:
            tracking = importlib.import_module("mlflow.tracking")
            self._entities = importlib.import_module("mlflow.entities")
        except ImportError as error:
            raise ConfigError(
                f"logging.sinks names mlflow, which can't be imported ({error}); pip install mlflow-skinny, "
                "or remove it"
            ) from None
        self._client = tracking.MlflowClient(tracking_uri=config.uri)
        known = self._client.get_experiment_by_name(config.experiment)
        experiment = known.experiment_id if known else self._client.create_experiment(config.experiment)
        name = config.name or folder.resolve().name
        self._id = kept_id(
            folder / ID_FILE,
            resumed=bool(drop_from),
            make=lambda: self._client.create_run(experiment, run_name=name).info.run_id,
        )
        params = [self._entities.Param(key, value[:_LONGEST_PARAM]) for key, value in _flatten(run)]
        if not drop_from:
            self._client.log_batch(self._id, params=params)

    def write(self, row: Mapping[str, Any]) -> None:
        """Logs each finite number of the row."""
        now = round(1000 * time.time())
        metrics = [
            self._entities.Metric(name, float(value), now, row["step"])
            for name, value in row.items()
            if name != "step" and is_number(value)
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self._id)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
