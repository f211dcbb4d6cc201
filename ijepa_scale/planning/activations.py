"""Formulas for the bytes that one micro-batch takes on the device. Queries no device.

What autograd keeps is derived from `models/layers.py`, operation by operation, for eager PyTorch. Compiled blocks keep
less (the GELU is recomputed), by an amount that the compiler decides, so for them these figures are upper bounds.
Legend: n tokens of a block, q of them wanted from it, e bytes per element of a matrix product (2 under bf16 autocast,
4 in fp32). The residual stream and norms are fp32, 4 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_scale.config.architectures import Architecture, resolve
from ijepa_scale.config.schema import ModelConfig
from ijepa_scale.planning.memory import FP32_BYTES
from ijepa_scale.planning.tokens import Tokens

BF16_BYTES = 2
NORM_STATISTICS = 2 * FP32_BYTES  # mean and 1 / std of a token


@dataclass(frozen=True, kw_only=True)
class BlockBytes:
    """Bytes that one transformer block's forward keeps for its backward."""

    input: float  # the residual stream at the block's input, fp32
    products: float  # outputs of qkv, attention (and its log-sum-exp) and fc1
    results: float  # outputs of proj and fc2, which selective checkpointing keeps although backward doesn't read them
    cheap: float  # outputs of norms, GELU and the first addition

    def kept(self, checkpointing: str) -> float:
        """Returns the bytes kept from forward to backward."""
        if checkpointing == "none":
            return self.input + self.products + self.cheap
        return self.input if checkpointing == "full" else self.input + self.products + self.results

    def recomputed(self, checkpointing: str) -> float:
        """Returns the bytes that backward recomputes for this block."""
        if checkpointing == "none":
            return 0.0
        if checkpointing == "full":
            return self.products + self.cheap + self.input  # as large as the residual stream at the block's output
        return self.cheap


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch; they come on top of the states."""

    inputs: float  # fp32 images and the target's features
    encoder: float  # kept for backward by the context encoder
    encoder_tail: float  # the part of `encoder` after the last block
    predictor: float  # kept for backward by the predictor
    predictor_tail: float  # the part of `predictor` from the last block on
    loss: float  # kept for backward by the loss: prediction and target, fp32
    loss_work: float  # temporary, while the loss is computed
    weight_casts: float  # bf16 copies of weights that autocast makes and holds until the end of forward
    kept_casts: float  # the part of `weight_casts` that autograd keeps for backward
    encoder_block: float  # backward of one encoder block: recomputed and temporary
    predictor_block: float  # the same for a predictor block
    encoder_work: float  # temporary, for one block in the encoder's forward
    predictor_work: float  # temporary, for one block in the predictor's forward
    target_work: float  # temporary, for one block in the target's forward

    @property
    def kept(self) -> float:
        """All bytes that are kept for backward."""
        return self.encoder + self.predictor + self.loss + self.kept_casts


def activations(
    model: ModelConfig,
    tokens: Tokens,
    *,
    precision: str = "bf16",
    checkpointing: str = "none",
    casts: bool = True,
    device: str = "cuda",
) -> Activations:
    """Returns the bytes of one micro-batch of `tokens` under eager PyTorch.

    `precision` and `checkpointing` are those of the engine section; `casts` is false if weights are bf16 already
    (FSDP2). On CUDA in bf16, packed attention is one varlen kernel; otherwise it is one SDPA call for each run of
    equal lengths, and the outputs are concatenated.
    """
    sizes = resolve(model)
    e = BF16_BYTES if precision == "bf16" else FP32_BYTES
    by_runs = tokens.packed and (device == "cpu" or precision == "fp32")
    wide, narrow = (sizes.width, sizes.mlp_width), (sizes.predictor_width, sizes.predictor_mlp_width)
    block = block_bytes(tokens.context, *wide, heads=sizes.heads, e=e, by_runs=by_runs)
    inner = block_bytes(tokens.predictor, *narrow, heads=sizes.heads, e=e, by_runs=by_runs)
    last = _last_block(tokens, *narrow, heads=sizes.heads, e=e, by_runs=by_runs)
    embedded = e * tokens.context * sizes.channels * sizes.patch_size**2
    # the final norm, and the input of the product after it
    encoder_tail = tokens.context * (NORM_STATISTICS + (FP32_BYTES + e) * sizes.width)
    predictor_tail = last.kept(checkpointing) + tokens.predicted * (NORM_STATISTICS + (FP32_BYTES + e) * narrow[0])
    rows = tokens.predicted * sizes.width
    halves = e == BF16_BYTES
    inside, outside = _linear_weights(sizes)
    copied = BF16_BYTES if halves and casts else 0
    pixels = sizes.channels * sizes.num_patches * sizes.patch_size**2
    return Activations(
        inputs=FP32_BYTES * tokens.images * (pixels + tokens.wanted * sizes.width),
        encoder=embedded + sizes.depth * block.kept(checkpointing) + encoder_tail,
        encoder_tail=encoder_tail,
        predictor=(sizes.predictor_depth - 1) * inner.kept(checkpointing) + predictor_tail,
        predictor_tail=predictor_tail,
        loss=2 * FP32_BYTES * rows,
        loss_work=(FP32_BYTES + (BF16_BYTES if halves else 0)) * rows,
        weight_casts=copied * (inside + outside),
        kept_casts=copied * (outside + (inside if checkpointing == "none" else 0)),
        encoder_block=block.recomputed(checkpointing) + backward_work(tokens.context, *wide, e=e),
        predictor_block=inner.recomputed(checkpointing) + backward_work(tokens.predictor, *narrow, e=e),
        encoder_work=forward_work(tokens.context, *wide, e=e, checkpointing=checkpointing),
        predictor_work=forward_work(tokens.predictor, *narrow, e=e, checkpointing=checkpointing),
        target_work=_target_work(tokens, sizes, e),
    )


def block_bytes(n: float, width: int, mlp_width: int, *, heads: int, e: int, by_runs: bool = False) -> BlockBytes:
    """Returns what a block on n tokens, all of them wanted, keeps for backward.

    On CUDA and on the CPU, flash attention keeps q, k, v (views of one qkv tensor), its output (which is also proj's
    input), and one fp32 log-sum-exp per head and token.
    """
    attention = n * (e * width + FP32_BYTES * heads)
    return BlockBytes(
        input=FP32_BYTES * n * width,
        products=3 * e * n * width + attention + e * n * mlp_width,
        results=2 * e * n * width,
        cheap=n * (2 * NORM_STATISTICS + (2 * e + FP32_BYTES) * width + e * mlp_width)
        + (e * n * width if by_runs else 0.0),
    )


def _linear_weights(sizes: Architecture) -> tuple[int, int]:
    """Returns the numbers of weights that autocast copies to bf16 and holds: in blocks, and in the predictor outside.

    The copy of the patch convolution's weight isn't held: its input needs no gradient, and autocast doesn't cache a
    view of a weight.
    """

    def block(width: int, mlp_width: int) -> int:
        return 4 * width * width + 2 * width * mlp_width

    narrow = sizes.predictor_depth * block(sizes.predictor_width, sizes.predictor_mlp_width)
    return sizes.depth * block(sizes.width, sizes.mlp_width) + narrow, 2 * sizes.width * sizes.predictor_width


def _last_block(tokens: Tokens, width: int, mlp_width: int, *, heads: int, e: int, by_runs: bool) -> BlockBytes:
    """Returns what the predictor's last block keeps for backward; only its predicted tokens are wanted.

    The wanted tokens have a separate norm and query product; the others only cost a norm, keys and values.
    """
    n, q = tokens.predictor, tokens.predicted
    attention = q * (e * width + FP32_BYTES * heads)
    norms = (n + 2 * q) * (NORM_STATISTICS + e * width)
    return BlockBytes(
        input=FP32_BYTES * width * (n + q),  # the wanted rows are a copy
        products=e * width * (q + 2 * n) + attention + e * q * mlp_width,
        results=2 * e * q * width,
        cheap=norms + q * (FP32_BYTES * width + e * mlp_width) + (e * q * width if by_runs else 0.0),
    )


def backward_work(n: float, width: int, mlp_width: int, *, e: int) -> float:
    """Returns the bytes of gradients just after backward through fc2: of the residual stream, its cast, the GELU."""
    return n * (FP32_BYTES * width + (e * width if e == BF16_BYTES else 0) + e * mlp_width)


def forward_work(n: float, width: int, mlp_width: int, *, e: int, checkpointing: str) -> float:
    """Returns the temporary bytes at the GELU, on top of what is kept.

    They are the fp32 norms and residual stream, the branch, and the GELU's input and output. Without checkpointing
    they don't matter, because the next block keeps more.
    """
    if checkpointing == "none":
        return 0.0
    if checkpointing == "selective":  # products are kept
        return n * (3 * FP32_BYTES * width + e * mlp_width)
    return n * ((3 * FP32_BYTES + e) * width + 2 * e * mlp_width)


def _target_work(tokens: Tokens, sizes: Architecture, e: int) -> float:
    """Returns the most bytes that the target's forward uses at once: in its embedding or at a block's GELU."""
    n = tokens.images * tokens.patches
    embedding = n * (FP32_BYTES + (e if e == BF16_BYTES else 0)) * sizes.channels * sizes.patch_size**2
    embedding += n * (e + FP32_BYTES) * sizes.width
    block = n * FP32_BYTES * sizes.width  # the residual stream at the block's input
    block += forward_work(n, sizes.width, sizes.mlp_width, e=e, checkpointing="full")
    return max(embedding, block)
