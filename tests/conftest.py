"""What all tests share: one thread, GPU tests skipped by name, and the real photos where they are."""

import re
import signal
from pathlib import Path

import pytest
import torch

# Engines whose cases are long forms: DDP, FSDP2 and ZeRO-3 stand for all of them in `make test`
SPARED = re.compile("hsdp|zero1|zero2|offload|reshard")
SPARED_IN = ("tests/distributed/", "tests/golden/")
CLOTHING = Path(__file__).parents[2] / "shared" / "data" / "clothing-small.tar"


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # started in the background of a script, as CI may: then Ctrl-C, which tests send, would reach nobody
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder, _, case = item.nodeid.partition("[")
        if folder.startswith(SPARED_IN) and SPARED.search(case):
            item.add_marker(pytest.mark.long)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def clothing_tar() -> Path:
    """845 real JPEG photos in 10 classes, train/CLASS/*.jpg and val/CLASS/*.jpg."""
    if not CLOTHING.exists():
        pytest.skip(f"{CLOTHING.name} is not in ../shared/data")
    return CLOTHING
