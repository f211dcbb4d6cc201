"""What an evaluation refuses before it reads weights or encodes images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.evaluate.labelled_sets import Named
from ijepa_scale.evaluate.offline import EvaluationRequest, check_folder, evaluate_encoder
from ijepa_scale.models.registry import build_encoder

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
NOWHERE = EvaluationRequest(source="nowhere.safetensors", train="nowhere", test="nowhere")


def sets_named(*names: str) -> tuple[Named, ...]:
    return tuple(Named(name, "nowhere", "nowhere") for name in names)


@given(st.text(alphabet="ab/.\n |$\u2028\udcff-", max_size=41), st.booleans())
def test_names_of_further_sets_fit_a_file_and_a_table(name, twice):
    good = set(name) <= set("ab.-") and name[:1] in ("a", "b") and len(name) <= 40 and not twice
    request = dataclasses.replace(NOWHERE, transfer=sets_named(*[name] * (1 + twice)), classes=3)
    said = "--classes is 3" if good else "--transfer is named .*; give each data set a name of its own, of up to 40"
    with pytest.raises(ConfigError, match=said):
        evaluate_encoder(request, ALONE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": 3}, "--classes is 3, but images with labels have no maps; drop the flag"),
        ({"depth_scale": 0.5}, "--depth-scale is 0.5, but images with labels have no maps; drop the flag"),
        ({"token_gb": float("nan")}, "--token-gb is nan; give 0, which keeps none, or more"),
        ({"token_gb": -1.0}, "--token-gb is -1; give 0, which keeps none, or more"),
    ],
)
def test_what_no_protocol_uses_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        evaluate_encoder(dataclasses.replace(NOWHERE, **changes), ALONE)


def test_a_folder_that_takes_no_files_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/here")):
        with pytest.raises(ConfigError, match=r"can't be written to \(.*\); name another folder with --to"):
            check_folder(dataclasses.replace(NOWHERE, folder=folder), ALONE)
    check_folder(dataclasses.replace(NOWHERE, folder=tmp_path / "new" / "folder"), ALONE)
    assert not list((tmp_path / "new" / "folder").iterdir())


@pytest.mark.parametrize(
    ("classes", "changes", "said"),
    [
        (1, {"protocols": ("knn",)}, "^2 training images of one class; give two classes or more"),
        (3, {"protocols": ("lowshot",), "shots": (5,)}, "^the smallest class has 2 training images, fewer than 5"),
        (3, {"protocols": ("lowshot-finetune",), "subsets": ("3",)}, "^class 0 has 2 images, fewer than 3 shots"),
        (3, {"protocols": ("knn",), "shots": (10,), "transfer": True}, "^more: the smallest class has 2 training"),
    ],
)
def test_labels_are_refused_before_anything_is_encoded(tmp_path, classes, changes, said):
    for split in ("train", "test"):
        for number in range(2 * classes):
            path = tmp_path / split / f"class{number % classes}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((16, 16, 3), 9 * number, np.uint8)).save(path)
    encoder = build_encoder("vit_tiny", image_size=16, patch_size=8, width=24, depth=1, heads=3, seed=0)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    train, test = str(tmp_path / "train"), str(tmp_path / "test")
    if changes.get("transfer"):
        changes = {**changes, "transfer": (Named("more", train, test),)}
    request = EvaluationRequest(
        source=str(tmp_path / "encoder.safetensors"), train=train, test=test, image_size=16, heads=3,
        folder=tmp_path / "to", **changes,
    )  # fmt: skip
    with pytest.raises(DataError, match=said):
        evaluate_encoder(request, ALONE)
    assert not list((tmp_path / "to").iterdir())
