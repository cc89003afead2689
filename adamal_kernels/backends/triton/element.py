"""The Triton twin of ``csrc/formula/element.h`` (the formula) and ``csrc/cuda/walk.h`` (the walk).

Importing this imports Triton, which is slow: :mod:`.backend` does so on first use.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.language.extra import libdevice
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from ...core.bucket import BucketKey
from ...core.buffers import SecondMoment
from ...core.scalars import StepScalars
from .tables import TENSOR_WORDS

__all__ = [
    "BLOCK",
    "DTYPES",
    "ROWS_HEADER",
    "casts_bfloat16_correctly",
    "constants",
    "divide",
    "elements",
    "interpreted",
    "launch_options",
    "load",
    "multiply",
    "sqrt",
    "step_item",
    "step_kernel",
    "store",
    "target",
]

BLOCK = 1024
"""Elements a work item, which is one program, covers.

Four a thread: with eight, Triton sends 16-bit streams through shared memory, to exchange lanes of
eight values for the moments' four, with a dozen barriers; and float64 takes 171 registers.
"""

ROWS_HEADER = 4
"""Elements before the rows of scalars that the device derived: the first tells a step taken."""

_THREADS = 256

DTYPES = {  # Triton's names of torch's types
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

_MONOTONE = tl.constexpr(SecondMoment.MONOTONE.value)
_AMSGRAD = tl.constexpr(SecondMoment.AMSGRAD.value)
_TENSOR_WORDS = tl.constexpr(len(TENSOR_WORDS))
_NUMEL = tl.constexpr(TENSOR_WORDS["numel"])
_EXP_AVG = tl.constexpr(TENSOR_WORDS["exp_avg"])
_EXP_AVG_SQ = tl.constexpr(TENSOR_WORDS["exp_avg_sq"])
_MAX_EXP_AVG_SQ = tl.constexpr(TENSOR_WORDS["max_exp_avg_sq"])
_SCALARS = tl.constexpr(len(StepScalars._fields))
_BLOCK = tl.constexpr(BLOCK)
_ROWS_HEADER = tl.constexpr(ROWS_HEADER)
_VECTOR_BYTES = tl.constexpr(16)


def target(device: torch.device) -> GPUTarget:
    """Return what Triton compiles for on a GPU; raises where Triton's driver does not start."""
    with torch.cuda.device(device):
        return driver.active.get_current_target()


def constants(key: BucketKey, target: GPUTarget | None, *, aligned: bool) -> dict[str, object]:
    """Return the compile-time arguments of :func:`step_kernel` for a kind of bucket.

    ``aligned`` promises, unchecked, that every tensor starts at a multiple of 16 bytes.
    """
    return {
        "PARAM": DTYPES[key.format.param],
        "GRAD": DTYPES[key.format.grad],
        "EXP_AVG": DTYPES[key.format.exp_avg],
        "EXP_AVG_SQ": DTYPES[key.format.exp_avg_sq],
        "SECOND_MOMENT": key.second_moment.value,
        "ALIGNED": aligned,
        "DEVICE_SCALARS": key.device_scalars,
        "PACKS": _is_nvidia(target) and target.arch >= 100,
    }


def launch_options(target: GPUTarget | None) -> dict[str, object]:
    """Return the compiler options; ``target`` is None in the interpreter, which has none."""
    if target is None:
        return {}
    options = {"num_warps": _THREADS // target.warp_size, "enable_fp_fusion": False}
    if _is_nvidia(target):
        options["enable_reflect_ftz"] = False  # libdevice must not flush denormals
    return options


def _is_nvidia(target: GPUTarget | None) -> bool:
    return target is not None and target.backend == "cuda"


def interpreted() -> bool | None:
    """Whether kernels run in the interpreter; None if ours would and Triton's own would not."""
    ours, tritons = (isinstance(f, InterpretedFunction) for f in (step_kernel, tl.max))
    return ours if ours is tritons else None


@functools.cache
def casts_bfloat16_correctly() -> bool:
    """Whether float32 to bfloat16 rounds, and back keeps denormals, here in the interpreter."""
    values = torch.tensor([1.0 + 2.0**-8 + 2.0**-9, 1e-39])
    rounded = torch.empty_like(values, dtype=torch.bfloat16)
    widened = torch.empty_like(values)
    for i in range(len(values)):
        _cast_kernel[(1,)](values[i], rounded[i])
        _cast_kernel[(1,)](rounded[i], widened[i])
    return torch.equal(widened, values.bfloat16().float())


@triton.jit
def _cast_kernel(source, target):
    tl.store(target, tl.load(source).to(target.dtype.element_ty))


@triton.jit
def sqrt(x):
    """Return the root, rounded to nearest."""
    # tl.sqrt is approximate in float32 and rounded to nearest in float64; sqrt_rn takes no float64.
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def divide(x, y):
    """Return the quotient, rounded to nearest."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def multiply(x, y, PACKS: tl.constexpr):
    """Return the product, rounded to nearest before anything is added to it."""
    # Where float32 operations are packed in pairs, ptxas 12.9 and 13.0 fuse a packed product with
    # a sum, .rn and --fmad=false notwithstanding. A libdevice product is not packed.
    if PACKS and x.dtype == tl.float32:
        return libdevice.mul_rn(x, y)
    else:
        return x * y


@triton.jit
def _element(g, p, m, v, v_max, scalars, SECOND_MOMENT: tl.constexpr, PACKS: tl.constexpr):
    """Return ``p, m, v, v_max, grown``; ``grown`` tells where the monotone buffer moved.

    Compares and ``where`` instead of minimum and maximum, so that NaN takes the same way
    everywhere. ``scalars`` points at a row of StepScalars in the compute type.
    """
    one_minus_beta1 = tl.load(scalars + 0)
    one_minus_beta2 = tl.load(scalars + 1)
    beta2 = tl.load(scalars + 2)
    step_size = tl.load(scalars + 3)
    bias2_sqrt = tl.load(scalars + 4)
    eps = tl.load(scalars + 5)
    coupled_decay = tl.load(scalars + 6)
    decay_factor = tl.load(scalars + 7)
    grad_factor = tl.load(scalars + 8)
    lower = tl.load(scalars + 9)
    upper = tl.load(scalars + 10)

    g = multiply(grad_factor, g, PACKS)
    g = tl.where(coupled_decay != 0, g + multiply(coupled_decay, p, PACKS), g)
    p = multiply(p, decay_factor, PACKS)
    m = m + multiply(one_minus_beta1, g - m, PACKS)
    g2 = multiply(g, g, PACKS)
    if SECOND_MOMENT == _MONOTONE:
        grown = g2 > v
        v = tl.where(grown, v + multiply(one_minus_beta2, g2 - v, PACKS), v)
        denominator = v
    else:
        v = multiply(beta2, v, PACKS) + multiply(one_minus_beta2, g2, PACKS)
        grown = v > v_max
        v_max = tl.where(grown, v, v_max)
        denominator = v_max if SECOND_MOMENT == _AMSGRAD else v
    d = divide(sqrt(denominator), bias2_sqrt) + eps
    quotient = tl.where((d == 0) & (m == 0), 0.0, divide(m, d))
    p = p - multiply(step_size, quotient, PACKS)
    p = tl.where(p < lower, lower, tl.where(p > upper, upper, p))
    return p, m, v, v_max, grown


@triton.jit
def _any_of_vector(lanes, VECTOR: tl.constexpr):
    """OR ``lanes`` over each 16-byte vector: a store predicated per lane would turn scalar."""
    shape: tl.constexpr = [_BLOCK // VECTOR, VECTOR]
    vectors = tl.reshape(lanes.to(tl.int32), shape)
    # Not reduce_or, which the interpreter runs element by element in Python.
    any_of_vector = tl.max(vectors, axis=1, keep_dims=True)
    predicate = tl.reshape(tl.broadcast_to(any_of_vector, shape), [_BLOCK]) != 0
    # True by construction; Triton 3.6 does not see it through the reshape.
    return tl.max_constancy(predicate, VECTOR)


@triton.jit
def _update_block(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    scalars,
    mask,
    SECOND_MOMENT: tl.constexpr,
    PACKS: tl.constexpr,
):
    """Step one block: pointers to its elements, and the mask of those that exist (None: all).

    Return what the denominator was made of in the last step, and what it is made of now, both as
    they are stored.
    """
    COMPUTE: tl.constexpr = scalars.dtype.element_ty
    STORED: tl.constexpr = exp_avg_sq.dtype.element_ty
    VECTOR: tl.constexpr = _VECTOR_BYTES // (STORED.primitive_bitwidth // 8)
    g = load(grad, mask, COMPUTE)
    p = load(param, mask, COMPUTE)
    m = load(exp_avg, mask, COMPUTE)
    v = load(exp_avg_sq, mask, COMPUTE)
    v_max = load(max_exp_avg_sq, mask, COMPUTE) if SECOND_MOMENT == _AMSGRAD else v
    before = v_max

    p, m, v, v_max, grown = _element(g, p, m, v, v_max, scalars, SECOND_MOMENT, PACKS)

    store(param, p, mask)
    store(exp_avg, m, mask)
    grown = _any_of_vector(grown, VECTOR)
    if mask is not None:
        grown = grown & mask
    if SECOND_MOMENT == _MONOTONE:
        store(exp_avg_sq, v, grown)
    else:
        store(exp_avg_sq, v, mask)
        if SECOND_MOMENT == _AMSGRAD:
            store(max_exp_avg_sq, v_max, grown)
    after = v_max if SECOND_MOMENT == _AMSGRAD else v
    return before, after.to(STORED).to(COMPUTE)


@triton.jit
def load(pointers, mask, COMPUTE: tl.constexpr, other=None):
    """Return what is stored as numbers to compute with."""
    return tl.load(pointers, mask, other=other).to(COMPUTE)


@triton.jit
def store(pointers, values, mask):
    """Store what was computed, rounded to nearest even, if at all."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask)


@triton.jit
def elements(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return pointers to the block of a tensor that begins at element ``start``."""
    first = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # A pointer that was an integer carries no alignment: without the hint nothing vectorises.
        first = tl.multiple_of(first, _VECTOR_BYTES)
    return first + start + tl.arange(0, _BLOCK)


@triton.jit
def step_kernel(
    tensors,
    items,
    inputs,
    scalars,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    SECOND_MOMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    PACKS: tl.constexpr,
):
    """Step every work item of a bucket.

    ``tensors`` are rows of TENSOR_WORDS; ``items`` int32 pairs of a tensor and its block of
    ``BLOCK`` elements; ``inputs`` int64 pairs, for each tensor, of its gradient's address (0: none
    in this step, and nothing changes) and its row of ``scalars``, which are StepScalars in the
    compute type, or, with ``DEVICE_SCALARS``, what :func:`.derive_kernel` left: then a tensor has
    the row of its own index. All start at multiples of 16 bytes. :func:`constants` has the rest.
    """
    step_item(
        tensors,
        items,
        inputs,
        scalars,
        PARAM,
        GRAD,
        EXP_AVG,
        EXP_AVG_SQ,
        SECOND_MOMENT,
        ALIGNED,
        DEVICE_SCALARS,
        PACKS,
    )


@triton.jit
def step_item(
    tensors,
    items,
    inputs,
    scalars,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    SECOND_MOMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    PACKS: tl.constexpr,
):
    """Step this program's work item of :func:`step_kernel`.

    Return what its elements' denominators were made of and are made of now, how many elements it
    has (0 or less: it is not stepped), and its row of scalars.
    """
    item = items + 2 * tl.program_id(0)
    index = tl.load(item)
    start = tl.load(item + 1).to(tl.int64) * _BLOCK
    tensor = tensors + _TENSOR_WORDS * index
    param = elements(tl.load(tensor), start, PARAM, ALIGNED)
    exp_avg = elements(tl.load(tensor + _EXP_AVG), start, EXP_AVG, ALIGNED)
    exp_avg_sq = elements(tl.load(tensor + _EXP_AVG_SQ), start, EXP_AVG_SQ, ALIGNED)
    max_exp_avg_sq = elements(tl.load(tensor + _MAX_EXP_AVG_SQ), start, EXP_AVG_SQ, ALIGNED)
    grad_address = tl.load(inputs + 2 * index)
    # Without a gradient no element remains, which costs no branch: the mask below is false.
    remaining = tl.where(grad_address == 0, 0, tl.load(tensor + _NUMEL) - start)
    grad = elements(grad_address, start, GRAD, ALIGNED)
    if DEVICE_SCALARS:
        remaining = tl.where(tl.load(scalars) == 0, 0, remaining)  # A step that is skipped.
        row = scalars + _ROWS_HEADER + _SCALARS * index
    else:
        row = scalars + _SCALARS * tl.load(inputs + 2 * index + 1)

    # The branch is uniform: only a tensor's last block pays for a mask, which undoes vectors.
    if remaining >= _BLOCK:
        before, after = _update_block(
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, row, None, SECOND_MOMENT, PACKS
        )
    else:
        mask = tl.arange(0, _BLOCK) < remaining
        before, after = _update_block(
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, row, mask, SECOND_MOMENT, PACKS
        )
    return before, after, remaining, row
