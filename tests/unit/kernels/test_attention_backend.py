"""The dense attention kernel is the one that was asked for, or an error says why not."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from ijepa_kernels.attention.backend import (
    AUTO_ORDER,
    BACKENDS,
    HeadShape,
    backend_for,
    choose_backend,
    force_backend,
    packed_backend,
    packed_problem,
)

SHAPE = HeadShape(role="target", heads=3, head_dim=16, queries=5, tokens=9)
EMPTY = dataclasses.replace(SHAPE, tokens=0)  # what the flash kernel of the CPU can't take


@pytest.fixture(autouse=True)
def restored():
    """The switches are the process's: other tests must find them as they were."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        yield
    force_backend("auto", "cpu")


@pytest.mark.parametrize("name,kernel", [("auto", "flash"), ("flash", "flash"), ("math", "math")])
def test_the_forced_kernel_is_the_one_that_runs(name, kernel):
    assert choose_backend(name, [SHAPE], torch.float32, "cpu") == name
    assert backend_for(SHAPE, torch.float32, "cpu") == kernel
    q = torch.zeros(1, 3, 5, 16)
    with torch.profiler.profile() as profile:
        F.scaled_dot_product_attention(q, q, q)
    ran = {event.key for event in profile.key_averages()}
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in ran) == (kernel == "flash")


def test_auto_gives_back_pytorchs_own_choice():
    force_backend("math", "cpu")
    force_backend("auto", "cpu")
    assert backend_for(SHAPE, torch.float32, "cpu") == "flash"
    assert backend_for(EMPTY, torch.float32, "cpu") == "math"


def test_the_automatic_order_has_known_kernels_and_ends_with_the_one_that_always_runs():
    assert set(AUTO_ORDER) < set(BACKENDS) and AUTO_ORDER[-1] == "math"


def test_unknown_names_and_cuda_kernels_on_the_cpu_are_refused():
    with pytest.raises(ValueError, match="attention 'fast' is unknown; choose one of auto, flash, cudnn"):
        force_backend("fast", "cpu")
    for name in ("cudnn", "efficient", "fa3", "fa4"):
        with pytest.raises(ValueError, match=f"attention {name} needs a CUDA device and this one is cpu; choose auto"):
            choose_backend(name, [SHAPE], torch.float32, "cpu")


def test_shapes_that_the_kernel_cannot_run_are_named_with_the_reason():
    message = (
        r"attention flash can't run target \(3 heads of head_dim 16, 5 of 0 tokens\) in float32 on cpu: "
        "No available kernel.*"
    )
    with pytest.raises(ValueError, match=message):
        choose_backend("flash", [SHAPE, EMPTY], torch.float32, "cpu")
    assert backend_for(EMPTY, torch.float32, "cpu") == "none"


def test_other_flash_kernels_need_their_package_and_their_release(monkeypatch):
    """The registry is PyTorch's own; the packages aren't here."""
    with pytest.raises(ValueError, match="attention fa3 can't be activated.*install its package, or choose flash"):
        force_backend("fa3", "cuda")
    monkeypatch.setattr(torch_attention, "list_flash_attention_impls", lambda: ["FA4"])
    with pytest.raises(ValueError, match="attention fa3 isn't in torch .*, which knows FA4; choose flash"):
        force_backend("fa3", "cuda")
    monkeypatch.delattr(torch_attention, "activate_flash_attention_impl")
    with pytest.raises(ValueError, match="which knows no other flash kernels; choose flash"):
        force_backend("fa4", "cuda")


def test_another_flash_kernel_is_put_in_place_and_taken_out_again():
    class Handle:
        removed = False

        def remove(self):
            self.removed = True

    handle = Handle()
    before = dict(torch_attention._registry._FLASH_ATTENTION_IMPLS)
    torch_attention.register_flash_attention_impl("FA4", register_fn=lambda: handle)
    try:
        force_backend("fa4", "cuda")
        assert torch_attention.current_flash_attention_impl() == "FA4"
        assert backend_for(SHAPE, torch.float32, "cpu") == "flash"  # it is one for CUDA
        assert packed_backend(torch.bfloat16, "cuda") == "variable-length fa4"
        force_backend("flash", "cuda")
        assert handle.removed and torch_attention.current_flash_attention_impl() is None
    finally:
        torch_attention._registry._FLASH_ATTENTION_IMPLS.update(before)


def test_packed_sequences_say_what_they_run_in():
    assert packed_backend(torch.float32, "cuda") == "one dense call for each run of equal lengths"
    assert packed_backend(torch.bfloat16, "cpu") == "one dense call for each run of equal lengths"
    assert packed_backend(torch.bfloat16, "cuda") == "variable-length flash"
    assert packed_problem(SHAPE, torch.float32, "cpu") is None
    with torch.nn.attention.sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        assert "packed target (3 heads of head_dim 16" in packed_problem(SHAPE, torch.float32, "cpu")
