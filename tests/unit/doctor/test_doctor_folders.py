"""The doctor's checks of folders, data and decoding: hanging, slow, full and missing ones, and nothing left behind."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ijepa_scale import environment
from ijepa_scale.doctor import decoding, disk_probe, disks, limits, software
from ijepa_scale.doctor.finding import Finding, checked
from ijepa_scale.doctor.links import Pair, chosen_pairs, hosts_of, pair_findings, reduce_finding
from ijepa_scale.doctor.table import merged, table, table_json, wrong_of
from ijepa_scale.engine import world
from ijepa_scale.no_answer import NoAnswer
from ijepa_scale.planning.devices import device_with_title, devices
from launch.doctor import main


def jpeg(side: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Returns a folder of two tars with two images each, and a folder of images below it."""
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "photos" / "deep" / f"{number}.jpg").write_bytes(jpeg())
    (tmp_path / "photos" / "list.txt").write_text("deep/0.jpg,3\ndeep/2.jpg,1\n")
    for number in range(2):
        with tarfile.open(tmp_path / f"shard-{number:03}.tar", "w") as tar:
            for name in ("a.cls", "a.jpg", "b.jpg"):
                info = tarfile.TarInfo(name)
                info.size = len(jpeg())
                tar.addfile(info, io.BytesIO(jpeg()))
    return tmp_path


def test_a_folder_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    (finding,) = disks.run_folder(str(tmp_path / "not" / "there"), 1e6)
    assert finding.values["folder"] == str(tmp_path) and finding.values["write_bytes_per_s"] > 0
    assert "a checkpoint of 1 MB takes" in finding.found and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("where", "images"),
    [("", 4), ("shard-{000..001}.tar", 2), ("shard-*.tar", 4), ("photos", 3), ("photos/list.txt", 2)],
)
def test_images_of_every_form_of_data_are_found(data: Path, where: str, images: int) -> None:
    if where == "":
        (data / "photos").rename(data.parent / "elsewhere")
    found = disk_probe.read(str(data / where), 1 << 20, 5.0, 16)
    assert len(found["images"]) == images and found["bytes"] > 0  # type: ignore[arg-type]
    finding, first = disks.data_folder(str(data / where))
    assert finding.check == "data" and first == [jpeg()] * images


@pytest.mark.parametrize("what", ["run folder", "data"])
def test_a_disk_that_hangs_is_a_line(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(disks, "PROBE", probe)
    monkeypatch.setattr(disks, "LIMIT_S", 0.3)
    works = {"run folder": lambda: disks.run_folder("x", None), "data": lambda: [disks.data_folder("x")[0]]}
    (finding,) = checked(what, works[what], remedy="see to the disk")
    assert finding == Finding(check=what, found="no answer in 0.3 s", verdict="wrong", remedy="see to the disk")


def test_what_the_disk_says_is_the_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing.tar/x: No such file or directory"):
        disks.ask("leave", 10.0, folder=str(tmp_path), name="nothing.tar/x")
    with pytest.raises(NoAnswer):
        disks.ask("look", 0.3, folder=str(tmp_path), name="never", seconds=30.0)
    disks.ask("leave", 10.0, folder=str(tmp_path / "new"), name=".doctor-1")
    assert disks.ask("look", 10.0, folder=str(tmp_path), name=".doctor-1", seconds=0.0) == {"seen": True}
    disks.ask("remove", 10.0, folder=str(tmp_path), name=".doctor-1")
    assert disks.ask("look", 10.0, folder=str(tmp_path), name=".doctor-1", seconds=0.0) == {"seen": False}


GOOD = {
    "folder": "/runs", "filesystem": "nfs4", "free_bytes": 1e12, "free_files": 10**6,
    "write_bytes_per_s": 1e9, "read_bytes_per_s": 1e9, "files_per_s": 900.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"free_files": None}, None),
        ({"write_bytes_per_s": 1e6}, "it writes slowly"),
        ({"read_bytes_per_s": 1e6}, "it reads slowly"),
        ({"files_per_s": 3.0}, "it makes files slowly"),
        ({"free_bytes": 20e9}, "it is too full for 30 GB of checkpoints"),
        ({"free_files": 7}, "it has room for 7 more files"),
    ],
)
def test_a_slow_or_full_folder_is_wrong(changes: dict, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "ask", lambda *_, **__: GOOD | changes)
    (finding,) = disks.run_folder("/runs", 10e9)
    assert finding.verdict == ("ok" if said is None else "wrong") and (said or "takes 10 s") in finding.found
    assert bool(finding.remedy) == (said is not None)


def test_slow_or_missing_data_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding, images = disks.data_folder(str(tmp_path / "nowhere"))
    assert finding.verdict == "wrong" and finding.found.endswith("nowhere: no images") and not images
    slow = {"filesystem": "nfs4", "files": 1, "bytes": 10**7, "read_bytes_per_s": 5e6, "images": []}
    monkeypatch.setattr(disks, "ask", lambda *_, **__: dict(slow))
    assert disks.data_folder("/data")[0].verdict == "wrong"
    slow["bytes"] = 10**6
    assert disks.data_folder("/data")[0].found.endswith("in 1 files, too few to judge it")


@settings(max_examples=30, deadline=None)
@given(rate=st.floats(1, 1e4), needed=st.floats(1, 1e4), workers=st.integers(0, 8), processes=st.integers(1, 4))
def test_workers_that_do_not_keep_up_are_wrong(rate: float, needed: float, workers: int, processes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "decoding_rate", lambda *_: rate)
        patch.setattr(decoding.os, "sched_getaffinity", lambda _: range(8))
        (finding,) = decoding.decoding(None, [b""], processes=processes, needed=needed, workers=workers)
    reached = rate * min(max(1, workers), 8 / processes)
    assert finding.verdict == ("wrong" if reached < 1.1 * needed else "ok")
    if finding.verdict == "wrong":
        wanted = int(finding.remedy.split("data.workers=")[1].split(";")[0].split(",")[0])
        assert wanted * rate >= 1.1 * needed * (1 - 1e-9) and (wanted - 1) * rate < 1.1 * needed * (1 + 1e-9)


def test_decoding_is_measured_on_a_made_image_and_says_what_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SECONDS", 0.1)
    assert decoding.made_image() == decoding.made_image() and 40_000 < len(decoding.made_image()) < 200_000
    assert decoding.decoding_rate(decoding.crops_of(None), [decoding.made_image()], 0.1) > 20
    (finding,) = decoding.decoding(None, [b"no image"], processes=1, needed=None)
    assert finding.verdict == "wrong"
    (finding,) = decoding.decoding(None, [], processes=1, needed=None)
    assert finding.verdict == "not checked" and "--need gives it" in finding.found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_pairs_are_all_or_the_ring_and_the_firsts_of_hosts(local: list[int]) -> None:
    hosts = [f"h{host}" for host, count in enumerate(local) for _ in range(count)]
    pairs, count = chosen_pairs(hosts), len(hosts)
    assert len(set(pairs)) == len(pairs) <= 28 and all(0 <= a < b < count for a, b in pairs)
    if count * (count - 1) // 2 <= 28:
        assert len(pairs) == count * (count - 1) // 2
    everyone = chosen_pairs(hosts, most=10**6)
    assert {rank for pair in everyone for rank in pair} == set(range(count)) or count == 1


def test_hosts_with_equal_names_are_told_apart() -> None:
    assert hosts_of([("a", 0), ("a", 1), ("b", 0)]) == ["a", "a", "b"]
    assert hosts_of([("a", 0), ("a", 1), ("a", 0), ("a", 1)]) == ["a", "a", "a (2)", "a (2)"]


def pair(first: int, second: int, speed: float, *, apart: bool) -> Pair:
    return Pair(first=first, second=second, between_hosts=apart, latency_s=2e-5, bytes_per_s=speed)


@settings(max_examples=60, deadline=None)
@given(speeds=st.lists(st.floats(2e8, 5e8), min_size=3, max_size=8), slow=st.floats(1e6, 5e7))
def test_a_slow_pair_or_network_is_named(speeds: list[float], slow: float) -> None:
    pairs = [pair(0, rank, speed, apart=True) for rank, speed in enumerate(speeds, start=1)]
    (finding,) = pair_findings("gloo", pairs, 9)
    assert finding.verdict == "ok" and finding.check == "pairs between hosts, gloo"
    (finding,) = pair_findings("gloo", [*pairs, pair(3, 7, slow, apart=True)], 9)
    assert finding.verdict == "wrong" and "far slower than the others: 3-7 at" in finding.found
    inside, between = pair_findings("gloo", [pair(0, 1, slow, apart=False), pair(0, 2, slow, apart=True)], 3)
    assert inside.verdict == "ok" and "slower than gigabit Ethernet" in between.found and between.verdict == "wrong"


@settings(max_examples=40, deadline=None)
@given(best=st.floats(1e8, 6e11), name=st.sampled_from(sorted(devices())))
def test_an_all_reduce_far_below_the_links_is_wrong(best: float, name: str) -> None:
    device = devices()[name]
    assert device_with_title(device.title) == device and device_with_title("none") is None
    found = reduce_finding("NCCL", {4000: best / 9, 10**8: best}, 8, device.link_bandwidth)
    assert (found.verdict == "wrong") == (best < 0.3 * device.link_bandwidth) == bool(found.remedy)
    assert reduce_finding("gloo", {4000: best}, 8, None).verdict == "ok"


def test_equal_findings_are_one_line_and_wrong_ones_have_their_remedy() -> None:
    found = [
        *(Finding(check="a", found="x", where=f"h{host}") for host in range(5)),
        *(Finding(check="b", found=f"speed {host}", where=f"h{host}") for host in range(7)),
        Finding(check="c", found="broken", verdict="wrong", remedy="fix it", where="h3"),
        Finding(check="a", found="y", verdict="wrong", remedy="stop", where="h6"),
    ]
    assert [each.where for each in merged(found)][:2] == ["h0, h1, h2 and 2 more", "h6"]
    lines = table(found).splitlines()
    assert lines[0] == "ok           a  h0, h1, h2 and 2 more: x" and lines[1] == "wrong        a  h6: y"
    assert "ok           b  3 more places, see --json" in lines and lines[-2:] == [
        "remedy       a: stop",
        "remedy       c: fix it",
    ]
    assert len(wrong_of(found)) == 2 and table_json(found, {"n": 1})["wrong"] == 2
    assert table(found[:1]).splitlines() == ["ok           a  x", "", "nothing is wrong"]


def test_the_command_ends_with_0_1_or_2(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "SECONDS", 0.1)
    monkeypatch.setattr(disks, "SPEED_S", 0.2)
    for module, name in (
        (disks, "SLOW"),
        (disks, "SLOW_FILES"),
        (limits, "OPEN_FILES"),
        (limits, "MEMORY_PER_PROCESS"),
    ):
        monkeypatch.setattr(module, name, 0)  # what this machine is like doesn't matter here
    monkeypatch.setattr(limits, "SHARED_BYTES_PER_PROCESS", 0)
    flags = ["--folder", str(tmp_path / "runs"), "--data", str(data / "photos"), "--json", str(tmp_path / "d" / "j")]
    assert main([*flags, "--need", "1"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("nothing is wrong\n") and "3 of the run's images" in out
    content = json.loads((tmp_path / "d" / "j").read_text())
    assert content["wrong"] == 0 and content["processes"] == 1 and not (tmp_path / "runs").exists()
    assert {each["check"] for each in content["findings"]} >= {"versions", "open files", "run folder", "decoding"}
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--need", "1e9"])
    assert ended.value.code == 1 and "remedy       decoding: set data.workers=" in capsys.readouterr().out
    for module in (software, world):
        monkeypatch.setattr(module, "gpu_in_machine", lambda: "an NVIDIA GPU (/dev/nvidia0)")
        monkeypatch.setattr(module, "why_unusable", lambda: "it is too old; update the driver")
    monkeypatch.setattr(environment, "hidden_gpus", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--need", "1"])
    assert ended.value.code == 1 and "remedy       GPUs: update the driver" in capsys.readouterr().out
    for wrong, said in (
        (["--config", str(tmp_path / "none.yaml")], "none.yaml"),
        (["data.workers=3"], "data.workers=3 changes a configuration, and none is named; give --config"),
    ):
        try:
            code = main(wrong)
        except SystemExit as ended:
            code = ended.code
        error = capsys.readouterr().err
        assert code == 2 and said in error and error.count("\n") == 1, error
