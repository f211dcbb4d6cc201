"""Images for evaluation equal PIL's and come in the requested order."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from ijepa_scale.data.eval_reader import IMAGENET_MEAN, IMAGENET_STD, EvalReader, center_crop, spread
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError


def pixels_of(number, height, width):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(300, 400), (401, 299), (256, 256), (60, 500), (17, 16)])
@pytest.mark.parametrize("size", [224, 96])
def test_equals_torchvision_on_pil_images(shape, size):
    pixels = pixels_of(0, *shape)
    theirs = v2.Compose([v2.Resize(round(size / 0.875), v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])
    expected = np.asarray(theirs(Image.fromarray(pixels)))
    np.testing.assert_array_equal(center_crop(pixels, (size, size), 0.875), expected)


def test_oblong_sizes_are_covered():
    assert center_crop(pixels_of(0, 300, 400), (64, 96), 1.0).shape == (64, 96, 3)
    assert center_crop(pixels_of(0, 400, 100), (64, 96), 0.875).shape == (64, 96, 3)


def test_small_images_of_the_right_size_are_only_normalised(tmp_path):
    images = [pixels_of(n, 28, 28) for n in range(7)]
    source = ShardSource(write_shards([Sample(f"{n}", png(p), n) for n, p in enumerate(images)], tmp_path))
    ids = [5, 0, 3, 6, 1]
    batches = list(EvalReader(source, (28, 28), ids=ids, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch.labels for batch in batches]).tolist() == ids
    assert np.concatenate([batch.sample_ids for batch in batches]).tolist() == ids
    expected = torch.stack([torch.from_numpy(images[n]).permute(2, 0, 1) / 255.0 for n in ids])
    expected = (expected - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    torch.testing.assert_close(torch.cat([batch.images for batch in batches]), expected, atol=1e-5, rtol=0)
    helped = list(EvalReader(source, (28, 28), ids=ids, batch_size=2, workers=1))
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, helped, strict=True))


@pytest.mark.parametrize("wished", [True, False])
def test_batches_are_page_locked_if_wished(wished, tmp_path, monkeypatch):
    """Here a tensor that is "locked" is a copy of which 1 was taken."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor - 1)
    source = ShardSource(write_shards([Sample(f"{n}", png(pixels_of(n, 28, 28)), n) for n in range(3)], tmp_path))
    for workers in (0, 1):
        batches = list(EvalReader(source, (28, 28), ids=range(3), batch_size=2, workers=workers, pin_memory=wished))
        assert torch.cat([batch.labels for batch in batches]).tolist() == [n - wished for n in range(3)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_ends_the_evaluation(tmp_path, workers):
    source = ShardSource(write_shards([Sample("a", png(pixels_of(0, 9, 9))[:60], 0)], tmp_path))
    with pytest.raises(DataError, match="sample .*:a: not a decodable image"):
        list(EvalReader(source, (28, 28), ids=[0], workers=workers))


@pytest.mark.parametrize(("count", "chosen"), [(10, 3), (10, 10), (3, 10), (1000, 7), (5, 0)])
def test_spread(count, chosen):
    ids = spread(count, chosen)
    assert len(ids) == min(count, chosen) == len(set(ids.tolist()))
    if len(ids) > 1:
        gaps = np.diff(ids)
        assert ids[0] == 0 and ids[-1] < count and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
