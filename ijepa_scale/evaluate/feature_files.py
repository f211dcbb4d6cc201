"""Files of features: .npy, .safetensors and .parquet, each whole when it has its name. Knows nothing of images.

A Parquet file has the columns `name` and `features`. Next to the others stands FILE.names.txt, a line per row.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ijepa_scale.errors import ConfigError
from ijepa_scale.new_file import new_file

Rows = Callable[[], Iterator[tuple[np.ndarray, list[str]]]]  # (n, D) float32 and n names, from the first row on
SUFFIXES = (".npy", ".safetensors", ".parquet")


def check_format(path: Path) -> None:
    """Checks that features can be written into such a file.

    Raises:
        ConfigError: its suffix is unknown, or a package is missing.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} ends in {path.suffix!r}; choose one of {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{path} needs pyarrow, which isn't installed; pip install pyarrow, or choose .npy")


def write_features(path: Path, shape: tuple[int, int], rows: Rows, facts: dict[str, Any]) -> None:
    """Writes features (N, D) float32 with their names, one after another, and renames the whole file.

    `facts` are stored with them where the format can.

    Raises:
        ConfigError: the file can't be written.
    """
    try:
        with new_file(path) as temporary:
            if path.suffix == ".parquet":
                _write_parquet(temporary, shape[1], rows, facts)
                return
            with new_file(path.with_name(f"{path.name}.names.txt")) as names:
                with names.open("w", encoding="utf-8") as file:
                    file.writelines(f"{name}\n" for _, several in rows() for name in several)
                if path.suffix == ".npy":
                    _write_array(temporary, shape, rows)
                    return
                with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".unfinished-", suffix=".npy") as whole:
                    _write_array(Path(whole.name), shape, rows)
                    features = torch.from_numpy(np.load(whole.name, mmap_mode="c"))
                    save_file({"features": features}, temporary, metadata={k: str(v) for k, v in facts.items()})
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error}); free space, and start again: parts are kept") from None


def _write_array(path: Path, shape: tuple[int, int], rows: Rows) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for features, _ in rows():
            file.write(np.ascontiguousarray(features, dtype="<f4").tobytes())


def _write_parquet(path: Path, width: int, rows: Rows, facts: dict[str, Any]) -> None:
    import pyarrow  # an optional dependency
    import pyarrow.parquet

    schema = pyarrow.schema(
        [("name", pyarrow.string()), ("features", pyarrow.list_(pyarrow.float32(), width))],
        metadata={"ijepa_scale": json.dumps(facts)},
    )
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        for features, names in rows():
            values = pyarrow.array(np.ascontiguousarray(features).reshape(-1))
            column = pyarrow.FixedSizeListArray.from_arrays(values, width)
            file.write_table(pyarrow.table([pyarrow.array(names), column], schema=schema))
