"""Bad input: an error that names the argument, the value and the remedy, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from helpers.support import Place, refused
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from adamal_kernels import Adam, AdamAL, AdamALW, Box, NonNegative
from adamal_kernels.backends import BACKENDS, FUSED, check_request, pick
from adamal_kernels.core.bucket import BucketKey
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import FORMATS, Format
from adamal_kernels.verify import same_bits

BIG = 10**400  # a number, and beyond every float

NUMBERS = {
    "lr": "lr >= 0",
    "eps": "eps >= 0",
    "weight_decay": "weight_decay >= 0",
}

# Options, the error, and words of its message.
OPTIONS: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    *[
        ({name: value}, ValueError, [f"{name}={value!r}", "finite", allowed])
        for name, allowed in NUMBERS.items()
        for value in (-1e-9, -1, math.nan, math.inf, -math.inf, np.float64(-1))
    ],
    *[({name: BIG}, ValueError, [name, "finite", allowed]) for name, allowed in NUMBERS.items()],
    *[
        ({name: value}, TypeError, [name, "must be a number", repr(value)])
        for name in NUMBERS
        for value in ("0.1", b"0.1", None, True, [0.1], 1j)
    ],
    *[
        ({name: torch.tensor(0.1)}, TypeError, [f"{name} must be a number", f"{name}.item()"])
        for name in ("eps", "weight_decay")
    ],
    *[
        ({"lr": torch.tensor(value)}, ValueError, [f"lr={value!r}", "finite", "lr >= 0"])
        for value in (-1.0, math.nan, math.inf)
    ],
    ({"lr": torch.tensor([0.1, 0.1])}, ValueError, ["Tensor lr", "1-element", "(2,)"]),
    ({"lr": torch.tensor(1)}, TypeError, ["Tensor lr", "float32 or float64", "int64"]),
    (
        {"lr": torch.tensor(0.1), "foreach": True},
        ValueError,
        ["lr as a Tensor", "capturable=False and foreach=True", "pass a number"],
    ),
    *[
        ({"betas": (value, 0.9)}, ValueError, [f"betas[0]={value!r}", "0 <= beta < 1"])
        for value in (-0.1, 1.0, 1, 2.0, math.nan, math.inf)
    ],
    ({"betas": (0.9, 1.0)}, ValueError, ["betas[1]=1.0", "0 <= beta < 1"]),
    ({"betas": (0.9, "0.9")}, TypeError, ["betas[1]", "'0.9'", "number"]),
    ({"betas": 0.9}, TypeError, ["betas", "0.9", "pair of numbers"]),
    ({"betas": (0.9,)}, TypeError, ["betas", "(0.9,)", "pair of numbers"]),
    ({"betas": (0.9, 0.9, 0.9)}, TypeError, ["betas", "pair of numbers"]),
    ({"betas": "ab"}, TypeError, ["betas", "'ab'", "pair of numbers"]),
    (
        {"betas": (torch.tensor(0.9), torch.tensor(1.0))},
        ValueError,
        ["betas[1]=1.0", "0 <= beta < 1"],
    ),
    *[
        ({name: value}, TypeError, [name, "True or False", repr(value)])
        for name in (
            "amsgrad",
            "maximize",
            "capturable",
            "differentiable",
            "decoupled_weight_decay",
            "bias_correction",
        )
        for value in (1, None, "yes")
    ],
    (
        {"amsgrad": True},
        ValueError,
        ["amsgrad=True", "AdamAL", "never decreases", "adamal_kernels.Adam"],
    ),
    ({"projection": (-1, 1)}, TypeError, ["projection", "(-1, 1)", "Box(-1, 1)"]),
    ({"projection": Box}, TypeError, ["projection", "Box(-1, 1)"]),
    ({"backend": "gpu"}, ValueError, ["backend", "'gpu'", "auto, cuda, triton, cpu"]),
    ({"backend": None}, ValueError, ["backend", "None", "auto"]),
    ({"backend": ["cpu"]}, ValueError, ["backend", "['cpu']", "auto"]),
    ({"fused": 1}, TypeError, ["fused", "1", "True, False or None"]),
    ({"foreach": "yes"}, TypeError, ["foreach", "'yes'", "True, False or None"]),
]

CONTRADICTIONS: list[tuple[dict[str, Any], list[str]]] = [
    *[
        ({"fused": True, "backend": name}, [f"fused=True and backend={name!r}"])
        for name in ("foreach", "reference")
    ],
    *[
        ({"fused": False, "backend": name}, [f"fused=False and backend={name!r}"])
        for name in ("cuda", "triton", "cpu")
    ],
    *[
        ({"foreach": True, "backend": name}, [f"foreach=True and backend={name!r}"])
        for name in ("cuda", "triton", "cpu", "reference")
    ],
    ({"foreach": False, "backend": "foreach"}, ["foreach=False and backend='foreach'"]),
    ({"differentiable": True, "foreach": True}, ["only backend='reference'", "foreach=True"]),
    ({"differentiable": True, "backend": "cpu"}, ["only backend='reference'", "backend='cpu'"]),
]

# Those of torch are of its type.
TORCHS_CONTRADICTIONS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"fused": True, "foreach": True},
        ["`fused` and `foreach` cannot be `True` together", "set only backend"],
    ),
    (
        {"fused": True, "differentiable": True},
        ["`fused` does not support `differentiable`", "backend='reference'", "fused=None"],
    ),
]

ALL_OPTIONS = [
    *OPTIONS,
    *[
        (options, ValueError, [*words, "contradict", "set only backend"])
        for options, words in CONTRADICTIONS
    ],
    *[(options, RuntimeError, words) for options, words in TORCHS_CONTRADICTIONS],
]


def short(value: Any) -> str | None:
    if not isinstance(value, dict):
        return ""
    return ",".join(f"{k}={v!r:.30}" for k, v in value.items()).replace("\n", "")


def started(place: Place | None = None) -> tuple[AdamAL, list[Tensor]]:
    """Return an optimizer with state, and parameters that all have gradients."""
    device, backend = place or (torch.device("cpu"), "reference")
    params = [nn.Parameter(torch.linspace(-1, 1, 6, device=device).view(2, 3)) for _ in range(3)]
    # The last is the one to spoil: those before it must not be stepped either.
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = AdamAL(groups, lr=0.1, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.step()
    return optimizer, params


@pytest.mark.parametrize(("options", "error", "words"), ALL_OPTIONS, ids=short)
class TestOptions:
    """The same checks wherever an option comes in."""

    def test_constructor(
        self, options: dict[str, Any], error: type[Exception], words: list[str]
    ) -> None:
        param = nn.Parameter(torch.ones(2))
        with pytest.raises(error) as caught:
            AdamAL([param], **options)
        assert [word for word in words if word not in str(caught.value)] == []

    def test_default_that_every_group_overrides(
        self, options: dict[str, Any], error: type[Exception], words: list[str]
    ) -> None:
        param = nn.Parameter(torch.ones(2))
        sound = AdamAL([param]).defaults
        with pytest.raises(error):
            AdamAL([{"params": [param], **sound}], **options)

    def test_group(self, options: dict[str, Any], error: type[Exception], words: list[str]) -> None:
        optimizer, _ = started()
        group = {"params": [nn.Parameter(torch.ones(2))], "backend": "auto", **options}
        with refused(optimizer, error, *words):
            optimizer.add_param_group(group)

    def test_edit(self, options: dict[str, Any], error: type[Exception], words: list[str]) -> None:
        optimizer, _ = started()
        optimizer.param_groups[1].update({"backend": "auto", **options})
        with refused(optimizer, error, *words):
            optimizer.step()


@pytest.mark.parametrize("edit", [{"lr": math.nan}, {"lr": -1.0}, {"betas": (0.9, 1.0)}], ids=str)
def test_edits_are_checked_in_every_step(place: Place, edit: dict[str, Any]) -> None:
    optimizer, _ = started(place)
    optimizer.param_groups[1].update(edit)
    with refused(optimizer, ValueError, next(iter(edit))):
        optimizer.step()


def test_amsgrad_of_the_subclass_names_it() -> None:
    with pytest.raises(ValueError, match="amsgrad=True: AdamALW"):
        AdamALW([nn.Parameter(torch.ones(1))], amsgrad=True)


PARAMS: list[tuple[str, Callable[[], Tensor], dict[str, Any], type[Exception], list[str]]] = [
    *[
        (
            str(dtype),
            lambda dtype=dtype: torch.ones(2).to(dtype),
            {},
            TypeError,
            ["params[1] of group 2", str(dtype), "torch.bfloat16", "convert"],
        )
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    ],
    (
        "empty box",
        lambda: torch.ones(2, dtype=torch.float16),
        {"projection": Box(1.0001, 1.0002)},
        ValueError,
        ["projection", "Box(lo=1.0001, hi=1.0002)", "torch.float16", "widen"],
    ),
    (
        "box beyond the type",
        lambda: torch.ones(2, dtype=torch.float16),
        {"projection": Box(1e6, math.inf)},
        ValueError,
        ["projection", "Box(lo=1000000.0, hi=inf)", "torch.float16", "widen"],
    ),
    (
        "backend that does not serve the device",
        lambda: torch.ones(2),
        {"backend": "cuda"},
        RuntimeError,
        ["backend='cuda'", "cpu"],
    ),
    (
        "fused on a device that has none",
        lambda: torch.ones(2, device="meta"),
        {"fused": True},
        RuntimeError,
        ["fused=True", "meta"],
    ),
]


@pytest.mark.parametrize(
    ("make", "options", "error", "words"), [p[1:] for p in PARAMS], ids=[p[0] for p in PARAMS]
)
def test_parameters_that_cannot_be_stepped(
    make: Callable[[], Tensor], options: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    optimizer, _ = started()
    group = {"params": [nn.Parameter(torch.ones(2)), nn.Parameter(make())], "backend": "auto"}
    with refused(optimizer, error, *words):
        optimizer.add_param_group({**group, **options})
    optimizer.step()
    with pytest.raises(error):
        AdamAL([nn.Parameter(make())], **options)


FROZEN: dict[str, Callable[[], Tensor]] = {
    "int8": lambda: torch.ones(3, dtype=torch.int8),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "a number of steps": lambda: torch.tensor(0),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "meta": lambda: torch.ones(3, device="meta"),
    "a wrapper subclass": lambda: Wrapper(torch.ones(3)),
    "overlapping": lambda: torch.ones(1).expand(3),
    "made in inference mode": lambda: made_in_inference_mode(),
    "complex, in a box": lambda: torch.ones(3, dtype=torch.complex64),
    "float16, in an empty box": lambda: torch.ones(3, dtype=torch.float16),
    "whose memory is freed": lambda: freed(),
}


def made_in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def freed(numel: int = 3) -> Tensor:
    made = torch.ones(numel)
    made.untyped_storage().resize_(0)
    return made


@pytest.mark.parametrize("kind", FROZEN)
def test_what_is_frozen_is_nobodys_business(place: Place, kind: str) -> None:
    """Neither when it is added, nor in steps, whoever takes them, nor in checkpoints."""
    frozen = nn.Parameter(FROZEN[kind](), requires_grad=False)
    if kind == "overlapping":
        frozen = FROZEN[kind]()
    found = []
    for extra in ([], [frozen]):
        param = nn.Parameter(torch.ones(3, device=place.device))
        box = Box(1.0001, 1.0002) if kind == "float16, in an empty box" else Box(-1, 1)
        optimizer = AdamAL([*extra, param], projection=box, backend=place.backend)
        optimizer.load_state_dict(optimizer.state_dict())
        with optimizer.watch() as watch:
            for _ in range(3):
                param.grad = torch.ones_like(param)
                optimizer.step()
            assert watch.read()[param].step == 3
        with optimizer.step_in_backward():
            param.sum().backward()
        optimizer.load_state_dict(optimizer.state_dict())
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
        param.grad = torch.ones_like(param)
        step()
        found.append(param.detach())
        assert optimizer.state[param]["step"].item() == 5
        assert frozen not in optimizer.state
    assert same_bits(*found)


@pytest.mark.parametrize("kind", ["float8", "a wrapper subclass"])
def test_what_was_frozen_is_checked_when_it_has_a_gradient(place: Place, kind: str) -> None:
    frozen = nn.Parameter(FROZEN[kind](), requires_grad=False)
    param = nn.Parameter(torch.ones(3, device=place.device))
    optimizer = AdamAL([param, frozen], backend=place.backend)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    frozen.requires_grad_()
    optimizer.step()
    frozen.grad = FROZEN[kind]()
    with refused(optimizer, (TypeError, NotImplementedError), "params[1] of group 0"):
        optimizer.step()


def test_what_is_frozen_after_it_was_trained(place: Place) -> None:
    """Its state stays, whatever becomes of it, and the others' steps are repeated by C++."""
    trained, other = (nn.Parameter(torch.ones(3, device=place.device)) for _ in range(2))
    optimizer = AdamAL([trained, other], backend=place.backend)
    for param in (trained, other):
        param.grad = torch.ones_like(param)
    optimizer.step()
    trained.grad = None
    trained.requires_grad_(False)
    for data in (trained.data.to(torch.int8), other.data, trained.data[:1]):
        trained.data = data
        for _ in range(2):
            optimizer.step()
    assert optimizer.state[trained]["step"].item() == 1
    assert optimizer.state[other]["step"].item() == 7
    if place.backend in FUSED:
        assert optimizer._stepper._steady_state is not None


@pytest.mark.parametrize("name", BACKENDS)
def test_a_named_backend_that_cannot_run_says_why(name: str) -> None:
    device = torch.device("meta")
    reason = BACKENDS[name].unavailable(device)
    if reason is None:
        return
    with pytest.raises(RuntimeError) as caught:
        AdamAL([nn.Parameter(torch.ones(2, device=device))], backend=name)
    assert f"backend={name!r} cannot run here" in str(caught.value)
    assert reason in str(caught.value)


def test_pick_names_the_pair_that_a_backend_leaves_out() -> None:
    dtypes = Format(torch.float64, torch.float16)
    key = BucketKey(torch.device("cpu"), dtypes, SecondMoment.PLAIN)
    with pytest.raises(RuntimeError, match=r"backend='reference'.*float64.*float16"):
        pick(key, backend="reference")


@pytest.mark.parametrize("case", CONTRADICTIONS, ids=lambda case: short(case[0]))
def test_contradictions_of_a_request(case: tuple[dict[str, Any], list[str]]) -> None:
    request = {"backend": "auto", "fused": None, "foreach": None, **case[0]}
    with pytest.raises(ValueError, match=case[1][0]):
        check_request(request.pop("backend"), **request)


class Wrapper(Tensor):
    """A tensor subclass that wraps another, as DTensor does."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> Wrapper:
        return Wrapper(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = [a.inner if isinstance(a, Wrapper) else a for a in args]
        out = func(*unwrapped, **(kwargs or {}))
        out = Wrapper(out) if isinstance(out, Tensor) else out
        return return_and_correct_aliasing(func, args, kwargs or {}, out)


GRADS: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], list[str]]] = {
    "sparse": (
        lambda p: torch.ones(p.shape, device=p.device).to_sparse(),
        RuntimeError,
        ["sparse", "torch.sparse_coo", "to_dense()", "SparseAdam"],
    ),
    "wrapper subclass": (
        lambda p: Wrapper(torch.ones(p.shape, device=p.device)),
        NotImplementedError,
        ["Wrapper", "not supported yet"],
    ),
}


@pytest.mark.parametrize("kind", GRADS)
def test_gradients_of_another_kind(place: Place, kind: str) -> None:
    make, error, words = GRADS[kind]
    optimizer, params = started(place)
    params[2].grad = None
    params[2].grad = make(params[2])
    with refused(optimizer, error, "the gradient of params[1] of group 1", *words):
        optimizer.step()


def _with_data(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def edit(param: Tensor) -> None:
        param.requires_grad_(False).data = change(param.data)

    return edit


# torch checks a gradient when it is set, and lets the parameter change under it.
CHANGES: dict[str, tuple[Callable[[Tensor], None], type[Exception], list[str]]] = {
    "shape": (
        _with_data(lambda data: data[:1].clone()),
        RuntimeError,
        ["shape (2, 3)", "(1, 3)", "must be the same"],
    ),
    "shape that broadcasts": (
        _with_data(lambda data: data.expand(4, 2, 3).clone()),
        RuntimeError,
        ["shape (2, 3)", "(4, 2, 3)", "must be the same"],
    ),
    "float64 parameter": (
        _with_data(lambda data: data.double()),
        TypeError,
        ["torch.float32", "torch.float64", "it may be torch.float64"],
    ),
    "integer parameter": (
        _with_data(lambda data: data.int()),
        TypeError,
        ["torch.int32", "not supported"],
    ),
    "complex parameter": (
        _with_data(lambda data: data.to(torch.complex64)),
        TypeError,
        ["torch.float32 for a parameter of torch.complex64", "it may be"],
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_gradients_that_do_not_fit(place: Place, kind: str) -> None:
    change, error, words = CHANGES[kind]
    optimizer, params = started(place)
    change(params[2])
    with refused(optimizer, error, "the gradient of params[1] of group 1", *words):
        optimizer.step()


@pytest.mark.parametrize("betas", [(torch.tensor(0.9), 0.9), (0.9, torch.tensor(0.9))], ids=str)
def test_betas_of_both_kinds_are_refused_where_torch_does(betas: Any) -> None:
    """By the constructor only: torch's OneCycleLR replaces one of two."""
    with pytest.raises(ValueError, match=r"both floats or both Tensors.*convert one"):
        AdamAL([nn.Parameter(torch.ones(2))], betas=betas)


@pytest.mark.parametrize("value", [object(), "WORLD", 0], ids=lambda value: type(value).__name__)
def test_what_is_no_process_group(value: Any) -> None:
    with pytest.raises(TypeError, match=r"grad_norm_group must be a process group.*WORLD"):
        AdamAL([nn.Parameter(torch.ones(2))], grad_norm_group=value)
    optimizer, _ = started()
    with refused(optimizer, TypeError, "grad_norm_group", repr(value)):
        optimizer.grad_norm_group = value
    assert optimizer.grad_norm_group is None


def test_max_grad_norm_of_a_group() -> None:
    optimizer, _ = started()
    with refused(optimizer, ValueError, "max_grad_norm=1.0", "all groups", "constructor"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "max_grad_norm": 1.0})
    with pytest.raises(ValueError, match=r"max_grad_norm=2\.0 in a param group"):
        AdamAL([{"params": [nn.Parameter(torch.ones(2))], "max_grad_norm": 2.0}])
    optimizer.param_groups[1]["max_grad_norm"] = 1.0
    with refused(optimizer, ValueError, "max_grad_norm=1.0", "param group"):
        optimizer.step()


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("value", [65536.0, torch.ones(2)], ids=str)
def test_what_a_scaler_sets(name: str, value: Any) -> None:
    optimizer, _ = started()
    setattr(optimizer, name, value)
    with refused(optimizer, TypeError, f"optimizer.{name}", "one element", "GradScaler"):
        optimizer.step()


def test_complex_parameter_with_a_set() -> None:
    param = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    words = r"params\[0\] of group 0 .*complex64.*Box.*projection=None"
    with pytest.raises(TypeError, match=words):
        AdamAL([param], projection=Box(-1, 1))
    optimizer, params = started()
    optimizer.param_groups[1]["projection"] = Box(-1, 1)
    params[2].data = params[2].data.to(torch.complex64)
    params[2].grad = torch.ones_like(params[2])
    with refused(optimizer, TypeError, "params[1] of group 1", "complex64", "projection=None"):
        optimizer.step()


def test_gradient_of_real_type_for_complex_parameter_names_the_complex_type() -> None:
    optimizer, params = started()
    params[2].data = params[2].data.to(torch.complex64)
    with refused(optimizer, TypeError, "it may be torch.complex64"):
        optimizer.step()


class Elsewhere(nn.Parameter):
    """A parameter whose gradient is on another device, which torch itself does not set."""

    @property
    def grad(self) -> Tensor:
        return torch.ones(self.shape, device="meta")


def test_gradients_on_another_device() -> None:
    optimizer, _ = started()
    optimizer.add_param_group({"params": [Elsewhere(torch.ones(2))]})
    words = ("the gradient of params[0] of group 2", "is on meta", "parameter on cpu", "move")
    with refused(optimizer, RuntimeError, *words):
        optimizer.step()


STATES: dict[str, tuple[str, Callable[[Tensor], Any], list[str]]] = {
    "another shape": ("exp_avg", lambda m: m[:1], ["(2, 3)", "(1, 3)"]),
    "broadcasting shape": ("exp_avg_sq", lambda v: v.new_zeros(()), ["(2, 3)", "()"]),
    "a number": ("exp_avg", lambda m: 0.0, ["(2, 3)", "0.0"]),
    "None": ("exp_avg", lambda m: None, ["exp_avg", "None"]),
    "integers": ("exp_avg", lambda m: m.int(), ["torch.int32", "torch.float32"]),
    "complex": ("exp_avg", lambda m: m.to(torch.complex64), ["torch.complex64", "torch.float32"]),
    "sparse": ("exp_avg", lambda m: m.to_sparse(), ["exp_avg", "sparse"]),
    "overlapping": ("exp_avg_sq", lambda v: v.new_ones(1).expand(v.shape), ["exp_avg_sq"]),
    "a step of several elements": ("step", lambda step: torch.zeros(2), ["one element"]),
    "a step that is a number": ("step", lambda step: 3, ["one element", "3"]),
    "a NaN step": ("step", lambda step: torch.tensor(math.nan), ["step", "nan"]),
    "an infinite step": ("step", lambda step: torch.tensor(math.inf), ["step", "inf"]),
    "a negative step": ("step", lambda step: torch.tensor(-1.0), ["step", "-1"]),
    "a complex step": ("step", lambda step: torch.tensor(1j), ["step", "one element"]),
    "a sparse step": ("step", lambda step: torch.ones(1).to_sparse(), ["step", "one element"]),
    "a shared step of integers": (
        "step",
        lambda step: torch.ones((), dtype=torch.int64).share_memory_(),
        ["state['step']", "shared memory", "torch.int64", "must be torch.float32"],
    ),
    "a shared moment of another type": (
        "exp_avg",
        lambda m: torch.ones(2, 3, dtype=torch.float64).share_memory_(),
        ["state['exp_avg']", "shared memory", "torch.float64", "must be torch.float32"],
    ),
}


@pytest.mark.parametrize("kind", STATES)
def test_replaced_state(place: Place, kind: str) -> None:
    name, change, words = STATES[kind]
    optimizer, params = started(place)
    state = optimizer.state[params[2]]
    state[name] = change(state[name])
    with refused(optimizer, ValueError, name, "params[1] of group 1", *words):
        optimizer.step()


def test_a_step_whose_memory_is_freed(place: Place) -> None:
    optimizer, params = started(place)
    before = params[2].detach().clone()
    optimizer.state[params[2]]["step"] = freed(1)
    with pytest.raises(ValueError, match=r"state\['step'\] of params\[1\] of group 1 has been"):
        optimizer.step()
    assert same_bits(params[2], before)


def inference_step() -> Tensor:
    with torch.inference_mode():
        return torch.tensor(7.0)


ODD_STEPS: dict[str, Callable[[], Tensor]] = {
    "of shape (1,)": lambda: torch.full((1,), 7.0),
    "of integers": lambda: torch.tensor(7),
    "made in inference mode": inference_step,
    "that requires a gradient": lambda: torch.tensor(7.0, requires_grad=True),
    "that is a Parameter": lambda: nn.Parameter(torch.tensor(7.0)),
    "expanded": lambda: torch.tensor(7.0).expand(1, 1),
}


@pytest.mark.parametrize("backend_options", [{}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("kind", ODD_STEPS)
def test_odd_steps_are_counted(place: Place, kind: str, backend_options: dict[str, Any]) -> None:
    """Whether or not their parameter has a gradient in the first step."""
    for has_gradient in (True, False):
        params = [nn.Parameter(torch.ones(3, device=place.device)) for _ in range(2)]
        optimizer = AdamAL(params, backend=place.backend, **backend_options)
        for param in params:
            zeros = torch.zeros(3, device=place.device)
            optimizer.state[param] = {
                "step": ODD_STEPS[kind](),
                "exp_avg": zeros,
                "exp_avg_sq": zeros.clone(),
            }
        for step in range(3):
            params[0].grad = torch.ones_like(params[0])
            params[1].grad = torch.ones_like(params[1]) if step or has_gradient else None
            optimizer.step()
        counts = [optimizer.state[param]["step"].item() for param in params]
        assert counts == [10, 10 if has_gradient else 9]


def _on_meta(*names: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({name: state[name].to("meta") for name in names})


ON_META = {
    "the first moment": (["exp_avg"], ["state['exp_avg']", "on meta and holds no values"]),
    "the second moment": (["exp_avg_sq"], ["'exp_avg_sq'", "on meta, state['exp_avg'] on", "move"]),
    "both moments": (
        ["exp_avg", "exp_avg_sq"],
        ["state['exp_avg']", "on meta and holds no values"],
    ),
    "the step": (["step"], ["'step'", "one element", "meta"]),
}


@pytest.mark.parametrize("kind", ON_META)
def test_state_on_other_devices(place: Place, kind: str) -> None:
    """Some of a parameter's state on another device, and state on a device without values."""
    names, words = ON_META[kind]
    optimizer, params = started(place)
    _on_meta(*names)(optimizer.state[params[2]])
    with refused(optimizer, ValueError, "params[1] of group 1", *words):
        optimizer.step()


def test_maximum_on_another_device(place: Place) -> None:
    param = nn.Parameter(torch.ones(2, device=place.device))
    place.skip_unless_supported(FORMATS[0], SecondMoment.AMSGRAD)
    optimizer = Adam([param], amsgrad=True, backend=place.backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    _on_meta("max_exp_avg_sq")(optimizer.state[param])
    with refused(optimizer, ValueError, "'max_exp_avg_sq'", "is on meta", "move both"):
        optimizer.step()


def test_parameters_on_meta() -> None:
    """They may be given memory later (swap_tensors), but cannot be stepped."""
    real, meta = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    optimizer = AdamAL([real, meta], lr=0.1)
    real.grad = torch.ones(2)
    optimizer.step()
    meta.grad = torch.ones(2, device="meta")
    with refused(optimizer, RuntimeError, "params[1] of group 0", "on meta", "to_empty"):
        optimizer.step()
    torch.utils.swap_tensors(meta, nn.Parameter(torch.ones(2)))
    meta.grad = torch.ones(2)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (real, meta)] == [2, 1]


@pytest.mark.parametrize("edit", [math.nan, math.inf, -1.0])
def test_step_edited_in_place(place: Place, edit: float) -> None:
    optimizer, params = started(place)
    optimizer.state[params[2]]["step"].fill_(edit)
    with refused(optimizer, ValueError, "state['step'] of params[1] of group 1"):
        optimizer.step()


@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq"])
def test_missing_state(place: Place, name: str) -> None:
    optimizer, params = started(place)
    del optimizer.state[params[2]][name]
    with refused(optimizer, ValueError, "params[1] of group 1", repr(name)):
        optimizer.step()


def test_amsgrad_state_of_no_value() -> None:
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = Adam([param], amsgrad=True, backend="reference")
    optimizer.step()
    optimizer.state[param]["max_exp_avg_sq"] = None
    with refused(optimizer, ValueError, "state['max_exp_avg_sq'] of params[0] of group 0"):
        optimizer.step()


@pytest.mark.parametrize(
    "names",
    [
        ("exp_avg", "exp_avg"),
        ("exp_avg", "exp_avg_sq"),
        ("exp_avg_sq", "exp_avg"),
        ("step", "step"),
    ],
    ids=str,
)
def test_state_shared_between_parameters(place: Place, names: tuple[str, str]) -> None:
    """Stepped as it is, each would move the other's too."""
    optimizer, params = started(place)
    first, second = (optimizer.state[param] for param in params[1:])
    second[names[1]] = first[names[0]]
    with refused(optimizer, ValueError, "share memory", "group 1"):
        optimizer.step()


def test_parameter_for_a_moment(place: Place) -> None:
    optimizer, params = started(place)
    optimizer.state[params[2]]["exp_avg"] = params[2].data
    with refused(optimizer, ValueError, "share memory"):
        optimizer.step()


def test_numbers_that_are_taken() -> None:
    """What converts to a float is a number, whatever its class."""
    numbers: list[Any] = [0, 1, np.float32(0.5), np.int64(1), Decimal("0.5")]
    for number in numbers:
        optimizer = AdamAL([nn.Parameter(torch.ones(1))], lr=number, projection=NonNegative())
        assert optimizer.param_groups[0]["lr"] == number
