"""What a start does around its meeting: GPUs, network interfaces, errors that all have, groups that others made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist

from ijepa_scale import environment
from ijepa_scale.engine import start
from ijepa_scale.engine.meeting import Member
from ijepa_scale.errors import ConfigError
from ijepa_scale.launchers import Launch


def member(rank: int, host: str = "a", **known: str | None) -> Member:
    return Member(rank=rank, size=2, host=host, pid=10 + rank, **known)  # type: ignore[arg-type]


def test_two_processes_on_one_gpu_are_named() -> None:
    said = start._shared_gpu([member(0, gpu="GPU-1"), member(1, gpu="GPU-1")])
    assert said is not None and "process 0 (10 on a) and process 1 (11 on a) both use GPU GPU-1; give each" in said
    assert start._shared_gpu([member(0, gpu="GPU-1"), member(1, gpu="GPU-2")]) is None
    assert start._shared_gpu([member(0), member(1)]) is None


@pytest.mark.parametrize(
    ("own", "other", "loopback", "chosen"),
    [
        ({"network": "x"}, {"network": "y", "address": "10.0.0.2"}, True, "eth7"),
        ({"network": "x", "address": "10.0.0.1"}, {"network": "y"}, True, "eth7"),
        ({"network": "x"}, {"network": "y", "address": "10.0.0.2"}, False, None),  # gloo's own choice is right
        ({"network": "x"}, {"network": "x", "address": "10.0.0.2"}, True, None),  # containers that share a network
        ({"network": "x"}, {"network": "y", "address": "127.0.0.1"}, True, None),  # behind a proxy: nothing is known
    ],
)
def test_the_interface_towards_the_others_is_named_where_the_own_name_is_loopback(
    own: dict, other: dict, loopback: bool, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[str] = []
    monkeypatch.setattr(start, "_name_is_loopback", lambda _: loopback)
    monkeypatch.setattr(start, "_way_to", {"10.0.0.2": "10.0.0.1"}.__getitem__)
    monkeypatch.setattr(environment, "export_interface", named.append)
    addresses = {"lo": ["127.0.0.1"], "eth7": ["10.0.0.1"]}
    found = {name: [SimpleNamespace(address=each) for each in every] for name, every in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    mine = member(0, **own)
    start._choose_interface(mine, [mine, member(1, "b", **other)])
    assert named == ([chosen] if chosen else [])


def test_a_group_is_stopped_by_who_has_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(environment, "export", lambda _: None)  # variables that later tests would inherit
    start.start_world(Launch(), device)
    start.start_world(Launch(), device)  # after an error the group of the run before is still there
    start.stop_world()
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        start.start_world(Launch(), device)
        start.stop_world()
        assert dist.is_initialized(), "it is the program's"
        with pytest.raises(ConfigError, match="is 0 of 1 in the process group .* but 1 of 2 by"):
            start.start_world(Launch(rank=1, world_size=2, local_rank=1, local_world_size=2), device)
    finally:
        dist.destroy_process_group()


def tellers(*errors: str | None, port: int) -> list[bool]:
    """Returns who tells its error before a meeting, of processes of which some have none."""

    def process(rank: int) -> bool:
        launch = Launch(rank=rank, world_size=len(errors), address="127.0.0.1", port=port)
        return start.tells_early(launch, ConfigError(errors[rank]))

    with ThreadPoolExecutor(len(errors)) as pool:
        return list(pool.map(process, [rank for rank, error in enumerate(errors) if error is not None]))


def test_an_error_that_all_have_before_they_meet_is_told_once() -> None:
    assert sum(tellers("lr is -1", "lr is -1", "lr is -1", port=environment.free_port())) == 1


def test_errors_that_differ_are_all_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_EARLY_S", 1.0)
    assert tellers("lr is -1", "no GPU", port=environment.free_port()) == [True, True]
    assert tellers(None, "no GPU", port=environment.free_port()) == [True]
    assert start.tells_early(Launch(), ConfigError("alone"))
