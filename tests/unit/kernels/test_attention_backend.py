"""The dense attention kernel of a network is the one that was asked for, or an error says why not."""

import dataclasses

import pytest
import torch
import torch._dynamo.testing
from torch.nn import attention as torch_attention

from ijepa_kernels.attention import SequenceLayout, attention, backend
from ijepa_kernels.attention.backend import (
    AUTO_ORDER,
    BACKENDS,
    HeadShape,
    activate,
    backend_for,
    choose_backend,
    packed_backend,
    packed_problem,
)

SHAPE = HeadShape(role="target", heads=3, head_dim=16, queries=5, tokens=9)
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
dense_on_cpu = backend._dense
EMPTY = dataclasses.replace(SHAPE, tokens=0)  # what the flash kernel of the CPU can't take


def ran(*arguments, **options):
    """Returns the operations of an attention call."""
    with torch.profiler.profile() as profile:
        attention(*arguments, **options)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("name,kernel", [("auto", "flash"), ("flash", "flash"), ("math", "math")])
@pytest.mark.parametrize("packed", [False, True])
def test_the_chosen_kernel_is_the_one_that_runs_and_other_calls_stay_free(name, kernel, packed):
    chosen = choose_backend(name, [SHAPE], torch.float32, "cpu")
    assert chosen == (None if name == "auto" else name)
    assert backend_for(SHAPE, torch.float32, "cpu", chosen) == kernel
    q = torch.zeros(5, 3, 16) if packed else torch.zeros(1, 3, 5, 16)
    layout = SequenceLayout.of((5,)) if packed else None
    assert (FLASH in ran(q, q, q, layout, kernel=chosen)) == (kernel == "flash")
    assert FLASH in ran(q, q, q, layout)


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_call_runs_in_its_own_kernel_without_breaks(packed):
    """The choice is traced, so two networks with different kernels need one graph each, and keep their kernels."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    q = torch.zeros(5, 3, 16) if packed else torch.zeros(1, 3, 5, 16)
    layout = SequenceLayout.of((5,)) if packed else None
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda kernel, q: attention(q * 1, q * 2, q * 3, layout, kernel=kernel), fullgraph=True, backend=counter
    )
    for kernel in ("math", "flash", "math", "flash"):
        with torch.no_grad(), torch.profiler.profile() as profile:
            compiled(kernel, q)
        assert (FLASH in {event.key for event in profile.key_averages()}) == (kernel == "flash")
    assert counter.frame_count == 2
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


def test_auto_takes_the_first_kernel_that_runs_all_shapes_of_a_network(monkeypatch):
    """The CPU has two of the kernels, so it stands in for a GPU that can't run flash."""
    monkeypatch.setattr(backend, "_dense", lambda shape, dtype, device: dense_on_cpu(shape, dtype, "cpu"))
    assert choose_backend("auto", [SHAPE], torch.float32, "cuda") == "flash"
    assert choose_backend("auto", [SHAPE, EMPTY], torch.float32, "cuda") == "math"
    assert choose_backend("auto", [SHAPE, EMPTY], torch.float32, "cpu") is None  # PyTorch's own choice


def test_the_automatic_order_has_known_kernels_and_ends_with_the_one_that_always_runs():
    assert set(AUTO_ORDER) < set(BACKENDS) and AUTO_ORDER[-1] == "math"


def test_unknown_names_and_cuda_kernels_on_the_cpu_are_refused():
    with pytest.raises(ValueError, match="attention 'fast' is unknown; choose one of auto, flash, cudnn"):
        activate("fast", "cpu")
    for name in ("cudnn", "efficient", "fa3", "fa4"):
        with pytest.raises(ValueError, match=f"attention {name} needs a CUDA device and this one is cpu; choose auto"):
            activate(name, "cpu")


def test_shapes_that_the_kernel_cannot_run_are_named_with_the_reason():
    message = (
        r"attention flash can't run target \(3 heads of head_dim 16, 5 of 0 tokens\) in float32 on cpu: "
        "No available kernel.*"
    )
    with pytest.raises(ValueError, match=message):
        choose_backend("flash", [SHAPE, EMPTY], torch.float32, "cpu")
    assert backend_for(EMPTY, torch.float32, "cpu", "flash") == "none"
    assert backend_for(EMPTY, torch.float32, "cpu") == "math"


def test_other_flash_kernels_need_their_package_and_their_release(monkeypatch):
    """The registry is PyTorch's own; the packages aren't here."""
    with pytest.raises(ValueError, match="attention fa3 can't be activated.*install its package, or choose flash"):
        activate("fa3", "cuda")
    monkeypatch.setattr(torch_attention, "list_flash_attention_impls", lambda: ["FA4"])
    with pytest.raises(ValueError, match="attention fa3 isn't in torch .*, which knows FA4; choose flash"):
        activate("fa3", "cuda")
    monkeypatch.delattr(torch_attention, "activate_flash_attention_impl")
    with pytest.raises(ValueError, match="which knows no other flash kernels; choose flash"):
        activate("fa4", "cuda")


def test_another_flash_kernel_is_put_in_place_and_taken_out_again():
    class Handle:
        removed = False

        def remove(self):
            self.removed = True

    handle = Handle()
    before = dict(torch_attention._registry._FLASH_ATTENTION_IMPLS)
    torch_attention.register_flash_attention_impl("FA4", register_fn=lambda: handle)
    try:
        activate("fa4", "cuda")
        assert torch_attention.current_flash_attention_impl() == "FA4"
        assert backend_for(SHAPE, torch.float32, "cpu") == "flash"  # it is one for CUDA
        assert packed_backend(torch.bfloat16, "cuda") == "variable-length fa4"
        activate("flash", "cuda")
        assert handle.removed and torch_attention.current_flash_attention_impl() is None
    finally:
        torch_attention._registry._FLASH_ATTENTION_IMPLS.update(before)


def test_packed_sequences_say_what_they_run_in():
    assert packed_backend(torch.float32, "cuda") == "one dense call for each run of equal lengths"
    assert packed_backend(torch.bfloat16, "cpu") == "one dense call for each run of equal lengths"
    assert packed_backend(torch.bfloat16, "cuda") == "variable-length flash"
    assert packed_problem(SHAPE, torch.float32, "cpu") is None
    assert "packed target (3 heads of head_dim 16" in packed_problem(SHAPE, torch.float32, "cpu", "cudnn")
