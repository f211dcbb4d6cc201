"""A whole dense evaluation on shapes whose textures tell their classes: what is learnt, written, kept and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.evaluate import stored_features
from ijepa_scale.evaluate.dense.dense_evaluation import evaluate_dense
from ijepa_scale.evaluate.dense.dense_protocols import Measure
from ijepa_scale.evaluate.dense.dense_results import DenseResults
from ijepa_scale.evaluate.dense.map_files import IGNORED
from ijepa_scale.evaluate.labelled_sets import Named
from ijepa_scale.evaluate.offline import EvaluationRequest
from ijepa_scale.models.registry import build_encoder
from launch import evaluate as command

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
SIZE = 32


def textures(generator: np.random.Generator) -> np.ndarray:
    """Grey noise, rows and columns of equal brightness, (3, SIZE, SIZE)."""
    stripes = np.where(np.arange(SIZE) % 4 < 2, 80, 170)
    noise = generator.integers(80, 170, (SIZE, SIZE))
    return np.stack([noise, np.tile(stripes[:, None], SIZE), np.tile(stripes, (SIZE, 1))])


def shapes(root: Path, count: int, seed: int) -> Path:
    """A box of one texture on another one; masks say which. Depth is 1 behind, and 2 or 4 in the box, by texture."""
    generator = np.random.default_rng(seed)
    for folder in ("images", "masks", "depth"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        behind, front = generator.permutation(3)[:2]
        top, left = generator.integers(0, 12, 2)
        mask = np.full((SIZE, SIZE), behind)
        mask[top : top + 18, left : left + 18] = front
        pixels = np.take_along_axis(textures(generator), mask[None], axis=0)[0] + generator.normal(0, 8, mask.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB").save(root / "images" / f"{number:03d}.png")
        depth = np.array([1.0, 2.0, 4.0], dtype=np.float32)[mask]
        depth[0] = np.nan
        np.save(root / "depth" / f"{number:03d}.npy", depth)
        mask[0] = IGNORED
        Image.fromarray(mask.astype(np.uint8)).save(root / "masks" / f"{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def request_of_shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    encoder = build_encoder("vit_tiny", image_size=SIZE, patch_size=4, width=48, depth=2, heads=3, seed=3)
    save_file(encoder.state_dict(), root / "encoder.safetensors")
    return EvaluationRequest(
        source=str(root / "encoder.safetensors"), train=str(shapes(root / "train", 60, 0)),
        test=str(shapes(root / "test", 20, 1)), protocols=("segmentation", "patch-knn"), image_size=SIZE, heads=3,
        workers=0, epochs=12, untrained=False, folder=root / "to",
    )  # fmt: skip


def evaluated(request: EvaluationRequest, folder: Path, **changes: object) -> DenseResults:
    results = evaluate_dense(dataclasses.replace(request, folder=folder, **changes), ALONE)  # type: ignore[arg-type]
    assert results is not None
    return results


def values(results: DenseResults) -> dict[tuple[str, str], float]:
    return {(each.protocol, each.measure): each.value for each in results.measures if each.of_class is None}


def test_a_trained_probe_finds_the_textures_and_a_random_one_does_not(request_of_shapes, tmp_path):
    found = evaluated(request_of_shapes, tmp_path / "to")
    trained = values(found)
    assert trained["segmentation", "mIoU"] > 0.6 and trained["patch-knn", "mIoU"] > 0.5
    moved = Path(request_of_shapes.train).parent / "moved"
    if not moved.exists():  # the masks of other images
        names = sorted(Path(request_of_shapes.train, "masks").iterdir())
        (moved / "masks").mkdir(parents=True)
        (moved / "images").symlink_to(Path(request_of_shapes.train, "images"))
        for name, other in zip(names, names[7:] + names[:7], strict=True):
            (moved / "masks" / name.name).write_bytes(other.read_bytes())
    wrong = values(evaluated(request_of_shapes, tmp_path / "moved", train=str(moved)))
    for protocol in ("segmentation", "patch-knn"):
        assert wrong[protocol, "mIoU"] < trained[protocol, "mIoU"] - 0.2
    assert values(evaluated(request_of_shapes, tmp_path / "to")) == trained  # and it repeats
    for each in found.measures:
        assert each.low <= each.value <= each.high


def test_depth_is_found_where_textures_tell_it(request_of_shapes, tmp_path):
    found = values(evaluated(request_of_shapes, tmp_path, protocols=("depth",), epochs=25))
    assert found["depth", "δ1"] > 0.6 and found["depth", "abs rel"] < 0.3  # 2 everywhere has δ1 1/3, abs rel 1/2


def test_tokens_are_computed_once_and_each_photograph_counts(request_of_shapes, tmp_path, monkeypatch):
    calls = []

    encode = stored_features._encoded

    def counted(encoder, images, pools):
        calls.append(len(images))
        return encode(encoder, images, pools)

    monkeypatch.setattr(stored_features, "_encoded", counted)
    evaluated(request_of_shapes, tmp_path, protocols=("patch-knn",))
    assert sum(calls) == 80
    evaluated(request_of_shapes, tmp_path, protocols=("segmentation",), epochs=1)
    assert sum(calls) == 80


def test_the_same_architecture_at_random_weights_stands_next_to_it(request_of_shapes, tmp_path):
    found = evaluated(request_of_shapes, tmp_path, protocols=("patch-knn",), untrained=True)
    assert [each.measure for each in found.untrained] == [each.measure for each in found.measures]
    assert found.untrained != found.measures
    for path in found.write(tmp_path):
        assert path.stat().st_size > 100
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["measures"][0]["measure"] == "mIoU" and len(written["untrained"]) == 5
    with pytest.raises(ConfigError, match="evaluation.json exists; name another folder with --to, or add --overwrite"):
        evaluated(request_of_shapes, tmp_path)


def test_the_command_takes_dense_protocols(request_of_shapes, tmp_path, capsys):
    given = [
        request_of_shapes.source, "--data", request_of_shapes.train, request_of_shapes.test, "--to", str(tmp_path),
        "--image-size", str(SIZE), "--heads", "3", "--workers", "0", "--no-untrained",
    ]  # fmt: skip
    assert command.main([*given, "--protocol", "patch-knn", "--classes", "3"]) == 0
    assert "mIoU" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        command.main([*given, "--protocol", "patch-knn", "--classes", "2", "--overwrite"])
    assert ended.value.code == 2 and "class 2, but there are 2 (0 to 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocols": ("segmentation", "depth")}, "protocols segmentation, depth need different data"),
        ({"protocols": ("segmentation", "knn")}, "protocols segmentation, knn need different data"),
        ({"protocols": ("depth",), "classes": 3}, "--classes is 3, but depth has no classes; drop the flag"),
        ({"depth_scale": 1000.0}, "--depth-scale is 1000, but masks have no scale; drop the flag"),
        ({"transfer": (Named("more", "a", "b"),)}, "--transfer is more, but it is for images with labels, not masks"),
        ({"reader": "shards"}, "--reader is shards, but masks are read from folders of files; drop the flag"),
    ],
)
def test_what_does_not_belong_together_is_refused(request_of_shapes, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        evaluated(request_of_shapes, tmp_path, **changes)


def test_classes_beyond_the_number_are_refused(request_of_shapes, tmp_path):
    with pytest.raises(DataError, match=r"class 2, but there are 2 \(0 to 1\)"):
        evaluated(request_of_shapes, tmp_path, classes=2)
    found = evaluated(request_of_shapes, tmp_path, classes=9, protocols=("patch-knn",))
    assert "9 classes" in found.facts["train"]


def test_test_masks_have_no_class_beyond_the_training_masks(request_of_shapes, tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / "test" / folder).mkdir(parents=True)
        for path in list(Path(request_of_shapes.test, folder).iterdir()):
            (tmp_path / "test" / folder / path.name).symlink_to(path)
    (tmp_path / "test" / "masks" / "003.png").unlink()
    Image.new("L", (SIZE, SIZE), 5).save(tmp_path / "test" / "masks" / "003.png")
    with pytest.raises(DataError, match=r"test: 1 of 20 pairs .*003.png \(class 5, but there are 3 \(0 to 2\)"):
        evaluated(request_of_shapes, tmp_path / "to", test=str(tmp_path / "test"))


def test_class_lists_must_agree(request_of_shapes, tmp_path):
    root = Path(request_of_shapes.train).parent
    try:
        (root / "train" / "classes.json").write_text('["noise", "rows", "columns"]')
        found = evaluated(request_of_shapes, tmp_path / "named", protocols=("patch-knn",))
        assert "IoU, columns" in found.text()
        with pytest.raises(ConfigError, match="--classes is 4, but classes.json of .* names 3"):
            evaluated(request_of_shapes, tmp_path, classes=4)
        (root / "test" / "classes.json").write_text('["rows", "noise", "columns"]')
        with pytest.raises(DataError, match="classes.json of .* and of .* differ"):
            evaluated(request_of_shapes, tmp_path)
    finally:
        for split in ("train", "test"):
            (root / split / "classes.json").unlink(missing_ok=True)


def test_one_class_is_none(request_of_shapes, tmp_path):
    only = tmp_path / "only"
    for split in ("train", "test"):
        (only / split / "masks").mkdir(parents=True)
        (only / split / "images").symlink_to(Path(request_of_shapes.train, "images"))
        for name in Path(request_of_shapes.train, "masks").iterdir():
            Image.new("L", (SIZE, SIZE)).save(only / split / "masks" / name.name)
    with pytest.raises(DataError, match="has 1 class; give masks of 2 to 255"):
        evaluated(request_of_shapes, tmp_path, train=str(only / "train"), test=str(only / "test"))


def test_many_classes_stand_in_the_files_only(tmp_path):
    def measure(name: str, of_class: int | None = None) -> Measure:
        return Measure(protocol="segmentation", measure=name, value=0.5, low=0.25, high=0.75, of_class=of_class)

    results = DenseResults(
        facts={}, measures=[measure("mIoU"), *(measure("IoU", index) for index in range(30))], untrained=[]
    )
    assert "class 29" not in results.text() and "50.00%" in results.text()
    assert "IoU, class 29 | 50.00% | 25.00% - 75.00%" in results.markdown()


def test_a_figure_outside_its_interval_is_drawn(tmp_path):
    """The interval is that of images drawn again, which may all score higher, as where a rare class is then missing."""
    measure = Measure(protocol="segmentation", measure="mIoU", value=0.2, low=0.25, high=0.75)
    results = DenseResults(facts={}, measures=[measure], untrained=[measure])
    assert all(path.stat().st_size > 100 for path in results.write(tmp_path))
