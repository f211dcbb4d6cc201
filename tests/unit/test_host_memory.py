"""The host memory that a process may take, from made-up system files, and the refusal of too many locked buffers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.host_memory import host_bytes
from ijepa_scale.train import setup

GIB = 2**30
MEMORY = f"MemTotal: 99 kB\nMemAvailable: {64 * GIB // 1024} kB\n"


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMORY, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, 64 * GIB),
        ({"sys/fs/cgroup/memory.max": f"{9 * GIB}\n", "sys/fs/cgroup/memory.current": f"{2 * GIB}\n"}, 7 * GIB),
        ({"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": f"{2 * GIB}\n"}, 64 * GIB),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{9 * GIB}",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}",
            },
            8 * GIB,
        ),
        (  # nearly all of it is page cache
            {
                "sys/fs/cgroup/memory.max": f"{9 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{9 * GIB}\n",
                "sys/fs/cgroup/memory.stat": f"anon {2 * GIB}\nactive_file {3 * GIB}\ninactive_file {4 * GIB}\n",
            },
            7 * GIB,
        ),
        (  # version 1 sums over groups inside under names of their own
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{9 * GIB}",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{8 * GIB}",
                "sys/fs/cgroup/memory/memory.stat": f"active_file 7\ntotal_active_file {GIB}\ntotal_inactive_file 0\n",
            },
            2 * GIB,
        ),
        (  # version 2 without a namespace, as under Slurm: the limit is on a group around the process's own
            {
                "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
                "sys/fs/cgroup/slurm/job_7/memory.max": f"{5 * GIB}",
                "sys/fs/cgroup/slurm/job_7/memory.current": f"{GIB}",
                "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max",
                "sys/fs/cgroup/slurm/job_7/step_0/memory.current": "0",
            },
            4 * GIB,
        ),
        (  # version 1 without a namespace
            {
                "proc/self/cgroup": "9:cpu:/a\n4:hugetlb,memory:/job_7\n",
                "sys/fs/cgroup/memory/job_7/memory.limit_in_bytes": f"{3 * GIB}",
                "sys/fs/cgroup/memory/job_7/memory.usage_in_bytes": f"{GIB}",
            },
            2 * GIB,
        ),
    ],
)
def test_the_tightest_limit_counts(tmp_path: Path, files: dict[str, str], left: int) -> None:
    assert host_bytes(system(tmp_path, files)) == left


def test_buffers_that_the_host_cannot_lock_are_refused_before_they_are_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(rank=0, size=1, local_rank=0, local_size=8, device=torch.device("cpu"))
    loader: Any = SimpleNamespace(buffer_bytes=2 * 10**9)
    monkeypatch.setattr(setup, "host_bytes", lambda: 15 * 10**9)
    setup.check_host_memory(loader, world)  # nothing is locked on the CPU

    gpu: Any = SimpleNamespace(local_size=8, device=SimpleNamespace(type="cuda"), gather=lambda tensor: tensor[None])
    made = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda values, device: made(values))
    text = "the loaders of a host's processes page-lock 16.00 GB for batches but the host has 15.00 GB left .*lower"
    with pytest.raises(ConfigError, match=text):
        setup.check_host_memory(loader, gpu)
    gpu.local_size = 7
    setup.check_host_memory(loader, gpu)
    other = made([20 * 10**9, 24 * 10**9])  # of a host with more processes
    gpu.gather = lambda tensor: torch.stack([tensor, other])
    with pytest.raises(ConfigError, match="page-lock 24.00 GB for batches but the host has 20.00 GB left"):
        setup.check_host_memory(loader, gpu)
