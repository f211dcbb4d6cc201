"""W&B and MLflow sinks against their real packages, offline."""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import tracking
from wandb.proto import wandb_internal_pb2

from ijepa_scale.config import LoggingConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.metrics import wandb_sink
from ijepa_scale.metrics.mlflow_sink import MlflowConfig
from ijepa_scale.metrics.sinks import open_sinks
from ijepa_scale.metrics.wandb_sink import WandbConfig

RUN = {"seed": 3, "optimizer": {"lr": 1e-3}}
ROWS = [{"step": 1, "loss": 0.5, "mfu": None}, {"step": 2, "loss": float("nan"), "lr": 0.25}]


def write(folder: Path, name: str, config: object, rows: list[dict], *, drop_from: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    logging = LoggingConfig(tensorboard=False, sinks={name: config})
    with open_sinks(folder, rank=0, logging=logging, drop_from=drop_from, run=RUN) as sinks:
        for row in rows:
            sinks.write(row)


def logged(folder: Path, runs: int) -> list[dict[str, str]]:
    """Returns the rows in the offline files of so many W&B runs, each value as JSON text; W&B's process writes them."""
    deadline = time.monotonic() + 30
    while True:
        rows, finished = [], 0
        for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
            for data in log_records(path.read_bytes()[7:]):  # behind the file's own header
                record = wandb_internal_pb2.Record.FromString(data)
                finished += record.HasField("exit")
                if record.HasField("history"):
                    names = [(item.key or ".".join(item.nested_key), item.value_json) for item in record.history.item]
                    rows.append({name: value for name, value in names if not name.startswith("_")})
        if finished == runs:
            return rows
        assert time.monotonic() < deadline, f"{finished} of {runs} runs are written out"
        time.sleep(0.1)


def log_records(content: bytes) -> Iterator[bytes]:
    """Yields the records of a LevelDB log that fits into one block: (crc, length, type 1 = whole record), data."""
    while content:
        _, length, kind = struct.unpack("<IHB", content[:7])
        assert kind == 1
        yield content[7 : 7 + length]
        content = content[7 + length :]


def test_wandb_gets_each_finite_number_and_a_resumed_run_keeps_its_id(tmp_path) -> None:
    config = WandbConfig(mode="offline")
    write(tmp_path / "run", "wandb", config, ROWS)
    first = (tmp_path / "run" / "wandb_id.txt").read_text()
    assert logged(tmp_path / "run", 1) == [{"step": "1", "loss": "0.5"}, {"step": "2", "lr": "0.25"}]
    write(tmp_path / "run", "wandb", config, [{"step": 3, "loss": 0.125}], drop_from=3)
    assert (tmp_path / "run" / "wandb_id.txt").read_text() == first
    assert logged(tmp_path / "run", 2)[-1] == {"step": "3", "loss": "0.125"}
    assert {path.stem for path in tmp_path.glob("run/wandb/offline-run-*/*.wandb")} == {f"run-{first.strip()}"}
    write(tmp_path / "run", "wandb", config, [])
    assert (tmp_path / "run" / "wandb_id.txt").read_text() != first


def test_mlflow_gets_rows_and_parameters_and_a_resumed_run_continues(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = MlflowConfig(uri=f"file://{tmp_path}/mlruns", experiment="test")
    write(tmp_path / "run", "mlflow", config, ROWS)
    write(tmp_path / "run", "mlflow", config, [{"step": 3, "loss": 0.125}], drop_from=3)
    client = tracking.MlflowClient(tracking_uri=config.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 0.5), (3, 0.125)]
    assert run.data.metrics["lr"] == 0.25 and "mfu" not in run.data.metrics
    assert run.data.params == {"seed": "3", "optimizer.lr": "0.001"}
    assert run.info.run_name == "run" and run.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("name", "config", "module"), [("wandb", WandbConfig(), "wandb"), ("mlflow", MlflowConfig(), "mlflow.tracking")]
)
def test_a_missing_package_is_named(name, config, module, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ConfigError, match=f"logging.sinks names {name}, which can't be imported .*; pip install {name}"
    ):
        write(tmp_path / "run", name, config, [])


@pytest.mark.parametrize("bounded", [True, False], ids=["W&B ends in time", "an older version doesn't"])
def test_a_run_ends_though_wandb_takes_no_rows(bounded: bool, tmp_path, monkeypatch, caplog) -> None:
    given: list[dict] = []

    def finish() -> None:
        if bounded and given[0] == {"finish_timeout": 0.2, "finish_timeout_raises": True}:
            raise TimeoutError("Timed out finishing run.")
        time.sleep(20)

    def init(*, settings: dict, **_: object) -> SimpleNamespace:
        given.append(settings)
        nothing = lambda *args, **named: None  # noqa: E731
        return SimpleNamespace(define_metric=nothing, log=nothing, finish=finish, dir=str(tmp_path / "data" / "files"))

    fields = {"finish_timeout": 0, "finish_timeout_raises": 0} if bounded else {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=SimpleNamespace(model_fields=fields)))
    monkeypatch.setattr(wandb_sink, "_SPARE_S", 0.2)
    begin = time.monotonic()
    write(tmp_path / "run", "wandb", WandbConfig(finish_timeout=0.2), ROWS)
    assert time.monotonic() - begin < 10
    assert "W&B hasn't taken all rows within 0.2 s" in caplog.text and f"`wandb sync {tmp_path}/data`" in caplog.text


def test_wandb_knows_the_limit_of_the_end(tmp_path) -> None:
    sink = wandb_sink.WandbSink(WandbConfig(mode="offline", finish_timeout=7), tmp_path, drop_from=0, run=RUN)
    try:
        assert sink._run.settings.finish_timeout == 7 and sink._run.settings.finish_timeout_raises
    finally:
        sink.close()
