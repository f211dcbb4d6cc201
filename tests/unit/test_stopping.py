"""Signals are noted while the main thread is busy; the second one ends the process, a repeated first one doesn't."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from ijepa_scale import stopping

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def test_nothing_was_asked_until_a_signal_comes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in stopping.SIGNALS:
        with stopping.listening():
            assert stopping.reason() is None
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 10
            while stopping.reason() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert stopping.reason() == signal.Signals(number).name
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopping" not in [thread.name for thread in threading.enumerate()]


def test_outside_the_main_thread_it_says_that_it_cannot(caplog: pytest.LogCaptureFixture) -> None:
    def listen() -> None:
        with stopping.listening():
            pass

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert "not in the main thread" in caplog.text


def started(body: str, **options: int) -> subprocess.Popen[str]:
    code = "import ctypes, os, signal, sys, time\nfrom ijepa_scale import stopping\n" + textwrap.dedent(body)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


IDLE = """
with stopping.listening():
    print("ready", flush=True)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        ctypes.CDLL(None).usleep(900_000)  # in C, without the interpreter's lock, as a collective
"""


def test_a_repeated_signal_is_one_and_a_later_one_ends_the_process() -> None:
    process = started(IDLE)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):  # from a terminal and a launcher
        process.send_signal(number)
        time.sleep(0.05)
    time.sleep(4)  # surely 2 s after it has noted the last one
    assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGHUP
    assert "ends at once: a second signal, SIGHUP" in said


FULL = """
os.set_blocking(2, False)
for size in (1000, 1):
    try:
        while True:
            os.write(2, b"?" * size)
    except BlockingIOError:
        pass
os.set_blocking(2, True)
"""


@pytest.mark.parametrize("errors", ["full", pytest.param("closed", marks=pytest.mark.long)])
def test_it_ends_though_nobody_reads_why(errors: str) -> None:
    process = started(FULL * (errors == "full") + IDLE)
    assert process.stderr is not None
    if errors == "closed":
        process.stderr.close()
    process.send_signal(signal.SIGINT)
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM


def test_the_end_of_the_launcher_is_noted_and_ends_the_process() -> None:
    process = started(
        """
        child = os.fork()
        if child == 0:
            stopping.watch_launcher()
            with stopping.listening():
                print("ready", flush=True)
                begin, asked = time.monotonic(), None
                while time.monotonic() < begin + 30:
                    if stopping.reason() and not asked:
                        asked = stopping.reason()
                        print(asked, flush=True)
                    time.sleep(0.1)
        time.sleep(60)
        """
    )
    process.kill()
    process.wait()
    begin = time.monotonic()
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "its launcher has ended\n"
    assert "couldn't stop in time" in process.stderr.read()  # returns once the child has ended
    assert time.monotonic() - begin < 20


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this Python has no descriptors of processes")
def test_the_end_of_the_launcher_is_noted_at_once() -> None:
    """And not at the next look, which is hours away."""
    process = started(
        """
        stopping._LOOK_S = 7200.0
        child = os.fork()
        if child == 0:
            stopping.watch_launcher()
            with stopping.listening():
                print("ready", flush=True)
                end = time.monotonic() + 60
                while not stopping.reason() and time.monotonic() < end:
                    time.sleep(0.01)
                print(stopping.reason(), flush=True)
            os._exit(0)
        time.sleep(60)
        """
    )
    process.kill()
    process.wait()
    assert process.stdout is not None and process.stdout.readline() == "its launcher has ended\n"


def test_signals_are_passed_on_to_processes() -> None:
    process = started(
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
            os.kill(os.getppid(), signal.SIGUSR2)
            time.sleep(60)
        signal.sigwait({signal.SIGUSR2})
        with stopping.passing_on(lambda: [child, None]):
            print("ready", flush=True)
            _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
        """
    )
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 7


def test_signals_before_there_are_processes_are_passed_on_later() -> None:
    children: list[int] = []
    with stopping.passing_on(lambda: children) as pass_early:
        os.kill(os.getpid(), signal.SIGTERM)
        with subprocess.Popen(["sleep", "60"]) as process:
            children.append(process.pid)
            pass_early()
            assert process.wait(timeout=20) == -signal.SIGTERM
    children.clear()
    with stopping.passing_on(lambda: children) as pass_early:
        os.kill(os.getpid(), signal.SIGTERM)
        pass_early()  # all have ended by now: nothing is sent, and it returns
