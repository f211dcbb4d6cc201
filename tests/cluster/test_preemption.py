"""Jobs of a real Slurm that jobs of a higher partition preempt: what they save, and who starts them again.

Skipped by name where Slurm can't be started: it needs root and Debian's packages slurm-wlm, munge and iproute2.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm as machine
from tests.cluster.slurm import Slurm, missing
from tests.cluster.test_slurm import STEPS, command, data, endings, equal, repeated, submit, told, wait_for_step, whole

pytestmark = [pytest.mark.long, pytest.mark.nightly, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
__all__ = ["command", "data", "whole"]  # fixtures

LOW = {"requeue": ("REQUEUE", 0), "cancel": ("CANCEL", 0), "grace": ("CANCEL", 60)}  # partition -> mode, grace, s
PREEMPTION = """PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Returns a Slurm with a partition for each way of being preempted."""
    lines = [f"PartitionName={name} Nodes=ALL PriorityTier=1 PreemptMode={mode} GraceTime={grace} State=UP\n"
             for name, (mode, grace) in LOW.items()]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "CONF", machine.CONF + PREEMPTION + "".join(lines))
        with machine.started(tmp_path_factory.mktemp("slurm") / "files") as found:
            yield found


@pytest.mark.parametrize("partition", LOW)
def test_a_preempted_job_saves(partition: str, slurm: Slurm, command, data: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = submit(command, data, tmp_path, "--partition", partition)
    wait_for_step(20, folder)
    flags = ("--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--chdir=/")
    urgent = slurm.run("sbatch", *flags, "--wrap=sleep 1").strip()
    slurm.wait(urgent, "COMPLETED")
    if partition == "cancel":  # Slurm ends the job, without time for it to requeue itself
        time.sleep(3)
        assert slurm.job(job)["JobState"] == "PREEMPTED", told(folder)
        assert [code for code, _ in endings(folder)] == [75]
        job = submit(command, data, tmp_path, "--partition", partition)
    found = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", "PREEMPTED")
    assert found["JobState"] == "COMPLETED", (found, told(folder))
    equal(folder, whole)
    (code, checkpoint), last = endings(folder)
    assert code == 75 and "step-00000020" <= checkpoint < f"step-{STEPS:08d}" and last[0] == 0
    assert repeated(folder) == 0
