"""What is written tensor by tensor is what the library reads, with the bytes and the hash that were returned."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ijepa_scale.checkpoint import tensor_file
from ijepa_scale.checkpoint.tensor_file import write_tensors

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)


@given(
    sizes=st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), st.integers(1, 300), max_size=6),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_read_back(sizes: dict[str, int], data: st.DataObject, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tensor_file, "_BLOCK", data.draw(st.integers(1, 999)))
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    path = tmp_path / "a.safetensors"
    size, digest = write_tensors(path, list(tensors.items()))
    written = path.read_bytes()
    assert size == len(written) and digest == hashlib.sha256(written).hexdigest()
    read = load_file(path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_parts_of_larger_tensors_are_written_without_the_rest(tmp_path: Path) -> None:
    whole = torch.arange(20.0).view(4, 5)
    write_tensors(tmp_path / "a", [("columns", whole[:, 1]), ("middle", whole.view(-1)[7:13])])
    read = load_file(tmp_path / "a")
    assert read["columns"].tolist() == [1, 6, 11, 16] and read["middle"].tolist() == [7, 8, 9, 10, 11, 12]


def test_a_full_disk_is_an_error_of_the_system() -> None:
    assert os.path.exists("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_tensors(Path("/dev/full"), [("a", torch.ones(9))])


def test_a_call_that_writes_less_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems write a part, and say how much."""
    real = Path.open

    def open_slow(path: Path, mode: str, **options: object):
        file = real(path, mode, **options)

        class Slow:
            fileno, __enter__ = file.fileno, lambda self: self
            __exit__ = lambda self, *_: file.close()  # noqa: E731
            write = staticmethod(lambda data: file.write(data[:7]))

        return Slow()

    monkeypatch.setattr(Path, "open", open_slow)
    size, _ = write_tensors(tmp_path / "a", [("a", torch.arange(50.0))])
    monkeypatch.undo()
    assert size == (tmp_path / "a").stat().st_size
    assert load_file(tmp_path / "a")["a"].tolist() == list(range(50))
