from __future__ import annotations

import pytest

from ijepa_scale.environment import Launch, detect_launch, first_host
from ijepa_scale.errors import ConfigError

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "12", "SLURM_STEP_NUM_TASKS": "12", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "8,4", "SLURM_JOB_NODELIST": "gpu[003-004]",
}  # fmt: skip


def test_alone() -> None:
    assert detect_launch({}) == Launch()
    assert detect_launch({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == Launch()


def test_torchrun_and_deepspeed() -> None:
    found = detect_launch(TORCHRUN)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (3, 8, 1, 2)
    assert (found.address, found.port) == ("a", 29500)
    deepspeed = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "4"}
    assert detect_launch(deepspeed).local_world_size == 4


def test_srun() -> None:
    found = detect_launch(SLURM)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (9, 12, 1, 4)
    assert found.address == "gpu003" and found.launcher == "srun"
    assert found.port == detect_launch({**SLURM, "SLURM_PROCID": "0"}).port
    assert found.port != detect_launch({**SLURM, "SLURM_JOB_ID": "13"}).port
    assert detect_launch({**SLURM, "SLURM_NODEID": "0"}).local_world_size == 8


def test_torchrun_inside_a_slurm_job_goes_before_slurm() -> None:
    assert detect_launch({**SLURM, **TORCHRUN}).launcher == "torchrun or deepspeed"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-007,011],login1", "gpu003"),
        ("a1,b2", "a1"),
        ("rack2-[1,5]x,z", "rack2-1x"),
        ("localhost", "localhost"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing; start with torchrun"),
        ({**TORCHRUN, "RANK": "a"}, "isn't a whole number"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 is outside the 8 processes"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "many"}, r"expected a form like 8\(x2\),4"),
    ],
)
def test_refusals(variables: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        detect_launch(variables)
