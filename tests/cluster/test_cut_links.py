"""Hosts that can't reach each other end, name each other, and go on later; a run's hosts may come and go."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import TwoHosts, lacking
from tests.cluster.launches import QUICK, SLOW_STEPS, begin, c10d, configs, difference, static, train, wait_for
from tests.cluster.test_two_hosts import data, expected, hosts
from tests.distributed.commands import losses
from tests.distributed.test_hanging import wait_until

__all__ = ["data", "expected", "hosts"]
pytestmark = [pytest.mark.skipif(lacking() is not None, reason=str(lacking())), pytest.mark.long]
LIMIT_S = 30
SLOW = ("--plugin", "slow_steps", *QUICK)
AGAIN = "start the same command again to go on from the last checkpoint"


def has_ended(process: psutil.Process) -> bool:
    """Returns whether a process has ended; its launcher, which may wait for the network, need not know yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("settings", [(), ("engine.strategy=fsdp2",)], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("meet", [static, pytest.param(c10d, marks=pytest.mark.nightly)])
def test_a_cut_link_is_named_at_both_ends(
    meet, settings: tuple[str, ...], hosts: TwoHosts, data: Path, expected: dict, tmp_path: Path
) -> None:
    (tmp_path / "slow_steps.py").write_text(SLOW_STEPS.format(seconds=0.3))
    files = configs(tmp_path, data)
    started = begin(meet(hosts), files, *SLOW, *settings)
    wait_for(lambda: len(losses(tmp_path / "run")) >= 8, started, files)
    trainers = [host.trainers(file)[0] for host, file in zip(hosts, files, strict=True)]
    hosts.cut()
    try:
        wait_until(lambda: all(has_ended(trainer) for trainer in trainers), seconds=LIMIT_S)
        logs = [file.with_suffix(".log").read_text() for file in files]
        for rank, (host, log) in enumerate(zip(hosts, logs, strict=True)):
            other = f"of process {1 - rank} ({trainers[1 - rank].pid} on node{'ba'[rank]}): "
            (line,) = [line for line in log.splitlines() if line.startswith(f"error (process {rank}): ")]
            assert "(engine.link_timeout)" in line and other in line and line.endswith(AGAIN), (host.name, line)
    finally:
        hosts.join()
    for process in started:
        process.wait(timeout=90)
    found = train(meet(hosts), files, *QUICK, *settings)
    assert "resumed from" in files[0].with_suffix(".log").read_text()
    assert difference(found, expected) < 1e-7


@pytest.mark.nightly
def test_a_host_that_comes_and_goes_changes_no_number(
    hosts: TwoHosts, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 host, then 2, then 1: the batch is that of all processes, so each row is that of one process."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    (tmp_path / "slow_steps.py").write_text(SLOW_STEPS.format(seconds=0.5))
    files = configs(tmp_path, data)
    first, second = c10d(hosts, "--max-restarts", "3", "--rdzv-conf", "last_call_timeout=1", nodes="1:2")
    steps, log = tmp_path / "run", files[0].with_suffix(".log")
    longer = ("schedule.epochs=8", "schedule.warmup_epochs=1")
    started = begin([first], files, *SLOW, *longer)
    wait_for(lambda: len(losses(steps)) >= 5, started, files[:1])
    started += begin([second], files[1:], *SLOW, *longer)
    wait_for(lambda: "on 2 x cpu" in log.read_text(), started, files)
    joined = max(losses(steps))
    wait_for(lambda: max(losses(steps)) >= joined + 8, started, files)
    agent = next(each for each in hosts.b.processes() if "torch.distributed.run" in each.cmdline())
    agent.send_signal(signal.SIGTERM)
    started[1].wait(timeout=60)
    left = max(losses(steps))
    wait_for(lambda: log.read_text().count("on 1 x cpu") == 2, started[:1], files[:1])
    wait_for(lambda: max(losses(steps)) >= left + 5, started[:1], files[:1])
    started[0].wait(timeout=120)
    assert started[0].returncode == 0, log.read_text()[-3000:]
    (tmp_path / "alone").mkdir()
    alone = configs(tmp_path / "alone", data)[:1]
    whole = train([(*hosts.a.prefix, "python")], alone, *QUICK, *longer)
    assert max(whole) == 80 and difference(losses(steps), whole) < 1e-6
