"""Reads PyTorch files with PyTorch's safe loader. Nothing that a file names is imported or run.

Objects that programs often store next to the weights, such as their options, are read as `Ignored`: the loader is told
to put this class in place of theirs.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ijepa_scale.errors import CheckpointError


class Ignored:
    """Stands for an object without weights. Takes whatever the file says about it, and keeps none of it."""

    def __new__(cls, *_: Any) -> Ignored:  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _mapping(*_: Any) -> OrderedDict:
    """Stands for a kind of dictionary; the loader fills it."""
    return OrderedDict()


def _sequence(*_: Any) -> list:
    """Stands for a kind of list; the loader fills it."""
    return []


_OBJECTS = (
    "argparse.Namespace", "types.SimpleNamespace",
    *(f"{module}.multiarray.{name}" for module in ("numpy.core", "numpy._core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype", "numpy.ndarray",
    *(f"{module}.{kind}{name}" for module in ("pathlib", "pathlib._local") for kind in ("", "Pure")
      for name in ("Path", "PosixPath", "WindowsPath")),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    "decimal.Decimal", "fractions.Fraction", "uuid.UUID", "typing.Any", "torch.torch_version.TorchVersion",
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes", "object",
                                      "slice", "range", "frozenset")),
    *(f"omegaconf.{name}" for name in (
        "dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata", "base.SCMode",
        "nodes.AnyNode", "nodes.StringNode", "nodes.IntegerNode", "nodes.FloatNode", "nodes.BooleanNode",
        "nodes.BytesNode", "nodes.PathNode", "nodes.EnumNode", "nodes.InterpolationResultNode",
    )),
)  # fmt: skip
_MAPPINGS = (
    "collections.defaultdict", "easydict.EasyDict", "addict.addict.Dict", "yacs.config.CfgNode", "attrdict.AttrDict",
    "lightning_fabric.utilities.data.AttributeDict", "lightning.fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict", "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
)  # fmt: skip
_SEQUENCES = ("collections.deque",)
# What a damaged file can raise inside PyTorch's loader.
_DAMAGE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError,
    AssertionError, ArithmeticError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
_REFUSED = re.compile(r"GLOBAL (\S+)|unrecognized function (.+)|types? allowlisted .*but got (.+)")


def read_torch_file(path: Path) -> Mapping[Any, Any]:
    """Returns the dictionary that a file of `torch.save` holds, on the CPU; tensors of zip files are memory-mapped.

    Raises:
        CheckpointError: it is damaged, holds no dictionary, or names a type that isn't known to be harmless.
    """
    stand_ins = [
        *((Ignored, name) for name in _OBJECTS),
        *((_mapping, name) for name in _MAPPINGS),
        *((_sequence, name) for name in _SEQUENCES),
    ]
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            # memory-mapped, because a published file also holds optimiser states of the size of four encoders
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _DAMAGE as error:
        refused = _REFUSED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is not None:
            name = next(filter(None, refused.groups())).rstrip(".,")
            raise CheckpointError(
                f"{path} isn't a file of tensors and plain values, and is refused: loading {name} could run code; "
                "convert it to .safetensors with the program that wrote it"
            ) from None
        raise CheckpointError(f"{path} can't be read as a PyTorch file ({briefly(error)}); copy it again") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors")
    return content


def briefly(error: BaseException) -> str:
    """Returns the first sentence of an error's text; its kind if it has none."""
    return (str(error).strip() or type(error).__name__).split(". ")[0].splitlines()[0]
