"""Bytes that one micro-batch takes on the device, by what engine and model do. Formulas, asks no device.

What autograd keeps is read off `models/layers.py`, operation by operation, for eager PyTorch; compiled blocks keep
less (the GELU is recomputed), by an amount that the compiler decides: there these figures are upper bounds.
Legend: n tokens of a block, q of them wanted from it, D width, F MLP width, H heads, e bytes of a product's
numbers (2 under bf16 autocast, 4 in fp32). The residual stream and norms are fp32, 4 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_scale.config.architectures import IMAGE_CHANNELS, Architecture, resolve
from ijepa_scale.config.schema import ModelConfig
from ijepa_scale.planning.memory import FP32_BYTES
from ijepa_scale.planning.tokens import Tokens

BF16_BYTES = 2
_NORM_STATISTICS = 2 * FP32_BYTES  # mean and 1 / std of a token


@dataclass(frozen=True, kw_only=True)
class BlockBytes:
    """What one transformer block's forward leaves for its backward."""

    input: float  # the residual stream on entry, fp32
    products: float  # outputs of qkv, attention (and its log-sum-exp) and fc1
    results: float  # outputs of proj and fc2, which selective checkpointing keeps though nothing reads them
    cheap: float  # outputs of norms, GELU and the first addition

    def kept(self, checkpointing: str) -> float:
        """Returns the bytes kept from forward to backward."""
        if checkpointing == "none":
            return self.input + self.products + self.cheap
        return self.input if checkpointing == "full" else self.input + self.products + self.results

    def recomputed(self, checkpointing: str) -> float:
        """Returns the bytes that backward makes anew for this block."""
        if checkpointing == "none":
            return 0.0
        if checkpointing == "full":
            return self.products + self.cheap + self.input  # and the residual stream on exit
        return self.cheap


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch, beside the states."""

    inputs: float  # images, fp32, and the target's features
    encoder: float  # kept for backward: the context encoder's
    encoder_tail: float  # the part of it behind the last block
    predictor: float  # kept for backward: the predictor's
    predictor_tail: float  # the part of it from the last block on
    loss: float  # the same: prediction and target, fp32
    loss_work: float  # besides, while the loss is computed
    weight_casts: float  # bf16 copies that autocast makes of weights and holds until the forward's end
    kept_casts: float  # the part of them that autograd keeps for backward
    encoder_block: float  # backward of one block: recomputed and in work
    predictor_block: float
    encoder_work: float  # of one block, in the encoder's forward
    predictor_work: float  # of one block, in the predictor's forward
    target_work: float  # of one block, in the target's forward

    @property
    def kept(self) -> float:
        """All bytes kept for backward."""
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

    `precision` and `checkpointing` are the engine section's; `casts` is false where weights are bf16
    already (FSDP2). On CUDA in bf16, packed attention is one varlen kernel; else one SDPA call per run of
    equal lengths, whose outputs are copied together.
    """
    sizes = resolve(model)
    e = BF16_BYTES if precision == "bf16" else FP32_BYTES
    by_runs = tokens.packed and (device == "cpu" or precision == "fp32")
    wide, narrow = (sizes.width, sizes.mlp_width), (sizes.predictor_width, sizes.predictor_mlp_width)
    block = block_bytes(tokens.context, *wide, heads=sizes.heads, e=e, by_runs=by_runs)
    inner = block_bytes(tokens.predictor, *narrow, heads=sizes.heads, e=e, by_runs=by_runs)
    last = _last_block(tokens, *narrow, heads=sizes.heads, e=e, by_runs=by_runs)
    embedded = e * tokens.context * IMAGE_CHANNELS * sizes.patch_size**2
    # the final norm and the input of the product behind it
    encoder_tail = tokens.context * (_NORM_STATISTICS + (FP32_BYTES + e) * sizes.width)
    predictor_tail = last.kept(checkpointing) + tokens.predicted * (_NORM_STATISTICS + (FP32_BYTES + e) * narrow[0])
    rows = tokens.predicted * sizes.width
    halves = e == BF16_BYTES
    inside, outside = _linear_weights(sizes)
    copied = BF16_BYTES if halves and casts else 0
    pixels = IMAGE_CHANNELS * sizes.num_patches * sizes.patch_size**2
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
        encoder_block=block.recomputed(checkpointing) + _backward_work(tokens.context, *wide, e=e),
        predictor_block=inner.recomputed(checkpointing) + _backward_work(tokens.predictor, *narrow, e=e),
        encoder_work=_forward_work(tokens.context, *wide, e=e, checkpointing=checkpointing),
        predictor_work=_forward_work(tokens.predictor, *narrow, e=e, checkpointing=checkpointing),
        target_work=_target_work(tokens, sizes, e),
    )


def block_bytes(n: float, width: int, mlp_width: int, *, heads: int, e: int, by_runs: bool = False) -> BlockBytes:
    """Returns what a block on n tokens, all of them wanted, leaves for backward.

    Flash attention on CUDA and on the CPU alike keeps q, k, v (views of one qkv tensor), its output, which
    is also proj's input, and one fp32 log-sum-exp per head and token.
    """
    attention = n * (e * width + FP32_BYTES * heads)
    return BlockBytes(
        input=FP32_BYTES * n * width,
        products=3 * e * n * width + attention + e * n * mlp_width,
        results=2 * e * n * width,
        cheap=n * (2 * _NORM_STATISTICS + (2 * e + FP32_BYTES) * width + e * mlp_width)
        + (e * n * width if by_runs else 0.0),
    )


def _linear_weights(sizes: Architecture) -> tuple[int, int]:
    """Returns how many weights autocast copies to bf16 and holds: those in blocks, and the predictor's two others.

    The patch convolution's isn't held: its input needs no gradient, and a view of a weight isn't cached.
    """

    def block(width: int, mlp_width: int) -> int:
        return 4 * width * width + 2 * width * mlp_width

    narrow = sizes.predictor_depth * block(sizes.predictor_width, sizes.predictor_mlp_width)
    return sizes.depth * block(sizes.width, sizes.mlp_width) + narrow, 2 * sizes.width * sizes.predictor_width


def _last_block(tokens: Tokens, width: int, mlp_width: int, *, heads: int, e: int, by_runs: bool) -> BlockBytes:
    """Returns the same for the predictor's last block, of which only the predicted tokens are wanted.

    They ask with a norm and a product of their own; the others cost norm, keys and values.
    """
    n, q = tokens.predictor, tokens.predicted
    attention = q * (e * width + FP32_BYTES * heads)
    norms = (n + 2 * q) * (_NORM_STATISTICS + e * width)
    return BlockBytes(
        input=FP32_BYTES * width * (n + (q if tokens.packed else 0.0)),  # packed, the wanted rows are a copy
        products=e * width * (q + 2 * n) + attention + e * q * mlp_width,
        results=2 * e * q * width,
        cheap=norms + q * (FP32_BYTES * width + e * mlp_width) + (e * q * width if by_runs else 0.0),
    )


def _backward_work(n: float, width: int, mlp_width: int, *, e: int) -> float:
    """Returns the gradients alive where backward has passed fc2: the residual stream's, its cast, the GELU's."""
    return n * (FP32_BYTES * width + (e * width if e == BF16_BYTES else 0) + e * mlp_width)


def _forward_work(n: float, width: int, mlp_width: int, *, e: int, checkpointing: str) -> float:
    """Returns what is alive beside what is kept, at the GELU: fp32 norms and residual stream, branch, the GELU's ends.

    Where everything is kept, the next block keeps more than this.
    """
    if checkpointing == "none":
        return 0.0
    if checkpointing == "selective":  # products are kept
        return n * (3 * FP32_BYTES * width + e * mlp_width)
    return n * ((3 * FP32_BYTES + e) * width + 2 * e * mlp_width)


def _target_work(tokens: Tokens, sizes: Architecture, e: int) -> float:
    """Returns what the target's forward has at once: in its embedding, or at a block's GELU."""
    n = tokens.images * tokens.patches
    embedding = n * (FP32_BYTES + (e if e == BF16_BYTES else 0)) * IMAGE_CHANNELS * sizes.patch_size**2
    embedding += n * (e + FP32_BYTES) * sizes.width
    block = n * FP32_BYTES * sizes.width  # the residual stream on entry
    block += _forward_work(n, sizes.width, sizes.mlp_width, e=e, checkpointing="full")
    return max(embedding, block)
