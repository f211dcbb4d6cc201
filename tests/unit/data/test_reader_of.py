"""Which reader suits a path: told by what is there, refused where it would be a guess."""

from __future__ import annotations

from pathlib import Path

import pytest

from ijepa_scale.data.sources.open import reader_of
from ijepa_scale.errors import DataError


def put(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return str(path)


def test_folders_lists_patterns_and_addresses(tmp_path):
    put(tmp_path / "photos" / "a.jpg")
    put(tmp_path / "shards" / "0.TAR")
    for name, reader in (
        (str(tmp_path / "photos"), "imagefolder"), (f"{tmp_path}/photos/**", "imagefolder"),
        (f"{tmp_path}/photos/.", "imagefolder"), (str(tmp_path / "shards"), "shards"),
        (put(tmp_path / "list.txt"), "list"), (put(tmp_path / "list.CSV"), "list"), (put(tmp_path / "a.tar"), "shards"),
        (f"{tmp_path}/{{000..127}}.tar", "shards"), ("https://example.org/a.tar", "shards"),
    ):  # fmt: skip
        assert reader_of(name) == reader, name


def test_a_folder_of_images_with_a_stray_tar_is_refused(tmp_path):
    put(tmp_path / "a.jpg"), put(tmp_path / "b.png"), put(tmp_path / "backup.tar"), put(tmp_path / ".hidden.tar")
    with pytest.raises(DataError, match="holds 2 images and 1 tars, and which are meant isn't guessed"):
        reader_of(str(tmp_path))


def test_what_no_reader_reads_says_what_to_do(tmp_path):
    for path, said in (
        (put(tmp_path / "a.zip"), "launch/shards.py make --from zip --root"),
        (put(tmp_path / "a.parquet"), "launch/shards.py make --from parquet --root"),
        (put(tmp_path / "a.jpg"), "is one image; give the folder that it is in"),
        (str(tmp_path / "nothing"), "doesn't exist or can't be reached"),
    ):
        with pytest.raises(DataError, match=said):
            reader_of(path)
