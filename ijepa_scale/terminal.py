"""What all launch scripts share: flags, paths among them, what they print, and how they end. Knows no script's task."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import io
import logging
import os
import re
import select
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from ijepa_scale.environment import expand_path
from ijepa_scale.errors import ConfigError, ReplicaError, SaveError, UserError
from ijepa_scale.escapes import bounded, one_line
from ijepa_scale.registry import load_plugin
from ijepa_scale.shipped import as_called

USER_ERROR_CODE, INTERRUPTED_CODE = 2, 130
FAULT_CODE, HANG_CODE = 70, 71  # EX_SOFTWARE and EX_OSERR of sysexits.h
UNSAVED_CODE, RESUBMIT_CODE = 74, 75  # EX_IOERR and EX_TEMPFAIL
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_OF_FILES = (
    *_OF_WRITING, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENOTEMPTY, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.ETXTBSY,
)  # fmt: skip
_CLOSED_PIPE_CODE = 141  # what a shell reports for a process that SIGPIPE has ended


class Parser(argparse.ArgumentParser):
    """The parser of a launch script. The description is printed as written; a mistake is told in one line."""

    def __init__(self, *, description: str | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=as_called(description or ""), **options)

    def error(self, message: str) -> NoReturn:
        """Prints a mistake in the flags, and exits with code 2."""
        report(re.sub(r"^argument (\S+): is ", r"\1 is ", message) + f" ({self.prog} --help explains the flags)")
        sys.exit(USER_ERROR_CODE)

    def add_local_rank(self) -> None:
        """Accepts the flag that deepspeed and torch.distributed.launch add; its value is in the environment too."""
        self.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)

    def add_plugins(self) -> None:
        """Adds `--plugin`."""
        self.add_argument(
            "--plugin",
            action=_Plugin,
            default=[],
            metavar="MODULE",
            help="module that registers components; can be repeated",
        )


class _Plugin(argparse.Action):
    """Imports the module at once, so that what it registers can be chosen by the other flags."""

    def __call__(self, parser: argparse.ArgumentParser, flags: argparse.Namespace, value: Any, _: Any = None) -> None:
        try:
            load_plugin(value)
        except UserError as error:
            parser.error(str(error))
        setattr(flags, self.dest, [*getattr(flags, self.dest), value])


def path(text: str) -> str:
    """Returns a path as `expand_path` does; the type of every flag that takes a path.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        return expand_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"is {text!r}; {error}") from None


def existing_path(text: str) -> str:
    """Returns a path as it is if there is such a file or folder, else as `path` does.

    The type of lists of files: a shell fills them in, with names that may begin with `~` or hold `$`.
    """
    return text if os.path.lexists(text) else path(text)


def at_least_1(text: str) -> int:
    """Returns a whole number from 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    return _at_least(1, text)


def at_least_0(text: str) -> int:
    """Returns a whole number from 0.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"is {text!r}; give a whole number of at least {least}")
    return number


def above_0(text: str) -> float:
    """Returns a finite number above 0.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"is {text!r}; give a number above 0")
    return number


def file_problem(error: OSError) -> str | None:
    """Returns the line about an error of the file system, or None if it is another error of the operating system."""
    if error.errno not in _OF_FILES or (error.errno == errno.ENOENT and error.filename is None):
        return None
    what = "can't be written" if error.errno in _OF_WRITING else "can't be used"
    remedy = "free space, fix the permissions, or name another place"
    return f"{error.filename or 'a file'} {what} ({error.strerror}); {remedy}"


def code_of(error: BaseException) -> int:
    """Returns the code that a process ends with after this error."""
    if isinstance(error, SaveError):
        return UNSAVED_CODE
    if isinstance(error, ReplicaError):
        return FAULT_CODE
    if isinstance(error, UserError) or (isinstance(error, OSError) and file_problem(error) is not None):
        return USER_ERROR_CODE
    return 1  # as Python does after a traceback


def at_most(seconds: float, work: Callable[[], None]) -> None:
    """Runs `work` in a thread, and leaves it behind if it takes too long: what reads standard error may hang."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def say(*lines: object) -> None:
    """Prints each on a line of its own on standard output; names in them can't break it."""
    for line in lines:
        print(one_line(as_called(str(line))), flush=True)


def report(error: object, kind: str = "error") -> None:
    """Prints an error on standard error in one line after its kind, its middle left out if it is very long.

    One that tells all that is wrong with a configuration has a line for each problem.
    """
    lines = error.problems if isinstance(error, ConfigError) else [str(error)]
    print(
        (f"{kind}: " if kind else "") + "\n".join(bounded(one_line(as_called(line))) for line in lines),
        file=sys.stderr,
        flush=True,
    )


def log_to_terminal(level: int = logging.INFO, form: str = "%(message)s") -> None:
    """Prints log records from `level` on on standard error, but for those that are printed already.

    Names in them can't break a line.
    """
    handler = logging.StreamHandler()
    handler.setLevel(level)
    handler.addFilter(lambda record: not getattr(record, "printed", False))
    handler.setFormatter(LineFormatter(form))
    logging.basicConfig(level=level, handlers=[handler])


class LineFormatter(logging.Formatter):
    """Escapes the values of a record. A record that is one value whole, like a report, may have several lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Returns the line of a record."""
        if isinstance(record.args, tuple) and record.args and record.msg != "%s":
            record.message = str(record.msg) % tuple(map(_shown, record.args))
        record.message = "\n".join(map(one_line, as_called(record.message).split("\n")))
        return super().formatMessage(record)


class _Shown(str):
    """A text of which `%s` shows one line, while `%r` quotes it as it does any."""

    def __str__(self) -> str:
        return one_line(str.__str__(self))


def _shown(value: object) -> object:
    return _Shown(value) if isinstance(value, (str, os.PathLike, BaseException)) else value


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Lets standard output take any text, and ends the process quietly with code 141 when its reader has gone."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold any bytes, in any encoding of the terminal
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        sys.exit(_CLOSED_PIPE_CODE)


def _reader_has_gone(descriptor: int) -> bool:
    """Returns whether nothing reads the pipe that a descriptor writes to."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def command(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """Returns a script's `main`, which takes its arguments and returns its exit code, with the ends of all scripts.

    It reports a `UserError` and an error of the file system in one line and returns 2, and returns 130 after Ctrl-C.
    """

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        try:
            with printing():
                return main(arguments)
        except UserError as error:
            report(error)
            return USER_ERROR_CODE
        except KeyboardInterrupt:
            report("interrupted", "")
            return INTERRUPTED_CODE
        except OSError as error:
            if (problem := file_problem(error)) is None:
                raise
            report(problem)
            return USER_ERROR_CODE

    return run


__all__ = [
    "FAULT_CODE", "HANG_CODE", "INTERRUPTED_CODE", "RESUBMIT_CODE", "UNSAVED_CODE", "USER_ERROR_CODE",
    "LineFormatter", "Parser", "above_0", "at_least_0", "at_least_1", "at_most", "code_of", "command",
    "existing_path", "file_problem", "log_to_terminal", "path", "printing", "report", "say",
]  # fmt: skip
