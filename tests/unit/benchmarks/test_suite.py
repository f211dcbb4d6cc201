"""The GPU suite loses nothing silently: rows of killed children, expected and other skips, bars of each GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ceilings, gpu_suite, smoke, suite
from benchmarks.common import read_rows, record
from benchmarks.suite import Item, Outcome, exit_code, expected, judge, plan, run_item, run_items, summary
from benchmarks.synthetic import configured
from ijepa_kernels.attention.backend import activate
from ijepa_kernels.fp8_linear import check_capability
from ijepa_scale.config import load_config
from ijepa_scale.engine import norms

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("in*.yaml"))


def item(name, code, *, limit_s=20.0, expected_s=1.0, cannot=None):
    return Item(name=name, command=("-c", code), expected_s=expected_s, limit_s=limit_s, cannot=cannot)


def test_suite_names_what_failed_and_what_was_skipped(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # the suite must not depend on it
    lines = []
    items = [
        item("fine", "print('all is well')"),
        item("wrong", "raise SystemExit('the bar is not met')"),
        item("slow", "print('begun'); import time; time.sleep(60)", limit_s=5.0),
        item("killed", "import os; os.kill(os.getpid(), 9)"),
        item("not here", "", cannot="it needs a CUDA device"),
        item("too long", "", expected_s=4000.0),
    ]
    outcomes = list(run_items(items, 1000.0, show=lines.append))
    found = {each.name: (each.status, each.reason) for each in outcomes}
    assert found == {
        "fine": ("done", ""),
        "wrong": ("failed", "exit code 1: the bar is not met"),
        "slow": ("failed", "not done after 5 s"),
        "killed": ("failed", "killed by signal 9"),
        "not here": ("skipped", "it needs a CUDA device"),
        "too long": ("skipped", found["too long"][1]),
    }
    assert "s of 1000 s left, 4000 s expected" in found["too long"][1]
    assert "all is well" in lines and "begun" in lines
    assert all(exit_code([each]) == (each.name != "fine") for each in outcomes)
    assert all(name in summary(outcomes) for name in found)
    assert "| all | 4004 | 1000 |  |" in plan(items[:4] + items[5:], 1000.0)


HELD = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"], start_new_session=True)
print("begun")
time.sleep(60)
"""


def test_a_child_whose_output_stays_open_does_not_hold_the_suite(monkeypatch):
    """As one does that waits for a driver (state D): no signal ends it."""
    monkeypatch.setattr(suite, "KILLED_S", 0.5)
    outcome = run_item(item("held", HELD), 3.0)
    assert outcome.status == "failed" and outcome.output == "begun" and outcome.seconds < 15
    assert re.search(r"not done after 3 s, and process \d+ or one of its hasn't ended 0 s after", outcome.reason)


def test_an_output_that_cannot_be_judged_kills_nobody(monkeypatch):
    def judge(code, output):
        raise KeyError("a fault")

    killed = []
    monkeypatch.setattr(suite, "judge", judge)
    monkeypatch.setattr(os, "killpg", lambda *given: killed.append(given))
    with pytest.raises(KeyError):
        run_item(item("fine", "print(1)"), 60.0)
    assert not killed, "the number may be that of others"


def test_expected_skips_pass_and_others_do_not():
    fp8 = "SKIPPED fp8 target: cuda has compute capability 8.0, but fp8 products need 8.9 or higher; set precision bf16"
    lacks, broken = item("lacks", f"print({fp8!r})"), item("broken", "print('SKIPPED zero1: no kernel image')")
    cannot = item("fp8", "", cannot="fp8 products need 8.9 or higher; set precision bf16")
    outcomes = list(run_items([lacks, broken, cannot], 1000.0, show=lambda text: None))
    assert [(each.status, exit_code([each])) for each in outcomes] == [("done", 0), ("failed", 1), ("skipped", 0)]
    assert outcomes[1].reason == "skipped zero1: no kernel image" and exit_code(outcomes) == 1
    assert "| lacks: fp8 target | skipped |  | cuda has compute capability 8.0" in summary(outcomes)


def test_reasons_that_the_package_gives_are_expected(monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for refuse in (norms._apex, lambda: activate("fa3", "cuda"), lambda: check_capability(torch.device("cuda"))):
        with pytest.raises(ValueError) as caught:
            refuse()
        assert expected(str(caught.value)), caught.value
    assert not expected("out of memory") and not expected("an fp8 product failed")


def test_suite_tells_memory():
    output = "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\nat the end\n"
    reason = "out of memory: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert judge(1, output) == ("failed", reason)
    assert judge(0, "5 passed") == ("done", "")


def test_rows_are_on_disk_as_soon_as_they_are_measured(tmp_path):
    path, seen = tmp_path / "rows.jsonl", []

    def rows():
        for number in range(3):
            seen.append(len(read_rows(path)))
            yield {"number": number}

    assert record(path, rows()) == [{"number": 0}, {"number": 1}, {"number": 2}] and seen == [0, 1, 2]


KILLED = """
import os, sys
from benchmarks import ceilings
measured, real = [], ceilings.timed
def timed(*given):
    measured.append(given)
    if len(measured) == 4:
        os.kill(os.getpid(), 9)
    return real(*given)
ceilings.timed = timed
sys.argv = ["ceilings", "--device", "cpu", "--quick", "--to", sys.argv[1]]
ceilings.main()
"""


def test_a_child_killed_in_mid_work_keeps_its_rows_and_its_output(tmp_path):
    path = tmp_path / "rows.jsonl"
    killed = Item(name="killed", command=("-c", KILLED, str(path)), expected_s=1, limit_s=120)
    outcome = run_item(killed, 120)
    assert (outcome.status, outcome.reason) == ("failed", "killed by signal 9")
    rows = read_rows(path)
    assert [row["layer"] for row in rows] == ["patches", "qkv", "proj"] and all(row["p50"] > 0 for row in rows)
    assert outcome.skips == (("products in fp8", "row-wise fp8 products need a CUDA device"),)


BROKEN = """
import os, signal, sys, time
from benchmarks import smoke
smoke.LIMIT_S = {False: 1, True: 1}
def measure(name, settings, device):
    if name == "plain":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "ddp":
        import atexit
        atexit.register(os.kill, os.getpid(), signal.SIGSEGV)  # as a broken device may do at the end
        raise RuntimeError("no kernel image\\nmore")
    if name == "fsdp2":
        time.sleep(60)
    return {"benchmark": "smoke", "path": name, "status": "ok", "losses": [0.5], "losses_fp32": [0.5],
            "loss_difference": 0.0, "grad_norm_difference": 0.0, "seconds": 1.0}
smoke.measure = measure
sys.argv = ["smoke", *sys.argv[1:]]
smoke.main()
"""


def test_a_path_that_crashes_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: real(
        [sys.executable, "-u", "-c", BROKEN, *command[4:]], **options
    ))  # fmt: skip
    names = ["plain", "plain, fp32", "ddp", "fsdp2", "zero1"]
    rows = list(smoke.everywhere(names, "cpu", tmp_path / "rows.jsonl"))
    assert [row["path"] for row in rows] == names == [row["path"] for row in read_rows(tmp_path / "rows.jsonl")]
    assert [row["status"] for row in rows] == ["failed", "ok", "failed", "failed", "ok"]
    assert [row["reason"] for row in rows if row["status"] == "failed"] == [
        "killed by SIGSEGV", "RuntimeError: no kernel image", "killed by SIGALRM, not done after 60 s",
    ]  # fmt: skip
    lines = capfd.readouterr().out.splitlines()
    assert "ddp: FAILED, RuntimeError: no kernel image" in lines and "plain: FAILED, killed by SIGSEGV" in lines
    assert any(line.startswith("zero1: ok, losses") for line in lines)


def test_smoke_tells_right_from_wrong_attention_and_lists_what_is_refused(tmp_path, monkeypatch):
    from ijepa_scale.models import layers

    cpu, known = torch.device("cpu"), smoke.paths("cpu")
    assert smoke.measure("plain, packed", known["plain, packed"], cpu)["status"] == "ok"
    right = layers.attention
    monkeypatch.setattr(layers, "attention", lambda q, *rest, **named: right(1.1 * q, *rest, **named))
    assert smoke.measure("plain, packed", known["plain, packed"], cpu)["status"] == "failed"
    (row,) = smoke.everywhere(["fsdp2, fp8 target"], "cpu", tmp_path / "rows.jsonl")
    assert row["status"] == "skipped" and expected(row["reason"])


def test_settings_of_the_gpu_run_are_valid(tmp_path):
    for settings in smoke.paths("cuda").values():
        configured([*smoke.COMMON, *smoke.SIZES["cuda"], *settings])
    items = {each.name: each.command for each in gpu_suite.gpu_items(tmp_path / "rows", tmp_path, 8)}
    step = items["step H/14@224"]
    variants = [value for flag, value in zip(step, step[1:], strict=False) if flag == "--variant"]
    assert variants == [gpu_suite.PACKED, gpu_suite.GROUPS["vit_huge"], gpu_suite.FP8, gpu_suite.FUSED]
    for variant in variants:
        configured(["engine.precision=bf16", *variant.split()])


def test_ceilings_cover_every_product_of_a_block_and_every_role():
    model = ceilings.model_for(torch.device("cuda"), False)
    found = list(ceilings.products(model, 128))
    wide = {(p.role, p.layer): (p.rows, p.inputs, p.outputs) for p in found}
    assert wide["target", "fc1"] == (128 * 256, 1280, 5120) and wide["target", "patches"][1] == 588
    assert wide["context", "padded patches"][1] == 592 and wide["predictor", "qkv"][1:] == (384, 1152)
    assert {p.role for p in found if "dgrad" in p.passes} == {"context", "predictor"}
    heads = {each.role: each for each in ceilings.heads_of(model, 128)}
    assert (heads["context"].heads, heads["context"].head_dim) == (16, 80)
    assert (heads["predictor, packed"].heads, heads["predictor, packed"].head_dim) == (16, 24)
    assert len(set(heads["context, packed"].lengths)) > 1 == len(set(heads["context"].lengths))


def test_suite_compares_with_the_bars_of_its_gpu():
    step = {"benchmark": "step", "model": "vit_huge", "image_size": 224}
    rows = [
        {**step, "side": "ours", "share_of_peak": 0.44, "times_baseline": {"p50": 1.5}},
        {**step, "side": f"ours, {gpu_suite.FUSED}", "share_of_peak": 0.56, "times_baseline": {"p50": 1.9}},
        {**step, "side": "ours, masks.context=packed", "share_times_ours": 0.99},
        {"benchmark": "curves", "seed_from_seed": 0.2, "fast_from_eager": 0.1},
    ]
    words = {device: [line[3] for line in gpu_suite.verdicts(rows, device)[:4]] for device in (
        "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S"
    )}  # fmt: skip
    assert list(words.values()) == [
        ["met", "", "met", ""], ["NOT MET", "", "met", "NOT MET"], ["NOT MET", "", "", ""], ["", "", "", ""],
    ]  # fmt: skip
    lines = {line[0]: line[1:] for line in gpu_suite.verdicts(rows, "NVIDIA L40S")}
    assert lines["H/14@224, MFU"] == ["", "0.44", ""] and lines["g/16@224, MFU"] == ["", "not measured", ""]
    assert lines["H/14@224, packed, MFU of the truncated"] == ["0.95", "0.99", "met"]
    assert lines["200 steps: distance of seeds over that of fast from eager"] == ["1", "2", "met"]


def test_dry_run_prints_the_order_and_fits_the_budget(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--dry-run"])
    gpu_suite.main()
    lines = [line.split(" | ") for line in capsys.readouterr().out.replace("| ", "", 1).splitlines()]
    names = [line[0].removeprefix("| ") for line in lines[2:]]
    assert names == [
        "smoke", "ceilings", "step H/14@224", "end to end", "step g/16@224", "kernels", "curves", "update", "augment",
        "all",
    ]  # fmt: skip
    assert float(lines[-1][1]) <= gpu_suite.BUDGET_S
    told = re.findall(r"^\| \d \| .* \| (\d+) \|$", (ROOT / "docs" / "benchmarks.md").read_text(), re.MULTILINE)
    assert told == [line[1] for line in lines[2:-1]]


def test_quick_suite_writes_rows_table_and_picture(tmp_path, monkeypatch, capsys):
    arguments = ["gpu_suite", "--device", "cpu", "--quick", "--items", "step H/14@224", "ceilings"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--folder", str(tmp_path)])
    monkeypatch.setattr(gpu_suite, "folder_of", lambda images, scratch: scratch)
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main()
    assert stopped.value.code == 0
    (path,) = tmp_path.glob("*.jsonl")
    rows = [row for row in read_rows(path) if row["benchmark"] == "step"]
    assert [row["side"] for row in rows] == [
        "eager baseline", "ours", "ours, masks.context=packed", "ours, masks.group_size=2",
    ]  # fmt: skip
    assert rows[1]["times_baseline"]["p50"] > 0 and rows[1]["loss_difference_times_baseline"] < 2e-2
    text = path.with_suffix(".md").read_text()
    assert "| ceilings: products in fp8 | skipped |  | row-wise fp8 products need a CUDA device |" in text
    assert "ours, mask groups of 2 |" in text and path.with_suffix(".png").stat().st_size > 1000
    assert "| step H/14@224 | done |" in capsys.readouterr().out


def test_the_report_is_renewed_after_each_item(tmp_path):
    outcome = Outcome(name="smoke", status="done", reason="", seconds=1.0, output="plain: ok")
    path = tmp_path / "rows.jsonl"
    assert "| smoke | done |" in gpu_suite.write([], [outcome], path)
    assert "plain: ok" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_commands_of_the_configurations_run_one_mask_group_or_what_the_suite_measures(path):
    command = path.read_text().split("torchrun ")[1].split("\n\n")[0]
    overrides = [word for word in command.split() if "=" in word]
    config = load_config(path, overrides)
    micro, rest = divmod(config.data.batch_size, 8 * config.engine.accumulation)
    measured = {("vit_huge", 14): gpu_suite.HUGE, ("vit_giant", 16): gpu_suite.GIANT}
    assert "--nproc-per-node 8 " in command and rest == 0
    if micro != config.masks.group_size:
        flags = measured[config.model.name, config.model.patch_size]
        assert micro == int(flags[flags.index("--batch") + 1])
        assert f"masks.group_size={config.masks.group_size}" == gpu_suite.GROUPS[config.model.name]
