"""Files of one array, of any size: written part by part, read memory-mapped. Knows nothing of what is in them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ijepa_scale.new_file import new_file
from ijepa_scale.regular_file import check_regular

logger = logging.getLogger(__name__)


def write_array(path: Path, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """Writes an array of this shape from parts along its first axis, all of one dtype, as an NPY file.

    Doesn't write through a memory map, since that ends the process when the disk is full.

    Raises:
        OSError: it can't be written; nothing is left.
    """
    count = 0
    with new_file(path) as temporary, temporary.open("wb") as file:
        for part in parts:
            if count == 0:
                descr = np.lib.format.dtype_to_descr(part.dtype)
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(part).data)
            count += len(part)
        assert count == shape[0] > 0


def opened(path: Path, count: int) -> np.ndarray | None:
    """Returns the array (count, ...) in a file, memory-mapped, or None if there is no file.

    Also None for a file that was cut or holds anything else than one array of plain numbers; that is logged.

    Raises:
        OSError: it can't be read.
    """
    try:
        check_regular(path)
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, OverflowError, SyntaxError, TypeError, MemoryError) as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
    else:
        if isinstance(found, np.ndarray) and found.shape[:1] == (count,) and found.dtype.kind in "fu":
            return found
        problem = f"it holds no {count} rows of numbers"
    logger.warning("%s is damaged (%s); it is recomputed", path, problem)
    return None
