"""Processes that evaluate or embed something else than the others are refused; copies on other paths are welcome."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.evaluate.embed import EmbedOptions, embed
from ijepa_scale.evaluate.offline import EvaluationRequest, evaluate_encoder
from ijepa_scale.models.registry import build_encoder
from tests.distributed import harness
from tests.distributed.test_evaluate import images

__all__ = ["images"]


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """An encoder at random weights, in a file."""
    built = build_encoder("vit_tiny", image_size=16, patch_size=8, seed=3)
    save_file(built.state_dict(), tmp_path / "encoder.safetensors")
    return tmp_path / "encoder.safetensors"


def said_of(world: World, per_process: list[list[Any]]) -> list[str]:
    """Returns what each evaluation of this process came to: its error, or nothing."""
    found = []
    for options in per_process[world.rank]:
        try:
            (embed if isinstance(options, EmbedOptions) else evaluate_encoder)(options, world)  # type: ignore[operator]
            found.append("")
        except ConfigError as error:
            found.append(str(error))
    return found


def copied(path: Path) -> Path:
    """Returns a copy, whose files are new."""
    to = path.parent / "elsewhere" / path.name
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, to)
    return to


def test_what_differs_between_processes_is_refused(encoder: Path, images: Path, tmp_path: Path) -> None:
    fewer = copied(images / "val")
    next(fewer.rglob("*.png")).unlink()
    edited = tmp_path / "edited.safetensors"
    weights = load_file(encoder)
    weights["norm.weight"][3] += 1e-3
    save_file(weights, edited)
    request = EvaluationRequest(
        source=str(encoder), train=str(images / "train"), test=str(images / "val"), image_size=16,
        protocols=("knn",), folder=tmp_path / "to", batch_size=4, workers=0,
    )  # fmt: skip
    plan = EmbedOptions(
        images=[str(images / "val")], model=str(encoder), to=tmp_path / "to.npy", workers=0, progress=False
    )
    other: list[tuple[Any, dict[str, Any], str]] = [
        (request, {"seed": 7}, "--seed is 0 on process 0"),
        (request, {"which": "context"}, "--weights is 'target' on process 0"),
        (request, {"protocols": ("logistic",)}, "--protocol is ('knn',) on process 0"),
        (request, {"test": str(fewer)}, "what is in test is 31 images, "),
        (request, {"source": str(edited)}, "the encoder is "),
        (plan, {"batch_size": 5}, "--batch-size is 64 on process 0"),
        (plan, {"pool": "last4"}, "--pool is 'mean' on process 0"),
        (plan, {"images": [str(fewer)]}, "what is in the images is 31 images, "),
        (plan, {"model": str(edited)}, "the encoder is "),
    ]
    changed = [dataclasses.replace(options, **change) for options, change, _ in other]
    said = harness.run(said_of, 2, [[options for options, _, _ in other], changed], alone=True)
    assert said[0] == said[1]
    for (_, _, expected), line in zip(other, said[0], strict=True):
        assert expected in line and "on process 1" in line and "\n" not in line
    assert not plan.to.exists() and not list(request.folder.glob("features/*"))


def test_hosts_may_have_copies_of_their_own(encoder: Path, images: Path, tmp_path: Path) -> None:
    """The paths differ, and so do the times of the files, but what is computed is the same."""
    theirs, model = copied(images), copied(encoder)
    request = EvaluationRequest(
        source=str(encoder), train=str(images / "train"), test=str(images / "val"), image_size=16,
        protocols=("knn",), folder=tmp_path / "to", batch_size=4, workers=0, untrained=False,
    )  # fmt: skip
    plan = EmbedOptions(
        images=[str(images / "val")], model=str(encoder), to=tmp_path / "to.npy", workers=0, progress=False
    )
    own = [
        dataclasses.replace(request, source=str(model), train=str(theirs / "train"), test=str(theirs / "val")),
        dataclasses.replace(plan, images=[str(theirs / "val")], model=str(model)),
    ]  # fmt: skip
    assert harness.run(said_of, 2, [[request, plan], own], alone=True) == [["", ""]] * 2
    assert len(list(request.folder.glob("features/*.npy"))) == 2
    alone = dataclasses.replace(plan, to=tmp_path / "alone.npy")
    assert harness.run(said_of, 1, [[alone]], alone=True) == [[""]]
    np.testing.assert_array_equal(np.load(plan.to), np.load(alone.to))
