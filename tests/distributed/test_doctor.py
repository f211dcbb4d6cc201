"""The doctor on two processes: links, a clock that is wrong, and processes that hang or see other folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ijepa_scale.doctor import disks, examination
from ijepa_scale.doctor.board import Board
from ijepa_scale.doctor.examination import DoctorOptions
from ijepa_scale.doctor.links import Links
from ijepa_scale.engine.world import World
from ijepa_scale.environment import Launch
from tests.distributed.commands import ROOT, clean_environment
from tests.distributed.harness import run

OFFSET = 3.5  # seconds


def links_between_hosts(world: World) -> list[dict]:
    """Returns what is found between two processes that say that they are hosts; the second one's clock is late."""
    late = OFFSET * world.rank
    links = Links(world, host=f"host{world.rank}", clock=lambda: time.time() - late)
    return [vars(each) for each in links.measure()]


def test_links_and_clocks_are_measured_and_a_late_clock_is_wrong() -> None:
    found, nothing = run(links_between_hosts, 2)
    assert nothing == []
    clocks, pairs, reduced = found
    assert clocks["verdict"] == "wrong" and "host1 is 3.5 s behind process 0's host" in clocks["found"]
    assert clocks["values"]["offset_s"] == pytest.approx(-OFFSET, abs=0.2)
    assert pairs["check"] == "pairs between hosts, gloo" and pairs["found"].startswith("1 of 1 pairs: ")
    assert pairs["values"]["pairs"][0]["bytes_per_s"] > 1e6 and pairs["values"]["pairs"][0]["latency_s"] > 0
    assert reduced["check"] == "all-reduce, gloo" and len(reduced["values"]["bus_bytes_per_s"]) >= 2


def hanging(world: World, folder: str) -> list:
    """Returns what process 0 says of a process 1 that doesn't come to the links, and then of one that tells nothing."""
    board = Board(world)
    launch = Launch(rank=world.rank, world_size=2, address="127.0.0.1")
    options = DoctorOptions(folder=folder, data=None, config=None, need=None, json=None)
    patient = examination._Patient(options, launch, torch.device("cpu"), [])
    links = Links(world, host="a", wait_s=1.0)
    if world.rank:
        with pytest.raises(RuntimeError):  # process 0 ends, and so does its board
            board.hear("never", 60.0)
        return [links.stage]
    said = []
    try:
        links.measure()
    except RuntimeError as error:
        said.append((links.stage, examination._ABSENT.search(str(error))[1]))
    examination.LOCAL_S = examination._AFTER_S = 0.5
    examination._together(patient, world, board)
    said.append(patient.findings[-1].found)
    assert patient.hung and examination._told(patient, board) == 1 and patient.findings[-1].check == "processes"
    said.append(patient.findings[-1].found)
    return said


def test_a_process_that_hangs_is_named(tmp_path: Path) -> None:
    (stage, absent), unfinished, silent = run(hanging, 2, str(tmp_path))[0]
    assert (stage, absent) == ("measuring processes 0 and 1 over gloo", "1")
    assert unfinished == "processes 1 haven't finished their own checks within 0.5 s of process 0"
    assert silent == "processes 1 don't tell what they find"
    assert not list(tmp_path.iterdir())


def looking(world: World, folder: str, shadow: str | None) -> list[tuple[str, str]]:
    """Returns what each process says of the run's folder; process 1 sees `shadow` in its place."""
    board, ask = Board(world), disks.ask
    if shadow is not None and world.rank:
        disks.ask = lambda what, limit, **arguments: ask(what, limit, **arguments | {"folder": shadow})
    examination.SEEN_S = 0.3
    options = DoctorOptions(folder=folder, data=None, config=None, need=None, json=None)
    patient = examination._Patient(options, Launch(rank=world.rank, world_size=2), torch.device("cpu"), [])
    found = examination._same_folder(patient, board)
    if world.is_main:
        board._await("looked", 30.0)
        examination._remove(*patient.left)
    else:
        board.tell("looked/1", "")
    world.barrier()
    return [(each.verdict, each.found) for each in found]


@pytest.mark.parametrize("shadow", [False, True])
def test_another_folder_under_the_same_name_is_wrong(shadow: bool, tmp_path: Path) -> None:
    folder, other = tmp_path / "runs", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    main, (found,) = run(looking, 2, str(folder / "new"), str(other) if shadow else None)
    expected = "isn't the one of process 0: a file made there isn't seen here" if shadow else "is the one of process 0"
    assert main == [] and found == ("wrong" if shadow else "ok", f"{folder} {expected}")
    assert not list(folder.iterdir()) and not list(other.iterdir())


@pytest.mark.parametrize("need", ["1", "1e9"])
@pytest.mark.long
def test_all_of_it_under_torchrun(need: str, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *launcher, str(ROOT / "launch" / "doctor.py"), "--folder", str(tmp_path / "runs")]
    done = subprocess.run(
        [*command, "--need", need, "--json", str(tmp_path / "found.json")],
        env=clean_environment(PYTHONPATH=os.pathsep.join(sys.path)), capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    wrong = [each["check"] for each in found["findings"] if each["verdict"] == "wrong"]
    assert ("decoding" in wrong) == (need == "1e9")
    assert done.returncode == (1 if wrong else 0), done.stdout + done.stderr
    assert {each["check"] for each in found["findings"]} >= {"pairs in a host, gloo", "all-reduce, gloo", "same folder"}
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_processes_that_it_starts_end_with_its_verdict(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), "--folder", str(tmp_path), "--processes", "2"]
    done = subprocess.run(
        [*command, "--need", "1e9"], env=clean_environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 1 and "remedy       decoding: set data.workers=" in done.stdout, done.stderr
    assert "process 1 on" in done.stdout and not list(tmp_path.iterdir())
