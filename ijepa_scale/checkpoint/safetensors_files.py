"""Reads safetensors files, and sets of them with an index. Knows nothing of models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ijepa_scale.checkpoint.file_kinds import check_kind
from ijepa_scale.checkpoint.torch_files import briefly
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.errors import CheckpointError

INDEX = ".index.json"  # what follows .safetensors in the name of an index. Source: huggingface_hub's serialization


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file, or of all files of an index, on the CPU, and the metadata of a single file.

    Raises:
        CheckpointError: a file is missing or can't be read, or lacks tensors that the index places in it.
    """
    if not path.name.endswith(INDEX):
        return _read(path)
    tensors: dict[str, Tensor] = {}
    for name, wanted in _shards(path).items():
        shard = path.with_name(name)
        if not os.path.isfile(shard):  # unlike Path.is_file, takes a name that no file can have
            raise CheckpointError(f"{path} names {name}, which isn't there; download it into {path.parent} too")
        check_kind(shard)
        found, _ = _read(shard)
        lacking = sorted(wanted - found.keys())
        if lacking:
            raise CheckpointError(f"{shard} lacks {lacking[0]}, which {path.name} places in it; download both again")
        tensors |= {each: found[each] for each in wanted}
    return tensors, {}


def files_of(path: Path) -> tuple[Path, ...]:
    """Returns the files whose bytes make up the weights: the file, or an index and all that it names."""
    return (path, *(path.with_name(name) for name in sorted(_shards(path)))) if path.name.endswith(INDEX) else (path,)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path} can't be read as safetensors ({briefly(error)}); copy it again") from error


def _shards(index: Path) -> Mapping[str, set[str]]:
    """Returns the names of the tensors in each file that an index names."""
    try:
        places = parse_json(index.read_bytes())["weight_map"]
        shards: dict[str, set[str]] = {}
        for tensor, name in places.items():
            shards.setdefault(name, set()).add(tensor)
            if not name or Path(name).name != name:
                raise ValueError(f"{name!r} isn't a file next to it")
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"{index} isn't an index of safetensors files ({type(error).__name__}: {briefly(error)}); download it again"
        ) from None
    return shards
