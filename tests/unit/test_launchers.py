"""Which process of a run this is, as each launcher says it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.errors import ConfigError
from ijepa_scale.launchers import Launch, detect, first_host

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}  # fmt: skip
KUBERNETES = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
SLURM = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "12", "SLURM_STEP_NUM_TASKS": "12", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "8,4", "SLURM_JOB_NODELIST": "gpu[003-004]",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-a-77@1", "PMIX_RANK": "1",
}  # fmt: skip
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "n1"}


def place(launch: Launch) -> tuple[int, int, int, int]:
    return launch.rank, launch.world_size, launch.local_rank, launch.local_world_size


def test_alone() -> None:
    assert detect({}) == Launch()
    assert detect({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == Launch()
    assert detect({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}) == Launch(launcher="srun")
    assert detect({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}) == Launch(launcher="mpirun")


def test_torchrun_and_deepspeed() -> None:
    found = detect(TORCHRUN)
    assert place(found) == (3, 8, 1, 2)
    assert (found.address, found.port) == ("a", 29500)
    assert not found.store_is_there
    assert detect({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}).store_is_there
    assert not detect({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "False"}).store_is_there
    deepspeed = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "4"}
    assert detect(deepspeed).local_world_size == 4


def test_kubernetes_starts_one_process_in_each_pod() -> None:
    found = detect(KUBERNETES)
    assert place(found) == (3, 8, 0, 1) and found.launcher == "environment"


def test_srun() -> None:
    found = detect(SLURM)
    assert place(found) == (9, 12, 1, 4)
    assert found.address == "gpu003" and found.launcher == "srun"
    assert detect({**SLURM, "SLURM_NODEID": "0"}).local_world_size == 8


def test_mpirun_of_open_mpi() -> None:
    found = detect(OPEN_MPI)
    assert place(found) == (1, 4, 1, 4)
    assert found.address == "127.0.0.1" and found.launcher == "mpirun"
    several = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert detect({**several, "MASTER_ADDR": "node1", "MASTER_PORT": "5"}).port == 5
    with pytest.raises(ConfigError, match=r"4 processes on several hosts but MASTER_ADDR isn't set; .*-x MASTER_ADDR"):
        detect(several)


def test_mpirun_of_mpich() -> None:
    assert place(detect(HYDRA)) == (2, 4, 0, 2)
    found = detect({"PMI_RANK": "2", "PMI_SIZE": "4"})
    assert place(found) == (2, 4, 2, 4) and (found.address, found.port) == ("127.0.0.1", 29500)


def test_mpirun_inside_slurm() -> None:
    """Both start their servers with srun, whose variables the processes inherit."""
    server = {**SLURM, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    assert place(detect({**server, **HYDRA})) == (2, 4, 0, 2)
    assert place(detect({**server, **OPEN_MPI})) == (1, 4, 1, 4)
    assert detect({**SLURM, "PMI_RANK": "9", "PMI_SIZE": "12"}).launcher == "srun"  # srun --mpi=pmi2


def test_torchrun_goes_before_the_job_it_is_in() -> None:
    assert detect({**SLURM, **OPEN_MPI, **TORCHRUN}).launcher == "torchrun or deepspeed"


@given(rank=st.integers(0, 11), job=st.integers(1, 10**6))
def test_all_processes_of_a_job_find_the_same_port(rank: int, job: int) -> None:
    slurm = {**SLURM, "SLURM_JOB_ID": str(job)}
    port = detect(slurm).port
    assert detect({**slurm, "SLURM_PROCID": str(rank)}).port == port
    assert 20_000 <= (port or 0) < 32_000  # Linux's ports for outgoing connections begin at 32768
    mpi = {**OPEN_MPI, "PMIX_NAMESPACE": str(job)}
    assert detect({**mpi, "OMPI_COMM_WORLD_RANK": str(rank % 4)}).port == detect(mpi).port


def test_jobs_that_share_a_host_have_different_ports() -> None:
    jobs = [{**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(20) for step in range(5)]
    ports = [detect(job).port for job in jobs]
    assert len(set(ports)) > 95


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-007,011],login1", "gpu003"),
        ("a1,b2", "a1"),
        ("rack2-[1,5]x,z", "rack2-1x"),
        ("localhost", "localhost"),
        ("rack[1-2]-n[03-04,9],x", "rack1-n03"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing; start with torchrun"),
        ({**TORCHRUN, "RANK": "a"}, "isn't an integer"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 is outside the 8 processes"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT is 99999; give one from 1 to 65535"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "local rank 2 is outside the 2 processes of this host; check LOCAL_RANK"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "many"}, r"expected a form like 8\(x2\),4"),
        ({"PMIX_RANK": "1"}, "nothing tells how many processes there are; start with torchrun"),
        ({"SLURM_NTASKS": "16", "SLURM_JOB_ID": "3"}, "16 tasks but this process is none of them; start it with srun"),
    ],
)
def test_refusals(variables: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        detect(variables)


def test_a_process_that_starts_the_others_is_no_task_of_a_job() -> None:
    assert detect({"SLURM_NTASKS": "16", "SLURM_JOB_ID": "3"}, starts_others=True) == Launch()


@given(
    st.dictionaries(st.sampled_from([*TORCHRUN, *SLURM, *OPEN_MPI, *HYDRA]), st.sampled_from(["0", "1", "2", "x", ""]))
)
def test_any_variables_give_a_place_or_one_line(variables: dict[str, str]) -> None:
    try:
        found = detect(variables)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert 0 <= found.rank < found.world_size and 0 <= found.local_rank < found.local_world_size


def test_ranks_are_a_permutation_under_srun() -> None:
    tasks = itertools.product(range(2), range(8))
    env = [
        {**SLURM, "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": str(8 * node + local),
         "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node), "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
        for node, local in tasks
    ]  # fmt: skip
    assert [place(detect(each)) for each in env] == [(rank, 16, rank % 8, 8) for rank in range(16)]
