"""The tables of metrics.md hold the fields that runs write, and no others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from pages import DOCS, text_of

from ijepa_scale.config import load_config
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.engine.world import World
from ijepa_scale.metrics.row import FIELDS
from ijepa_scale.metrics.stored_rows import read_rows
from ijepa_scale.train.finetune import finetune
from tests.distributed.commands import write_data
from tests.distributed.spiking import FACTOR, configured, train

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
FINETUNE = """
folder: {folder}
model: {{encoder: {{name: vit_tiny, image_size: 16, patch_size: 4, width: 24, depth: 2, heads: 2}}, num_classes: 2}}
data: {{train: {data}, batch_size: 8, workers: 0}}
schedule: {{epochs: 1, warmup_epochs: 0, stop_after: 2}}
engine: {{device: cpu, precision: fp32, strategy: plain}}
logging: {{every: 1, tensorboard: false, progress: none}}
evaluate: {{test: {data}, workers: 0}}
"""
TRAINING, PRETRAINING, FINETUNING, ROLLBACK = (
    "In training rows", "In evaluation rows of pretraining", "In evaluation rows of finetuning", "In rollback rows",
)  # fmt: skip
Fields = Mapping[str, set[str]]


def tables() -> dict[str, set[str]]:
    """Returns the names in the first column of each section's table."""
    sections = re.split(r"^## ", text_of(DOCS / "metrics.md"), flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        heading, _, text = section.partition("\n")
        cells = re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
        names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
        assert len(names) == len({*names}), heading
        found[heading] = {*names}
    return found


def fields_of(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Returns the names of the rows' fields, with N for the number of a block."""
    return {re.sub(r"_\d+$", "_N", name) for row in rows for name in row}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Fields:
    """Returns the fields by kind of row: of a run that goes back at a spike, one from weights, and finetuning."""
    folder = tmp_path_factory.mktemp("metrics")
    data, pretrained = write_data(folder / "data"), folder / "run.yaml"
    configured(pretrained, data, folder / "run")
    settings = (
        "health.every=18", "evaluate.every=18", f"evaluate.train={data}", f"evaluate.test={data}",
        "spikes.action=rollback",
    )  # fmt: skip
    assert train(ALONE, pretrained, settings, {27: (FACTOR, None)}) == ""
    started = (*settings, f"folder={folder / 'started'}", f"model.init={folder / 'run'}", "schedule.stop_after=1")
    assert train(ALONE, pretrained, started, {}) == ""
    path = folder / "finetune.yaml"
    path.write_text(FINETUNE.format(folder=folder / "finetuned", data=data))
    finetune(load_config(path, kind=FinetuneConfig), ALONE)
    rows = {name: list(read_rows(folder / name / "metrics.jsonl")) for name in ("run", "started", "finetuned")}
    both = [*rows["run"], *rows["started"]]
    return {
        TRAINING: fields_of(row for row in (*both, *rows["finetuned"]) if "loss" in row),
        PRETRAINING: fields_of(row for row in both if "rank_me" in row) - {"step"},
        FINETUNING: fields_of(row for row in rows["finetuned"] if "top1" in row) - {"step"},
        ROLLBACK: fields_of(row for row in both if "rolled_back_to" in row) - {"step"},
        "all": fields_of([*both, *rows["finetuned"]]),
    }


@pytest.mark.parametrize("kind", [TRAINING, PRETRAINING, FINETUNING, ROLLBACK])
def test_a_table_has_the_fields_of_its_rows(kind: str, written: Fields) -> None:
    assert tables()[kind] == written[kind]


def test_each_field_of_each_row_is_in_a_table(written: Fields) -> None:
    assert written["all"] == set().union(*tables().values())


def test_training_rows_have_the_fields_that_are_declared(written: Fields) -> None:
    assert written[TRAINING] == {*FIELDS, "steps_skipped"}
