"""Connects a process to the store in which the processes of a run meet. Knows nothing of what they do there."""

from __future__ import annotations

import logging
import resource
import socket
import time
from functools import partial

import psutil
import torch.distributed as dist
from torch.distributed import Store

from ijepa_scale.errors import ConfigError
from ijepa_scale.launchers import Launch
from ijepa_scale.no_answer import NoAnswer, within

logger = logging.getLogger(__name__)

TELL_S = 10.0  # between two lines about what is waited for
_TRY_S = 5.0  # that an attempt may take
_PAUSE_S = 0.2  # between attempts


def connect(launch: Launch, deadline: float) -> tuple[Store, str | None]:
    """Returns the store, and the address of this host on the way to it, None if it is this host's own.

    Process 0 serves the store, unless the launcher does. Others try to reach it until the `deadline`, a time of
    `time.monotonic()`, and say every 10 s what keeps them.

    Raises:
        ConfigError: the port is in use, or process 0 can't be reached in time.
    """
    assert launch.address is not None and launch.port is not None
    if launch.rank == 0 and not launch.store_is_there:
        return _serve(launch), None
    address = _reach(launch, deadline)
    try:
        # torch 2.11 waits without end for what accepts a connection and says nothing
        return within(max(_TRY_S, deadline - time.monotonic()), partial(_join, launch)), address
    except (NoAnswer, dist.DistError) as error:
        raise ConfigError(
            f"process {launch.rank} on {socket.gethostname()} finds something at {launch.address}:{launch.port} that "
            "doesn't answer as process 0 of a run does; set MASTER_PORT to a port that is free on process 0's host, "
            "and check that process 0 isn't stopped"
        ) from error


def _join(launch: Launch) -> Store:
    return dist.TCPStore(launch.address or "", launch.port or 0, is_master=False, wait_for_workers=False)


def _serve(launch: Launch) -> Store:
    """Returns the store, served by this process on all its addresses."""
    assert launch.port is not None
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each process keeps two connections to the store
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("", launch.port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        said = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"process 0 can't listen on port {launch.port} of {socket.gethostname()} ({said}); end the program that "
            "uses it, or set MASTER_PORT to another for all processes (torchrun: --master-port)"
        ) from error
    _warn_of_other_host(launch)
    # over loopback, since this host may not know the name that others call it by
    return dist.TCPStore(
        "127.0.0.1",
        launch.port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _warn_of_other_host(launch: Launch) -> None:
    """Warns if the address that others were given isn't this host's, as far as it knows: services have others."""
    try:
        named = {str(found[4][0]) for found in socket.getaddrinfo(launch.address, None, type=socket.SOCK_STREAM)}
    except OSError:
        return  # that a host doesn't know its own name is usual in containers
    own = {found.address.partition("%")[0] for every in psutil.net_if_addrs().values() for found in every}
    if not any(address in own or address.startswith("127.") for address in named):
        logger.warning(
            "MASTER_ADDR is %s (%s), which isn't an address of %s, where process 0 runs: if the others don't "
            "connect, set it to this host",
            launch.address,
            ", ".join(sorted(named)),
            socket.gethostname(),
        )


def _reach(launch: Launch, deadline: float) -> str:
    """Waits until something listens at process 0's address, and returns this host's address on the way there."""
    began = told = time.monotonic()
    while True:
        try:
            left = deadline - time.monotonic()
            with socket.create_connection((launch.address or "", launch.port or 0), max(0.1, min(left, _TRY_S))) as way:
                return str(way.getsockname()[0])
        except (OSError, OverflowError, UnicodeError) as error:
            why = _reason(error)
        now = time.monotonic()
        if now > deadline:
            raise ConfigError(
                f"process {launch.rank} on {socket.gethostname()} can't reach process 0 at {launch.address}:"
                f"{launch.port} ({why}) within {now - began:.0f} s; check MASTER_ADDR and MASTER_PORT, the firewall, "
                "and that process 0 runs"
            )
        if launch.local_rank == 0 and now - told > TELL_S:
            told = now
            logger.warning("waiting for process 0 at %s:%d (%s), %.0f s", launch.address, launch.port, why, now - began)
        time.sleep(_PAUSE_S)


def _reason(error: Exception) -> str:
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "this host doesn't know that name"
    if isinstance(error, TimeoutError):
        return "no answer"
    return str(getattr(error, "strerror", None) or error).lower()
