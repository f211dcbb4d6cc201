"""Starts the processes of a run in named stages, each of which ends in time and says who and what is wrong.

detect (`launchers`), connect, meet, agree, and then PyTorch's process group on the store in which they have met.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _set_pg_timeout

from ijepa_scale import environment
from ijepa_scale.engine.agreement import agree, check_alike
from ijepa_scale.engine.connect import connect
from ijepa_scale.engine.meeting import LINGER_S, Member, ends, linger, meet, refuse
from ijepa_scale.engine.world import TIMEOUT, World
from ijepa_scale.errors import ConfigError
from ijepa_scale.launchers import Launch
from ijepa_scale.no_answer import NoAnswer, within

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
_AFTER_S = 0.3  # that the others leave to process 0 to tell what it knows too
_EARLY_S = 3.0  # that those with the same error before they have met wait for one another
_LEAST_S = 30.0  # to connect all with all, once they have met
_OVERTIME_S = 15.0  # after its deadline, that a meeting may take until all know who is missing
_SPARE_S = 5.0  # for what ends by itself in time, unless the store doesn't answer
_made: list[Any] = []  # the process group, if `start_world` has made it


def start_world(
    launch: Launch,
    device: torch.device,
    *,
    alone: bool = False,
    timeout_s: float = START_TIMEOUT_S,
    facts: Mapping[str, str] | None = None,
) -> World:
    """Creates the process group, unless a single process is `alone` and needs no collectives, and returns the world.

    Communicates: waits until all processes have joined. `facts` are what all must have alike, by name.

    Raises:
        ConfigError: the processes don't find one another within `timeout_s`, two use the same GPU, or their facts
            differ.
    """
    store, members = None, [Member.own(launch.rank, launch.world_size)]
    if dist.is_initialized() and not (alone and launch.world_size == 1):
        _check_place(launch)
    if not (alone and launch.world_size == 1) and not dist.is_initialized():
        # DeepSpeed reads the device index from LOCAL_RANK
        environment.export(launch if device.index is None else replace(launch, local_rank=device.index))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if launch.world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            _made.append(dist.group.WORLD)
        else:
            store, members = _start_with_others(launch, device, backend, timeout_s, facts or {})
    world = World(
        rank=launch.rank,
        size=launch.world_size,
        local_rank=launch.local_rank,
        local_size=launch.local_world_size,
        device=device,
        store=store,
        members=tuple(members),
        launcher=launch.launcher,
    )
    return world if store is not None or launch.world_size == 1 else _among_others(world, facts or {})


def _start_with_others(
    launch: Launch, device: torch.device, backend: str, timeout_s: float, facts: Mapping[str, str]
) -> tuple[Store, list[Member]]:
    """Makes the process group, and returns the part of the store that only these processes use, and who they are."""
    began = time.monotonic()
    deadline = began + timeout_s
    whole, address = connect(launch, deadline)
    own = Member.own(launch.rank, launch.world_size, address, _gpu(device))

    def meeting() -> tuple[Store, list[Member]]:
        part, members = meet(whole, own, deadline)
        _agree(part, members, own, {"the kind of device": device.type, **facts}, deadline)
        return part, members

    try:
        # in threads, since torch 2.11 waits without end for a store that stops answering, whatever its timeout
        store, members = within(deadline - time.monotonic() + _OVERTIME_S, meeting)
    except NoAnswer as error:
        who = "the launcher's store" if launch.store_is_there else "process 0"
        raise ConfigError(
            f"{who} at {launch.address}:{launch.port} doesn't answer {own}, {time.monotonic() - began:.0f} s after it "
            "began to start; check that it isn't stopped (state T in ps) and that its host isn't frozen, then start "
            "all processes again"
        ) from error
    except dist.DistError as error:
        raise _lost(own, error) from error
    _choose_interface(own, members)
    whole.set_timeout(TIMEOUT)
    soon_s = max(_LEAST_S, deadline - time.monotonic())

    def grouping() -> None:
        group, soon = PrefixStore("group", store), datetime.timedelta(seconds=soon_s)
        dist.init_process_group(backend, store=group, rank=own.rank, world_size=own.size, timeout=soon)

    try:
        within(soon_s + _SPARE_S, grouping)
    except (NoAnswer, RuntimeError) as error:  # RuntimeError: of the store, or of gloo
        if not isinstance(error, (NoAnswer, dist.DistError)) and "gloo" not in str(error).lower():
            raise
        raise _lost(own, error) from error
    _set_pg_timeout(TIMEOUT)
    _made.append(dist.group.WORLD)
    return store, members


def _lost(own: Member, error: Exception) -> ConfigError:
    said = str(error).partition("\n")[0]
    return ConfigError(
        f"{own} has lost the others while they started ({said}); read their output, and check that all hosts reach one "
        "another on all ports, through the interface that GLOO_SOCKET_IFNAME names"
    )


def _among_others(world: World, facts: Mapping[str, str]) -> World:
    """Returns the world of a group that another program has made, once its processes have compared their facts."""
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, Member.own(world.rank, world.size, gpu=_gpu(world.device)))
    if problem := _shared_gpu(gathered):
        raise ConfigError(problem)
    found = replace(world, members=tuple(gathered))
    check_alike(found, {"the kind of device": world.device.type, **facts})
    return found


def stop_world() -> None:
    """Destroys the process group that `start_world` has made, if there is one. One of another program stays."""
    if dist.is_initialized() and dist.group.WORLD in _made:
        _made.clear()
        dist.destroy_process_group()


def _check_place(launch: Launch) -> None:
    """Checks that this process has the same place in a group that is there as in its environment."""
    group, own = (dist.get_rank(), dist.get_world_size()), (launch.rank, launch.world_size)
    if group != own:
        raise ConfigError(
            f"this process is {group[0]} of {group[1]} in the process group that the program has made, but "
            f"{own[0]} of {own[1]} by the environment; set RANK and WORLD_SIZE as in the group"
        )


def tells_first(world: World, error: BaseException) -> bool:
    """Returns whether this process is the one to tell an error that others may have too. Process 0 waits for them.

    So the error is told once, and the store is served until all have asked.
    """
    if world.store is None:
        return True
    if not world.is_main:
        time.sleep(_AFTER_S)

    def ask() -> bool:
        first = world.store.add(f"told/{hashlib.sha256(str(error).encode()).hexdigest()}", 1) == 1
        ends(world.store)
        linger(world.store, world.members[world.rank], world.size)
        return bool(first)

    try:
        return within(LINGER_S + _SPARE_S, ask)
    except (NoAnswer, dist.DistError):  # the store doesn't answer, or has ended with process 0 or the launcher
        return True


def tells_early(launch: Launch, error: BaseException) -> bool:
    """Returns whether this process is the one to tell an error from before the processes have met.

    Those that have the same one count themselves in the store, for which they wait a little; a restart counts on.
    """
    if launch.world_size == 1:
        return True
    deadline = time.monotonic() + _EARLY_S
    key, size = f"early/{hashlib.sha256(str(error).encode()).hexdigest()}", launch.world_size

    def ask(store: Store) -> int:
        number = store.add(key, 1)
        while launch.rank == 0 and store.add(key, 0) < size and time.monotonic() < deadline:
            time.sleep(0.05)
        return number

    try:
        store, _ = connect(launch, deadline)
        number = within(deadline - time.monotonic() + _SPARE_S, partial(ask, store))
    except (ConfigError, NoAnswer, dist.DistError):  # the others have no such error, or have ended
        return True
    return number % size == 1


def _agree(store: Store, members: Sequence[Member], own: Member, facts: Mapping[str, str], deadline: float) -> None:
    try:
        if own.rank == 0 and (problem := _shared_gpu(members)):
            refuse(store, problem)
        agree(store, members, own.rank, facts, deadline)
    except ConfigError:
        linger(store, own, own.size)
        raise


def _gpu(device: torch.device) -> str | None:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def _shared_gpu(members: Sequence[Member]) -> str | None:
    """Returns what is wrong if two processes use the same GPU."""
    users: dict[tuple[str, str], Member] = {}
    for member in members:
        if member.gpu is not None:
            other = users.setdefault((member.host, member.gpu), member)
            if other is not member:
                return (
                    f"{other} and {member} both use GPU {member.gpu}; give each process its own: set LOCAL_RANK to its "
                    "number on its host, or let the launcher start at most as many processes as there are GPUs"
                )
    return None


def _choose_interface(own: Member, members: Sequence[Member]) -> None:
    """Names the network interface to gloo, where it would choose loopback though there are several hosts.

    gloo takes the interface of the address that the host's own name stands for, which Debian makes 127.0.1.1.
    """
    away = [member for member in members if (member.host, member.network) != (own.host, own.network)]
    if all(member.network == own.network for member in away) or not _name_is_loopback(own.host):
        return
    address = own.address
    if address is None or _is_loopback(address):  # it is on the host of process 0
        target = next((each.address for each in away if each.address and not _is_loopback(each.address)), None)
        if target is None:
            return
        address = _way_to(target)
    for name, found in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address.removeprefix("::ffff:") for each in found):
            logger.info("gloo uses the network interface %s: %s is loopback on this host", name, own.host)
            environment.export_interface(name)
            return


def _name_is_loopback(host: str) -> bool:
    """Returns whether this host takes its own name for loopback, or doesn't know it."""
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return True
    return any(map(_is_loopback, found))


def _is_loopback(address: str) -> bool:
    return address.removeprefix("::ffff:").startswith("127.") or address == "::1"


def _way_to(address: str) -> str:
    """Returns this host's address on the way to another. Sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect((address, 9))
        return str(way.getsockname()[0])
