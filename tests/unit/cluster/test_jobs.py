"""What is asked of Slurm, by commands that stand in for Slurm's, and how a job goes on when its tasks have ended."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from ijepa_scale.checkpoint.manifest import MANIFEST
from ijepa_scale.cluster import job_record, jobs, slurm_commands
from ijepa_scale.cluster.job_record import FILE, RECORD
from ijepa_scale.errors import UserError
from launch import slurm

ROOT = Path(__file__).parents[3]
H14 = str(ROOT / "configs" / "in1k_vith14_ep300.yaml")
STUB = (
    '#!/bin/bash\necho "${0##*/} $*" >> "$STUBS/said"\ncat "$STUBS/${0##*/}.says"\nexit $(cat "$STUBS/${0##*/}.code")\n'
)
SQUEUE = STUB.replace('"$STUBS/${0##*/}.says"', '"$STUBS/$([[ $* == *--me* ]] && echo live || echo squeue).says"')
FORM = "{:<32}{:<400}{:<20}{:<60}{:<10}\n"


class Stubs:
    """Stand-ins for Slurm's commands, each of which says what it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("sbatch", "squeue", "scontrol", "scancel"):
            (folder / name).write_text(SQUEUE if name == "squeue" else STUB)
            (folder / name).chmod(0o755)
            self.says(name, "")
        self.live()

    def says(self, name: str, text: str, code: int = 0) -> None:
        (self.folder / f"{name}.says").write_text(text)
        (self.folder / f"{name}.code").write_text(str(code))

    def state(self, name: str, nodes: str = "a[1-2]", reason: str = "None", restarts: int = 0) -> None:
        self.says("squeue", FORM.format(name, nodes, "1:02", reason, restarts))

    def live(self, *jobs: str, state: str = "RUNNING") -> None:
        (self.folder / "live.says").write_text("".join(f"{job} {state}\n" for job in jobs))

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
    return [json.loads(line) for line in (folder / RECORD).read_text().splitlines()]


def test_a_submission_is_kept_in_the_run_folder(
    stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs.says("sbatch", "17;cluster\n")
    (stubs.folder / "sbatch").write_text('#!/bin/bash\n[ -z "$RANK" ] && cat > "$STUBS/given" && echo 17\n')
    run = tmp_path / "run"
    assert submit(run) == 0
    assert f"job 17: {run}; see `launch/slurm.py status|logs|cancel {run}`" in capsys.readouterr().out
    text = (run / FILE).read_text()
    assert text == (stubs.folder / "given").read_text() and "#SBATCH --nodes=1\n" in text
    assert all(stat.S_IMODE((run / path).stat().st_mode) == 0o600 for path in (FILE, RECORD))
    (event,) = record(run)
    assert event.pop("at") and event == {
        "event": "submitted", "job": "17", "output": f"{run}/logs/slurm-17.out", "checkpoint": None
    }  # fmt: skip
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
    job_record.note(tmp_path, event="ended", job="17", code=2, checkpoint=None)
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
    job_record.note(tmp_path, event="submitted", job="18", output="")
    assert [requeues(1) for _ in range(3)] == [True, True, False], "so does a new submission"
    assert jobs.ended(tmp_path, 1, retries=0) == "exit code 1: job 17 isn't requeued after 4 faults at step-00000020"


def test_a_notice_is_no_fault_if_the_run_has_gone_on(
    stubs: Stubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a time limit that leaves no time for a step would requeue the job for ever."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    stubs.state("RUNNING")
    save(tmp_path, 20)
    job_record.note(tmp_path, event="submitted", job="17", output="", checkpoint="step-00000020")

    def requeued(code: int, retries: int) -> bool:
        return "job 17 requeued" in jobs.ended(tmp_path, code, retries=retries)

    assert [requeued(75, 2) for _ in range(4)] == [True, True, False, False]
    for step in (30, 40, 50):
        save(tmp_path, step)
        assert requeued(75, 0)
    assert [requeued(71, 2), requeued(75, 2), requeued(137, 2)] == [True, True, False]
    job_record.note(tmp_path, event="submitted", job="18", output="", checkpoint="step-00000050")
    assert not requeued(75, 0)
    (tmp_path / "checkpoints" / "step-00000050" / MANIFEST).unlink()
    assert [requeued(75, 2), requeued(75, 2)] == [True, False], "an older checkpoint is no progress"


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
    assert capsys.readouterr().err == said and not (tmp_path / "run").exists()
    (tmp_path / "other" / "slurm").mkdir(parents=True)
    assert submit(tmp_path / "other", "--folder", str(tmp_path / "a" / "b")) == 2
    assert (tmp_path / "other" / "slurm").is_dir() and not (tmp_path / "a").exists()
    capsys.readouterr()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(tmp_path / "run") == 2
    assert "sbatch isn't installed here; use a host of the cluster, or add --dry-run" in capsys.readouterr().err


def test_a_broken_record_is_named(stubs: Stubs, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / RECORD).write_text("{\n")
    with pytest.raises(UserError, match=r"jobs\.jsonl has a line that isn't JSON .*; remove the line"):
        list(jobs.status(tmp_path))


@pytest.mark.parametrize(
    "line",
    [
        "{}", "[]", "3", "null", '{"event": "submitted"}', '{"event": "submitted", "job": "--me"}',
        '{"event": "submitted", "job": 17}', '{"event": "submitted", "job": "17 18"}', '{"event": "x", "job": "17"}',
        '{"event": "ended", "job": "17", "code": "1", "checkpoint": null}',
        '{"event": "ended", "job": "17", "code": 1, "checkpoint": "step-x"}',
        '{"event": "ended", "job": "17", "code": true, "checkpoint": null}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("what", ["status", "cancel"])
def test_a_record_of_another_shape_is_shown(
    line: str, what: str, stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / RECORD).write_text(line + "\n")
    assert slurm.main([what, str(tmp_path)]) == 2
    text = f"jobs.jsonl has a line that is no event of a job: {line}; remove the line\n"
    assert capsys.readouterr().err.endswith(text) and not stubs.said()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[]", "run.json holds [] instead of an object; remove it"), ("3", "run.json holds 3 instead of an object"),
        ('{"job": "--me"}', "the job is '--me', which isn't a job"), ('{"job": 21}', "the job is 21, which isn't"),
        ('{"job": "21\\n"}', "the job is '21\\n', which isn't a job"), ('{"job": null}', "no run that was a job of"),
    ],
)  # fmt: skip
def test_a_run_file_of_another_shape_is_shown(
    content: str, text: str, stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(content)
    for what in ("status", "cancel"):
        assert slurm.main([what, str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert text in said and len(said.splitlines()) == 1 and not stubs.said()


@pytest.mark.parametrize(("printed", "job"), [("Welcome 5\n\n17;c-1\n", "17"), ("17_2", "17_2")])
def test_a_banner_of_the_site_is_no_number(printed: str, job: str, stubs: Stubs, tmp_path: Path) -> None:
    stubs.says("sbatch", printed)
    assert submit(tmp_path) == 0
    assert record(tmp_path)[0]["job"] == job


@pytest.mark.parametrize("printed", ["", "\n", "--me\n", "17\nbye\n", "Submitted batch job 17\n", "17;a b\n"])
def test_another_answer_of_sbatch_is_shown(
    printed: str, stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs.says("sbatch", printed)
    assert submit(tmp_path) == 2
    text = f"sbatch printed {printed.strip()!r} where a job's number was expected; the job may be queued all the same"
    assert text in (said := capsys.readouterr().err) and "`squeue --me` shows it" in said
    assert not (tmp_path / RECORD).exists() and (tmp_path / "logs").is_dir()


def test_a_slow_sbatch_may_have_queued_the_job(
    stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_commands, "_TIMEOUT_S", 0.2)
    (stubs.folder / "sbatch").write_text("#!/bin/bash\nexec sleep 20\n")
    assert submit(tmp_path) == 2
    said = capsys.readouterr().err
    assert "sbatch hasn't answered for 0.2 s" in said and "may be queued all the same: `squeue --me` shows it" in said
    assert (tmp_path / "logs").is_dir(), "Slurm doesn't make it"


def test_a_folder_has_one_job_at_a_time(stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stubs.says("sbatch", "17\n")
    assert submit(tmp_path) == 0
    stubs.says("sbatch", "18\n")
    for state in ("PENDING", "RUNNING", "SUSPENDED"):
        stubs.live("3", "17", state=state)
        for dependency in ("afterok:3", "after:17", "afterok:17?afterok:3"):
            assert submit(tmp_path) == submit(tmp_path, "--dependency", dependency) == 2
            said = capsys.readouterr().err.splitlines()[1]
            assert f"job 17 of {tmp_path} is {state}; cancel it (launch/slurm.py cancel {tmp_path})" in said
            assert said.endswith("or add --dependency afterany:17") and len(record(tmp_path)) == 1
    assert submit(tmp_path, "--dependency", "afterok:3,afterany:4:17") == 0
    stubs.live("17", "18")
    stubs.state("RUNNING")
    capsys.readouterr()
    assert slurm.main(["status", str(tmp_path)]) == slurm.main(["cancel", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "job 18: RUNNING" in said[0] and "job 17: RUNNING" in said[1]
    assert stubs.said()[-2:] == ["scancel 18", "scancel 17"], "else 18 would begin"
    stubs.live("17", "18", state="COMPLETING")
    assert submit(tmp_path) == 0
    stubs.live("170", "17_1")
    assert submit(tmp_path) == 0


def test_the_runs_of_a_sweep_have_one_job_at_a_time(
    stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs.says("sbatch", "17\n")
    assert submit(tmp_path, "--array", "seed=4,5") == 0
    stubs.live("17_1")
    assert submit(tmp_path, "--array", "seed=5,6") == 2
    assert f"job 17_1 of {tmp_path}/seed-5 is RUNNING" in capsys.readouterr().err
    assert not (tmp_path / "seed-6").exists()
    assert submit(tmp_path, "--array", "seed=4,6") == 0
    assert submit(tmp_path, "--array", "seed=5,7", "--dependency", "afterany:17") == 0


@pytest.mark.parametrize("what", ["status", "cancel"])
@pytest.mark.parametrize("name", ["README.md", "nosuch"])
def test_what_is_no_folder_is_told(
    what: str, name: str, stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").touch()
    assert slurm.main([what, str(tmp_path / name)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / name} isn't a run folder; name one, or a sweep's\n"


def test_a_run_that_others_have_submitted(stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its run.json tells the job, as under submitit."""
    (tmp_path / "run.json").write_text('{"job": "21"}')
    stubs.state("RUNNING")
    assert slurm.main(["status", str(tmp_path)]) == slurm.main(["cancel", str(tmp_path)]) == 0
    assert "job 21: RUNNING on a[1-2]" in capsys.readouterr().out and stubs.said() == ["scancel 21"]
    (tmp_path / "run.json").write_text("{")
    assert slurm.main(["status", str(tmp_path)]) == 2
    assert "run.json isn't JSON" in capsys.readouterr().err
