"""Tensors sharded over processes: the only file that names DTensor, FSDP1 and ZeRO.

The formula is elementwise, so a step of every process's own part is the step of the whole. Backends
get those parts, which are plain tensors; the optimizer's users keep their DTensors.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from ..core.layout import empty_dense_like, same_layout
from ..core.rows import multiplier_shape, multiplier_strides
from ..projections import CoupledSet

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

__all__ = [
    "FLAT_SHARD",
    "check_process_group",
    "check_sharded_gradient",
    "check_sharded_parameter",
    "check_sharded_state",
    "gradient_part",
    "has_own_placements",
    "is_flat_shard",
    "is_only_process",
    "is_sharded",
    "local_part",
    "mark_like",
    "mesh_and_placements",
    "moment_like",
    "multiplier_like",
    "placed_as",
    "redistributed_part",
    "reduce_found_inf",
    "reduce_squared_norms",
    "row_reducer",
    "sharded_class",
    "splits_rows",
    "zero_redundancy_optimizer",
]

# In which two tensors on one mesh have to agree for their parts to belong together.
_PLACEMENTS = ("placements", "shard_order")

# By which FSDP1 knows its flat parameters, and the original ones that are views of their shards.
_FLAT_MARK = "_fsdp_flattened"

FLAT_SHARD = "FSDP1 shard"
"""Stands for mesh and placements of a parameter that FSDP1 sharded; it names no process group."""


def _dtensor_class() -> type[DTensor] | None:
    # Whoever has made a DTensor has imported this, which takes a while.
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_sharded(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor: this process's part of one spread over a device mesh.

    Example:
        >>> is_sharded(torch.zeros(2))
        False
    """
    cls = type(tensor)
    # Asked some twenty times of every tensor in a step: what nearly all are is told first.
    return cls is not Tensor and cls is not Parameter and cls is _dtensor_class()


def is_flat_shard(tensor: Tensor) -> bool:
    """Whether ``tensor`` is FSDP1's: a flat parameter, or a view of this process's shard of one.

    Example:
        >>> is_flat_shard(torch.zeros(2))
        False
    """
    return bool(getattr(tensor, _FLAT_MARK, False))


def is_only_process() -> bool:
    """Whether the job is known to be of one process, which then has all of every tensor."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() == 1


def mark_like(copy: Tensor, param: Tensor) -> None:
    """Let a copy of a parameter count as FSDP1's where the parameter does."""
    if is_flat_shard(param):
        setattr(copy, _FLAT_MARK, True)


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a DTensor, sharing its memory; any other tensor as it is.

    Example:
        >>> x = torch.zeros(2)
        >>> local_part(x) is x
        True
    """
    return tensor._local_tensor if is_sharded(tensor) else tensor


def moment_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros of ``dtype``, spread over processes and laid out in memory as ``param``.

    Example:
        >>> moment_like(torch.empty(3, 2).t(), torch.float64).stride()
        (1, 2)
    """
    if is_sharded(param):
        return torch.zeros_like(param, dtype=dtype, requires_grad=False)
    return empty_dense_like(param, dtype).zero_()


def multiplier_like(param: Tensor, projection: CoupledSet) -> Tensor:
    """Return zeros, float64, one for each row of ``param``, where the rows are.

    Each process has those of its own rows; of rows that are spread over processes each has the
    same.

    Example:
        >>> from adamal_kernels import L2Ball
        >>> multiplier_like(torch.empty(3, 2), L2Ball(1.0, dim=1)).shape
        torch.Size([3, 1])
    """
    part = local_part(param)
    zeros = torch.empty_strided(
        multiplier_shape(part.shape, projection),
        multiplier_strides(part, projection),
        dtype=torch.float64,
        device=part.device,
    ).zero_()
    if not is_sharded(param):
        return zeros
    shape = torch.Size(multiplier_shape(param.shape, projection))
    replicate = sys.modules["torch.distributed.tensor"].Replicate()
    split = _splitting_dims(param, projection.reduced_dims(param.dim()))
    placements = [
        replicate if dim in split else placement for dim, placement in enumerate(param.placements)
    ]
    return type(param).from_local(
        zeros,
        param.device_mesh,
        placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def _splitting_dims(param: Tensor, dims: Sequence[int]) -> list[int]:
    """Return the dimensions of a DTensor's mesh over which it is sharded along one of ``dims``."""
    return [
        i
        for i, placement in enumerate(param.placements)
        if placement.is_shard() and placement.dim % param.dim() in dims
    ]


def splits_rows(param: Tensor, dims: Sequence[int]) -> bool:
    """Whether slices of ``param`` along ``dims`` are spread over processes.

    Example:
        >>> splits_rows(torch.empty(3, 2), (0, 1))
        False
    """
    return is_sharded(param) and bool(_splitting_dims(param, dims))


def row_reducer(param: Tensor, dims: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Return what adds sums over slices along ``dims`` over the processes that share them.

    It is a collective of those processes, returns the same bits on all of them, and leaves its
    argument as it is.
    """
    mesh, split = param.device_mesh, _splitting_dims(param, dims)

    def reduce(sums: Tensor) -> Tensor:
        total = sums.clone(memory_format=torch.contiguous_format)
        for dim in split:
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
        return total

    return reduce


def check_sharded_parameter(param: Tensor, where: str) -> None:
    """Refuse a DTensor whose parts are not its elements.

    Raises:
        ValueError: a placement is Partial: the parts are summands.
    """
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"{where} is a DTensor with placements {param.placements}: a sum that is still to be "
            "taken cannot be stepped; redistribute() it to Replicate() or Shard()"
        )


def check_sharded_gradient(param: Tensor, grad: Tensor, where: str) -> None:
    """Check that a gradient is spread as its parameter is, or can be redistributed so.

    To be called where either of them is a DTensor.

    Raises:
        RuntimeError: only one of them is a DTensor, their meshes differ, or the gradient's part
            has another shape than the parameter's though they are spread alike.
    """
    if not is_sharded(param):
        raise RuntimeError(
            f"the gradient of {where} is a DTensor, the parameter a plain tensor; set the gradient "
            "to its full_tensor(), or make the parameter a DTensor with distribute_tensor()"
        )
    if not is_sharded(grad):
        raise RuntimeError(
            f"the gradient of {where} is a plain tensor, the parameter a DTensor; make the "
            "gradient one with DTensor.from_local() or distribute_tensor()"
        )
    if grad.device_mesh != param.device_mesh:
        raise RuntimeError(
            f"the gradient of {where} is on {grad.device_mesh}, the parameter on "
            f"{param.device_mesh}; they must be on one mesh"
        )
    if not has_own_placements(param, grad):
        return
    found, expected = grad._local_tensor.shape, param._local_tensor.shape
    if found != expected:
        raise RuntimeError(
            f"the gradient of {where} has a local tensor of shape {tuple(found)}, the parameter "
            f"one of {tuple(expected)}, though both have placements {param.placements}; they must "
            "be the same"
        )


def check_sharded_state(param: Tensor, value: Tensor, where: str) -> None:
    """Check that a moment is spread as its parameter is.

    To be called where either of them is a DTensor.

    Args:
        param: the parameter.
        value: the moment.
        where: names the moment.

    Raises:
        ValueError: it is not.
    """
    remedy = "clear the parameter's state to start it anew, or load it with load_state_dict()"
    if is_sharded(param) != is_sharded(value):
        kinds = {True: "a DTensor", False: "a plain tensor"}
        raise ValueError(
            f"{where} is {kinds[is_sharded(value)]}, the parameter {kinds[is_sharded(param)]}; "
            f"{remedy}"
        )
    if value.device_mesh != param.device_mesh:
        raise ValueError(
            f"{where} is on {value.device_mesh}, the parameter on {param.device_mesh}; {remedy}"
        )
    if not has_own_placements(param, value):
        raise ValueError(
            f"{where} has placements {value.placements}, the parameter {param.placements}; {remedy}"
        )
    found, expected = value._local_tensor.shape, param._local_tensor.shape
    if found != expected:
        raise ValueError(
            f"{where} has a local tensor of shape {tuple(found)}, the parameter one of "
            f"{tuple(expected)}; {remedy}"
        )


def has_own_placements(param: Tensor, tensor: Tensor) -> bool:
    """Whether ``tensor``, on the parameter's mesh, is placed on it as the parameter is."""
    return all(
        getattr(tensor._spec, name, None) == getattr(param._spec, name, None)
        for name in _PLACEMENTS
    )


def gradient_part(grad: Tensor) -> Tensor:
    """Return this process's part of a gradient, after the collective that it may still wait for."""
    part = local_part(grad)
    # AsyncCollectiveTensor, which has the result of a collective, under way or done.
    wait = getattr(part, "wait", None) if part is not grad else None
    return part if wait is None else wait()


def redistributed_part(param: Tensor, grad: Tensor) -> Tensor:
    """Return this process's part of a gradient that is placed otherwise than its parameter.

    A collective: every process of the mesh has to call it for the same parameters in one order.
    ``grad`` itself is left as it is.

    Args:
        param: a DTensor.
        grad: a DTensor on the same mesh with any placements, Partial included.

    Returns:
        A plain tensor of the gradient's type, laid out in memory as the parameter's own part.
    """
    with torch.inference_mode(False), torch.no_grad():
        if not has_own_placements(param, grad):
            grad = grad.redistribute(param.device_mesh, param.placements)
        part = gradient_part(grad)
        pattern = param._local_tensor
        if same_layout(part, pattern) and type(part) is Tensor:
            return part
        return empty_dense_like(pattern, part.dtype).copy_(part)


@functools.cache
def _sharded_class_of(extension: Any, dtensor: type[DTensor]) -> Any | None:
    try:
        return extension.ShardedClass(
            type=dtensor,
            local=dtensor.__dict__.get("_local_tensor"),
            spec=dtensor.__dict__.get("_spec"),
            mesh=["mesh"],
            placements=list(_PLACEMENTS),
            redistribute=redistributed_part,
        )
    except ValueError:  # A torch that keeps them otherwise: every step is checked in Python.
        return None


def sharded_class(extension: Any, params: Iterable[Tensor]) -> tuple[Any | None, bool]:
    """Return what C++ needs to read ``params``, and whether it can read them all.

    Args:
        extension: ``adamal_kernels._C``.
        params: what is stepped.

    Returns:
        A ``ShardedClass``, or None where no parameter is a DTensor; and False where some are and
        C++ cannot read them in this version of torch.
    """
    dtensor = _dtensor_class()
    if dtensor is None or not any(map(is_sharded, params)):
        return None, True
    found = _sharded_class_of(extension, dtensor)
    return found, found is not None


def placed_as(param: Tensor, value: Tensor, where: str) -> Tensor:
    """Return a saved value of a parameter's shape, spread over processes as the parameter is.

    Args:
        param: a parameter.
        value: a tensor of its (global) shape. For a DTensor parameter it may be a plain tensor,
            the same on every process, of which each takes its part without communicating; or a
            DTensor on the parameter's mesh, which is redistributed if it is placed otherwise: a
            collective, then.
        where: names the value.

    Returns:
        A DTensor if the parameter is one, else ``value``; it may share memory with ``value``.

    Raises:
        ValueError: ``value`` is a DTensor and the parameter is none or on another mesh.
    """
    if not is_sharded(value):
        if not is_sharded(param):
            return value
        replicate = sys.modules["torch.distributed.tensor"].Replicate()
        value = type(param).from_local(
            value, param.device_mesh, [replicate] * param.device_mesh.ndim, run_check=False
        )
    elif not is_sharded(param):
        raise ValueError(
            f"{where} is a DTensor, the parameter a plain tensor; save a full state dict, with "
            "get_optimizer_state_dict(options=StateDictOptions(full_state_dict=True)), or load it "
            "with torch.distributed.checkpoint"
        )
    elif value.device_mesh != param.device_mesh:
        raise ValueError(
            f"{where} is on {value.device_mesh}, the parameter on {param.device_mesh}; load it "
            "with torch.distributed.checkpoint, which takes checkpoints to other meshes"
        )
    if has_own_placements(param, value):
        return value
    return value.redistribute(param.device_mesh, param.placements)


def mesh_and_placements(
    tensor: Tensor,
) -> tuple[DeviceMesh, tuple[Placement, ...]] | Literal["FSDP1 shard"] | None:
    """Return how a tensor is spread over processes, as :func:`reduce_squared_norms` takes it.

    Returns:
        A DTensor's mesh and placements; :data:`FLAT_SHARD` for what FSDP1 sharded; None for any
        other tensor.

    Example:
        >>> mesh_and_placements(torch.zeros(2)) is None
        True
    """
    if is_sharded(tensor):
        return tensor.device_mesh, tensor.placements
    return FLAT_SHARD if is_flat_shard(tensor) else None


def reduce_squared_norms(sums: Mapping[Any, Tensor], group: ProcessGroup | None = None) -> Tensor:
    """Return the sum of squares of whole tensors from those of each process's own parts.

    Each sum is all-reduced over the mesh dimensions on which its tensors are sharded, and not over
    those on which they are replicated, where every process has the same one. The sum of tensors
    that no mesh tells of is all-reduced over ``group``. Sums that are reduced over the same
    dimensions of the same mesh share a collective. There is no synchronisation with the host but
    that of the collectives: with NCCL none.

    A collective: all processes of a mesh have to pass the same keys in one order, zero being the
    sum of parts without elements; all of ``group`` have to take part, with or without a sum.
    Meshes that this process is not of are left to those that are.

    Args:
        sums: by :func:`mesh_and_placements` of the tensors, the sum of the squares of the elements
            of this process's parts: float64 tensors without dimensions, all on one device, which
            are left as they are. Where there are shards of FSDP1, the sum of other tensors that
            are no DTensors, under the key None, is taken to be whole.
        group: the processes over which FSDP1 shards, or else over which tensors that are no
            DTensors are partitioned. None: every process has them whole.

    Returns:
        A new float64 tensor without dimensions on the same device, with the same bits on all
        processes of the meshes and the group; a zero on the CPU if there are no sums.

    Raises:
        ValueError: a placement is Partial (the square of a sum is not the sum of the squares of
            its summands: redistribute first), or a sum is no float64 tensor without dimensions, or
            is on another device than the first. Nothing has been communicated then.

    Example:
        >>> reduce_squared_norms({None: torch.tensor(25.0, dtype=torch.float64)})
        tensor(25., dtype=torch.float64)
    """
    device = next(iter(sums.values())).device if sums else torch.device("cpu")
    whole = torch.zeros((), dtype=torch.float64, device=device)
    totals: dict[Any, Tensor] = {} if group is None else {group: whole}
    partitioned = FLAT_SHARD if FLAT_SHARD in sums else None
    for key, value in sums.items():
        if value.dtype != torch.float64 or value.dim() != 0 or value.device != device:
            raise ValueError(
                f"sums[{key}] must be a float64 tensor without dimensions on {device}, got "
                f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
            )
        if isinstance(key, tuple):
            reduced_over: Any = key[0], _sharded_dims(*key)
        else:
            reduced_over = group if key == partitioned else None
        totals[reduced_over] = totals[reduced_over] + value if reduced_over in totals else value
    for reduced_over, total in totals.items():
        if isinstance(reduced_over, tuple):
            mesh, dims = reduced_over
            if mesh.get_coordinate() is None:
                continue
            total = _all_reduced(total, [mesh.get_group(dim) for dim in dims])
        elif reduced_over is not None:
            total = _all_reduced(total, [reduced_over])
        whole = whole + total
    return whole


def _all_reduced(value: Tensor, groups: Iterable[ProcessGroup], op: Any = None) -> Tensor:
    """Return a number reduced over one group after the other: the sum, if ``op`` is not given."""
    dist = torch.distributed
    found = value.clone()
    for group in groups:
        # NCCL takes no number of the host, where a process without gradients has its zero.
        if found.is_cpu and dist.get_backend(group) == "nccl":
            found = found.cuda()
        dist.all_reduce(found, op=dist.ReduceOp.SUM if op is None else op, group=group)
    return found.to(value.device)


def reduce_found_inf(found_inf: Tensor, params: Iterable[Tensor]) -> Tensor:
    """Return a GradScaler's ``found_inf``, the same on all processes that share a DTensor.

    A collective of the parameters' meshes; without a DTensor among them, none.

    Args:
        found_inf: of one element: not 0 where a gradient of this process was not finite.
        params: all parameters of the optimizer, with a gradient or without.

    Returns:
        Float32, 1 where it is not 0 on any process and 0 elsewhere; ``found_inf`` itself if no
        parameter is a DTensor.

    Example:
        >>> reduce_found_inf(torch.tensor(1.0), [torch.zeros(2)])
        tensor(1.)
    """
    meshes = dict.fromkeys(param.device_mesh for param in params if is_sharded(param))
    if not meshes:
        return found_inf
    # As 0 and 1: of NaN, which counts too, there is no maximum.
    found = (found_inf.detach() != 0).float()
    for mesh in meshes:
        if mesh.get_coordinate() is not None:
            groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
            found = _all_reduced(found, groups, torch.distributed.ReduceOp.MAX)
    return found


def check_process_group(group: Any, name: str) -> None:
    """Check that ``group`` is a process group, and this process one of it.

    Raises:
        TypeError: it is not: another object, or what ``new_group`` returns to the others.
    """
    dist = torch.distributed
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a process group that this process is of, such as "
            f"torch.distributed.group.WORLD or mesh.get_group(), or None; got {group!r}"
        )


def zero_redundancy_optimizer() -> ZeroRedundancyOptimizer | None:
    """Return the ``ZeroRedundancyOptimizer`` that is making an optimizer of its own part now.

    It tells that optimizer nothing, so the callers are asked.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return None
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is vars(module):
            found = frame.f_locals.get("self")
            if isinstance(found, module.ZeroRedundancyOptimizer):
                return found
        frame = frame.f_back
    return None


def _sharded_dims(mesh: DeviceMesh, placements: tuple[Placement, ...]) -> tuple[int, ...]:
    """Return the dimensions of ``mesh`` over which parts differ."""
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"placements {placements} on {mesh} are Partial: the sum of squares of summands is not "
            "that of their sum; redistribute() to Replicate() or Shard() first"
        )
    return tuple(dim for dim, placement in enumerate(placements) if not placement.is_replicate())
