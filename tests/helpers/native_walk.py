"""The formula in numpy, cases for the native kernels, and what the kernels are to make of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.scalars import StepOptions, StepScalars, derive_step_scalars
from adamal_kernels.core.storage import FORMATS, Format, compute_dtype
from helpers.native_harness import (
    STREAMS,
    Harness,
    Info,
    StepCase,
    StepResult,
    TensorCase,
)

Array = npt.NDArray[Any]
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
CODES = range(len(FORMATS))
BACKENDS = ("step_cpu", "step_cuda")


# The formula, in numpy: its float32 and float64 operations, sqrt included, are correctly rounded.
def decoded(bits: Array, dtype: torch.dtype) -> Array:
    if dtype in NUMPY:
        return bits
    return torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()


def encoded(values: Array, dtype: torch.dtype) -> Array:
    if dtype in NUMPY:
        return values.astype(NUMPY[dtype])
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


@np.errstate(all="ignore")
def expected_tensor(case: StepCase, tensor: TensorCase) -> TensorCase:
    if tensor.grad is None:
        return tensor
    dtypes = FORMATS[case.format]
    real = NUMPY[compute_dtype(dtypes.param)]
    s = StepScalars(*(real(value) for value in case.scalars[tensor.row]))
    param = decoded(tensor.param, dtypes.param)
    grad = s.grad_factor * decoded(tensor.grad, dtypes.grad).astype(real)
    if s.coupled_decay != 0:
        grad = grad + s.coupled_decay * param
    param = param * s.decay_factor
    exp_avg = tensor.exp_avg + s.one_minus_beta1 * (grad - tensor.exp_avg)
    square = grad * grad
    exp_avg_sq = s.beta2 * tensor.exp_avg_sq + s.one_minus_beta2 * square
    largest = None
    if case.second_moment == SecondMoment.MONOTONE:
        grown = tensor.exp_avg_sq + s.one_minus_beta2 * (square - tensor.exp_avg_sq)
        exp_avg_sq = np.where(square > tensor.exp_avg_sq, grown, tensor.exp_avg_sq)
    if case.second_moment == SecondMoment.AMSGRAD:
        old = tensor.max_exp_avg_sq
        largest = np.where(exp_avg_sq > old, exp_avg_sq, old)
    denominator = np.sqrt(exp_avg_sq if largest is None else largest) / s.bias2_sqrt + s.eps
    quotient = exp_avg / denominator
    quotient[(exp_avg == 0) & (denominator == 0)] = 0
    param = param - s.step_size * quotient
    param = np.where(param < s.lower, s.lower, np.where(param > s.upper, s.upper, param))
    assert param.dtype == exp_avg.dtype == exp_avg_sq.dtype == real
    return TensorCase(encoded(param, dtypes.param), tensor.grad, exp_avg, exp_avg_sq, largest)


def differing(found: Array, expected: Array, dtype: torch.dtype) -> Array:
    """Where the bits differ, any NaN being equal to any NaN."""
    integer = np.dtype(f"u{expected.itemsize}")
    both_nan = np.isnan(decoded(found, dtype)) & np.isnan(decoded(expected, dtype))
    return np.flatnonzero((found.view(integer) != expected.view(integer)) & ~both_nan)


def check(cases: Sequence[StepCase], results: Sequence[StepResult]) -> None:
    for case, result in zip(cases, results, strict=True):
        dtypes = FORMATS[case.format]
        real = compute_dtype(dtypes.param)
        for i, (tensor, found) in enumerate(zip(case.tensors, result.tensors, strict=True)):
            expected = expected_tensor(case, tensor)
            for name in STREAMS:
                if name == "grad" or getattr(tensor, name) is None:
                    continue
                dtype = dtypes.param if name == "param" else real
                wrong = differing(getattr(found, name), getattr(expected, name), dtype)
                assert wrong.size == 0, (
                    f"{dtypes}, {SecondMoment(case.second_moment).name}, tensor {i} of "
                    f"{tensor.param.size} elements, misaligned {tensor.misaligned}: {name} differs "
                    f"at {wrong[:8]}: {getattr(found, name)[wrong[:8]]}, "
                    f"expected {getattr(expected, name)[wrong[:8]]}"
                )


# The cases.
def extremes(dtype: torch.dtype) -> list[float]:
    limits = torch.finfo(dtype)
    denormal = limits.smallest_normal * limits.eps
    return [math.nan, math.inf, -math.inf, 0.0, -0.0, denormal, -3 * denormal, limits.max]


def make_tensor(
    rng: np.random.Generator, case: StepCase, numel: int, *, extreme: bool = True, **options: Any
) -> TensorCase:
    dtypes = FORMATS[case.format]
    real = compute_dtype(dtypes.param)

    def values(dtype: torch.dtype, specials: list[float], transform: Callable = np.positive):
        array = transform(rng.standard_normal(numel)).astype(NUMPY[real])
        if extreme:
            special = rng.random(numel) < 0.3
            array[special] = rng.choice(np.array(specials, array.dtype), special.sum())
        return encoded(array, dtype)

    # -inf and -0 are no second moments, but a store that is left out must not depend on that.
    moments = [*extremes(real), 1.0, 1e-20]
    amsgrad = case.second_moment == SecondMoment.AMSGRAD
    return TensorCase(
        param=values(dtypes.param, extremes(dtypes.param)),
        grad=values(dtypes.grad, extremes(dtypes.grad)),
        exp_avg=values(real, extremes(real)),
        exp_avg_sq=values(real, moments, np.square),
        max_exp_avg_sq=values(real, moments, np.square) if amsgrad else None,
        **options,
    )


DECAYS: tuple[dict[str, Any], ...] = (
    {"weight_decay": 0.0},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled": True},
)
BOXES = ((-math.inf, math.inf), (-0.25, 0.5), (-math.inf, 0.5), (-0.25, math.inf))


def make_scalars(
    *,
    step: int = 3,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    bias_correction: bool = True,
    box: tuple[float, float] = BOXES[0],
    lr: float = 0.1,
) -> StepScalars:
    options = StepOptions(
        lr=lr,
        beta1=0.9,
        beta2=0.98,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled,
        maximize=maximize,
        bias_correction=bias_correction,
        lower=box[0],
        upper=box[1],
    )
    return derive_step_scalars(step, options)


ROWS = [
    make_scalars(),
    make_scalars(step=1, weight_decay=0.1, box=BOXES[1]),
    make_scalars(step=1000, weight_decay=0.1, decoupled=True, maximize=True),
    make_scalars(eps=0.0, bias_correction=False),
]


def formula_cases() -> Iterator[StepCase]:
    """Every formula, with two step counts and two eps (0 among them) a bucket."""
    rng = np.random.default_rng(1)
    kernels = itertools.product(CODES, SecondMoment, DECAYS, BOXES, (False, True))
    for seed, (format, second_moment, decay, box, maximize) in enumerate(kernels):
        options: dict[str, Any] = {**decay, "box": box, "maximize": maximize}
        scalars = [
            make_scalars(**options),
            make_scalars(eps=0.0, bias_correction=False, **options),
            make_scalars(step=2000, eps=0.0, **options),
        ]
        case = StepCase(format, second_moment, scalars, [], seed)
        case.tensors = [make_tensor(rng, case, 300, row=row) for row in (2, 0, 1, 0)]
        yield case


def vector_width(dtypes: Format) -> int:
    return 16 // min(dtype.itemsize for dtype in dtypes)


def sizes(info: Info, format: int) -> list[int]:
    width, chunk = vector_width(FORMATS[format]), info.cuda_chunks[format]
    return [
        *(0, 1, width - 1, width, width + 1),
        *(chunk - width - 1, chunk - 1, chunk, chunk + 1, 2 * chunk, 2 * chunk + 3),
    ]


def shape_cases(info: Info, sizes_of: Callable[[Info, int], list[int]]) -> Iterator[StepCase]:
    """Every kernel on every size, the tensors of a bucket on different rows."""
    rng = np.random.default_rng(2)
    for seed, (format, second_moment) in enumerate(itertools.product(CODES, SecondMoment)):
        case = StepCase(format, second_moment, ROWS, [], seed)
        case.tensors = [
            make_tensor(rng, case, size, row=i % len(ROWS))
            for i, size in enumerate(sizes_of(info, format))
        ]
        yield case


def misaligned_cases(info: Info) -> Iterator[StepCase]:
    """Every stream misaligned on its own, then all of them, between aligned neighbours."""
    rng = np.random.default_rng(3)
    for seed, (format, second_moment) in enumerate(itertools.product(CODES, SecondMoment)):
        chunk = info.cuda_chunks[format]
        case = StepCase(format, second_moment, ROWS, [], seed)
        case.tensors = [make_tensor(rng, case, chunk)]
        for i, name in enumerate(STREAMS[: 5 if second_moment == SecondMoment.AMSGRAD else 4]):
            case.tensors += [
                make_tensor(rng, case, chunk + 5, misaligned={name: 1}, row=i % len(ROWS)),
                make_tensor(rng, case, 37, misaligned={name: 1 + seed % 7}),
                make_tensor(rng, case, chunk + 5),
            ]
        case.tensors += [
            make_tensor(rng, case, 2 * chunk + 3, misaligned=dict.fromkeys(STREAMS, 3)),
            make_tensor(rng, case, chunk - 1, misaligned={"param": 1, "grad": 3}),
        ]
        yield case


def gradient_cases() -> Iterator[StepCase]:
    """Tensors without gradient at the start, in the middle and at the end; then nothing else."""
    rng = np.random.default_rng(4)
    for pattern in ("0110100", "0", "000", "1"):
        for format, second_moment in ((0, SecondMoment.MONOTONE), (2, SecondMoment.AMSGRAD)):
            case = StepCase(format, second_moment, ROWS, [])
            for i, has_grad in enumerate(pattern):
                # The row of a tensor without gradient is not read: this one does not exist.
                row = i % len(ROWS) if has_grad == "1" else 1 << 20
                tensor = make_tensor(rng, case, 2100 if i % 2 else 9, row=row)
                case.tensors.append(tensor if has_grad == "1" else replace(tensor, grad=None))
            yield case
    yield StepCase(0, SecondMoment.MONOTONE, [], [])


def check_formula(harness: Harness, backend: str) -> None:
    cases = list(formula_cases())
    check(cases, getattr(harness, backend)(cases))


def check_sizes_about_vectors_and_chunks(harness: Harness, info: Info, backend: str) -> None:
    cases = list(shape_cases(info, sizes))
    check(cases, getattr(harness, backend)(cases))


def check_sizes_about_cpu_chunks(harness: Harness, info: Info) -> None:
    chunk = info.cpu_chunk
    cases = list(shape_cases(info, lambda *_: [chunk - 1, chunk, chunk + 1, 2 * chunk + 3]))
    check(cases, harness.step_cpu(cases))


def check_misaligned_streams(harness: Harness, info: Info, backend: str) -> None:
    cases = list(misaligned_cases(info))
    check(cases, getattr(harness, backend)(cases))


def check_tensors_without_gradient(harness: Harness, backend: str) -> None:
    cases = list(gradient_cases())
    check(cases, getattr(harness, backend)(cases))


def check_zero_over_zero_leaves_the_parameter(
    harness: Harness, backend: str, second_moment: SecondMoment
) -> None:
    case = StepCase(0, second_moment, [make_scalars(eps=0.0)], [])
    zeros, minus_zeros = np.zeros(5, np.float32), np.full(5, -0.0, np.float32)
    param = np.array([1.5, -0.0, 1e-40, -3.0, 0.0], np.float32)
    largest = zeros if second_moment == SecondMoment.AMSGRAD else None
    case.tensors = [TensorCase(param, grad, grad, zeros, largest) for grad in (zeros, minus_zeros)]
    (result,) = getattr(harness, backend)([case])
    for tensor in result.tensors:
        assert tensor.param.tobytes() == param.tobytes()


# The monotone v, and amsgrad's maximum, are stored only where they changed.
def at_rest(case: StepCase, numel: int, **options: Any) -> TensorCase:
    """A tensor whose largest second moment no gradient exceeds."""
    tensor = make_tensor(np.random.default_rng(5), case, numel, extreme=False, **options)
    moment = "max_exp_avg_sq" if tensor.max_exp_avg_sq is not None else "exp_avg_sq"
    large = np.full_like(getattr(tensor, moment), 1000)
    return replace(tensor, **{moment: large}, read_only=frozenset([moment]))


def check_cuda_walk_does_not_store_what_did_not_change(
    harness: Harness, info: Info, second_moment: SecondMoment
) -> None:
    cases = []
    for format in CODES:
        case = StepCase(format, second_moment, ROWS[:1], [])
        case.tensors = [at_rest(case, size) for size in sizes(info, format)]
        misaligned = {"param": 1}
        case.tensors.append(at_rest(case, info.cuda_chunks[format] + 9, misaligned=misaligned))
        cases.append(case)
    check(cases, harness.step_cuda(cases))


# Launches.
def tiny_tensors(case: StepCase, count: int, rows: int) -> list[TensorCase]:
    rng = np.random.default_rng(6)
    return [make_tensor(rng, case, 1 + i % 3, row=i % rows) for i in range(count)]


def distinct_rows(count: int) -> list[StepScalars]:
    return [make_scalars(step=1 + i, lr=0.01 * (1 + i)) for i in range(count)]


def check_launches_split_where_their_parameters_are_full(
    harness: Harness, info: Info, format: int
) -> None:
    precision = int(FORMATS[format].param == torch.float64)
    small, large = info.small[precision], info.large[precision]
    assert small.bytes <= 4096
    assert large.bytes <= 32764
    # (tensors, distinct rows) -> (launches, of which small)
    expected = {
        (1, 1): (1, 1),
        (small.tensors, 1): (1, 1),
        (small.tensors + 1, 1): (1, 0),
        (small.rows, small.rows): (1, 1),
        (small.rows + 1, small.rows + 1): (1, 0),
        (large.tensors, 2): (1, 0),
        (large.tensors + 1, 2): (2, 1),
        (2 * large.tensors + small.tensors + 1, 2): (3, 0),
        (large.rows + 7, large.rows): (1, 0),
        (large.rows + 1, large.rows + 1): (2, 1),
        (3 * large.rows, 3 * large.rows): (3, 0),
        # The rows come round again after each launch is full.
        (2 * large.rows + 2, large.rows + 1): (3, 1),
    }
    cases = []
    for tensors, rows in expected:
        case = StepCase(format, SecondMoment.MONOTONE, distinct_rows(rows), [], seed=tensors)
        case.tensors = tiny_tensors(case, tensors, rows)
        cases.append(case)
    results = harness.step_cuda(cases)
    check(cases, results)
    counts = [(result.launches, result.small_launches) for result in results]
    assert counts == list(expected.values())


SIXTEEN_BIT = [(2, torch.bfloat16), (3, torch.float16)]
PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def check_encode(harness: Harness, code: int, dtype: torch.dtype) -> None:
    """Every stored value, every tie between two, their neighbours, and random patterns."""
    values = decoded(PATTERNS, dtype)
    finite = np.unique(values[np.isfinite(values)]).astype(np.float64)
    gap = finite[-1] - finite[-2]
    finite = np.concatenate([[-finite[-1] - gap], finite, [finite[-1] + gap]])
    with np.errstate(over="ignore"):
        ties = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2]).astype(np.float32)
        near = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    patterns = np.random.default_rng(7).integers(0, 1 << 32, 1 << 18, np.uint32).view(np.float32)
    specials = np.array([*extremes(torch.float32), 2.0**-149, 2.0**-25, 65520.0], np.float32)
    # NaNs whose payload a rounding carry would turn into an infinity or a zero.
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    values = np.concatenate([ties, *near, patterns, specials, nans])
    assert differing(harness.encode(code, values), encoded(values, dtype), dtype).size == 0


def check_scalars_are_those_of_python(harness: Harness) -> None:
    rng = np.random.default_rng(8)
    steps = [1, 2, 3, 4, 7, 8, 100, 4095, 4096, 1_000_000, 2**40 + 1]
    cases = [
        (
            step,
            StepOptions(
                lr=rng.choice([0.0, rng.uniform()]),
                beta1=beta,
                beta2=rng.choice([0.9, 0.98, 0.999, 0.9999, rng.uniform()]),
                eps=1e-8,
                weight_decay=rng.uniform(),
                decoupled_weight_decay=bool(rng.integers(2)),
                maximize=bool(rng.integers(2)),
                bias_correction=bool(rng.integers(8)),
                lower=-rng.uniform(),
                upper=math.inf,
            ),
            rng.uniform(),
        )
        for step in [*steps, *range(1, 3000, 7)]
        for beta in (0.0, 0.5, 0.9, 0.99, rng.uniform())
    ]
    expected = np.array([derive_step_scalars(*case) for case in cases])
    assert harness.derive_step_scalars(cases).tobytes() == expected.tobytes()
