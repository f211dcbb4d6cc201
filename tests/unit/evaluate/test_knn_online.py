import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale.config.schema import KnnConfig
from ijepa_scale.data.eval_reader import EvalReader
from ijepa_scale.data.sources.open import build_source
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.evaluator import ImageSettings
from ijepa_scale.evaluate.features import extract_features, gather_features, local_ids
from ijepa_scale.evaluate.online import OnlineKnn

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=CPU)
NORMALISATION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGES = ImageSettings(size=(8, 8), **NORMALISATION)


def write_shard(folder, name, count, *, labelled=True):
    """Writes 8 x 8 images with noise in one of three colours, which is the label."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(name))
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for number in range(count):
            label = number % 3
            pixels = rng.integers(0, 60, (8, 8, 3))
            pixels[..., label] += 190
            png = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(png, format="PNG")
            members = {"png": png.getvalue()} | ({"cls": str(label).encode()} if labelled else {})
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(folder)


def tokens(images):
    """Replaces an encoder: returns the mean colours of the four quarters as tokens."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(2).mT


@pytest.mark.parametrize("count,world", [(1, 1), (7, 1), (7, 3), (2, 4), (8, 4)])
def test_parts_are_equally_long_and_cover_everything(count, world):
    ids = np.arange(100, 100 + count)
    parts = [local_ids(ids, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert np.concatenate(parts)[:count].tolist() == ids.tolist()


def test_features_are_means_of_tokens_in_order(tmp_path):
    source = build_source("shards", write_shard(tmp_path / "train", "train", 11))
    reader = EvalReader(source, (8, 8), ids=np.arange(11), batch_size=4, **NORMALISATION)
    features = extract_features(tokens, reader, CPU)
    images = torch.cat([batch.images for batch in reader])
    assert features.shape == (11, 3) and features.dtype == torch.float32
    assert torch.allclose(features, images.mean(dim=(2, 3)), atol=1e-6)


def test_features_of_several_processes_equal_those_of_one(tmp_path):
    source = build_source("shards", write_shard(tmp_path / "train", "train", 11))
    ids = np.arange(11)

    def part(rank, world):
        reader = EvalReader(source, (8, 8), ids=local_ids(ids, rank, world), batch_size=3, **NORMALISATION)
        return extract_features(tokens, reader, CPU)

    alone = gather_features(part(0, 1), ALONE.gather, 11)
    together = gather_features(part(0, 4), lambda _: torch.stack([part(rank, 4) for rank in range(4)]), 11)
    assert alone.shape == (11, 3) and torch.equal(alone, together)


def test_accuracy_of_an_encoder_that_sees_and_of_one_that_does_not(tmp_path):
    config = KnnConfig(
        train=write_shard(tmp_path / "train", "train", 30), test=write_shard(tmp_path / "test", "test", 12),
        max_train=24, batch_size=5, neighbors=3,
    )  # fmt: skip
    online = OnlineKnn(config, IMAGES, ALONE)
    assert online.run(tokens) == {"knn": 1.0, "linear": 1.0}
    assert online.run(lambda images: torch.ones(len(images), 4, 2))["knn"] == pytest.approx(1 / 3)


def test_unlabelled_images_are_refused_before_the_start(tmp_path):
    config = KnnConfig(
        train=write_shard(tmp_path / "train", "train", 6),
        test=write_shard(tmp_path / "test", "test", 6, labelled=False),
    )
    with pytest.raises(DataError, match=r"evaluate.test: 6 of 6 images have no label \(the first is .*test.tar:0000"):
        OnlineKnn(config, IMAGES, ALONE)
