"""Reads damaged shards in a separate process; prints the number of each outcome and the memory growth.

Run it with: python -m tests.unit.data.fuzz_shards FOLDER [EXAMPLES]
"""

from __future__ import annotations

import collections
import io
import json
import resource
import signal
import sys
import tarfile
from datetime import timedelta
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ijepa_scale.config.schema import AugmentConfig
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources.tar_index import index_path
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError
from tests.unit.data.test_data_loader import jpeg

SAMPLES, SECONDS = 6, 20
# (offset, length) of the fields of a tar header, and values that a hostile header may contain
FIELDS = {"name": (0, 100), "size": (124, 12), "checksum": (148, 8), "type": (156, 1), "link": (157, 100)}
SIZES = [0, 1, 511, 513, 10**6, 8**11 - 1, 2**63]
TYPES = b"\001234567LKSxgXA\xff"

HEADER = (st.integers(0, 2 * SAMPLES - 1), st.sampled_from(sorted(FIELDS)), st.integers(0))
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("header"), *HEADER),
        st.tuples(st.just("header, sealed"), *HEADER),
        st.tuples(st.just("image"), st.integers(0, SAMPLES - 1), st.integers(0, 10**6), st.integers(0, 255)),
        st.tuples(st.just("byte"), st.integers(0, 10**6), st.integers(0, 255)),
        st.tuples(st.just("cut"), st.integers(0, 10**6)),
        st.tuples(st.just("twice"), st.integers(0, 10**6), st.integers(0, 4000)),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


def whole() -> tuple[bytes, list[int]]:
    """Returns a tar of labelled JPEGs, and the offsets of its headers."""
    stream = io.BytesIO()
    headers = []
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(SAMPLES):
            for name, content in ((f"{number}.jpg", jpeg(number, 40, 50)), (f"{number}.cls", b"%d" % number)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                headers.append(tar.offset)
                tar.addfile(info, io.BytesIO(content))
    return stream.getvalue(), headers


def changed(data: bytes, headers: list[int], changes: list[tuple]) -> bytes:
    """Returns the tar after the changes."""
    tar = bytearray(data)
    for kind, *values in changes:
        if kind.startswith("header"):
            header, field, number = headers[values[0]], *values[1:]
            begin, length = FIELDS[field]
            content = {
                "size": b"%011o\0" % SIZES[number % len(SIZES)],
                "type": bytes([TYPES[number % len(TYPES)]]),
                "name": [b"../x.jpg", b"/etc/passwd", b"\xff" * 100, b"", b"a\0b", b"./."][number % 6],
            }.get(field, number.to_bytes(40, "little", signed=False) if number < 2**320 else b"x")
            tar[header + begin : header + begin + length] = content[:length].ljust(length, b"\0")
            if kind == "header, sealed":
                tar[header + 148 : header + 156] = b" " * 8
                tar[header + 148 : header + 156] = b"%06o\0 " % sum(tar[header : header + 512])
        elif kind == "image":
            begin = headers[2 * values[0]] + 512
            tar[begin + values[1] % 1500] = values[2]
        elif kind == "byte":
            tar[values[0] % len(tar)] = values[1]
        elif kind == "cut":
            return bytes(tar[: values[0] % len(tar)])
        else:
            begin = values[0] % len(tar)
            tar[begin:begin] = tar[begin : begin + values[1]]
    return bytes(tar)


def read(path: Path) -> str:
    """Returns the outcome of reading the shard; fails if a sample is lost silently."""
    index_path(path).unlink(missing_ok=True)
    try:
        source = ShardSource([path])
        order = SampleOrder(source.shard_sizes, 1, 0, 1)
        loader = TrainLoader(
            source, order, AugmentConfig(), (16, 16), seed=0, stop_step=source.num_samples, max_bad_fraction=1.0
        )
        batches = list(loader)
    except DataError as error:
        assert str(error) and "\n" not in str(error)
        return "clear error"
    assert len(batches) == source.num_samples and all(batch.sizes.min() >= 1 for batch in batches)
    left_out = source.problems().counts.total()
    assert source.num_samples >= SAMPLES or left_out, "a sample is gone and nothing says so"
    return "counted" if left_out + loader.num_bad else "nothing to see"


def main(folder: Path, examples: int) -> None:
    """Prints counts by outcome, and the growth of resident memory in MB."""
    path = folder / "fuzzed.tar"
    data, headers = whole()
    path.write_bytes(data)
    assert read(path) == "nothing to see"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    endings: collections.Counter[str] = collections.Counter()

    @settings(
        max_examples=examples, deadline=timedelta(seconds=SECONDS), database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(CHANGES)
    def fuzz(changes: list[tuple]) -> None:
        path.write_bytes(changed(data, headers, changes))
        signal.alarm(SECONDS)  # ends the process, so a hang is a failure
        endings[read(path)] += 1
        signal.alarm(0)

    fuzz()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({**endings, "grown_mb": round(grown)}))


if __name__ == "__main__":
    np.seterr(all="raise")
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100)
