"""Says what a file is that was given as weights and holds none. Reads a few bytes, and knows nothing of models."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

from ijepa_scale.errors import CheckpointError

_HEAD = 1024  # bytes that are looked at
_SAFETENSORS_LENGTH = 8  # bytes of the header's length, little endian. Source: the safetensors README, "Format"
_LARGE_FILE_STORES = {
    b"version https://git-lfs.github.com/": ("Git LFS", "run `git lfs pull` in its repository"),
    b"/annex/objects/": ("git-annex", "run `git annex get` in its repository"),
}
_TEXTS = {
    (b"<!doctype html", b"<html", b"<head"): "a web page, such as a login; download the file itself",
    (b"<?xml", b"<error"): "an XML document, such as a store's refusal; download the file itself",
    (b"{",): "JSON text, such as a server's error; download the weights themselves",
}  # fmt: skip
# Source: the magic numbers of file(1).
_MAGIC = {
    b"\x1f\x8b": "a gzip archive; unpack it and give the file inside",
    b"BZh": "a bzip2 archive; unpack it and give the file inside",
    b"\xfd7zXZ\x00": "an xz archive; unpack it and give the file inside",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it and give the file inside",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it and give the file inside",
    b"Rar!": "a RAR archive; unpack it and give the file inside",
    b"\x89HDF": "an HDF5 file, such as Keras'; convert it to .safetensors",
    b"\x93NUMPY": "a NumPy array; convert the model to .safetensors",
    b"GGUF": "a GGUF file; give the weights that it was made from",
}
# Source: torch/serialization.py, MAGIC_NUMBER, pickled by protocol 2: how files of PyTorch before 1.6 begin.
_TORCH_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_TORCH_ZIP, _SCRIPT = "data.pkl", "constants.pkl"  # members of each file of torch.save; of TorchScript's only


def check_kind(path: Path, *, is_index: bool = False) -> None:
    """Checks by its first bytes that a file may hold weights in the format that its suffix says, or be an index of it.

    Raises:
        CheckpointError: it can't be read, or is something else: a pointer of a large-file store, a web page, an
            archive, empty, cut short, or weights in the other format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD)
        found = _other_kind(path, head, size) if not (is_index and head.lstrip().startswith((b"{", b"["))) else None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}); check its permissions and the disk") from None
    if found is not None:
        raise CheckpointError(f"{path} holds no weights that can be read: it is {found}")


def _other_kind(path: Path, head: bytes, size: int) -> str | None:
    """Returns what the file is instead, with the remedy; None if nothing speaks against its suffix."""
    if not head.strip(b"\0"):
        return f"empty ({size} bytes, all zero); copy it again" if head else "empty (0 bytes); copy it again"
    for mark, (store, remedy) in _LARGE_FILE_STORES.items():
        if mark in head and size < _HEAD:
            return f"a pointer of {store}, {size} bytes that stand for the file; {remedy}"
    for mark, kind in _MAGIC.items():
        if head.startswith(mark):
            return kind
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for marks, kind in _TEXTS.items():
        if text.startswith(marks):
            return kind
    is_safetensors = head[_SAFETENSORS_LENGTH : _SAFETENSORS_LENGTH + 1] == b"{" and not head.startswith(b"PK")
    if tarfile.is_tarfile(path):
        return "a tar archive; unpack it and give the file inside"
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path, size)
    if head.startswith(_PICKLES) and not head.startswith(_TORCH_LEGACY) and not is_safetensors:
        return (
            "a plain pickle, which may hold code; load it with the program that wrote it, and torch.save its "
            "state_dict()"
        )
    if path.suffix.lower() == ".safetensors":
        return _safetensors_kind(head, size) if is_safetensors else None
    return "in the safetensors format; rename it to .safetensors" if is_safetensors else None


def _zip_kind(path: Path, size: int) -> str | None:
    """Returns what a zip archive is, if it isn't the PyTorch file that its suffix says."""
    if not zipfile.is_zipfile(path):
        return f"cut short: the end of its {size} bytes lacks the list of contents; copy it again"
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        return f"a damaged zip archive ({error}); copy it again"
    if _TORCH_ZIP not in members:
        return "a zip archive without PyTorch's data.pkl; unpack it and give the file inside"
    if _SCRIPT in members:
        return "a TorchScript program, which holds code; save its state_dict() with the program that wrote it"
    return "a PyTorch file; rename it to .pth" if path.suffix.lower() == ".safetensors" else None


def _safetensors_kind(head: bytes, size: int) -> str | None:
    """Returns whether a safetensors file ends inside its header; None if it doesn't."""
    whole = _SAFETENSORS_LENGTH + int.from_bytes(head[:_SAFETENSORS_LENGTH], "little")
    if size < whole:
        return f"cut short: {size} bytes, and its header alone has {whole}; copy it again"
    return None
