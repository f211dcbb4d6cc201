"""Errors that a user can act on. Knows nothing of the rest of the package.

Each message names the value found, what was expected and the remedy. Launch scripts print it
and exit with code 2; library callers catch it as `ValueError`.
"""


class UserError(ValueError):
    """A mistake in the input that its author can mend."""


class ConfigError(UserError):
    """A configuration that can't be run as written."""


class DataError(UserError):
    """Data that is missing, damaged or not what its description says."""


class SampleError(DataError):
    """One sample that can't be used; `kind` is what it is counted under."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or doesn't belong to this run."""


class NonFiniteError(UserError):
    """A loss or gradient that is NaN or infinite at `step`; nothing has moved since the step before it."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step
