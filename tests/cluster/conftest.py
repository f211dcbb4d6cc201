"""What tests that start runs share."""

from tests.distributed.conftest import no_run_is_left

__all__ = ["no_run_is_left"]
