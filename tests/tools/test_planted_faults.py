"""The suite can fail: it catches each of many one-line faults, planted in a copy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from helpers import coupled_native as coupled
from helpers import device_kernels as device
from helpers import native_walk as walk
from helpers import projection_blocks as blocks
from helpers import watch_kernels as watched
from helpers.between_workers import is_worker
from helpers.forked_pytest import ROOT, run_pytest
from helpers.native_harness import Command, Harness, HarnessError

from adamal_kernels.core.buffers import SecondMoment


@dataclass(frozen=True)
class Fault:
    """A line that becomes wrong."""

    file: str
    right: str
    wrong: str

    def plant(self, folder: Path) -> None:
        """Make the line wrong in ``folder``; it is still there, once, or the fault is stale."""
        path = folder / self.file
        text = path.read_text()
        assert text.count(self.right) == 1, f"{self.right!r} is in {self.file} not exactly once"
        path.write_text(text.replace(self.right, self.wrong))


# What catches faults in csrc: checks that the native kernels' tests run, too.


def formula(harness: Harness) -> None:
    for backend in walk.BACKENDS:
        walk.check_formula(harness, backend)


def zero_over_zero(harness: Harness) -> None:
    for backend in walk.BACKENDS:
        walk.check_zero_over_zero_leaves_the_parameter(harness, backend, SecondMoment.MONOTONE)


def cpu_chunks(harness: Harness) -> None:
    walk.check_sizes_about_cpu_chunks(harness, harness.info())


def cuda_sizes(harness: Harness) -> None:
    walk.check_sizes_about_vectors_and_chunks(harness, harness.info(), "step_cuda")


def cuda_misaligned(harness: Harness) -> None:
    walk.check_misaligned_streams(harness, harness.info(), "step_cuda")


def cuda_without_gradient(harness: Harness) -> None:
    walk.check_tensors_without_gradient(harness, "step_cuda")


def cuda_unchanged_v(harness: Harness) -> None:
    for second_moment in (SecondMoment.MONOTONE, SecondMoment.AMSGRAD):
        walk.check_cuda_walk_does_not_store_what_did_not_change(
            harness, harness.info(), second_moment
        )


def device_steps(harness: Harness) -> None:
    for name in ("scaled and clipped", "found inf"):
        device.check_steps_are_those_of_python(harness, name, True)


def device_launches(harness: Harness) -> None:
    device.check_buckets_of_several_launches(harness, True)


def norms(harness: Harness) -> None:
    for command in (Command.NORM_CPU, Command.NORM_CUDA):
        device.check_norms_are_those_of_python(harness, command)
    device.check_norms_of_many_chunks_use_every_lane(harness)


def watched_steps(harness: Harness) -> None:
    for command in watched.COMMANDS:
        watched.check_records_are_those_of_the_eager_formula(harness, command)


def watched_extremes(harness: Harness) -> None:
    watched.check_records_of_every_type_and_of_extremes(harness, Command.WATCHED_CPU)


def projections(harness: Harness) -> None:
    blocks.check_short_rows(harness, 1)
    blocks.check_long_rows(harness, 0, 0)
    blocks.check_long_searches(harness, 16400)


def bounds(harness: Harness) -> None:
    for cls in (coupled.L2Ball, coupled.L1Ball):
        coupled.check_rows_about_the_size_of_their_balls(harness, cls, coupled.FLOAT32)
        coupled.check_a_row_whose_size_float32_would_lose(harness, cls)


def launches(harness: Harness) -> None:
    walk.check_launches_split_where_their_parameters_are_full(harness, harness.info(), 0)


def encoding(harness: Harness) -> None:
    for code, dtype in walk.SIXTEEN_BIT:
        walk.check_encode(harness, code, dtype)


Check = Callable[[Harness], None]

MATH, WALK = "csrc/formula/element.h", "csrc/cuda/walk.h"
LAUNCH, CPU, STORAGE = "csrc/cuda/launches.h", "csrc/cpu/step.cpp", "csrc/formula/storage.h"
DEVICE, TREE, NORM = "csrc/formula/scalars.h", "csrc/cpu/tree_sum.h", "csrc/cuda/norm_tree.h"
BLOCKS = "csrc/cuda/projection_blocks.h"

# Name -> the fault, and what catches it without sanitizers.
NATIVE_FAULTS: dict[str, tuple[Fault, Check]] = {
    "the maximum is stored as the second moment": (
        Fault(
            "csrc/formula/storage.h",
            "encode<typename Key::ExpAvgSq>(e.max_exp_avg_sq)",
            "encode<typename Key::ExpAvgSq>(e.exp_avg_sq)",
        ),
        formula,
    ),
    "a format's gradient is of the parameter's type": (
        Fault(
            "csrc/formula/dtypes.h",
            "X(6, float32, bfloat16, float32, float32)",
            "X(6, float32, float16, float32, float32)",
        ),
        formula,
    ),
    "a bound of a row's size has no room for rounding": (
        Fault("csrc/cpu/set_loops.h", "kShare = 0x1p-10", "kShare = 0"),
        bounds,
    ),
    "a bound of a row's size is blind to what is tiny": (
        Fault(
            "csrc/cpu/set_loops.h",
            " + static_cast<double>(count) * std::numeric_limits<T>::min()",
            "",
        ),
        bounds,
    ),
    "rows whose bound does not tell are left alone": (
        Fault(
            "csrc/cpu/projection.cpp",
            "if (!is_inside(tensor.rows.set, size_of(row))) row",
            "if (false) row",
        ),
        bounds,
    ),
    "elements that stood still have grown": (
        Fault("csrc/formula/watch.h", "grown += after > before;", "grown += after >= before;"),
        watched_steps,
    ),
    "the budget's least change is looked for too seldom": (
        Fault(
            "csrc/cpu/watch.h",
            "(grown > 0 && seen.least_change < seen_->least_change)",
            "(grown > 1 && seen.least_change < seen_->least_change)",
        ),
        watched_steps,
    ),
    "watched steps forget the last one's learning rate": (
        Fault("csrc/formula/watch.h", "record->budget_scale = now.scale;", ""),
        watched_steps,
    ),
    "a v that is no number has a smallest step": (
        Fault("csrc/formula/watch.h", "largest == largest ? smallest : largest;", "smallest;"),
        watched_extremes,
    ),
    "a skipped step is counted": (
        Fault(DEVICE, "if (found.skip) return false;", "if (found.skip) ++*count;"),
        device_steps,
    ),
    "a learning rate in memory is not read": (
        Fault(DEVICE, "found.lr = read(lr, found.lr);", ""),
        device_steps,
    ),
    "gradients are clipped and not unscaled": (
        Fault(MATH, "found.factor *= clip;", "found.factor = clip;"),
        device_steps,
    ),
    "options of a later launch are an earlier one's": (
        Fault(LAUNCH, "std::fill(slot_of_.begin(), slot_of_.end(), Params::kAtRest);", ""),
        device_launches,
    ),
    "a launch on the device starts at the first tensor": (
        Fault(LAUNCH, "scalars.rows[first_tensor + slot]", "scalars.rows[slot]"),
        device_launches,
    ),
    "lanes add neighbouring chunks": (
        Fault(
            NORM,
            "for (int64_t i = lane; i < chunks; i += kNormLanes)",
            "for (int64_t i = lane * 2; i < chunks; ++i)",
        ),
        norms,
    ),
    "the CUDA tree adds halves": (
        Fault(
            NORM,
            "values[j] = values[2 * j] + values[2 * j + 1]",
            "values[j] = values[j] + values[j + width]",
        ),
        norms,
    ),
    "the CPU tree ends early": (
        Fault(TREE, "for (; count > 1; count /= 2)", "for (; count > 2; count /= 2)"),
        norms,
    ),
    "only the first row of a tile is evaluated": (
        Fault(
            BLOCKS,
            "if (search.state != SearchState::searching) return;\n          shared.leaves",
            "if (row > 0) return;\n          shared.leaves",
        ),
        projections,
    ),
    "the step adds no sizes": (
        Fault(BLOCKS, "if (thread == 0) entry.sums[item.chunk].first = shared.leaves[0];", ""),
        projections,
    ),
    "searches end with the rounds": (
        Fault(
            BLOCKS,
            "while (shared.search.state == SearchState::searching)",
            "while (shared.search.state != shared.search.state)",
        ),
        projections,
    ),
    "the clamp is flipped": (
        Fault(MATH, "stepped < s.lower ? s.lower", "stepped > s.lower ? s.lower"),
        formula,
    ),
    "v takes a NaN": (
        Fault(
            MATH,
            "v = g2 > v ? v + s.one_minus_beta2 * (g2 - v) : v;",
            "v = g2 <= v ? v : v + s.one_minus_beta2 * (g2 - v);",
        ),
        formula,
    ),
    "the monotone v is a sum of two products": (
        Fault(
            MATH,
            "g2 > v ? v + s.one_minus_beta2 * (g2 - v)",
            "g2 > v ? s.beta2 * v + s.one_minus_beta2 * g2",
        ),
        formula,
    ),
    "the denominator is not amsgrad's": (
        Fault(MATH, "sqrt(denominator_sq)", "sqrt(v)"),
        formula,
    ),
    "zero is divided by zero": (
        Fault(MATH, "(kGuarded && d == T(0) && m == T(0)) ? T(0) : m / d", "m / d"),
        zero_over_zero,
    ),
    "a step without eps is not guarded": (
        Fault(MATH, "!(eps > T(0) &&", "!(eps >= T(0) &&"),
        zero_over_zero,
    ),
    "a lower bound alone is not guarded": (
        Fault(MATH, " && lower == -T(INFINITY)", ""),
        formula,
    ),
    "an upper bound alone is not guarded": (
        Fault(MATH, " && upper == T(INFINITY)", ""),
        formula,
    ),
    "no bias correction of v": (
        Fault(MATH, "sqrt(1.0 - beta_power(options.beta2, step))", "1.0"),
        walk.check_scalars_are_those_of_python,
    ),
    "the ragged tail is dropped": (
        Fault(
            WALK,
            "i = thread * kWidth; i < chunk.count;",
            "i = thread * kWidth; i + kWidth <= chunk.count;",
        ),
        cuda_sizes,
    ),
    "a chunk ends one element early": (
        Fault(
            WALK,
            "min_of(tensor.numel - offset, kCudaChunk<T>)",
            "min_of(tensor.numel - offset, kCudaChunk<T> - 1)",
        ),
        cuda_sizes,
    ),
    "the last word of a vector is not compared": (
        Fault(WALK, "(a.word[3] ^ b.word[3])", "(a.word[2] ^ b.word[2])"),
        cuda_sizes,
    ),
    "v is stored where it did not grow": (
        Fault(
            WALK,
            "exp_avg_sq[i].store_changed(chunk.exp_avg_sq + offset, old_exp_avg_sq);",
            "exp_avg_sq[i].store(chunk.exp_avg_sq + offset);",
        ),
        cuda_unchanged_v,
    ),
    "the gradient's alignment is not checked": (
        Fault(WALK, " | reinterpret_cast<uintptr_t>(grad) |", " |"),
        cuda_misaligned,
    ),
    "every tensor takes the first row": (
        Fault(LAUNCH, "return scalars[rows[slot]];", "return scalars[rows[0]];"),
        cuda_sizes,
    ),
    "a later launch takes the first one's gradients": (
        Fault(WALK, "slot = item.tensor - params.first_tensor", "slot = item.tensor"),
        launches,
    ),
    "a later launch keeps the last one's rows": (
        Fault(LAUNCH, "slot_of_row_[row] = kNoSlot;", "slot_of_row_[row] = slot_of_row_[row];"),
        launches,
    ),
    "a launch takes a tensor too many": (
        Fault(
            LAUNCH,
            "tensor_count_ == Params::kTensorCapacity",
            "tensor_count_ > Params::kTensorCapacity",
        ),
        launches,
    ),
    "the items of a tensor at rest are not passed over": (
        Fault(LAUNCH, "item_ += item_count(tensor_);", ""),
        cuda_without_gradient,
    ),
    "CPU chunks overlap": (
        Fault(CPU, "item.chunk * kCpuChunk", "item.chunk * (kCpuChunk - 1)"),
        cpu_chunks,
    ),
    "ties are rounded away from zero": (
        Fault(STORAGE, "bits + 0x7fff + ((bits >> 16) & 1)", "bits + 0x8000"),
        encoding,
    ),
}

BEYOND_THE_END = Fault(WALK, "if (i + kWidth <= chunk.count)", "if (i < chunk.count)")
"""What only the sanitizers see: a vector that reaches beyond a tensor's end."""


# Name -> the fault, and the test that catches it.
PYTHON_FAULTS: dict[str, tuple[Fault, str]] = {
    "what is stored is rounded before the step is computed": (
        Fault(
            "adamal_kernels/backends/eager/foreach.py",
            "denominators = [rounded_sqrt(v) for v in second_moments[-1]]",
            "denominators = [rounded_sqrt(v.to(w.dtype).to(v.dtype)) for v, w in "
            "zip(second_moments[-1], bucket.divisors)]",
        ),
        "kernels/test_formats.py::test_steps_compute_wide_and_store_narrow",
    ),
    "records are of what was stored before": (
        Fault(
            "adamal_kernels/backends/eager/reference.py",
            "record_steps(bucket.records, before, bucket.divisors,",
            "record_steps(bucket.records, before, before,",
        ),
        "kernels/test_formats.py::test_records_are_of_what_is_stored",
    ),
    "the first moment is held in the second one's type": (
        Fault(
            "adamal_kernels/core/buffers.py",
            'Buffer("exp_avg", stored_as="exp_avg")',
            'Buffer("exp_avg")',
        ),
        "optimizer/test_plan.py::test_state_tensors_are_the_same_in_cpp",
    ),
    "an arrow between folders points up": (
        Fault(
            "adamal_kernels/core/rounding.py",
            '    if value.device.type != "cpu":',
            '    from ..step import options  # noqa\n    if value.device.type != "cpu":',
        ),
        "tools/test_package_floors.py::test_python_imports_go_downwards",
    ),
    "no bias correction": (
        Fault(
            "adamal_kernels/core/scalars.py",
            "bias2_sqrt = _sqrt(1.0 - beta_power(o.beta2, step))",
            "bias2_sqrt = 1.0",
        ),
        "optimizer/test_hyperparameters.py::test_bias_corrections_are_of_beta_power",
    ),
    "one count for all parameters": (
        Fault(
            "adamal_kernels/step/stepper.py",
            "derive_step_scalars(int(step.item()) + 1,",
            'derive_step_scalars(table.setdefault("first", int(step.item()) + 1),',
        ),
        "optimizer/test_plan.py::test_counts_are_each_parameters_own",
    ),
    "the gradient's strides are ignored": (
        Fault(
            "adamal_kernels/step/stepper.py",
            "dense = _with_layout(grad, _pattern(entry))",
            "dense = grad",
        ),
        "optimizer/test_plan.py::test_layouts_change_no_bit[cpu-cpu-contiguous-float32]",
    ),
    "the wrong tensor is written back": (
        Fault(
            "adamal_kernels/step/stepper.py",
            "write_back.source.copy_(write_back.dense)",
            "write_back.dense.copy_(write_back.source)",
        ),
        "optimizer/test_plan.py::test_layouts_change_no_bit[cpu-cpu-strided-float32]",
    ),
    "replaced state is not checked": (
        Fault(
            "adamal_kernels/step/stepper.py",
            "                check_state(entry, held)",
            "                pass",
        ),
        "optimizer/test_bad_input.py::test_replaced_state",
    ),
    "steps repeated by C++ are not clamped": (
        Fault(
            "adamal_kernels/step/fast_path.py",
            "step_options(*binding.bounds)",
            'step_options(binding.bounds[0], float("inf"))',
        ),
        "fast_path/test_steady_state.py::test_is_taken_over_without_python",
    ),
    "bounds are rounded outward": (
        Fault(
            "adamal_kernels/projections.py",
            "upper = -_round_up(-self.hi, dtype) + 0.0",
            "upper = _round_up(self.hi, dtype) + 0.0",
        ),
        "method/test_projections.py::test_upper_bound_examples",
    ),
    "a step with lr=0 projects": (
        Fault("adamal_kernels/core/scalars.py", "stands = o.lr == 0", "stands = o.lr < 0"),
        "method/test_algorithm1.py::test_lr_zero_does_not_project",
    ),
    "loaded moments are cast to the parameter's type": (
        Fault(
            "adamal_kernels/checkpoints/merge.py",
            "moment_like(param, value.dtype)",
            "moment_like(param, param.dtype)",
        ),
        "checkpoints/test_checkpoint.py::test_every_bit_returns[cpu-cpu-monotone-bfloat16]",
    ),
    "a checkpoint overwrites the backend": (
        Fault(
            "adamal_kernels/checkpoints/merge.py",
            "group[name] = ours[name]",
            "group.setdefault(name, ours[name])",
        ),
        "checkpoints/test_checkpoint.py::test_how_to_compute_is_not_overwritten",
    ),
    "v goes on from AMSGrad's average": (
        Fault(
            "adamal_kernels/checkpoints/merge.py",
            'if group["amsgrad"] is True and maximum is not None:',
            "if False:",
        ),
        "checkpoints/test_checkpoint.py::test_v_goes_on_from_the_maximum_of_amsgrad",
    ),
    "optimi's bias correction stays in its moments": (
        Fault(
            "adamal_kernels/checkpoints/foreign.py",
            "moment.double() * (1.0 - beta_power(float(beta), count))",
            "moment.double()",
        ),
        "checkpoints/test_foreign_checkpoints.py::test_optimis_moments_lose_their_bias_correction",
    ),
    "DeepSpeed's count is that of its first parameter": (
        Fault(
            "adamal_kernels/checkpoints/foreign.py",
            'group["step"] = max(counts, key=',
            'group["step"] = min(counts, key=',
        ),
        "checkpoints/test_foreign_checkpoints.py::test_what_is_loaded_equals_torchs_own_to_the_bit",
    ),
    "the closure runs without gradients": (
        Fault("adamal_kernels/optimizer.py", "with torch.enable_grad():", "with torch.no_grad():"),
        "optimizer/test_optimizer.py::test_closure_is_called_once_with_gradients_enabled",
    ),
    "the reference's monotone v is a sum of two products": (
        Fault(
            "adamal_kernels/backends/eager/reference.py",
            "v = exp_avg_sq + s.one_minus_beta2 * (g2 - exp_avg_sq)",
            "v = s.beta2 * exp_avg_sq + s.one_minus_beta2 * g2",
        ),
        "kernels/test_backends.py::test_cases[float32-monotone-cpu-cpu]",
    ),
    "the reference's v takes a NaN": (
        Fault(
            "adamal_kernels/backends/eager/reference.py",
            "torch.where(g2 > exp_avg_sq, v, exp_avg_sq)",
            "torch.where(g2 <= exp_avg_sq, exp_avg_sq, v)",
        ),
        "kernels/test_backends.py::test_cases[float32-monotone-cpu-cpu]",
    ),
    "foreach clamps a NaN": (
        Fault(
            "adamal_kernels/backends/eager/foreach.py",
            "torch.where(p < lower, lower, torch.where(p > upper, upper, p))",
            "torch.where(p >= lower, torch.where(p > upper, upper, p), lower)",
        ),
        "kernels/test_backends.py::test_foreach_calls_over_lists_give_the_same_bits_on_cpus[monotone]",
    ),
    "foreach divides zero by zero": (
        Fault(
            "adamal_kernels/backends/eager/foreach_cpu.py",
            "if known.eps == 0:",
            "if known.eps < 0:",
        ),
        "method/test_algorithm1.py::test_zero_by_zero_stays",
    ),
    "a piece's v takes a NaN": (
        Fault(
            "adamal_kernels/backends/eager/foreach_cpu.py",
            "v.sub_(_keep_where(torch.gt(g2, v, out=a), fall))",
            "v.sub_(fall.clamp_max_(0))",
        ),
        "kernels/test_backends.py::test_cases[float32-monotone-foreach-cpu]",
    ),
    "a piece takes torch's own root": (
        Fault(
            "adamal_kernels/backends/eager/foreach_cpu.py",
            "np.sqrt(v.numpy(), out=a.numpy())",
            "torch.nextafter(torch.sqrt(v), v, out=a)",
        ),
        "kernels/test_backends.py::test_cases[float32-monotone-foreach-cpu]",
    ),
    "a packed parameter is not written back": (
        Fault(
            "adamal_kernels/backends/eager/foreach_cpu.py",
            "_PARAM + index != _GRAD:",
            "_PARAM + index > _GRAD:",
        ),
        "kernels/test_backends.py::test_cases[float32-monotone-foreach-cpu]",
    ),
    "an unchanged step's gradient may lie in what it writes": (
        Fault("adamal_kernels/step/unchanged.py", " or self._touch(grads):", ":"),
        "optimizer/test_memory.py::test_a_gradient_that_lies_in_a_parameter_is_refused[foreach-cpu-2]",
    ),
    "an unchanged step has the moments of the last one": (
        Fault(
            "adamal_kernels/step/unchanged.py",
            "not _are_same(_items(self._states), self._held)",
            "False",
        ),
        "optimizer/test_plan.py::test_nothing_is_stale[foreach-cpu-moment replaced]",
    ),
    "an unchanged step has the parameters of the last one": (
        Fault(
            "adamal_kernels/step/unchanged.py",
            "list(map(Tensor.data_ptr, self._written)) != self._addresses",
            "False",
        ),
        "optimizer/test_plan.py::test_nothing_is_stale[foreach-cpu-parameter's data replaced]",
    ),
    "an unchanged step has the set of the last one": (
        Fault(
            "adamal_kernels/step/unchanged.py",
            "list(map(_selects_code, options)) != self._kinds",
            "len(options) != len(self._kinds)",
        ),
        "optimizer/test_plan.py::test_nothing_is_stale[foreach-cpu-projection]",
    ),
    "verify finds nothing": (
        Fault(
            "adamal_kernels/verify/parity.py",
            "return not any(outcome.mismatches",
            "return True or any(outcome.mismatches",
        ),
        "tools/test_cli.py::test_a_planted_mismatch_is_named[param]",
    ),
}

TRITON_FAULTS: dict[str, tuple[Fault, str]] = {
    "m is stored beyond the tail": (
        Fault(
            "adamal_kernels/backends/triton/element.py",
            " store(exp_avg, m, mask)",
            " store(exp_avg, m, None)",
        ),
        "kernels/test_triton_interpreter.py::test_sizes[17]",
    ),
    "v is stored beyond the tail": (
        Fault("adamal_kernels/backends/triton/element.py", "grown = grown & mask", "grown = grown"),
        "kernels/test_triton_interpreter.py::test_sizes[17]",
    ),
    "v is stored where it did not grow": (
        Fault(
            "adamal_kernels/backends/triton/element.py",
            " store(exp_avg_sq, v, grown)",
            " store(exp_avg_sq, v, mask)",
        ),
        "kernels/test_triton_compile.py::test_sm_90[float32-float32-monotone]",
    ),
    "the alignment is not told": (
        Fault(
            "adamal_kernels/backends/triton/element.py",
            "first = tl.multiple_of(first, _VECTOR_BYTES)",
            "first = first",
        ),
        "kernels/test_triton_compile.py::test_sm_90[float32-float32-monotone]",
    ),
    "the pointer table is stale": (
        Fault(
            "adamal_kernels/backends/triton/plan.py",
            "if self._bound != bound:",
            "if self._bound is None:",
        ),
        "kernels/test_triton_interpreter.py::test_tables_follow_the_tensors[Python]",
    ),
    "every gradient is taken for aligned": (
        Fault("adamal_kernels/backends/triton/plan.py", "(e.param, grad, *", "(e.param, *"),
        "kernels/test_triton_interpreter.py::test_work_is_complete_and_alignment_true",
    ),
    "a gradient that is gone is read": (
        Fault(
            "adamal_kernels/backends/triton/element.py",
            "tl.where(grad_address == 0, 0, tl.load(tensor + _NUMEL) - start)",
            "tl.load(tensor + _NUMEL) - start",
        ),
        "kernels/test_triton_interpreter.py::test_alignment_in_the_steady_state",
    ),
    "a stream reads the tables of another": (
        Fault(
            "adamal_kernels/backends/triton/launcher.py",
            "if tables is None or (stream != tables.stream and not capturing):",
            "if tables is None:",
        ),
        "kernels/test_triton_interpreter.py::test_each_stream_has_its_tables[C++]",
    ),
    "a capture's tables are taken for filled": (
        Fault(
            "adamal_kernels/backends/triton/launcher.py",
            "if not capturing:\n                self._tables = tables",
            "self._tables = tables",
        ),
        "kernels/test_triton_interpreter.py::test_captured_steps[1]",
    ),
    "a step that is skipped is taken": (
        Fault(
            "adamal_kernels/backends/triton/element.py",
            "remaining = tl.where(tl.load(scalars) == 0, 0, remaining)",
            "remaining = remaining",
        ),
        "kernels/test_triton_interpreter.py::test_scalars_derived_on_the_device[C++-skipped]",
    ),
    "a skipped step is counted as taken": (
        Fault(
            "adamal_kernels/backends/triton/scalars.py",
            "tl.where(taken, tl.load(source), 0)",
            "tl.load(source)",
        ),
        "kernels/test_triton_interpreter.py::test_scalars_derived_on_the_device[C++-skipped]",
    ),
    "squares are added in the compiler's order": (
        Fault(
            "adamal_kernels/backends/triton/norm.py",
            "tl.sum(_add_neighbours(values, COUNT, LEVELS - 1), axis=0)",
            "tl.sum(values, axis=0)",
        ),
        "kernels/test_triton_interpreter.py::test_norm_of_gradients[float32-float32]",
    ),
    "a prepared launch takes one table for another": (
        Fault(
            "adamal_kernels/backends/triton/launcher.py",
            "arguments = [tensor.data_ptr() for tensor in tensors]",
            "arguments = [tensors[0].data_ptr() for tensor in tensors]",
        ),
        "kernels/test_triton_launcher.py::test_is_the_launch_that_triton_makes[float32-True-0]",
    ),
}


def native_verdict(fault: Fault, checks: list[Check], *, sanitize: bool = False) -> str:
    """Return what ``checks`` say of the kernels with ``fault``; nothing if they let them pass."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        fault.plant(folder)
        harness = Harness(folder / "csrc", sanitize=sanitize, build_dir=folder)
        try:
            for check in checks:
                check(harness)
        except (AssertionError, HarnessError) as caught:
            return str(caught) or repr(caught)
    return ""


def python_verdict(fault: Fault | None, tests: list[str]) -> tuple[int | None, str]:
    """Return pytest's exit status and output on the package with ``fault``."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "adamal_kernels", folder / "adamal_kernels", ignore=ignored)
        if fault is not None:
            fault.plant(folder)
        return run_pytest(folder, [f"tests/{test}" for test in tests])


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

Verdict = Callable[[], Any]


def of_each(verdict: Callable[..., Any], faults: Mapping[str, tuple[Fault, Any]]) -> Any:
    """Parametrize a test by the verdict on each fault alone."""
    values = [
        pytest.param(partial(verdict, fault, [caught_by]), id=name)
        for name, (fault, caught_by) in faults.items()
    ]
    return pytest.mark.parametrize("verdict", values)


def of_all(verdict: Callable[..., Any], faults: Mapping[str, tuple[Fault, Any]]) -> Any:
    """Parametrize a test by the verdict on an unchanged copy, of all that catches the faults."""
    all_checks = list(dict.fromkeys(caught_by for _, caught_by in faults.values()))
    return pytest.mark.parametrize(
        "verdict", [pytest.param(partial(verdict, None, all_checks), id="all")]
    )


@pytest.fixture(scope="module")
def find(request: pytest.FixtureRequest) -> Iterator[Callable[[Verdict], Any]]:
    """Finds a verdict. Where no other worker runs, those that the selected tests ask for are found
    two at a time ahead of them.
    """
    if is_worker(request.config):
        yield lambda verdict: verdict()
        return
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    mine = [spec.params["verdict"] for spec in specs if spec and "verdict" in spec.params]
    with ThreadPoolExecutor(2) as pool:
        futures: dict[Verdict, Future[Any]] = {verdict: pool.submit(verdict) for verdict in mine}
        yield lambda verdict: futures[verdict].result()
        pool.shutdown(cancel_futures=True)


Find = Callable[[Verdict], Any]


@pytest.mark.parametrize(
    "check", dict.fromkeys(check for _, check in NATIVE_FAULTS.values()), ids=lambda c: c.__name__
)
def test_unchanged_kernels_pass(check: Check) -> None:
    check(Harness(ROOT / "csrc", sanitize=False))


@of_all(python_verdict, PYTHON_FAULTS)
def test_unchanged_package_passes(verdict: Verdict, find: Find) -> None:
    status, output = find(verdict)
    assert status == 0, output


@pytest.mark.parametrize(
    "verdict",
    [partial(native_verdict, BEYOND_THE_END, [cuda_sizes], sanitize=True)],
    ids=["beyond the end"],
)
def test_sanitizers_catch(verdict: Verdict, find: Find) -> None:
    assert "AddressSanitizer" in find(verdict)


@needs_triton
@of_all(python_verdict, TRITON_FAULTS)
def test_unchanged_triton_kernels_pass(verdict: Verdict, find: Find) -> None:
    test_unchanged_package_passes(verdict, find)


@of_each(native_verdict, NATIVE_FAULTS)
def test_native_fault_is_caught(verdict: Verdict, find: Find) -> None:
    assert find(verdict) != "", "the tests let it pass"


@of_each(python_verdict, PYTHON_FAULTS)
def test_python_fault_is_caught(verdict: Verdict, find: Find) -> None:
    """By a test that fails; an error before it ran would be none of its doing."""
    status, output = find(verdict)
    assert status == 1, output
    assert re.search(r"^FAILED ", output, re.MULTILINE), output
    assert not re.search(r"^ERROR ", output, re.MULTILINE), output


@needs_triton
@of_each(python_verdict, TRITON_FAULTS)
def test_triton_fault_is_caught(verdict: Verdict, find: Find) -> None:
    test_python_fault_is_caught(verdict, find)
