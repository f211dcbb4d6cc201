"""Runs all checks in each process of a run, gathers what they find, and prints it. Each step is bounded in time."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from ijepa_scale import terminal
from ijepa_scale.config import PretrainConfig
from ijepa_scale.data.sources.fetch import scheme_of
from ijepa_scale.doctor import disks, limits, software
from ijepa_scale.doctor.board import Board
from ijepa_scale.doctor.decoding import Config, decoding, needed_rate
from ijepa_scale.doctor.finding import Finding, checked
from ijepa_scale.doctor.gpu_health import gpu_health
from ijepa_scale.doctor.links import WAIT_S, Links
from ijepa_scale.doctor.table import PROCESS, table, table_json, wrong_of
from ijepa_scale.engine.start import start_world, stop_world
from ijepa_scale.engine.world import World
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError
from ijepa_scale.new_file import new_file
from ijepa_scale.no_answer import NoAnswer, within
from ijepa_scale.planning.memory import state_bytes

WRONG_CODE = 1
QUICK_S = 30.0  # of a check that should take none
MEET_S, LINKS_S = 120.0, 180.0
SEEN_S = 5.0  # until another host's file must be seen
_LEAVE_S = 1.0  # for the other processes to end
_ALL_ANSWER = "all answer"
_AFTER_S = 5.0  # for findings, once a process is known to hang
LOCAL_S = 120.0  # until each process must have finished its own checks
_ABSENT = re.compile(r"Ranks ([\d, ]+) failed to pass")  # what `monitored_barrier` says
_HUNG = "see what the other processes print; check that the hosts reach each other (firewall, interface, address)"
_BROKEN = "report it with the command"


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What to check."""

    folder: str  # of the run
    data: str | None  # None: no data to check
    config: Config | None
    need: float | None  # images per second of each process; None: by the plan
    json: str | None


@dataclass
class _Patient:
    """One process under examination."""

    options: DoctorOptions
    launch: Launch
    device: torch.device
    findings: list[Finding]
    hung: bool = False  # something in a thread waits for ever
    left: tuple[str, str] | None = None  # the file that other processes look for

    @property
    def host(self) -> str:
        return socket.gethostname()

    @property
    def first(self) -> bool:
        """Whether this process answers for its host."""
        return self.launch.local_rank == 0

    def add(self, found: Iterable[Finding], where: str | None = None) -> None:
        place = self.host if where is None else where
        self.findings += [replace(each, where=each.where or place) for each in found]


def examine_here(options: DoctorOptions, launch: Launch, device: torch.device) -> None:
    """Examines this process and its links; process 0 prints the table, and exits with 1 if something is wrong.

    It does so when the others have ended, with 0, since launchers end by force what runs when a process fails.
    """
    patient = _Patient(options, launch, device, [])
    world = _meet(patient) if launch.world_size > 1 else None
    if launch.rank == 0 or patient.first:
        _host(patient)
    try:
        if world is not None:
            _together(patient, *world)
        code = _told(patient, None if world is None else world[1])
    except (NoAnswer, RuntimeError) as error:  # of the store
        patient.hung = True
        if launch.rank:
            said = "doesn't answer" if isinstance(error, NoAnswer) else "has ended"
            terminal.report(f"process 0 {said}: {_first_line(error)}", f"wrong (process {launch.rank})")
            code = WRONG_CODE
        elif isinstance(error, NoAnswer):  # the launcher serves it
            said = f"the launcher's store at {launch.address}:{launch.port} doesn't answer"
            patient.add([Finding(check="processes", found=said, verdict="wrong", remedy=_HUNG)], "")
            code = _report(patient)
        else:
            raise
    sys.stdout.flush()
    if not patient.hung and world is not None:
        world[0].barrier()
        stop_world()
    if code and launch.world_size > 1 and not launch.rank:
        time.sleep(_LEAVE_S)
    if patient.hung:
        os._exit(code)  # threads that wait for what doesn't answer can't be ended
    if code:
        sys.exit(code)


def _meet(patient: _Patient) -> tuple[World, Board] | None:
    """Returns the world of the run, once its processes have found one another, and the board for their findings."""
    launch, device = patient.launch, patient.device

    def meet() -> tuple[World, Board]:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        world = start_world(launch, device)
        return world, Board(world)

    try:
        return within(MEET_S, meet)
    except (NoAnswer, RuntimeError, OSError, ConfigError) as error:
        patient.hung = True
        said = f"{launch.world_size} processes don't meet at {launch.address}:{launch.port}: {_first_line(error)}"
        patient.add([Finding(check="meeting", found=said, verdict="wrong", remedy=_HUNG)], f"{PROCESS}{launch.rank}")
        return None


def _host(patient: _Patient) -> None:
    """Checks this host: software, limits, GPUs, folders, decoding."""
    options, config, count = patient.options, patient.options.config, patient.launch.local_world_size
    engine = None if config is None else config.engine
    needs_ops = isinstance(config, PretrainConfig) and getattr(config.optimizer, "impl", None) == "deepspeed"
    quick: dict[str, Callable[[], Iterable[Finding]]] = {
        "versions": software.versions,
        "driver": software.driver,
        "GPUs": software.usable_gpus,
        "GPU health": gpu_health,
        "compilers": partial(software.compilers, patient.device, needs_ops=needs_ops),
        "compile cache": partial(software.compile_cache, None if engine is None else engine.compile_cache),
        "/dev/shm": partial(limits.shared_memory, count),
        "open files": limits.open_files,
        "locked memory": limits.locked_memory,
        "memory": partial(limits.memory, count),
        "cores": partial(limits.cores, count),
    }
    for name, work in quick.items():
        try:
            patient.add(within(QUICK_S, partial(checked, name, work, remedy=_BROKEN)))
        except NoAnswer as error:
            patient.hung = True
            remedy = "see to the disks and drivers of this host: df, dmesg, nvidia-smi"
            patient.add([Finding(check=name, found=str(error), verdict="wrong", remedy=remedy)])
    remedy = "name a folder that is there and that you may write to, and see to the disk: df, dmesg"
    size = None
    if isinstance(config, PretrainConfig):
        states = state_bytes(config.model, "plain", optimizer_states=config.optimizer.state_names)
        size = states.total - states.gradients
    patient.add(checked("run folder", lambda: disks.run_folder(options.folder, size), remedy=remedy))
    images = _data(patient)
    patient.add(checked("decoding", lambda: _decoding(patient, images), remedy=_BROKEN))


def _data(patient: _Patient) -> list[bytes]:
    """Checks the data's folder, and returns its first images."""
    path, images = patient.options.data, list[bytes]()
    if path is None or scheme_of(path) is not None or path.startswith("pipe:"):
        said = "no data named; --data or --config does" if path is None else f"{path} isn't on a disk"
        patient.add([Finding(check="data", found=said, verdict="not checked")])
        return images

    def read() -> list[Finding]:
        finding, found = disks.data_folder(path)
        images.extend(found)
        return [finding]

    remedy = "name images that are there with --data or data.train, and see to the disk: df, dmesg"
    patient.add(checked("data", read, remedy=remedy))
    return images


def _decoding(patient: _Patient, images: list[bytes]) -> list[Finding]:
    launch, options = patient.launch, patient.options
    try:
        needed = options.need or needed_rate(options.config, patient.device, launch.world_size, launch.local_world_size)
    except ConfigError as error:
        said, _, remedy = str(error).splitlines()[0].rpartition("; ")
        return [Finding(check="configuration", found=said, verdict="wrong", remedy=remedy)]
    return list(decoding(options.config, images, processes=launch.local_world_size, needed=needed))


def _together(patient: _Patient, world: World, board: Board) -> None:
    """Checks what several processes share: the run's folder, clocks and links."""
    seen = checked("same folder", lambda: _same_folder(patient, board), remedy="see to the disk: df, dmesg")
    patient.add(seen, f"{PROCESS}{world.rank} on {patient.host}")
    missing = board.assemble(LOCAL_S)
    if missing:
        patient.hung = True
        if world.is_main:
            names = ", ".join(map(str, missing))
            said = f"processes {names} haven't finished their own checks within {LOCAL_S:g} s of process 0"
            patient.add([Finding(check="processes", found=said, verdict="wrong", remedy=_HUNG)], "")
        return
    links: list[Links] = []

    def measure() -> list[Finding]:
        if patient.device.type == "cuda":
            torch.cuda.set_device(patient.device)
        links.append(Links(world, host=patient.host))
        return links[0].measure()

    try:
        patient.add(within(LINKS_S, measure), "")
    except (NoAnswer, RuntimeError, OSError) as error:
        patient.hung = True
        if world.is_main:  # the others wait for the same process, and know less
            stage = links[0].stage if links else "connecting"
            absent = _ABSENT.search(str(error))
            answer = f"processes {absent[1]} don't answer within {WAIT_S:g} s" if absent else _first_line(error)
            said = f"{stage}: {answer}"
            patient.add([Finding(check="links", found=said, verdict="wrong", remedy=_HUNG)], "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _same_folder(patient: _Patient, board: Board) -> list[Finding]:
    """Returns whether this process sees a file that process 0 makes in the run's folder, or what is above it."""
    if patient.launch.rank == 0:
        name = f".doctor-{uuid.uuid4().hex}"
        try:
            near = disks.ask("leave", disks.LIMIT_S, folder=patient.options.folder, name=name)["folder"]
        except (OSError, NoAnswer):
            board.tell("file", "null")
            raise
        patient.left = (near, name)
        board.tell("file", json.dumps(patient.left))
        return []
    told = board.hear("file", LOCAL_S)
    if told is None or (place := json.loads(told)) is None:
        return []  # process 0 says what is wrong with the folder
    near, name = place
    if disks.ask("look", SEEN_S + disks.LIMIT_S, folder=near, name=name, seconds=SEEN_S)["seen"]:
        return [Finding(check="same folder", found=f"{near} is the one of process 0")]
    remedy = "put the run on a file system that all hosts mount at the same place, and name it with folder="
    said = f"{near} isn't the one of process 0: a file made there isn't seen here"
    return [Finding(check="same folder", found=said, verdict="wrong", remedy=remedy)]


def _told(patient: _Patient, board: Board | None) -> int:
    """Prints the table on process 0 and returns the exit code: that of process 0 counts."""
    launch, absent = patient.launch, list[int]()
    if launch.rank:
        if board is None:
            terminal.report("; ".join(each.found for each in patient.findings if each.check == "meeting"), "wrong")
            return WRONG_CODE
        board.post(patient.findings, hung=patient.hung)
        verdict = board.hear("verdict", LINKS_S + LOCAL_S)
        patient.hung |= verdict != _ALL_ANSWER
        return WRONG_CODE if verdict is None else 0
    if board is not None:
        others, absent, hung = board.collect(_AFTER_S if patient.hung else LOCAL_S)
        patient.hung |= hung
        patient.findings += others
        if absent:
            said = f"processes {', '.join(map(str, absent))} don't tell what they find"
            patient.add([Finding(check="processes", found=said, verdict="wrong", remedy=_HUNG)], "")
    if patient.left is not None:
        near, name = patient.left
        patient.add(checked("same folder", lambda: _remove(near, name), remedy="remove it"))
    code = _report(patient)
    if board is not None:
        try:
            board.tell_last("verdict", "" if patient.hung else _ALL_ANSWER, absent)
        except NoAnswer:
            patient.hung = True
    return code


def _remove(folder: str, name: str) -> list[Finding]:
    disks.ask("remove", disks.LIMIT_S, folder=folder, name=name)
    return []


def _report(patient: _Patient) -> int:
    """Prints the table, writes it as JSON if that is wanted, and returns the exit code."""
    launch, path = patient.launch, patient.options.json
    terminal.say(*table(patient.findings).splitlines())
    if path is not None:
        about = {"processes": launch.world_size, "launcher": launch.launcher, "device": str(patient.device)}
        with new_file(path) as temporary:
            temporary.write_text(json.dumps(table_json(patient.findings, about), indent=2) + "\n")
    return WRONG_CODE if wrong_of(patient.findings) else 0


__all__ = ["DoctorOptions", "WRONG_CODE", "examine_here"]
