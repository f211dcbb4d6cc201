"""All images of an evaluation set are tried before anything is trained, and all processes raise the same error."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest

from ijepa_scale.data.eval_reader import bad_images
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.features import check_images, local_ids
from tests.unit.data.shards.image_sets import class_folders


def a_set(tmp_path, bad):
    root = class_folders(tmp_path / "set", 30)
    for number in range(bad):
        (root / "b" / f"bad{number}.jpg").write_bytes(b"text")
    os.mkfifo(root / "c" / "pipe.jpg")
    return ImageFolderSource(root)


@pytest.mark.parametrize("workers", [0, 1])
def test_all_bad_images_are_found(tmp_path, workers):
    source = a_set(tmp_path, 3)
    found = bad_images(source, np.arange(source.num_samples), workers=workers)
    assert len(found) == 4 and all(f"bad{number}.jpg (not an image of" in found[number] for number in range(3))
    assert "pipe.jpg (not a regular file" in found[3]


@pytest.mark.parametrize("size", [1, 4])
def test_all_processes_raise_the_same_error(tmp_path, size):
    source = a_set(tmp_path, 6)
    ids = np.arange(source.num_samples)
    parts = [bad_images(source, local_ids(ids, rank, size)) for rank in range(size)]
    texts = set()
    for rank in range(size):
        world = SimpleNamespace(rank=rank, size=size, gather_objects=lambda mine: parts if mine in parts else None)
        with pytest.raises(
            DataError, match="evaluate.test: 7 of 37 images can't be used, and .*; and 2 more"
        ) as caught:
            check_images(source, ids, "evaluate.test", world=world)
        texts.add(str(caught.value))
    assert len(texts) == 1
    good = np.flatnonzero([".JPEG" in source.name(n) for n in ids])
    check_images(source, good, "x", world=SimpleNamespace(rank=0, size=1, gather_objects=lambda mine: [mine]))
