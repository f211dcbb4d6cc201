"""Errors that a user can fix. Must not import the rest of the package.

Each message names the value, the expectation and the remedy. Launch scripts print the message and exit with code 2;
library users can catch `ValueError`.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the input that the user can fix."""

    is_told: bool | None = None  # whether another process of the run tells it; None: they haven't talked about it


class ConfigError(UserError):
    """A configuration that can't be run as written. Its arguments are the problems, each a line of the message.

    Only they are lines: a name that holds a line break can't begin another.
    """

    @property
    def problems(self) -> list[str]:
        """What is wrong."""
        return [str(problem) for problem in self.args]

    def __str__(self) -> str:
        return "\n".join(self.problems)


class DataError(UserError):
    """Data that is missing, damaged or doesn't match its description."""


class SampleError(DataError):
    """A sample that can't be used. Bad samples are counted by `kind`."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class ShardError(SampleError):
    """A shard that can't be used any more, and so none of its samples."""

    def __init__(self, message: str, kind: str, shard: str) -> None:
        super().__init__(message, kind)
        self.shard = shard

    def __reduce__(self) -> tuple[type[ShardError], tuple[str, str, str]]:
        return type(self), (str(self), self.kind, self.shard)


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or doesn't belong to this run."""


class SaveError(CheckpointError):
    """A checkpoint that can't be written. Older ones are whole, and the state in memory is too."""


class ReplicaError(UserError):
    """Copies of the state that should be equal on several processes differ."""


class NonFiniteError(UserError):
    """A loss or gradient that is NaN or infinite at `step`. That step changed no weights or other state."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class SpikeError(UserError):
    """A loss or gradient norm so high at `step` that the user asked to stop. That step changed no state."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class CollapseError(UserError):
    """Features that collapse while training, where the user asked to stop then."""
