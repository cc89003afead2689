"""The Triton kernels in Triton's interpreter: every bit equals the reference's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import triton_device_scalars as device_checks
from helpers import triton_interpreter as checks
from helpers import triton_projection as projection_checks
from helpers.triton_interpreter import BLOCK, STREAMS, VARIANTS, Shape

from adamal_kernels import L2Ball, Simplex
from adamal_kernels.backends.triton.backend import TritonBackend
from adamal_kernels.core.bucket import BucketKey
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.norm import LANES, chunk_elements
from adamal_kernels.core.storage import FORMATS, Format

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

FLOAT32 = FORMATS[0]


def types_id(dtypes: Format) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes[:2])


every_pair = pytest.mark.parametrize("dtypes", FORMATS, ids=types_id)
some_pairs = pytest.mark.parametrize("dtypes", FORMATS[:3], ids=types_id)
every_plan = pytest.mark.parametrize("plan", checks.BACKENDS)
every_moment = pytest.mark.parametrize("second_moment", SecondMoment, ids=lambda m: m.name.lower())

Run = Callable[..., None]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """Runs a check in the process that has the interpreter; its failure is the caller's."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=checks.start) as worker:

        def run(check: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            worker.submit(check, *args, **kwargs).result()

        yield run


@pytest.mark.parametrize("variant", VARIANTS)
@every_moment
@every_pair
def test_same_bits(
    interpreted: Run, dtypes: Format, second_moment: SecondMoment, variant: str
) -> None:
    interpreted(checks.check_steps, dtypes, second_moment, (variant,))


@pytest.mark.parametrize("numel", [2, 3, 4, 5, 15, 16, 17, BLOCK - 4, BLOCK, BLOCK + 3, 2 * BLOCK])
def test_sizes(interpreted: Run, numel: int) -> None:
    shapes = (Shape(numel), Shape(numel, misaligned="param"))
    interpreted(checks.check_steps, FLOAT32, SecondMoment.MONOTONE, ("box",), shapes)


@pytest.mark.parametrize("stream", STREAMS)
@every_pair
def test_each_stream_misaligned(interpreted: Run, dtypes: Format, stream: str) -> None:
    shapes = (Shape(33), Shape(BLOCK + 33, misaligned=stream), Shape(BLOCK))
    interpreted(checks.check_steps, dtypes, SecondMoment.AMSGRAD, ("default",), shapes)


@every_moment
def test_every_tensor_has_its_own_row(interpreted: Run, second_moment: SecondMoment) -> None:
    shapes = tuple(Shape(5 + i) for i in range(2 * len(VARIANTS)))
    interpreted(checks.check_steps, FLOAT32, second_moment, tuple(VARIANTS), shapes)


@every_pair
def test_twenty_steps(interpreted: Run, dtypes: Format) -> None:
    shapes = (Shape(100), Shape(BLOCK + 7))
    variants = ("decoupled decay", "box")
    interpreted(checks.check_steps, dtypes, SecondMoment.MONOTONE, variants, shapes, steps=20)


@every_moment
@every_pair
def test_zero_by_zero(interpreted: Run, dtypes: Format, second_moment: SecondMoment) -> None:
    interpreted(checks.check_zero_by_zero, dtypes, second_moment)


@every_pair
def test_beyond_2_to_the_31(interpreted: Run, dtypes: Format) -> None:
    interpreted(checks.check_far_block, dtypes)


@every_plan
@every_pair
def test_work_is_complete_and_alignment_true(interpreted: Run, dtypes: Format, plan: str) -> None:
    interpreted(checks.check_launches, plan, dtypes)


@every_plan
def test_nothing_to_do_launches_nothing(interpreted: Run, plan: str) -> None:
    interpreted(checks.check_no_work, plan, FLOAT32)


@every_plan
def test_tables_follow_the_tensors(interpreted: Run, plan: str) -> None:
    interpreted(checks.check_tables, plan, FLOAT32)


@every_plan
def test_each_stream_has_its_tables(interpreted: Run, plan: str) -> None:
    interpreted(checks.check_streams, plan, FLOAT32)


@every_plan
@pytest.mark.parametrize("dtypes", [FLOAT32, FORMATS[1]], ids=types_id)
def test_more_rows_than_before(interpreted: Run, dtypes: Format, plan: str) -> None:
    interpreted(checks.check_more_rows_than_before, plan, dtypes)


@every_plan
def test_failed_tables_are_handed_over_again(interpreted: Run, plan: str) -> None:
    interpreted(checks.check_failed_tables_are_handed_over_again, plan, FLOAT32)


def test_alignment_in_the_steady_state(interpreted: Run) -> None:
    interpreted(checks.check_alignment_in_the_steady_state)


def test_2000_groups_are_one_launch_and_no_python_work(interpreted: Run) -> None:
    interpreted(checks.check_python_work, 2000)


def test_steady_state() -> None:
    """The tests of the steady state pass with Triton, too."""
    run_with_triton("fast_path/test_steady_state.py")


def test_sets_that_couple_elements() -> None:
    """The tests of what all backends do with them pass with Triton, but for the longest."""
    left_out = ("every_backend", "ends_in_the_set", "projected_point", "on_the_boundary")
    run_with_triton("method/test_coupled.py", *(f"not {name}" for name in left_out))


def test_scalars_of_the_device() -> None:
    """The tests of device scalars pass with Triton, but for those of the table of cases."""
    run_with_triton("kernels/test_device_scalars.py", "not capturable_gives")


def run_with_triton(file: str, *selected: str) -> None:
    """Run the tests of a file that step by Triton, in its interpreter."""
    chosen = " and ".join(("triton", *selected))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", chosen, file],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@every_plan
def test_scalars_are_rounded_once(interpreted: Run, plan: str) -> None:
    interpreted(checks.check_scalars_are_rounded_once, plan)


@pytest.mark.parametrize("given", device_checks.INPUTS)
@every_plan
def test_scalars_derived_on_the_device(interpreted: Run, plan: str, given: str) -> None:
    interpreted(device_checks.check_derived, plan, FORMATS[1], given)


@every_pair
def test_scalars_derived_on_the_device_are_rounded_once(interpreted: Run, dtypes: Format) -> None:
    interpreted(device_checks.check_derived, "C++", dtypes, "unscaled and clipped")


def test_more_tensors_than_a_program_derives_scalars_of(interpreted: Run) -> None:
    interpreted(device_checks.check_derived, "C++", FORMATS[1], "unscaled", tensors=260)


@every_pair
def test_norm_of_gradients(interpreted: Run, dtypes: Format) -> None:
    numels = device_checks.norm_sizes(dtypes)
    interpreted(device_checks.check_norm, dtypes, numels)


def test_norm_of_more_chunks_than_lanes(interpreted: Run) -> None:
    numels = (LANES * chunk_elements(torch.float64) + 3 * BLOCK + 5,)
    interpreted(device_checks.check_norm, FORMATS[1], numels)


@pytest.mark.parametrize("numels", [(9,), (0, 2), (1, 5000)], ids=str)
def test_norm_of_special_gradients(interpreted: Run, numels: tuple[int, ...]) -> None:
    interpreted(device_checks.check_norm, FLOAT32, numels, special=True)


@every_plan
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("capturable", [True, False])
def test_scaled_clipped_and_skipped_steps(
    interpreted: Run, plan: str, capturable: bool, max_grad_norm: float | None
) -> None:
    interpreted(device_checks.check_optimizer, plan, capturable, max_grad_norm)


@pytest.mark.parametrize("steps_before", [1, 3])
def test_captured_steps(interpreted: Run, steps_before: int) -> None:
    interpreted(device_checks.check_capture, steps_before)


def test_captured_projections(interpreted: Run) -> None:
    interpreted(device_checks.check_capture, 3, (L2Ball(1.0), Simplex()))


@every_pair
def test_projections(interpreted: Run, dtypes: Format) -> None:
    interpreted(projection_checks.check_layouts, "C++", dtypes, SecondMoment.MONOTONE)


@pytest.mark.parametrize("second_moment", [SecondMoment.PLAIN, SecondMoment.AMSGRAD])
def test_projections_in_the_metric_of_another_moment(
    interpreted: Run, second_moment: SecondMoment
) -> None:
    interpreted(projection_checks.check_layouts, "Python", FLOAT32, second_moment)


@some_pairs
def test_projections_of_wide_rows(interpreted: Run, dtypes: Format) -> None:
    interpreted(projection_checks.check_wide, dtypes)


@pytest.mark.parametrize(
    ("plan", "evaluations", "dtypes"),
    [("C++", 0, FLOAT32), ("C++", 2, FORMATS[1]), ("Python", 12, FLOAT32)],
)
def test_projections_of_long_rows(
    interpreted: Run, plan: str, evaluations: int, dtypes: Format
) -> None:
    interpreted(projection_checks.check_long, plan, dtypes, evaluations)


def test_projection_of_more_chunks_than_lanes(interpreted: Run) -> None:
    interpreted(projection_checks.check_more_chunks_than_lanes)


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("capturable", [True, False])
@every_plan
def test_what_is_not_projected(interpreted: Run, plan: str, capturable: bool, long: bool) -> None:
    interpreted(projection_checks.check_not_projected, plan, capturable, long)


def test_what_is_watched_of_moments_that_no_step_makes(interpreted: Run) -> None:
    interpreted(checks.check_watched_moments)


def test_available_in_the_interpreter(interpreted: Run) -> None:
    interpreted(checks.check_availability)


def test_cpu_tensors_need_the_interpreter() -> None:
    reason = TritonBackend().unavailable(torch.device("cpu"))
    assert reason is not None
    assert "TRITON_INTERPRET=1" in reason


def test_other_devices_are_refused() -> None:
    reason = TritonBackend().unavailable(torch.device("meta"))
    assert reason is not None
    assert "meta" in reason


def test_unknown_types_are_refused() -> None:
    key = BucketKey(torch.device("cpu"), Format(torch.float64, torch.float16), SecondMoment.PLAIN)
    assert TritonBackend().unsupported(key) is not None
