"""The command line of a submission: the published code's, sweeps, and mistakes that are found before a job waits."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.cluster.request import _split, request_of
from ijepa_scale.errors import ConfigError
from launch import plan, slurm

ROOT = Path(__file__).parents[3]
H14 = str(ROOT / "configs" / "in1k_vith14_ep300.yaml")
PUBLISHED = {  # configuration: GPUs of the published run, of 8 a node
    "in1k_vith14_ep300": 16, "in1k_vith16-448_ep300": 128, "in22k_vith14_ep66": 64, "in22k_vitg16_ep44": 128,
}  # fmt: skip


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert slurm.main([*words, "--dry-run"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    try:
        code = slurm.main([*words, "--dry-run"])
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    said = capsys.readouterr()
    assert code == 2 and not said.out
    return said.err


def test_the_published_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MY_TOKEN", "a secret")
    words = (
        "--fname configs/in1k_vith14_ep300.yaml --folder logs --partition P --nodes 2 --tasks-per-node 8 --time 1000"
    )
    text = dry_run(capsys, *words.split())
    assert directives(text) == {
        "job-name": "in1k_vith14_ep300", "chdir": str(ROOT), "output": f"{ROOT}/logs/slurm-%j.out",
        "open-mode": "append", "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "9",
        "partition": "P", "time": "1000", "signal": "USR1@120", "requeue": "",
    }  # fmt: skip
    assert "arguments=(--config configs/in1k_vith14_ep300.yaml)\n" in text
    assert f"folder={ROOT}/runs/in1k_vith14_ep300\n" in text and "launch/pretrain.py" in text
    assert "a secret" not in text and not (ROOT / "logs").exists()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_runs_on_their_published_nodes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config, gpus = str(ROOT / "configs" / f"{name}.yaml"), PUBLISHED[name]
    assert plan.main(["--config", config, "--gpus", f"{gpus}x", "a100-80gb"]) == 0
    capsys.readouterr()
    text = dry_run(capsys, "pretrain", "--config", config, "--nodes", str(gpus // 8), "--gpus-per-node", "8")
    found = directives(text)
    assert (found["nodes"], found["ntasks-per-node"], found["gpus-per-node"]) == (str(gpus // 8), "8", "8")


def test_what_is_passed_through(capsys: pytest.CaptureFixture[str]) -> None:
    extra = ("account=physics", "qos=long", "exclusive", "constraint=a100|h100", "mem=0", "comment=a b")
    flags = [word for text in extra for word in ("--sbatch", text)]
    text = dry_run(
        capsys, "pretrain", "--config", H14, *flags, "--dependency", "afterok:12", "data.workers=3", "--notice", "300",
        "--gpus-per-node", "4", "--retries", "0", "optimizer.lr=2e-3",
    )  # fmt: skip
    found = directives(text)
    assert found["account"] == "physics" and found["exclusive"] == "" and found["constraint"] == '"a100|h100"'
    assert found["comment"] == '"a b"' and found["dependency"] == "afterok:12" and found["cpus-per-task"] == "4"
    assert found["ntasks-per-node"] == "4" and found["signal"] == "USR1@300" and "ended --retries 0" in text
    assert "time" not in found and "partition" not in found and "data.workers=3 optimizer.lr=2e-3)" in text


def test_a_job_without_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    text = dry_run(capsys, "pretrain", "--config", H14, "--gpus-per-node", "0", "--tasks-per-node", "2")
    assert "gpus-per-node" not in text and directives(text)["ntasks-per-node"] == "2"


def test_a_sweep_has_named_folders(tmp_path: Path) -> None:
    folder = tmp_path / "a $b"
    request = request_of(
        "pretrain",
        ["--config", H14, f"folder={str(folder).replace('$', '$$')}", "--array", "lr=1e-3,5e-4", "--array",
         "augment.crop_scale=[0.3,1],[0.2,1]"],
        ROOT / "launch",
    )  # fmt: skip
    members = request.file.members
    names = [f"lr-{lr}_augment.crop_scale-{scale}" for lr in ("1e-3", "5e-4") for scale in ("-0.3,1-", "-0.2,1-")]
    assert [member.folder for member in members] == [folder / name for name in names]
    assert members[1].arguments[-3:-1] == ("optimizer.lr=1e-3", "augment.crop_scale=[0.2,1]")
    assert members[1].arguments[-1] == f"folder={tmp_path}/a $$b/{names[1]}"
    found = dict(request.file.directives)
    assert found["array"] == "0-3" and found["output"] == f"{folder}/logs/slurm-%A_%a.out"


@given(st.lists(st.text("ab", min_size=1) | st.sampled_from(["[1,2]", "'a,b'", "{a: [1,2], b: 3}"]), min_size=1))
def test_values_are_split_at_outer_commas(values: list[str]) -> None:
    assert _split(",".join(values)) == values


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["pretrain", "--config", H14, "optimizer.lrr=1"], "command line: optimizer.lrr"),
        (
            ["pretrain", "--config", H14, "--nodes", "3", "--gpus-per-node", "8"],
            "batch 2048 is not divisible by 24 pro",
        ),
        (["pretrain", "--config", H14, "--time", "soon"], "--time is 'soon'; give minutes, or days-hours"),
        (["pretrain", "--config", H14, "--node", "2"], "unrecognized arguments: --node"),
        (["pretrain", "--config", H14, "--notice", "65536"], "--notice is '65536'; sbatch takes at most 65535"),
        (["pretrain", "--config", H14, "--time", "9" * 5000], "give minutes, or days-hours"),
        (
            ["pretrain", "--config", H14, "--gpus-per-node", "4", "--tasks-per-node", "8"],
            "--gpus-per-node is 4 and --tasks-per-node 8; one task trains on one GPU, so give one",
        ),
        (["evaluate", "x", "--data", "a", "b", "--gpus-per-node", "8", "--tasks-per-node", "4"], "one task trains on"),
        (["pretrain", "--config", H14, "--array", "folder=a,b"], "--array names folder, but settings name each run's"),
        (["pretrain", "--config", H14, "--sbatch", "nodes=2"], "--sbatch names nodes, which this command sets"),
        (["pretrain", "--config", H14, "--sbatch", "a b"], "--sbatch is 'a b'; write a long option"),
        (["pretrain", "--config", H14, "--array", "lr"], "--array is 'lr'; write key=value,value"),
        (["pretrain", "--config", H14, "--array", "lr=1,,2"], "--array is 'lr=1,,2'; write key=value,value"),
        (["pretrain", "--config", H14, "--array", "lr=1,2", "--array", "optimizer.lr=3"], "names optimizer.lr twice"),
        (["pretrain", "--config", H14, "--array", "every=1,2"], "--array names every, which may be"),
        (["pretrain", "--config", H14, "--array", "seed=1,1"], "two runs named seed-1; give values that differ"),
        (["pretrain", "--config", H14, "--array", "sed=1,2"], "command line: sed"),
        (["pretrain", "--config", H14, "--array", f"seed={','.join(map(str, range(1001)))}"], "more than 1000 runs"),
        (["pretrain", "--config", H14, "--name", "a\nb"], "'a\\nb' holds a line break"),
        (["pretrain", "--config", H14, "--folder", "a\\b"], "holds a backslash, which Slurm gives a meaning"),
        (["pretrain"], "--config/--fname"),
        (["finetune", "--config", H14], H14),
        (["evaluate", "runs/x"], "--data"),
        (["evaluate", "runs/x", "--data", "a", "b", "--processes", "2"], "--processes and --array are not for evalu"),
        (["launch"], "invalid choice: 'launch'"),
    ],
)
def test_mistakes_are_found_before_a_job_waits(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert text in refused(capsys, *words)


@pytest.mark.parametrize(
    ("time", "notice", "fits"),
    [
        ("1", "120", False), ("2", "120", False), ("3", "120", True), ("2:59", "120", False), ("3:00", "120", True),
        ("0:02:59", "120", False), ("0:03:00", "120", True), ("0-0:3", "120", True), ("0-0:02:59", "120", False),
        ("0-1", "3540", True), ("0-1", "3541", False), ("1-0", "65535", True), ("0", "120", True), ("1", "1", False),
    ],
)  # fmt: skip
def test_the_notice_leaves_a_minute(time: str, notice: str, fits: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Slurm sends the signal at the start where the limit is no longer than the notice. A limit of 0 is none."""
    words = ("pretrain", "--config", H14, "--time", time, "--notice", notice)
    if fits:
        assert directives(dry_run(capsys, *words))["signal"] == f"USR1@{notice}"
    else:
        assert f"--notice {notice} leaves less than a minute of --time {time}" in refused(capsys, *words)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("arra=0-5", "arra, which sbatch may take for array, which this command sets or relies on; give --array key="),
        ("array=0-5", "names array, which this command sets or relies on; give --array key="),
        ("tasks-per-node=2", "give --nodes and --tasks-per-node"), ("tasks=2", "give --nodes and --tasks-per-node"),
        ("ntasks-per-gpu=2", "give --nodes and --tasks-per-node"), ("ntask=2", "give --nodes and --tasks-per-node"),
        ("gpus=3", "give --gpus-per-node"), ("gpus-per-task=1", "give --gpus-per-node"), ("gre=gpu:1", "give --gpus"),
        ("gres=gpu:1", "give --gpus-per-node"), ("gres=nvme:1,gpu", "give --gpus-per-node"), ("gres=help", "give --g"),
        ("cpus-per-gpu=4", "give --cpus-per-task"), ("wait", "leave it out: status"), ("test-only", "give --dry-run"),
        ("test", "give --dry-run"), ("help", "give --dry-run"), ("usage", "give --dry-run"), ("vers", "give --dry-run"),
        ("parsable", "leave it out: the job's number"), ("q", "leave it out: the job's number"),
        ("output=x", "give --folder"), ("error=x", "give --folder"), ("chdir=x", "submit from that folder"),
        ("signal=TERM@5", "give --notice"), ("sig=TERM@5", "give --notice"), ("requeue", "the job requeues itself"),
        ("no-requeue", "the job requeues itself"), ("no", "relies on"), ("open-mode=truncate", "each start appends"),
        ("dep=afterok:1", "give --dependency"), ("wrap=ls", "the job has a file"), ("t=5", "relies on"),
    ],
)  # fmt: skip
def test_options_that_the_job_relies_on(option: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "pretrain", "--config", H14, "--gpus-per-node", "2", "--sbatch", option)
    assert said.startswith(f"error: --sbatch names {option.partition('=')[0]}") and text in said


@pytest.mark.parametrize(
    "option",
    ["time-min=5", "nodelist=a", "no-kill", "mem=0", "wait-all-nodes=1", "gres-flags=enforce-binding", "gres=nvme:1",
     "qos=Q", "reservation=R", "hint=nomultithread", "verbose", "gpu-bind=none", "export=ALL", "nice"],
)  # fmt: skip
def test_other_options_are_passed_through(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = dry_run(capsys, "pretrain", "--config", H14, "--gpus-per-node", "2", "--sbatch", option)
    assert f"#SBATCH --{option}\n" in text


@pytest.mark.parametrize(
    ("option", "fits"),
    [
        ("gres=gpu:a100:2", True), ("gres=gpu:2,nvme:1", True), ("gres=gpu:1g.5gb:2", True), ("gres=gpu:4", False),
        ("gres=gpu", False), ("gpus=4", True), ("gpus=a100:4", True), ("gpus=2", False), ("gpus-per-task=1", True),
        ("gpus-per-task=2", False), ("cpus-per-gpu=4", False), (f"gpus={'9' * 5000}", False),
    ],
)  # fmt: skip
def test_gpus_may_be_asked_for_by_type(option: str, fits: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of the two tasks of the two nodes gets one."""
    words = ("pretrain", "--config", H14, "--nodes", "2", "--tasks-per-node", "2", "--gpus-per-node", "0")
    if fits:
        assert f"#SBATCH --{option}\n" in dry_run(capsys, *words, "--sbatch", option)
    else:
        assert "relies on; give" in refused(capsys, *words, "--sbatch", option)


@pytest.mark.parametrize(
    ("called", "own", "other"),
    [("launch/slurm.py", "slurm.py", "python launch/evaluate.py"), ("ijepa slurm", "ijepa slurm", "ijepa evaluate")],
)
def test_help_names_the_command_as_it_was_called(
    called: str, own: str, other: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [called])
    assert f"({own} pretrain --help explains the flags)" in refused(capsys, "pretrain")
    assert f"({other} --help explains the flags)" in refused(capsys, "evaluate", "x")
    with pytest.raises(SystemExit):
        slurm.main(["evaluate", "--help"])
    assert f"usage: {own} evaluate" in (said := capsys.readouterr().out) and f"`{other} --help` lists them" in said


@pytest.mark.parametrize(
    ("source", "name"),
    [("runs/x", "runs-x"), ("/runs/y/", "runs-y"), ("published:in1k", "published-in1k"), ("y" * 99, "y" * 60),
     ("..", "source")],
)  # fmt: skip
def test_each_evaluated_run_has_a_folder(source: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Else two evaluations would share a table, and the record of their jobs."""
    text = dry_run(capsys, "evaluate", source, "--data", "a", "b")
    assert f"folder={Path.cwd()}/runs/evaluation/{name}\n" in text
    assert f"arguments=(--to runs/evaluation/{name} {source} --data a b)\n" in text


def test_an_evaluation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = ("runs/x", "--data", "tr ain", "val", "--protocol", "knn", "--to", str(tmp_path / "to"))
    text = dry_run(capsys, "evaluate", "--nodes", "2", *own[:3], "--gpus-per-node", "4", *own[3:])
    assert f"arguments=(runs/x --data 'tr ain' val --protocol knn --to {tmp_path}/to)" in text
    assert f"folder={tmp_path}/to\n" in text and "launch/evaluate.py" in text


def test_a_recipe_chooses_when_the_job_starts(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "own_images.yaml")
    text = dry_run(capsys, "pretrain", "--config", config, "--gpus-per-node", "3", "data.train=x", "folder=runs/x")
    assert "data.train=x folder=runs/x)" in text


def test_a_refusal_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="checkpoint.every or evaluate.every"):
        request_of("pretrain", ["--config", H14, "--array", "every=1,2"], ROOT)
