"""launch/evaluate.py: the same table on any number of processes, and one line for what can't be evaluated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from ijepa_scale.engine.world import World
from ijepa_scale.evaluate.labelled_sets import Named
from ijepa_scale.evaluate.offline import EvaluationRequest, evaluate_encoder
from ijepa_scale.evaluate.results import Results
from ijepa_scale.models.registry import build_encoder
from tests.distributed import harness
from tests.distributed.commands import ROOT, clean_environment


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """An encoder at random weights, in a file."""
    built = build_encoder("vit_tiny", image_size=16, patch_size=8, width=24, depth=4, heads=3, seed=3)
    save_file(built.state_dict(), tmp_path / "encoder.safetensors")
    return tmp_path / "encoder.safetensors"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Labelled images, 61 to train and 31 to test, whose classes are told apart by brightness."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 61), ("val", 31)):
        for number in range(count):
            label = number % 3
            pixels = generator.integers(0, 120, (18, 20, 3)) + 60 * label
            path = tmp_path / "images" / split / f"class{label}" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "images"


def evaluate(*arguments: str | os.PathLike, code: int = 0) -> str:
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), *map(str, arguments)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def words(source: Path, images: Path, to: Path) -> list[str]:
    return [
        str(source), "--data", str(images / "train"), str(images / "val"), "--to", str(to), "--epochs", "2",
        "--workers", "0", "--batch-size", "4", "--shots", "1", "2", "--image-size", "16", "--heads", "3",
        "--attentive-epochs", "2",
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("counts", ["123"])
def test_the_table_is_the_same_on_any_number_of_processes(
    counts: str, encoder: Path, images: Path, tmp_path: Path
) -> None:
    found = []
    for processes in counts:
        to = tmp_path / processes
        shown = evaluate(*words(encoder, images, to), "--processes", processes)
        found.append(json.loads((to / "evaluation.json").read_text()))
        assert "knn, best" in shown and (to / "evaluation.png").stat().st_size > 1000
    assert all(each["scores"] == found[0]["scores"] for each in found)
    assert all(each["untrained"] == found[0]["untrained"] for each in found)
    best = {score["protocol"]: score["accuracy"] for score in found[0]["scores"]}
    assert [*best] == [score["protocol"] for score in found[0]["untrained"]] and "attentive" in best
    assert best["knn, best"] > 0.6 and best["logistic"] > 0.6  # brightness shows even at random weights
    refused = evaluate(*words(encoder, images, tmp_path / "1"), "--protocol", "knn", code=2)
    assert "evaluation.json exists; name another folder with --to, or add --overwrite" in refused
    again = evaluate(*words(encoder, images, tmp_path / "1"), "--protocol", "knn", "--overwrite")
    assert "knn" in again and "linear" not in again


def in_process(world: World, request: EvaluationRequest) -> Results | None:
    """Evaluates in one of several processes."""
    return evaluate_encoder(request, world)


@pytest.mark.long
@pytest.mark.parametrize("token_gb", [0.0, 1.0])
def test_attentive_probes_are_the_same_on_any_number_of_processes(
    encoder: Path, images: Path, tmp_path: Path, token_gb: float
) -> None:
    tables = []
    for processes in (1, 2, 3):
        request = EvaluationRequest(
            source=str(encoder), train=str(images / "train"), test=str(images / "val"), image_size=16, heads=3,
            protocols=("attentive-4", "attentive"), folder=tmp_path / str(processes), batch_size=4, workers=0,
            attentive_epochs=3, token_gb=token_gb,
        )  # fmt: skip
        results, *others = harness.run(in_process, processes, request, alone=True)
        assert isinstance(results, Results) and others == [None] * (processes - 1)
        tables.append((results.scores, results.untrained))
        stored = [path.name for path in (tmp_path / str(processes) / "features").glob("*tokens*.npy")]
        assert len(stored) == (4 if token_gb else 0)
    assert tables[0] == tables[1] == tables[2]
    assert [score.protocol for score in tables[0][0]] == ["attentive-4", "attentive"]
    assert all(abs(31 * score.accuracy - round(31 * score.accuracy)) < 1e-9 for score in tables[0][0])
    assert max(score.accuracy for score in tables[0][0]) > 0.6


def test_finetuning_and_further_sets_have_rows_on_several_processes(
    encoder: Path, images: Path, tmp_path: Path
) -> None:
    request = EvaluationRequest(
        source=str(encoder), train=str(images / "train"), test=str(images / "val"), image_size=16, heads=3,
        protocols=("lowshot-finetune", "knn"), folder=tmp_path / "to", workers=0, subsets=("4",), seeds=1,
        finetune_epochs=1, shots=(1, 2),
        transfer=tuple(Named(name, str(images / "train"), str(images / "val")) for name in ("one", "other")),
    )  # fmt: skip
    results, _ = harness.run(in_process, 2, request)
    found = {score.protocol: score.accuracy for score in results.scores}
    assert [*found] == [
        "4-shot, finetuned", "knn", "knn, best", "one: knn", "one: logistic", "one: 1-shot", "other: knn",
        "other: logistic", "other: 1-shot", "all sets: knn", "all sets: logistic", "all sets: 1-shot",
    ]  # fmt: skip
    assert found["one: knn"] == found["other: knn"] == found["knn"] == found["all sets: knn"]
    assert [score.protocol for score in results.untrained] == [*found]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": "nothing.safetensors"}, "nothing.safetensors"),
        ({"train": "nowhere"}, "doesn't exist"),
        ({"unreadable": True}, "1 of 31 images can't be used"),
    ],
)
def test_what_cant_be_evaluated_is_one_line(
    encoder: Path, images: Path, tmp_path: Path, change: dict, said: str
) -> None:
    if change.get("unreadable"):
        (images / "val" / "class0" / "000.png").write_bytes(b"x")
    given = words(Path(change.get("source", encoder)), images, tmp_path / "to")
    given[2] = change.get("train", given[2])
    log = evaluate(*given, "--protocol", "knn", code=2)
    assert said in log and "Traceback" not in log and log.count("error (process 0)") == 1
