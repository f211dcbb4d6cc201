"""What is asked of Slurm, by commands that stand in for Slurm's, and how a job goes on when its tasks have ended."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from ijepa_scale.checkpoint.manifest import MANIFEST
from ijepa_scale.cluster import jobs
from ijepa_scale.errors import UserError
from launch import slurm

ROOT = Path(__file__).parents[3]
H14 = str(ROOT / "configs" / "in1k_vith14_ep300.yaml")
STUB = (
    '#!/bin/bash\necho "${0##*/} $*" >> "$STUBS/said"\ncat "$STUBS/${0##*/}.says"\nexit $(cat "$STUBS/${0##*/}.code")\n'
)
FORM = "{:<32}{:<400}{:<20}{:<60}{:<10}\n"


class Stubs:
    """Stand-ins for Slurm's commands, each of which says what it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("sbatch", "squeue", "scontrol", "scancel"):
            (folder / name).write_text(STUB)
            (folder / name).chmod(0o755)
            self.says(name, "")

    def says(self, name: str, text: str, code: int = 0) -> None:
        (self.folder / f"{name}.says").write_text(text)
        (self.folder / f"{name}.code").write_text(str(code))

    def state(self, name: str, nodes: str = "a[1-2]", reason: str = "None", restarts: int = 0) -> None:
        self.says("squeue", FORM.format(name, nodes, "1:02", reason, restarts))

    def said(self) -> list[str]:
        path = self.folder / "said"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not line.startswith("squeue")]


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    (tmp_path / "stubs").mkdir()
    found = Stubs(tmp_path / "stubs")
    monkeypatch.setenv("PATH", f"{found.folder}:/usr/bin:/bin")
    monkeypatch.setenv("STUBS", str(found.folder))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return found


def submit(folder: Path, *words: str) -> int:
    return slurm.main(["pretrain", "--config", H14, "--gpus-per-node", "8", f"folder={folder}", *words])


def record(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / jobs.RECORD).read_text().splitlines()]


def test_a_submission_is_kept_in_the_run_folder(
    stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs.says("sbatch", "17;cluster\n")
    (stubs.folder / "sbatch").write_text('#!/bin/bash\n[ -z "$RANK" ] && cat > "$STUBS/given" && echo 17\n')
    run = tmp_path / "run"
    assert submit(run) == 0
    assert f"job 17: {run}; see `launch/slurm.py status|logs|cancel {run}`" in capsys.readouterr().out
    text = (run / jobs.FILE).read_text()
    assert text == (stubs.folder / "given").read_text() and "#SBATCH --nodes=1\n" in text
    assert all(stat.S_IMODE((run / path).stat().st_mode) == 0o600 for path in (jobs.FILE, jobs.RECORD))
    (event,) = record(run)
    assert event.pop("at") and event == {"event": "submitted", "job": "17", "output": f"{run}/logs/slurm-17.out"}
    assert (run / "logs").is_dir(), "Slurm doesn't make it"
    assert submit(run) == 0 and len(record(run)) == 2


def test_a_sweep_is_one_job_with_a_record_in_each_run(
    stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs.says("sbatch", "17\n")
    sweep = tmp_path / "sweep"
    assert submit(sweep, "--array", "seed=4,5") == 0
    assert [record(sweep / f"seed-{seed}")[0]["job"] for seed in (4, 5)] == ["17_0", "17_1"]
    assert record(sweep / "seed-4")[0]["output"] == f"{sweep}/logs/slurm-17_0.out"
    stubs.state("PENDING", nodes="", reason="Priority")
    capsys.readouterr()
    assert slurm.main(["status", str(sweep)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{sweep}/seed-{seed}: job 17_{number}: PENDING (Priority), restarted 0 times; no checkpoint yet"
        for number, seed in enumerate((4, 5))
    ]
    assert slurm.main(["cancel", str(sweep)]) == 0
    assert stubs.said()[-2:] == ["scancel 17_0", "scancel 17_1"]


def test_status(stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stubs.says("sbatch", "17\n")
    assert submit(tmp_path) == 0
    capsys.readouterr()
    save(tmp_path, 20)
    stubs.state("RUNNING", restarts=2)
    assert slurm.main(["status", str(tmp_path)]) == 0
    line = f"{tmp_path}: job 17: RUNNING on a[1-2] for 1:02, restarted 2 times; newest checkpoint step-00000020\n"
    assert capsys.readouterr().out == line
    jobs._note(tmp_path, event="ended", job="17", code=2, checkpoint=None)
    stubs.says("squeue", "slurm_load_jobs error: Invalid job id specified\n", code=1)
    assert slurm.main(["status", str(tmp_path)]) == 0
    assert "job 17: Slurm no longer knows it; its tasks last ended with code 2; newest" in capsys.readouterr().out
    stubs.says("squeue", "Unable to contact slurm controller", code=1)
    assert slurm.main(["status", str(tmp_path)]) == 2
    assert "squeue --noheader" in (error := capsys.readouterr().err) and "failed: Unable to contact" in error


def save(folder: Path, step: int) -> None:
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST).touch()


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (0, "RUNNING", False), (75, "RUNNING", True), (1, "RUNNING", True), (70, "RUNNING", True),
        (71, "RUNNING", True), (137, "RUNNING", True), (143, "RUNNING", True), (2, "RUNNING", False),
        (74, "RUNNING", False), (130, "RUNNING", False), (75, "COMPLETING", False), (75, "CANCELLED", False),
        (75, "PENDING", False), (1, "COMPLETING", False), (1, "NODE_FAIL", False), (75, "TIMEOUT", False),
    ],
)  # fmt: skip
def test_how_a_job_goes_on(
    code: int, state: str, requeued: bool, stubs: Stubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a person must fix isn't started again, nor what was cancelled or Slurm requeues by itself."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    stubs.state(state)
    save(tmp_path, 20)
    assert slurm.main(["ended", "--code", str(code), str(tmp_path)]) == code
    assert stubs.said() == (["scontrol requeue 17"] if requeued else [])
    (event,) = record(tmp_path)
    assert (event["job"], event["code"], event["checkpoint"]) == ("17", code, "step-00000020")


def test_faults_without_progress_end_the_job(
    stubs: Stubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    stubs.state("RUNNING")

    def requeues(code: int) -> bool:
        before = len(stubs.said())
        jobs.ended(tmp_path, code, retries=2)
        return len(stubs.said()) > before

    assert [requeues(1) for _ in range(4)] == [True, True, False, False]
    save(tmp_path, 20)
    assert [requeues(1) for _ in range(3)] == [True, True, False], "a new checkpoint counts anew"
    assert [requeues(75) for _ in range(5)] == [True] * 5, "a notice is no fault"
    assert [requeues(71), requeues(1), requeues(137)] == [True, True, False]
    jobs._note(tmp_path, event="submitted", job="18", output="")
    assert [requeues(1) for _ in range(3)] == [True, True, False], "so does a new submission"
    assert jobs.ended(tmp_path, 1, retries=0) == "exit code 1: job 17 isn't requeued after 4 faults at step-00000020"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["ended", "--code", "75", "."], "no SLURM_JOB_ID is set; submit one instead"),
        (["status", "."], "holds no run that was a job of Slurm; name a run folder, or a sweep's"),
        (["cancel", "."], "holds no run that was a job of Slurm; name a run folder, or a sweep's"),
        (["logs", "."], "has no logs/process-*.log; name the folder of a run that has begun"),
    ],
)
def test_mistakes_are_told(
    words: list[str], text: str, stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slurm.main([*words[:-1], str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert text in said and len(said.splitlines()) == 1


def test_a_refused_submission(
    stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs.says("sbatch", "sbatch: error: invalid partition specified: P\n", code=1)
    assert submit(tmp_path / "run") == 2
    said = "error: sbatch --parsable failed: sbatch: error: invalid partition specified: P\n"
    assert capsys.readouterr().err == said and not (tmp_path / "run" / jobs.RECORD).exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(tmp_path / "run") == 2
    assert "sbatch isn't installed here; use a host of the cluster, or add --dry-run" in capsys.readouterr().err


def test_a_broken_record_is_named(stubs: Stubs, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / jobs.RECORD).write_text("{\n")
    with pytest.raises(UserError, match=r"jobs\.jsonl has a line that isn't JSON .*; remove the line"):
        list(jobs.status(tmp_path))


def test_a_run_that_others_have_submitted(stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its run.json tells the job, as under submitit."""
    (tmp_path / "run.json").write_text('{"job": "21"}')
    stubs.state("RUNNING")
    assert slurm.main(["status", str(tmp_path)]) == slurm.main(["cancel", str(tmp_path)]) == 0
    assert "job 21: RUNNING on a[1-2]" in capsys.readouterr().out and stubs.said() == ["scancel 21"]
    (tmp_path / "run.json").write_text("{")
    assert slurm.main(["status", str(tmp_path)]) == 2
    assert "run.json isn't JSON" in capsys.readouterr().err
