"""fused_tail: eager and reference against torch.optim.AdamW, the target's update and copies, and what is refused."""

import sys

import pytest
import torch

from ijepa_kernels.fp8_linear import quantise_rows
from ijepa_kernels.fused_tail import Rates, Weight, cost, fused_tail, prepare
from ijepa_kernels.target_update import target_update

BOTH = pytest.mark.parametrize("implementation", ["eager", "reference"])
STEPS, BAD = 50, (20, 21)  # steps of a comparison, and those that a flag stops
# shape, group, and what it has: a copy (c), a target (t), the target's bf16 copy (b) or fp8 copy (8)
WEIGHTS = [
    ((3, 5), 0, "ctb"), ((70,), 1, "ct"), ((), 2, "t"), ((0, 4), 0, "ctb"), ((1,), 1, ""), ((2, 1040), 0, "ct8"),
    ((3, 48), 2, "t8"), ((1025,), 2, "c"), ((16384 + 5,), 0, "ctb"),
]  # fmt: skip
RATES = [
    Rates(1e-3, 0.04), Rates(2e-3, 0.0, (0.8, 0.95), 1e-6), Rates(5e-4, 0.4, (0.0, 0.99))
]  # fmt: skip


def weights_of(cases=WEIGHTS, seed=0, shift=0):
    """Returns weights whose copies hold nothing of them yet; `shift` moves addresses by so many values."""
    generator = torch.Generator().manual_seed(seed)

    def new(shape, dtype=torch.float32, scale=0.02):
        size = int(torch.Size(shape).numel())
        return (scale * torch.randn(size + shift, generator=generator)).to(dtype)[shift:].view(shape)

    found = []
    for shape, group, has in cases:
        low = {name: new(shape, torch.bfloat16) if letter in has else None for name, letter in
               (("copy", "c"), ("target_copy", "b"))}  # fmt: skip
        quantised = (torch.zeros(shape).to(torch.float8_e4m3fn), torch.zeros(shape[0], 1)) if "8" in has else None
        found.append(
            Weight(
                new(shape),
                new(shape),
                torch.zeros(shape),
                torch.zeros(shape),
                torch.zeros(()),
                group,
                target=new(shape) if "t" in has else None,
                quantised=quantised,
                **low,
            )  # fmt: skip
        )
    return found


def gradients_of(weights, step):
    """Returns the weights with the gradients of a step: small and large ones."""
    generator = torch.Generator().manual_seed(1000 + step)
    scales = (1e-4, 1.0, 30.0)
    return [
        weight._replace(gradient=(scales[index % 3] * torch.randn(weight.value.shape, generator=generator)).to(
            weight.value.device
        ))
        for index, weight in enumerate(weights)
    ]  # fmt: skip


def clone(weights, device="cpu"):
    """Returns weights with memory of their own on a device, as far from wide loads' alignment as they were."""

    def copied(part):
        if isinstance(part, tuple):
            return tuple(map(copied, part))
        if not torch.is_tensor(part):
            return part
        shift = part.storage_offset()
        return torch.empty(part.numel() + shift, dtype=part.dtype, device=device)[shift:].view(part.shape).copy_(part)

    return [Weight(*map(copied, weight)) for weight in weights]


class Chain:
    """The steps that the tail replaces: torch.optim.AdamW, target_update, copies and quantise_rows."""

    def __init__(self, weights, rates=RATES):
        self.weights = weights
        self.leaves = [torch.nn.Parameter(weight.value) for weight in weights]
        groups = [
            {"params": [leaf for leaf, w in zip(self.leaves, weights, strict=True) if w.group == index],
             "lr": rate.lr, "weight_decay": rate.weight_decay, "betas": rate.betas, "eps": rate.eps}
            for index, rate in enumerate(rates)
        ]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, fused=True)

    def step(self, gradients, momentum, scale=1.0, moving=True):
        if moving:
            for leaf, gradient in zip(self.leaves, gradients, strict=True):
                leaf.grad = gradient * scale
            self.optimizer.step()
        for leaf, weight in zip(self.leaves, self.weights, strict=True):
            value = leaf.detach()
            if weight.target is not None and moving:
                target_update([weight.target], [value], momentum)
            if weight.copy is not None:
                weight.copy.copy_(value)
            if weight.target_copy is not None:
                weight.target_copy.copy_(weight.target)
            if weight.quantised is not None:
                for copy, new in zip(weight.quantised, quantise_rows(weight.target), strict=True):
                    copy.copy_(new)

    def states(self, name):
        return [self.optimizer.state[leaf][name] for leaf in self.leaves]


def compare(implementation, cases=WEIGHTS, scale=None, shift=0, steps=STEPS, bad=BAD, device="cpu"):
    """Returns the largest differences from the chain after `steps` steps, and whether stopped steps `moved` anything.

    Values, targets, scales and counters: absolute; they are at most 0.1 in size. Moments: in units of each one's
    largest value. Copies: in steps of their format.
    """
    chain = Chain(clone(weights_of(cases, shift=shift), device))
    weights = clone(weights_of(cases, shift=shift), device)
    held = any(weight.target is not None for weight in weights)
    table = prepare(weights) if implementation == "triton" else None
    moved = False
    for step in range(steps):
        momentum, stop = 0.9 + 0.099 * step / steps, step in bad
        given = gradients_of(weights, step)
        chain.step([weight.gradient for weight in given], momentum, 1.0 if scale is None else scale, not stop)
        if stop:
            given = [weight._replace(gradient=torch.full_like(weight.gradient, torch.nan)) for weight in given]
            before = clone(given, device)
        fused_tail(
            given, RATES, momentum=momentum if held else None,
            stopped=torch.full((), 2.0 * stop, device=device) if bad else None,
            gradient_scale=None if scale is None else torch.full((), scale, device=device), table=table,
            implementation=implementation,
        )  # fmt: skip
        if stop:
            moved |= any(
                not torch.equal(a, b)
                for old, new in zip(before, given, strict=True)
                for a, b in zip(old[:1] + old[2:5], new[:1] + new[2:5], strict=True)
            )
    return {**differences(weights, chain), "moved": moved}


def differences(weights, chain):
    mine = {name: [getattr(w, name) for w in weights] for name in Weight._fields}
    theirs = {name: [getattr(w, name) for w in chain.weights] for name in Weight._fields}
    theirs["value"] = [leaf.detach() for leaf in chain.leaves]
    theirs |= {name: chain.states(name) for name in ("exp_avg", "exp_avg_sq", "step")}
    for some in (mine, theirs):
        pairs = [pair or (None, None) for pair in some["quantised"]]
        some["quantised"], some["scales"] = ([pair[index] for pair in pairs] for index in (0, 1))
    kinds = {"absolute": ("value", "target", "scales", "step"), "relative": ("exp_avg", "exp_avg_sq"),
             "codes": ("copy", "target_copy", "quantised")}  # fmt: skip
    return {
        name: max(off(a, b, kind) for a, b in zip(mine[name], theirs[name], strict=True))
        for kind, names in kinds.items() for name in names
    }  # fmt: skip


def off(found, expected, kind):
    """Returns the largest difference; 0 where there is nothing, inf where a value isn't finite."""
    assert (found is None) == (expected is None)
    if found is None or not found.numel():
        return 0.0
    if not found.float().isfinite().all():
        return float("inf")
    if kind == "codes":
        code = {1: torch.uint8, 2: torch.int16}[found.element_size()]
        apart = (found.view(code).int() - expected.view(code).int()).abs()
        if found.element_size() == 1:
            # where the interpreter rounds up to a power of 2, it loses the carry, and so halves the result
            found, expected = found.float(), expected.float()
            half = (2 * found == expected) & (expected.frexp().mantissa.abs() == 0.5)
            apart[half | ((found == 0) & (expected.abs() <= 2**-6))] = 1
        return float(apart.max())
    unit = expected.double().abs().max().clamp(min=1e-30) if kind == "relative" else 1.0
    return float((found.double() - expected.double()).abs().max() / unit)


# The eager chain runs the same kernels; the others round in another order. A copy's code may then differ by one.
LIMITS = {
    "eager": {"value": 0, "target": 0, "scales": 0, "exp_avg": 0, "exp_avg_sq": 0,
              "copy": 0, "target_copy": 0, "quantised": 0},
    "reference": {"value": 1e-7, "target": 1e-7, "scales": 1e-9, "exp_avg": 1e-6, "exp_avg_sq": 1e-6,
                  "copy": 1, "target_copy": 1, "quantised": 1},
}  # fmt: skip


def check(found, limits):
    assert not found["moved"] and found["step"] == 0, found
    for name, limit in limits.items():
        assert found[name] <= limit, (name, found)


@BOTH
@pytest.mark.parametrize("scale", [None, 0.25])
def test_fifty_steps_equal_adamw_and_the_target_update(implementation, scale):
    limits = LIMITS[implementation]
    if implementation == "eager":  # with a flag, its target update is a multiply-add, not a lerp
        limits = {**limits, "target": 1e-7, "target_copy": 1, "quantised": 1, "scales": 1e-9}
    check(compare(implementation, scale=scale), limits)


@BOTH
def test_without_a_flag(implementation):
    check(compare(implementation, steps=5, bad=()), LIMITS[implementation])


@BOTH
def test_without_targets(implementation):
    cases = [(shape, group, has.translate(str.maketrans("", "", "tb8"))) for shape, group, has in WEIGHTS]
    check(compare(implementation, cases, steps=5), LIMITS[implementation])


@BOTH
@pytest.mark.parametrize("value", [1.0, 0.5, torch.nan])
def test_a_flag_that_is_not_0_stops_everything(implementation, value):
    weights = gradients_of(weights_of(), 0)
    before = clone(weights)
    stopped = torch.full((1,), value)
    fused_tail(weights, RATES, momentum=0.5, stopped=stopped, implementation=implementation)
    for old, new in zip(before, weights, strict=True):
        for name in ("value", "exp_avg", "exp_avg_sq", "step", "target"):
            assert getattr(old, name) is None or torch.equal(getattr(old, name), getattr(new, name)), name


@BOTH
def test_no_weights(implementation):
    fused_tail([], [], implementation=implementation)


def test_counters_may_differ_between_weights():
    weights = gradients_of(weights_of(), 0)
    weights[0].step.fill_(9.0)
    expected = clone(weights)
    fused_tail(weights, RATES, momentum=0.5, implementation="eager")
    fused_tail(expected, RATES, momentum=0.5, implementation="reference")
    assert weights[0].step == expected[0].step == 10.0 and weights[1].step == 1.0
    assert off(weights[0].value, expected[0].value, "absolute") <= 1e-7


def test_cost_counts_bytes():
    assert cost(10) == {"read_bytes": 160.0, "written_bytes": 120.0, "flops": 140.0}
    assert cost(10, copy=True, target="bf16") == {"read_bytes": 200.0, "written_bytes": 200.0, "flops": 170.0}
    assert cost(10, copy=True, target="fp8")["written_bytes"] == 190.0
    assert cost(10, target="fp32")["written_bytes"] == 160.0


def one(**changes):
    """Returns a list of one weight (2, 2) with a target, changed."""
    zeros = torch.zeros(2, 2)
    parts = {"value": zeros, "gradient": zeros, "exp_avg": zeros, "exp_avg_sq": zeros, "step": torch.zeros(()),
             "target": zeros}  # fmt: skip
    return [Weight(**{**parts, **changes})]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"exp_avg": torch.zeros(3)}, {}, r"exp_avg of weight 0 is \(3,\) torch.float32; give \(2, 2\) torch.float32"),
        ({"gradient": torch.zeros(2, 2).bfloat16()}, {}, "gradient of weight 0 is .* torch.bfloat16; give"),
        ({"value": torch.zeros(2, 4)[:, ::2]}, {}, "value of weight 0 is .*, not contiguous; give .*, contiguous"),
        ({"copy": torch.zeros(2, 2)}, {}, "copy of weight 0 is .*float32; give .* torch.bfloat16"),
        ({"step": torch.zeros(1)}, {}, r"step of weight 0 is \(1,\) torch.float32; give \(\) torch.float32"),
        ({"quantised": (torch.zeros(2, 2), torch.zeros(2, 1))}, {}, "quantised of weight 0 .* give .*float8_e4m3fn"),
        ({"target": None, "quantised": (torch.zeros(2, 2),) * 2}, {}, r"only targets \(N, K\) have one"),
        ({"target": None, "target_copy": torch.zeros(2, 2).bfloat16()}, {}, "has a target_copy but no target"),
        ({"group": 1}, {}, "weight 0 is in group 1 of 1; give rates for each group"),
        ({"exp_avg": torch.zeros(2, 2, device="meta")}, {}, "the tensors are on cpu, meta; move them to one device"),
        ({"gradient": torch.zeros(2, 2, device="meta")}, {}, "gradient of weight 0 is on meta; move it to cpu"),
        ({}, {"momentum": None}, "momentum is None but weights have targets; give a number from 0 to 1"),
        ({}, {"momentum": 1.5}, "momentum is 1.5; give a number from 0 to 1"),
        ({}, {"stopped": torch.zeros(2)}, r"stopped is \(2,\) torch.float32; give one float32 number"),
        ({}, {"gradient_scale": torch.zeros((), dtype=torch.int64)}, "gradient_scale is .* give one float32 number"),
        ({}, {"implementation": "apex"}, "'apex' is unknown; choose one of auto, eager, reference, triton"),
        ({}, {"implementation": "triton"}, "fused_tail needs CUDA tensors and these are on cpu; .*implementation='eag"),
    ],
)
def test_what_does_not_fit_is_refused(change, options, message):
    with pytest.raises(ValueError, match=message):
        fused_tail(one(**change), [Rates(0.1)], **{"momentum": 0.5, **options})


def test_nothing_to_prepare_is_said():
    with pytest.raises(ValueError, match="there are no weights to prepare; give at least one"):
        prepare([])


def test_triton_missing_is_said(monkeypatch):
    import ijepa_kernels.fused_tail as package

    monkeypatch.delattr(package, "triton", raising=False)  # an earlier import leaves the module there
    monkeypatch.setitem(sys.modules, "ijepa_kernels.fused_tail.triton", None)
    with pytest.raises(ValueError, match="Triton is needed for fused_tail .*or choose implementation='eager'"):
        prepare(one())
