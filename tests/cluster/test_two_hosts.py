"""A run over two hosts has the losses of a run on one, by each launcher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import SSHD, TwoHosts, lacking, two_hosts
from tests.cluster.launches import QUICK, c10d, configs, deepspeed, difference, mpirun, static, train
from tests.distributed.commands import ZERO3, finish, losses, start, write_config, write_data

TOLERANCE = 1e-7  # of a loss; 3e-8 was seen, since two processes add in another order than one
FEW = ("schedule.stop_after=3", *QUICK)
pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))
long = pytest.mark.long


def needs(*programs: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(lacking(*programs) is not None, reason=str(lacking(*programs)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("shards") / "data")


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    config = write_config(folder / "run.yaml", data, folder / "run")
    finish(start(config, *QUICK), config)
    return losses(folder / "run")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture(scope="module")
def reachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Hosts that root can log in to from either one."""
    with two_hosts(tmp_path_factory.mktemp("hosts"), ssh=True) as both:
        yield both


def test_torchrun(hosts: TwoHosts, data: Path, expected: dict, tmp_path: Path) -> None:
    found = train(static(hosts), configs(tmp_path, data), *FEW)
    assert difference(found, {step: expected[step] for step in (1, 2, 3)}) < TOLERANCE


@long
@pytest.mark.nightly
@pytest.mark.parametrize("settings", [("engine.strategy=ddp",), ("engine.strategy=fsdp2",), ZERO3], ids=lambda s: s[0])
@pytest.mark.parametrize("meet", [static, c10d])
def test_torchrun_with_each_engine(
    meet, settings: tuple[str, ...], hosts: TwoHosts, data: Path, expected: dict, tmp_path: Path
) -> None:
    assert difference(train(meet(hosts), configs(tmp_path, data), *QUICK, *settings), expected) < TOLERANCE


@long
@pytest.mark.parametrize("meet", [static, c10d])
def test_own_names_that_are_loopback_addresses(meet, data: Path, expected: dict, tmp_path: Path) -> None:
    """As Debian's installer writes /etc/hosts: a process that trusts its own name listens where no other host is."""
    with two_hosts(tmp_path / "hosts", own_name_is_loopback=True) as hosts:
        assert "127.0.1.1 nodea" in hosts.a.run("cat", "/etc/hosts")
        assert difference(train(meet(hosts), configs(tmp_path, data), *QUICK), expected) < TOLERANCE


@long
@needs("pdsh", "ssh", SSHD)
@pytest.mark.parametrize("settings", [("engine.strategy=fsdp2",), ZERO3], ids=lambda settings: settings[0])
def test_deepspeed_over_ssh(
    settings: tuple[str, ...], reachable: TwoHosts, data: Path, expected: dict, tmp_path: Path
) -> None:
    found = train(deepspeed(reachable, tmp_path, ssh=True), configs(tmp_path, data), *QUICK, *settings)
    assert difference(found, expected) < TOLERANCE
    assert "nodeb: " in (tmp_path / "nodea.log").read_text()  # as pdsh marks the lines of a host


@long
@pytest.mark.parametrize("settings", [("engine.strategy=fsdp2",), ZERO3], ids=lambda settings: settings[0])
def test_deepspeed_without_ssh(
    settings: tuple[str, ...], hosts: TwoHosts, data: Path, expected: dict, tmp_path: Path
) -> None:
    found = train(deepspeed(hosts, tmp_path, ssh=False), configs(tmp_path, data), *QUICK, *settings)
    assert difference(found, expected) < TOLERANCE


@long
@needs("mpirun")
def test_mpirun_on_one_host(hosts: TwoHosts, data: Path, expected: dict, tmp_path: Path) -> None:
    found = train([mpirun(hosts.a)], configs(tmp_path, data), *QUICK)
    assert difference(found, expected) < TOLERANCE
    assert "2 x cpu" in (tmp_path / "nodea.log").read_text()


@long
@needs("mpirun", "ssh", SSHD)
def test_mpirun_over_two_hosts(reachable: TwoHosts, data: Path, expected: dict, tmp_path: Path) -> None:
    found = train([mpirun(reachable.a, on=(reachable.a, reachable.b))], configs(tmp_path, data), *QUICK)
    assert difference(found, expected) < TOLERANCE
    assert "2 x cpu" in (tmp_path / "nodea.log").read_text()
