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
