"""Steps whose scalars are derived on the device, and norms, on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.norm import squared_norm
from adamal_kernels.core.scalars import StepOptions, derive_step_scalars, gradient_factor
from adamal_kernels.core.storage import FORMATS, compute_dtype
from helpers.native_harness import Command, DeviceCase, Harness, StepCase, TensorCase
from helpers.native_walk import check, encoded, make_tensor

OPTIONS = StepOptions(
    lr=0.1,
    beta1=0.9,
    beta2=0.98,
    eps=1e-8,
    weight_decay=0.1,
    decoupled_weight_decay=False,
    maximize=False,
    bias_correction=True,
)
OTHERS = (
    OPTIONS,
    OPTIONS._replace(lr=0.0, lower=-0.1, upper=0.1),
    OPTIONS._replace(decoupled_weight_decay=True, maximize=True, lower=-0.25, upper=0.5),
    OPTIONS._replace(bias_correction=False, beta1=0.0, eps=0.0),
)


def bucket(format: int, second_moment: SecondMoment, sizes: list[int]) -> StepCase:
    """A bucket with rows of options in turn, and every fifth gradient missing."""
    rng = np.random.default_rng(format)
    case = StepCase(format, second_moment, [], [], seed=format)
    for i, size in enumerate(sizes):
        tensor = make_tensor(rng, case, size, row=i % len(OTHERS))
        case.tensors.append(replace(tensor, grad=None) if i % 5 == 3 else tensor)
    return case


def expected_case(case: StepCase, device: DeviceCase) -> StepCase:
    """The same step by scalars that Python derives, a row a tensor."""
    found = gradient_factor(
        device.grad_scale, device.found_inf, device.grad_norm, device.max_grad_norm
    )
    scalars = [
        derive_step_scalars(int(count) + 1, device.options[tensor.row], found.factor)
        for tensor, count in zip(case.tensors, device.counts, strict=True)
    ]
    tensors = [
        replace(tensor, row=i, grad=None if found.skip else tensor.grad)
        for i, tensor in enumerate(case.tensors)
    ]
    return replace(case, scalars=scalars, tensors=tensors)


INPUTS = {
    "none": {},
    "scaled": {"grad_scale": 1024.0, "found_inf": 0.0},
    "clipped": {"grad_norm": 7.0, "max_grad_norm": 0.3},
    "not clipped": {"grad_norm": 0.25, "max_grad_norm": 0.3},
    "scaled and clipped": {"grad_scale": 3.0, "grad_norm": 7.0, "max_grad_norm": 0.3},
    "found inf": {"grad_scale": 1024.0, "found_inf": 1.0},
    "infinite norm": {"grad_norm": math.inf, "max_grad_norm": 0.3},
    "NaN norm": {"grad_norm": math.nan, "max_grad_norm": 0.3},
}


def check_steps_are_those_of_python(harness: Harness, name: str, by_address: bool) -> None:
    cases = [
        bucket(format, second_moment, [0, 1, 9, 2049, 40, 17])
        for format in (0, 1, 2, 4, 7)
        for second_moment in SecondMoment
    ]
    devices = [
        DeviceCase(
            OTHERS,
            np.array([0, 3, 1000, 7, 2**24, 1], np.float32),
            by_address=by_address,
            **INPUTS[name],
        )
        for _ in cases
    ]
    results = harness.step_on_device(cases, devices)
    check([expected_case(c, d) for c, d in zip(cases, devices, strict=True)], results)
    skipped = name in ("found inf", "infinite norm", "NaN norm")
    for case, device, result in zip(cases, devices, results, strict=True):
        taken = [0 if skipped or tensor.grad is None else 1 for tensor in case.tensors]
        assert (result.counts == device.counts + np.array(taken, np.float32)).all()
        assert result.skipped_steps == skipped


def check_buckets_of_several_launches(harness: Harness, small: bool) -> None:
    """More tensors, and more distinct options, than the parameters of one launch hold."""
    count = 1100 if small else 4700
    case = bucket(0, SecondMoment.MONOTONE, [1] * count)
    options = [OPTIONS._replace(lr=0.1 + i / count) for i in range(count)]
    case.tensors = [replace(tensor, row=i) for i, tensor in enumerate(case.tensors)]
    # Without gradients at either end, and for the length of a launch.
    for i in (*range(4), *range(200, 900), count - 1):
        case.tensors[i] = replace(case.tensors[i], grad=None)
    counts = np.arange(count, dtype=np.float32)
    device = DeviceCase(options, counts, grad_scale=2.0, small=small)
    (result,) = harness.step_on_device([case], [device])
    check([expected_case(case, device)], [result])
    has_grad = np.array([tensor.grad is not None for tensor in case.tensors])
    assert (result.counts == counts + has_grad).all()


def norm_cases() -> Iterator[tuple[StepCase, list[torch.Tensor]]]:
    """Buckets of gradients only, and the gradients as tensors."""
    for format, dtypes in enumerate(FORMATS):
        rng = np.random.default_rng(format)
        case = StepCase(format, SecondMoment.PLAIN, [], [], seed=format)
        grads = []
        for i, size in enumerate((0, 1, 7, 256, 1023, 1025, 2047, 2048, 2049, 16385, 5)):
            values = rng.standard_normal(size).astype(np.float32) * 3.0 ** (i % 5)
            grad = torch.from_numpy(values).to(dtypes.grad)
            if i == 10:
                grad[2] = math.inf
            stored = grad.numpy() if dtypes.grad.itemsize > 2 else encoded(values, dtypes.grad)
            if i == 10 and dtypes.grad.itemsize == 2:
                stored = grad.view(torch.int16).numpy().view(np.uint16)
            like = make_tensor(rng, case, size)
            case.tensors.append(replace(like, grad=stored, misaligned={"grad": i % 3}))
            grads.append(grad)
        yield case, grads


def check_norms_are_those_of_python(harness: Harness, command: Command) -> None:
    cases, grads = zip(*norm_cases(), strict=True)
    for case, tensors, sums in zip(
        cases, grads, harness.squared_norms(command, cases), strict=True
    ):
        real = compute_dtype(FORMATS[case.format].param)
        expected = np.array([squared_norm([grad], real).item() for grad in tensors])
        assert sums.tobytes() == expected.tobytes()


def check_norms_of_many_chunks_use_every_lane(harness: Harness) -> None:
    """One more chunk than there are lanes: the first lane adds two."""
    values = np.random.default_rng(3).standard_normal(257 * 2048 + 5).astype(np.float32)
    tensor = TensorCase(values[:0], values, values[:0], values[:0])
    tensor = replace(tensor, param=values, exp_avg=values, exp_avg_sq=values)
    case = StepCase(0, SecondMoment.PLAIN, [], [tensor, replace(tensor, grad=None)])
    expected = squared_norm([torch.from_numpy(values)], torch.float32).item()
    for command in (Command.NORM_CPU, Command.NORM_CUDA):
        assert harness.squared_norms(command, [case])[0].tolist() == [expected, 0.0]
