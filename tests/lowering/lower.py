"""Lowers the graphs of compiled blocks with Inductor for a pretended GPU, and counts kernels and bytes."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._inductor.utils import get_fused_kernel_name
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from tests.lowering.pretend import Gpu
from tests.lowering.roles import Graph

_SOURCE = re.compile(r"^(triton_\w+) = async_compile\.triton\('\w+', '''\n(.*?)''', device_str='cuda'\)$", re.M | re.S)


@dataclass
class Call:
    """A Triton kernel or an external call (a matrix product, attention), and the bytes that it reads and writes."""

    name: str
    triton: bool
    token_bytes: float  # of tensors that grow with the tokens, per token and channel of the block's input
    fixed_bytes: int  # of the others: weights, their casts and their gradients


@dataclass
class Program:
    """What Inductor makes of a graph."""

    queries: float  # share of the block's tokens that it returns
    calls: list[Call] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict, repr=False)  # Triton code by name


def lower(graph: Graph, gpu: Gpu) -> dict[str, Program]:
    """Returns the programs of a graph: `forward` and, if the role is trained, `backward`.

    Raises:
        AssertionError: lowering fixes a number of tokens, so each new number would compile the block again.
    """
    trained = any(isinstance(x, Tensor) and x.requires_grad for x in graph.inputs)
    mode = detect_fake_mode(graph.inputs)
    assert mode is not None and mode.shape_env is not None
    # autograd needs a driver for tensors on a GPU, so the graph of both passes is made on the CPU
    device = "cpu" if trained else "cuda"
    module = _on(graph.module, device)
    with mode:
        inputs = [_like(x, device) if isinstance(x, Tensor) else x for x in graph.inputs]
    streams = [x.numel() for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    tokens, *queries = [float(size.node.hint) for size in streams if free_symbols(size)]
    found: dict[str, Program] = {}

    def inner(lowered: torch.fx.GraphModule, examples: list[Any], **options: Any) -> Any:
        name = "backward" if options.get("is_backward") else "forward"
        found[name] = Program(queries=queries[0] / tokens if queries else 1.0)
        _lower(found[name], lowered, examples, tokens, gpu, mode, options)
        return lambda *args: None

    gpu.activate_triton()
    both = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    alone = torch._inductor.config.patch(compile_threads=1, force_disable_caches=True)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if trained else gpu.autocast()
    with tracing(TracingContext(mode)), both, alone, autocast, torch.set_grad_enabled(trained):
        compile_fx.compile_fx(module, inputs, inner_compile=inner)
    sizes = free_symbols([x for x in graph.inputs if isinstance(x, Tensor)])
    fixed = {str(size): mode.shape_env.replacements[size] for size in sizes & {*mode.shape_env.replacements}}
    assert not fixed, f"lowering the {graph.role} fixes {fixed}"
    return found


def _like(tensor: Tensor, device: str) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return empty.requires_grad_(tensor.requires_grad)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _on(module: torch.fx.GraphModule, device: str) -> torch.fx.GraphModule:
    """Returns the graph for another device, with the flash kernel: PyTorch chooses by asking the driver."""
    graph = copy.deepcopy(module.graph)
    for node in graph.nodes:
        if node.target is F.scaled_dot_product_attention:
            node.target = _flash
        node.args = tuple(device if arg == "cuda" else arg for arg in node.args)  # such as autocast's
    return torch.fx.GraphModule(module, graph)


def _lower(
    program: Program,
    module: torch.fx.GraphModule,
    examples: list[Any],
    tokens: float,
    gpu: Gpu,
    mode: FakeTensorMode,
    options: dict[str, Any],
) -> None:
    """Runs Inductor on a graph of ATen operations for the GPU, up to the code that it would load; fills `program`."""
    with mode:
        inputs = [_like(x, "cuda") if isinstance(x, Tensor) else x for x in examples]
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    module.recompile()
    FakeTensorProp(module, mode=mode).propagate_dont_convert_inputs(*inputs)

    def stop_before_loading(lowering: GraphLowering) -> Any:
        code, _ = lowering.codegen()
        program.calls = _calls(lowering, tokens)
        program.sources = dict(_SOURCE.findall(code.value))
        return SimpleNamespace(call=lambda args: None, __file__="", __path__="", key="")

    original, GraphLowering.compile_to_module = GraphLowering.compile_to_module, stop_before_loading
    try:
        with gpu.present(), V.set_fake_mode(mode):
            compile_fx.compile_fx_inner(module, inputs, **options)
    finally:
        GraphLowering.compile_to_module = original
    assert len(program.sources) <= sum(call.triton for call in program.calls)


def _calls(lowering: GraphLowering, tokens: float) -> list[Call]:
    """Returns the calls of a lowered graph; `tokens` is the number of tokens times the channels."""
    calls = []
    for node in lowering.scheduler.nodes:
        accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
        if not accesses:  # takes apart the result of another call
            continue
        triton = not isinstance(node, ExternKernelSchedulerNode)
        name = get_fused_kernel_name(node.get_nodes(), "original_aten") if triton else node.node.python_kernel_name
        growing = sum(size for buffer, size in accesses.items() if free_symbols(lowering.get_numel(buffer)))
        calls.append(Call(name, triton, round(growing / tokens, 2), sum(accesses.values()) - growing))
    return calls
