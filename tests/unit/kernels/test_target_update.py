"""target_update: eager and reference against torch.lerp, the flag, the copies, and what is refused."""

import sys

import pytest
import torch

from ijepa_kernels.target_update import cost, prepare, target_update

SHAPES = [(3, 5), (70,), (), (0, 4), (1025,), (1,)]
BOTH = pytest.mark.parametrize("implementation", ["eager", "reference"])


def lists(shapes=SHAPES, seed=0):
    """Returns target, source, copies that hold nothing of them yet."""
    generator = torch.Generator().manual_seed(seed)
    target, source = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    return target, source, [torch.full(shape, 7.0, dtype=torch.bfloat16) for shape in shapes]


def ulps(found, expected, target, source):
    """The largest difference in units of the last place of the larger of the two ends of each value."""
    worst = 0.0
    for a, b, *ends in zip(found, expected, target, source, strict=True):
        if a.numel():
            largest = torch.stack([x.abs() for x in ends]).amax(dim=0)
            unit = torch.nextafter(largest, torch.tensor(torch.inf)) - largest
            worst = max(worst, float(((a - b).abs() / unit).max()))
    return worst


@BOTH
@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("momentum", [1.0, 0.9999, 0.996, 0.5, 0.25, 0.0])
def test_it_is_lerp(implementation, flagged, momentum):
    target, source, copies = lists()
    moved, kept = [x.clone() for x in target], [x.clone() for x in source]
    flag = torch.zeros(()) if flagged else None
    target_update(moved, source, momentum, copies=copies, found_nonfinite=flag, implementation=implementation)
    expected = [torch.lerp(a, b, 1.0 - momentum) for a, b in zip(target, source, strict=True)]
    assert ulps(moved, expected, target, source) <= 1  # lerp fuses multiplication and addition where it is vectorised
    assert all(torch.equal(a, b) for a, b in zip(source, kept, strict=True))
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(copies, moved, strict=True))


def test_eager_without_a_flag_is_foreach_lerp_bit_for_bit():
    target, source, _ = lists()
    expected = [x.clone() for x in target]
    torch._foreach_lerp_(expected, source, 1.0 - 0.996)
    target_update(target, source, 0.996)
    assert all(torch.equal(a, b) for a, b in zip(target, expected, strict=True))


def test_eager_with_a_flag_stays_with_lerp_over_many_updates():
    target, source, _ = lists()
    plain, flag = [x.clone() for x in target], torch.zeros(())
    for _ in range(200):
        target_update(target, source, 0.99, found_nonfinite=flag)
        torch._foreach_lerp_(plain, source, 1.0 - 0.99)
    for a, b in zip(target, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # 200 roundings at most half an ulp apart


@BOTH
@pytest.mark.parametrize("value", [1.0, 2.0, torch.nan])
def test_where_the_flag_is_set_nothing_moves_and_copies_are_the_targets(implementation, value):
    target, source, copies = lists()
    source[0].fill_(torch.nan)
    expected = [x.clone() for x in target]
    flag = torch.full((1,), value)
    target_update(target, source, 0.5, copies=copies, found_nonfinite=flag, implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(target, expected, strict=True))
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(copies, expected, strict=True))


@BOTH
def test_no_tensors_and_empty_ones(implementation):
    target_update([], [], 0.9, copies=[], found_nonfinite=torch.zeros(()), implementation=implementation)
    target, source, copies = lists([(0,), (3, 0)])
    target_update(target, source, 0.9, copies=copies, found_nonfinite=torch.zeros(()), implementation=implementation)


def test_parameters_that_require_gradients_are_moved():
    target, source, _ = lists([(4, 4)])
    source[0].requires_grad_()
    target[0].requires_grad_()
    target_update(target, source, 0.5, found_nonfinite=torch.zeros(()))
    assert target[0].grad_fn is None


def test_cost_counts_bytes():
    assert cost(10, copies=True) == {"read_bytes": 80.0, "written_bytes": 60.0, "flops": 30.0}
    assert cost(10, copies=False)["written_bytes"] == 40.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": [torch.zeros(3)]}, "target and source differ in number or shapes; give lists of the same shapes"),
        ({"copies": [torch.zeros(2).bfloat16()] * 2}, "target and copies differ in number or shapes"),
        ({"target": [torch.zeros(2).bfloat16()]}, "target has tensors of torch.bfloat16; give torch.float32 only"),
        ({"copies": [torch.zeros(2)]}, "copies has tensors of torch.float32; give torch.bfloat16 only"),
        ({"source": [torch.zeros(4)[::2]]}, "source has tensors that aren't contiguous; give contiguous tensors"),
        ({"found_nonfinite": torch.zeros(2)}, r"found_nonfinite is \(2,\) torch.float32; give one float32 number"),
        ({"found_nonfinite": torch.zeros((), dtype=torch.bool)}, r"is \(\) torch.bool; give one float32 number"),
        ({"source": [torch.zeros(2, device="meta")]}, "the tensors are on cpu, meta; move them to one device"),
        ({"momentum": 1.01}, "momentum is 1.01; give a number from 0 to 1"),
        ({"implementation": "apex"}, "'apex' is unknown; choose one of auto, eager, reference, triton"),
        ({"implementation": "triton"}, "target_update needs CUDA tensors and these are on cpu; .*implementation='eag"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"target": [torch.zeros(2)], "source": [torch.zeros(2)], "momentum": 0.9, **change}
    with pytest.raises(ValueError, match=message):
        target_update(given.pop("target"), given.pop("source"), given.pop("momentum"), **given)


def test_nothing_to_prepare_is_said():
    with pytest.raises(ValueError, match="there are no tensors to prepare; give at least one"):
        prepare([], [])


def test_triton_missing_is_said(monkeypatch):
    import ijepa_kernels.target_update as package

    monkeypatch.delattr(package, "triton", raising=False)  # an earlier import leaves the module there
    monkeypatch.setitem(sys.modules, "ijepa_kernels.target_update.triton", None)
    with pytest.raises(ValueError, match="Triton is needed for target_update .*or choose implementation='eager'"):
        prepare([torch.zeros(2)], [torch.zeros(2)])
