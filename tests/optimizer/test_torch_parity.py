"""torch's whole optimizer contract: its own inputs and errors, and the product of the options.

torch's inputs are in a module that needs the package expecttest. Without it, what is made of them
is left out by name, and the rest runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from helpers.support import Place
from torch import Tensor, nn

from adamal_kernels import Adam, AdamAL, AdamALW, AdamW

try:
    from torch.testing._internal import common_optimizers
except ImportError as error:
    common_optimizers, missing = None, str(error)
else:
    missing = ""

STEPS = 3
CLASSES = (Adam, AdamW, AdamAL, AdamALW)
TWINS = {
    Adam: torch.optim.Adam,
    AdamW: torch.optim.AdamW,
    AdamAL: torch.optim.Adam,
    AdamALW: torch.optim.AdamW,
}
of_torchs_inputs = pytest.mark.skipif(common_optimizers is None, reason=missing)


class Outcome(NamedTuple):
    """What a run came to: the error it raised, or parameters and their state."""

    error: Exception | None
    values: list[dict[str, Tensor]]


def new_params(*, are_leaves: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator, requires_grad=True) for shape in ((2, 3), (5,), ())
    ]
    return leaves if are_leaves else [leaf.clone() for leaf in leaves]


def copied(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with tensors of their own, and betas of their own."""
    made = {name: v.clone() if isinstance(v, Tensor) else v for name, v in options.items()}
    if "betas" in options:
        made["betas"] = tuple(b.clone() if isinstance(b, Tensor) else b for b in options["betas"])
    return made


def run(cls: type, options: dict[str, Any]) -> Outcome:
    """Make an optimizer and take some steps; gradients do not depend on the parameters."""
    params = new_params(are_leaves=not options.get("differentiable"))
    try:
        optimizer: Any = cls(params, **copied(options))
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(10 + step)
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
    except Exception as error:  # Whatever it is: it is compared.
        return Outcome(error, [])
    return Outcome(None, [{"param": p, **optimizer.state[p]} for p in params])


def inputs_of(cls: type, kind: str) -> Callable[..., list[Any]]:
    """Return torch's function that makes the inputs, or error inputs, of a class's twin."""
    return getattr(common_optimizers, f"optim_{kind}_func_{TWINS[cls].__name__.lower()}")


@of_torchs_inputs
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchs_own_inputs(place: Place, cls: type, dtype: torch.dtype) -> None:
    twin, inputs = TWINS[cls], inputs_of(cls, "inputs")
    seen = 0
    for given in inputs(place.device, dtype):
        if given.kwargs.get("amsgrad") and cls._monotone:
            with pytest.raises(ValueError, match="amsgrad"):
                cls(new_params(), backend=place.backend, **given.kwargs)
            continue
        models = []
        for make, more in ((cls, {"backend": place.backend}), (twin, {"foreach": False})):
            torch.manual_seed(0)
            model = nn.Linear(4, 3).to(place.device, dtype)
            optimizer = make(model.parameters(), **copied(given.kwargs), **more)
            losses = []
            for _ in range(20):
                optimizer.zero_grad()
                loss = (model(torch.ones(4, device=place.device, dtype=dtype)) - 2).square().sum()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            goes_up = given.kwargs.get("maximize", False)
            assert (losses[-1] > losses[0]) == goes_up, given.desc
            models.append(model)
        if not cls._monotone:
            for our, their in zip(*(model.parameters() for model in models), strict=True):
                torch.testing.assert_close(our, their, msg=lambda m, d=given.desc: f"{d}: {m}")
        seen += 1
    assert seen >= 4


def error_inputs() -> Iterator[Any]:
    for cls in CLASSES if common_optimizers else ():
        made = inputs_of(cls, "error_inputs")(torch.device("cpu"), torch.float32)
        for number, given in enumerate(made):
            yield pytest.param(cls, number, id=f"{cls.__name__}-{given.optimizer_error_input.desc}")


@of_torchs_inputs
@pytest.mark.parametrize(("cls", "number"), list(error_inputs()))
def test_torchs_own_error_inputs(cls: type, number: int) -> None:
    """The same type of error, in words that hold torch's."""
    given = inputs_of(cls, "error_inputs")(torch.device("cpu"), torch.float32)[number]
    made = given.optimizer_error_input
    params = new_params() if made.params is None else made.params
    assert given.error_on is common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR
    for make in (cls, TWINS[cls]):
        if issubclass(given.error_type, Warning):
            with pytest.warns(given.error_type, match=given.error_regex):
                make(params, **made.kwargs)
        else:
            with pytest.raises(given.error_type, match=given.error_regex):
                make(params, **made.kwargs)


@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_a_parameter_listed_twice_is_stepped_twice(place: Place, cls: type) -> None:
    """As torch does, which warns of it."""
    found = []
    for make, options in ((cls, {"backend": place.backend}), (TWINS[cls], {})):
        params = [torch.ones(3, dtype=torch.float64, device=place.device) for _ in range(2)]
        for p in params:
            p.requires_grad_()
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = make([params[0], params[1], params[0]], lr=0.1, **options)
        for step in range(3):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + step, requires_grad=False)
            optimizer.step()
        assert [optimizer.state[p]["step"].item() for p in params] == [6, 3]
        found.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(*found)


def tensor(value: float) -> Tensor:
    return torch.tensor(value)


PRODUCT: dict[str, tuple[Any, ...]] = {
    "lr": (0.1, tensor(0.1)),
    "betas": ((0.8, 0.9), (tensor(0.8), tensor(0.9))),
    "weight_decay": (0.0, 0.1),
    "amsgrad": (False, True),
    "maximize": (False, True),
    "foreach": (None, True, False),
    "fused": (None, True),
    "capturable": (False, True),
    "differentiable": (False, True),
    "decoupled_weight_decay": (False, True),
}


def products(**fixed: Any) -> Iterator[dict[str, Any]]:
    axes = {name: (fixed[name],) if name in fixed else PRODUCT[name] for name in PRODUCT}
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def outcome_of_torch(twin: type, options: dict[str, Any]) -> Outcome:
    """Return torch's outcome; on CPUs it refuses capturable, the result of which is that without.

    What capturable allows, foreach with tensors, is foreach's result with numbers.
    """
    if not options["capturable"]:
        return run(twin, options)
    options = {**options, "capturable": False}
    if options["foreach"]:
        options["lr"] = float(options["lr"])
        options["betas"] = tuple(map(float, options["betas"]))
    return run(twin, options)


# What torch raises by an assertion, in step(): here the constructor says it.
ASSERTED = {"_foreach ops don't support autograd": ValueError}


def disagreement(ours: Outcome, theirs: Outcome, *, compare: bool) -> str | None:
    if theirs.error is not None:
        expected = ASSERTED.get(str(theirs.error), type(theirs.error))
        if type(ours.error) is not expected:
            return f"raised {ours.error!r} instead of {theirs.error!r}"
        return None
    if ours.error is not None:
        return f"raised {ours.error!r}"
    if compare:
        try:
            torch.testing.assert_close(ours.values, theirs.values)
        except AssertionError as error:
            return str(error)
    return None


@pytest.mark.parametrize("weight_decay", PRODUCT["weight_decay"])
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_the_product_of_the_options(cls: type, differentiable: bool, weight_decay: float) -> None:
    """Where torch raises, so do we, an error of the same type; where it works, so do we, alike."""
    wrong, worked, raised = {}, 0, 0
    for options in products(weight_decay=weight_decay, differentiable=differentiable):
        if cls in (AdamW, AdamALW) and not options.pop("decoupled_weight_decay"):
            continue
        if cls._monotone and options["amsgrad"]:
            # The one option that AdamAL has no use for.
            ours = run(cls, options)
            theirs = Outcome(ValueError("amsgrad"), [])
            if not options["foreach"] and isinstance(ours.error, ValueError):
                assert "amsgrad" in str(ours.error)
        else:
            ours, theirs = run(cls, options), outcome_of_torch(TWINS[cls], options)
        if found := disagreement(ours, theirs, compare=not cls._monotone):
            wrong[str(options)] = found
        worked += ours.error is None
        raised += ours.error is not None
    assert wrong == {}
    assert min(worked, raised) > 10
