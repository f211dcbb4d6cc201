"""After a kill at any moment, make continues and writes the same bytes; mismatched sets are refused."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ijepa_scale.data.shards.image_files import FolderImages
from ijepa_scale.data.shards.journal import JOURNAL
from ijepa_scale.data.shards.make import MakePlan, make_shards
from ijepa_scale.errors import DataError
from tests.unit.data.shards.image_sets import PLAN, class_folders, damaged_folders, encoded, make, tree

SCRIPT = Path(__file__).parents[4] / "launch" / "shards.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return damaged_folders(tmp_path_factory.mktemp("images") / "set")


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    """Returns the files that an uninterrupted run writes."""
    to = tmp_path_factory.mktemp("expected")
    make(folder, to)
    return tree(to)


def in_child(work):
    """Forks a child that calls `work` and exits; returns its process id."""
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            logging.disable()
            work()
            code = 0
        os._exit(code)
    return child


def finished(to):
    return (to / "manifest.json").exists() and not (to / JOURNAL).exists()


def test_killed_at_each_step_to_the_disk(tmp_path):
    """Kills the run before each sync, rename and removal in turn, and continues from there."""
    folder = class_folders(tmp_path / "set", 7)
    (folder / "a" / "1.JPEG").write_bytes(b"no image at all")
    make(folder, tmp_path / "expected", max_bad_fraction=0.5)
    expected = tree(tmp_path / "expected")
    assert len(expected) == 2 * 2 + 2  # two shards

    def dying(to, number):
        calls = 0

        def counted(function):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        os.fsync, os.replace, Path.unlink = counted(os.fsync), counted(os.replace), counted(Path.unlink)
        make(folder, to, max_bad_fraction=0.5)

    for number in range(1, 1000):
        to = tmp_path / str(number)
        status = os.waitpid(in_child(lambda to=to, number=number: dying(to, number)), 0)[1]
        if not os.WIFSIGNALED(status):
            break
        if not finished(to):  # else it was killed when everything was done
            make(folder, to, max_bad_fraction=0.5)
        assert tree(to) == expected, f"killed before step {number}"
    assert status == 0 and number > 20


def test_killed_at_random_moments(folder, expected, tmp_path):
    delays = [0.001, *np.random.default_rng(0).uniform(0.005, 0.05, 14)]
    kills = 0
    for delay in delays:
        child = in_child(lambda: make(folder, tmp_path))
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if finished(tmp_path):
            break
    else:
        make(folder, tmp_path)
    assert tree(tmp_path) == expected and kills


def test_a_killed_command_leaves_no_process_and_can_continue(tmp_path):
    root = class_folders(tmp_path / "set", 6)
    for number in range(60):
        (root / "a" / f"large{number}.jpg").write_bytes(encoded(number % 4, "JPEG", (1200, 1200)))
    to = tmp_path / "to"
    command = [sys.executable, str(SCRIPT), "make", "--root", str(root), "--to", str(to), "--shard-size", "60kB"]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(to.glob("*.tar")):
        assert process.poll() is None
        time.sleep(0.01)
    started = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(started) >= 2 and not (to / "manifest.json").exists()
    plan, images = MakePlan(shard_bytes=60_000), FolderImages(root)
    make_shards(images, to, plan=plan)
    make_shards(images, tmp_path / "other", plan=plan)
    assert tree(to) == tree(tmp_path / "other")
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.05)


def descendants(pid):
    """Returns the ids of all descendants of a process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def unfinished(folder, to):
    """Makes some shards in `to`, is killed before the set is complete, and returns `to`."""
    before = len(list(to.glob("*.tar")))

    def stop(done, shards, left_out):
        if shards > before + 1:
            os._exit(3)

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(lambda: make(folder, to, progress=stop)), 0)[1]) == 3
    assert (to / JOURNAL).exists() and len(list(to.glob("*.tar"))) > 1
    return to


def test_a_line_cut_short_by_the_kill_is_dropped(folder, expected, tmp_path):
    to = unfinished(folder, tmp_path / "to")
    with (to / JOURNAL).open("ab") as file:
        file.write(b'{"shard": {"name": "sha')
    unfinished(folder, to)  # killed once more, after it has added a line
    make(folder, to)
    assert tree(to) == expected


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"shard_bytes": 9000}, "started with other arguments: shard size 2500, now 9000; give the same ones"),
        (
            {"seed": 3, "prefix": "x"},
            "prefix 'shard', now 'x'; seed 0, now 3; give the same ones to finish it, or name",
        ),
        ({"resize_shorter": 8}, "resize-shorter None, now 8"),
    ],
)
def test_other_arguments_are_refused_with_what_differs(folder, tmp_path, plan, message):
    to = unfinished(folder, tmp_path / "to")
    before = tree(to)
    with pytest.raises(DataError, match=message):
        make_shards(FolderImages(folder), to, plan=MakePlan(**{"shard_bytes": 2500, **plan}))
    assert tree(to) == before


def test_other_images_are_refused(folder, tmp_path):
    root = class_folders(tmp_path / "set")
    to = unfinished(folder, tmp_path / "to")
    with pytest.raises(DataError, match="images from 'class folders .*set', now 'class folders .*set'"):
        make(root, to)
    to = unfinished(root, tmp_path / "to2")
    (root / "a" / "new.jpg").write_bytes(encoded(1))
    with pytest.raises(DataError, match="number of images 30, now 31; list of images '[0-9a-f]+', now '[0-9a-f]+'"):
        make(root, to)


def test_nothing_that_exists_is_overwritten(folder, expected, tmp_path):
    make(folder, tmp_path / "to")
    with pytest.raises(DataError, match=r"already holds shards .classes.json.; name an empty one"):
        make(folder, tmp_path / "to")
    assert tree(tmp_path / "to") == expected
    for name in ("x.tar", "shard-000000.tar.part", "classes.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"mine")
        with pytest.raises(DataError, match=f"already holds shards .{name}.; name an empty one"):
            make(folder, tmp_path / name)
        assert tree(tmp_path / name) == {name: b"mine"}
    to = unfinished(folder, tmp_path / "foreign")
    (to / "mine.tar").write_bytes(b"mine")
    with pytest.raises(DataError, match="mine.tar isn't part of the set being made there; move it away"):
        make(folder, to)
    (to / "mine.tar").unlink()
    next_name = f"shard-{len(list(to.glob('*.tar'))):06d}.tar"

    class Appearing(FolderImages):
        def read(self, sample_id):
            (to / next_name).write_bytes(b"mine")
            return super().read(sample_id)

    with pytest.raises(DataError, match=f"{next_name} has appeared while it was being written; remove it"):
        make_shards(Appearing(folder), to, plan=PLAN, max_bad_fraction=1)
    assert (to / next_name).read_bytes() == b"mine"


def test_a_damaged_unfinished_set_is_refused(folder, tmp_path):
    to = unfinished(folder, tmp_path / "to")
    shard = min(to.glob("*.tar"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    with pytest.raises(DataError, match=rf"has {len(content) - 512} bytes, but {len(content)} were written; put it"):
        make(folder, to)
    shard.unlink()
    with pytest.raises(DataError, match=f"shard-000000.tar has no bytes, but {len(content)} were written"):
        make(folder, to)
    for line in (b"nonsense\n", b"[1]\n", b'{"shard": {}}\n', b'{"shard": 3, "next_place": 1, "left_out": {}}\n'):
        plan = (to / JOURNAL).read_bytes().splitlines(keepends=True)[0]
        (to / JOURNAL).write_bytes(plan + line)
        with pytest.raises(DataError, match="making.jsonl is damaged .*; start again in an empty folder"):
            make(folder, to)


def test_a_second_process_is_refused(folder, tmp_path):
    found = []

    def second(*_):
        with pytest.raises(DataError, match="another process is writing into .*; let it finish, or name another"):
            make(folder, tmp_path)
        found.append(1)

    make(folder, tmp_path, progress=second)
    assert found


def test_a_set_that_another_process_has_just_finished_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda file, _: os.unlink(file.name))
    with pytest.raises(DataError, match="already holds shards; name an empty one"):
        make(folder, tmp_path)
