"""Small but realistic image sets, for the tests of making shards."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ijepa_scale.data.shards.image_files import FolderImages
from ijepa_scale.data.shards.make import MakePlan, make_shards


def pixels_of(seed: int, height: int = 12, width: int = 10) -> np.ndarray:
    """Returns smooth pixels that depend on the seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encoded(seed: int, kind: str = "JPEG", size: tuple[int, int] = (12, 10)) -> bytes:
    """Returns an encoded image of (height, width) pixels."""
    stream = io.BytesIO()
    Image.fromarray(pixels_of(seed, *size)).save(stream, kind)
    return stream.getvalue()


def class_folders(root: Path, count: int = 30, classes: tuple[str, ...] = ("b", "a", "c")) -> Path:
    """Writes ROOT/CLASS/NUMBER.JPEG, `count` in all, and returns ROOT."""
    for number in range(count):
        path = root / classes[number % len(classes)] / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, ("JPEG", "PNG", "WEBP")[number // 3 % 3]))
    return root


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Appends a regular file to a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def tar_of(folder: Path, path: Path, prefix: str = "") -> Path:
    """Writes the files below a folder into a tar, in reverse order."""
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*"), reverse=True):
            if file.is_file():
                add(tar, f"{prefix}{file.relative_to(folder)}", file.read_bytes())
    return path


class _Member(zipfile.ZipInfo):
    """A member whose name may hold any bytes, written without a mark of its encoding then, as Info-ZIP does."""

    def _encodeFilenameFlags(self):  # noqa: N802
        try:
            return super()._encodeFilenameFlags()
        except UnicodeEncodeError:
            return os.fsencode(self.filename), self.flag_bits


def zip_of(folder: Path, path: Path, prefix: str = "", **options) -> Path:
    """Writes the files and links below a folder into a ZIP archive, in reverse order, every other one deflated."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for number, file in enumerate(sorted(folder.rglob("*"), reverse=True)):
            member = _Member(f"{prefix}{file.relative_to(folder)}" + "/" * (file.is_dir() and not file.is_symlink()))
            member.create_system = 3
            member.compress_type = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            if file.is_symlink():
                member.external_attr = 0o120777 << 16
                archive.writestr(member, os.readlink(file))
            elif file.is_file() or file.is_dir():
                archive.writestr(member, file.read_bytes() if file.is_file() else b"")
    return path


def parquet_of(
    images: list[bytes | None], path: Path, *, labels=None, names=None, column="image", plain=False, rows=3, **more
) -> Path:
    """Writes images and labels into a Parquet file as Hugging Face does, or as a `plain` column of bytes."""
    kind = pa.binary() if plain else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = images if plain else [{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images)]
    columns = {column: pa.array(values, kind), **({} if labels is None else {"label": labels}), **more}
    table = pa.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}, column: {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows)
    return path


def tar_of_tars(folder: Path, path: Path) -> Path:
    """Writes class folders in ImageNet's format: a member CLASS.tar for each class, with its images in no folder."""
    with tarfile.open(path, "w") as outer:
        for entry in sorted(folder.iterdir(), reverse=True):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for file in sorted(entry.iterdir()):
                    add(inner, file.name, file.read_bytes())
            add(outer, f"{entry.name}.tar", stream.getvalue())
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Returns the content of all files in a folder of shards, except the mtime that each index records."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".idx.npz"):
            with np.load(path) as arrays:
                found[path.name] = b"".join(arrays[name].tobytes() for name in sorted(arrays) if name != "stamp")
        else:
            found[path.name] = path.read_bytes()
    return found


PLAN = MakePlan(shard_bytes=2500)


def damaged_folders(root: Path) -> Path:
    """Writes 30 images, two of which can't be decoded, and returns `root`."""
    class_folders(root)
    (root / "a" / "1.JPEG").write_bytes(b"no image at all")
    whole = (root / "c" / "2.JPEG").read_bytes()
    (root / "c" / "2.JPEG").write_bytes(whole[: len(whole) // 2])
    return root


def make(folder: Path, to: Path, **options):
    """Makes small shards from class folders, in which a tenth of the images may be bad."""
    return make_shards(FolderImages(folder), to, plan=PLAN, **{"max_bad_fraction": 0.1, **options})
