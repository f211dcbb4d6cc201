"""Each adapter is short, and gives the package's own features to the benchmark, where that is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ijepa_scale
from ijepa_scale.models.registry import build_encoder

ADAPTERS = sorted((Path(ijepa_scale.__file__).parent / "adapters").glob("[!_]*.py"))
OPTIONS = {"image_size": 16, "heads": 3}


@pytest.fixture
def source(tmp_path: Path) -> str:
    built = build_encoder("vit_tiny", image_size=16, patch_size=4, width=24, depth=4, heads=3, seed=3)
    save_file(built.state_dict(), tmp_path / "encoder.safetensors")
    return str(tmp_path / "encoder.safetensors")


def pictures(count: int) -> list[Image.Image]:
    """Dark and bright ones in turn."""
    generator = np.random.default_rng(0)
    return [
        Image.fromarray((generator.integers(0, 120, (20, 18, 3)) + 130 * (number % 2)).astype(np.uint8))
        for number in range(count)
    ]


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_an_adapter_has_at_most_20_lines(path):
    assert len([line for line in path.read_text().splitlines() if line]) <= 20


def test_mteb_evaluates_an_encoder(source, tmp_path):
    mteb = pytest.importorskip("mteb", reason="mteb isn't installed")
    datasets = pytest.importorskip("datasets", reason="datasets isn't installed")
    from ijepa_scale.adapters.mteb_images import ImageEncoder

    class Brightness(type(mteb.get_task("MNIST"))):
        def load_data(self, **_: object) -> None:
            rows = {"image": pictures(80), "label": [0, 1] * 40}
            self.dataset = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=FORM), test=None)
            self.dataset["test"] = self.dataset["train"]
            self.data_loaded = True

    FORM = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    adapter = ImageEncoder(source, **OPTIONS)
    found = mteb.evaluate(adapter, Brightness(), cache=None).task_results[0].scores["test"][0]
    assert found["accuracy"] > 0.9
    other = ImageEncoder(source, **{**OPTIONS, "image_size": 24})
    assert other.mteb_model_meta.revision != adapter.mteb_model_meta.revision  # MTEB keeps results by it
    encoder, transform = ijepa_scale.load(source, **OPTIONS)
    expected = ijepa_scale.features(encoder, pictures(5), transform=transform)
    batches = [{"image": pictures(5)[:3]}, {"image": pictures(5)[3:]}]
    assert torch.allclose(adapter.encode(batches), expected, atol=1e-6)


def test_visbench_probes_an_encoder(source, tmp_path):
    visbench = pytest.importorskip("visbench", reason="visbench isn't installed")
    from visbench.cache import FeatureCache
    from visbench.data.image_folder import ImageFolderDataset

    from ijepa_scale.adapters.visbench_backbone import backbone

    adapter = backbone(source, **OPTIONS)
    encoder, transform = ijepa_scale.load(source, **OPTIONS)
    images = transform(pictures(3))
    found = adapter.extract_features(adapter.preprocess(pictures(3)), layers=[1, 3])
    with torch.no_grad():
        expected = encoder(images, last=3)
    for ours, theirs in ((expected[0], found["dense_layers"][0]), (expected[2], found["dense"])):
        assert torch.allclose(ours.transpose(1, 2).unflatten(2, (4, 4)), theirs, atol=1e-6)
    assert torch.allclose(found["pooled"], ijepa_scale.features(encoder, images), atol=1e-6)
    for number, picture in enumerate(pictures(40)):
        path = tmp_path / ("train" if number < 20 else "test") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    train, test = (ImageFolderDataset(tmp_path / split) for split in ("train", "test"))
    result = visbench.run(adapter, "classification", test, train, cache=FeatureCache(root=tmp_path / "cache"))
    assert result.metrics["top1"] > 0.9
