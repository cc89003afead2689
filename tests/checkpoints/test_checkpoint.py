"""Checkpoints: what comes back, what travels to and from torch.optim.Adam, what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import copy_params, new_params, through_file, train, values_of
from helpers.support import Place, name_of, refused
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from adamal_kernels import Adam, AdamAL, AdamALW, AdamW, Box, L2Ball, NonNegative
from adamal_kernels.checkpoints.merge import merge_groups
from adamal_kernels.core.buffers import SecondMoment
from adamal_kernels.core.storage import FORMATS, Format
from adamal_kernels.verify import different_values, same_bits

FOREACH = {"backend": "foreach"}


@pytest.mark.parametrize("amsgrad", [False, True])
def test_keys_are_torchs(amsgrad: bool) -> None:
    saved = []
    for cls, options in ((Adam, FOREACH), (torch.optim.Adam, {})):
        optimizer = cls(new_params(), amsgrad=amsgrad, **options)
        train(optimizer, range(1))
        saved.append(optimizer.state_dict())
    ours, theirs = saved
    assert ours.keys() == theirs.keys()
    assert [list(values) for values in ours["state"].values()] == [
        list(values) for values in theirs["state"].values()
    ]
    assert theirs["param_groups"][0].keys() - ours["param_groups"][0].keys() == set()


@pytest.mark.parametrize("dtypes", FORMATS, ids=name_of)
@pytest.mark.parametrize("second_moment", SecondMoment, ids=lambda kind: kind.name.lower())
def test_every_bit_returns(place: Place, second_moment: SecondMoment, dtypes: Format) -> None:
    """And the steps that follow are those of a run that was not interrupted."""
    place.skip_unless_supported(dtypes, second_moment)
    cls = AdamAL if second_moment is SecondMoment.MONOTONE else Adam
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "backend": place.backend}
    if second_moment is SecondMoment.AMSGRAD:
        options["amsgrad"] = True

    def make(params: list[Tensor]) -> Optimizer:
        groups = [
            {"params": params[::2], "projection": Box(-0.5, 0.9)},
            {"params": params[1::2], "projection": NonNegative(), "betas": (0.5, 0.7)},
        ]
        return cls(groups, **options)

    params = new_params(dtypes, place.device)
    optimizer = make(params)
    train(optimizer, range(4))
    saved = through_file(optimizer.state_dict())

    resumed_params = new_params(dtypes, place.device)
    copy_params(params, resumed_params)
    # Options come from the checkpoint, too.
    resumed = cls([{"params": resumed_params[::2]}, {"params": resumed_params[1::2]}], **FOREACH)
    resumed.load_state_dict(saved)
    assert different_values(values_of(resumed), values_of(optimizer)) == []
    for ours, theirs in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        changed = {key for key in ours if key != "params" and ours[key] != theirs[key]}
        assert changed <= {"backend"}
        ours["backend"] = place.backend

    train(optimizer, range(4, 8))
    train(resumed, range(4, 8))
    assert different_values(values_of(resumed), values_of(optimizer)) == []


@pytest.mark.parametrize("dtypes", [FORMATS[0], Format(torch.bfloat16, torch.bfloat16)])
def test_travels_between_backends_and_devices(place: Place, dtypes: Format) -> None:
    """A run that is moved twice ends at the bits of one that stayed."""
    place.skip_unless_supported(dtypes)
    stayed = new_params(dtypes, place.device)
    optimizer = AdamAL(stayed, lr=0.05, backend=place.backend)
    train(optimizer, range(9))

    state: dict[str, Any] | None = None
    params: list[Tensor] = new_params(dtypes)
    there, elsewhere = place, Place(torch.device("cpu"), "reference")
    for leg, (device, backend) in enumerate((there, elsewhere, there)):
        params = [param.detach().to(device).requires_grad_() for param in params]
        moved = AdamAL(params, lr=0.05, backend=backend)
        if state is not None:
            moved.load_state_dict(state)
        train(moved, range(3 * leg, 3 * leg + 3))
        assert moved.backends_used == (backend,)
        state = through_file(moved.state_dict())
    assert different_values(values_of(moved), values_of(optimizer)) == []


def test_complex_state_returns() -> None:
    param = torch.randn(4, dtype=torch.complex64).requires_grad_()
    optimizer = AdamAL([param], **FOREACH)
    param.grad = torch.randn(4, dtype=torch.complex64)
    optimizer.step()
    other = AdamAL([param], **FOREACH)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert different_values(values_of(other), values_of(optimizer)) == []
    assert other.state[param]["exp_avg"].dtype == torch.complex64


def test_the_loaded_state_is_a_copy() -> None:
    optimizer = AdamAL(new_params(), **FOREACH)
    train(optimizer, range(3))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    other = AdamAL(new_params(), **FOREACH)
    other.load_state_dict(saved)
    train(other, range(3, 6))
    assert different_values(list(saved["state"].values()), list(before.values())) == []


@pytest.mark.parametrize(
    "options",
    [
        {"lr": np.float64(0.1)},
        {"lr": np.float32(0.1), "eps": np.float32(1e-8)},
        {"betas": (np.float64(0.9), Fraction(9, 10)), "weight_decay": Fraction(1, 10)},
        {"lr": 1, "weight_decay": 0},
        {"betas": [0.9, 0.99]},
        {"projection": Box(np.float64(-1), 1)},
    ],
    ids=str,
)
def test_whatever_number_was_given_is_loaded_weights_only(options: dict[str, Any]) -> None:
    optimizer = AdamAL(new_params(), **options, **FOREACH)
    train(optimizer, range(1))
    saved = through_file(optimizer.state_dict())
    other = AdamAL(new_params(), **FOREACH)
    other.load_state_dict(saved)
    for name, value in options.items():
        if name == "betas":
            value = tuple(map(float, value))
        expected = value if isinstance(value, (Box, tuple)) else float(value)
        assert other.param_groups[0][name] == expected


TORCH_KINDS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", TORCH_KINDS)
@pytest.mark.parametrize("classes", [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)])
def test_travels_from_torch_and_back(
    place: Place, classes: tuple[type, type], kind: str, amsgrad: bool
) -> None:
    ours, theirs = classes
    params, torch_params = new_params(device=place.device), new_params(device=place.device)
    options = {"lr": 0.03, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": amsgrad}
    torchs = theirs(torch_params, **options, **TORCH_KINDS[kind])
    train(torchs, range(3))

    copy_params(torch_params, params)
    optimizer = ours(params, backend=place.backend)
    optimizer.load_state_dict(through_file(torchs.state_dict()))
    assert optimizer.param_groups[0]["backend"] == place.backend
    assert {k: optimizer.param_groups[0][k] for k in options} == options
    assert optimizer.state[params[1]]["step"].device.type == "cpu"
    train(optimizer, range(3, 6))
    train(torchs, range(3, 6))
    torch.testing.assert_close(params, torch_params)

    copy_params(params, torch_params)
    back = theirs(torch_params)
    back.load_state_dict(through_file(optimizer.state_dict()))
    train(optimizer, range(6, 9))
    train(back, range(6, 9))
    torch.testing.assert_close(params, torch_params)
    for our, their in zip(params, torch_params, strict=True):
        torch.testing.assert_close(dict(optimizer.state[our]), dict(back.state[their]))


@pytest.mark.parametrize("kind", TORCH_KINDS)
@pytest.mark.parametrize("cls", [AdamAL, AdamALW])
def test_v_goes_on_from_the_maximum_of_amsgrad(place: Place, cls: type, kind: str) -> None:
    """In two buffers, from whichever kind of torch's Adam; and back, as one without amsgrad."""
    torch_params = new_params(device=place.device)
    torchs = torch.optim.Adam(torch_params, lr=0.03, amsgrad=True, **TORCH_KINDS[kind])
    train(torchs, range(3))
    # So that the maximum and the average differ.
    for values in torchs.state.values():
        values["exp_avg_sq"].mul_(0.5)
    saved = through_file(torchs.state_dict())

    params = new_params(device=place.device)
    copy_params(torch_params, params)
    optimizer = cls(params, backend=place.backend)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["amsgrad"] is False
    for ours, theirs in zip(params, torch_params, strict=True):
        found, held = optimizer.state[ours], torchs.state[theirs]
        assert list(found) == ["step", "exp_avg", "exp_avg_sq"]
        assert same_bits(found["exp_avg_sq"], held["max_exp_avg_sq"])
        assert same_bits(found["exp_avg"], held["exp_avg"])
    maxima = [torchs.state[p]["max_exp_avg_sq"].clone() for p in torch_params]
    train(optimizer, range(3, 6))
    for param, maximum in zip(params, maxima, strict=True):
        assert (optimizer.state[param]["exp_avg_sq"] >= maximum).all()

    back = torch.optim.Adam(torch_params, amsgrad=True)
    back.load_state_dict(through_file(optimizer.state_dict()))
    assert back.param_groups[0]["amsgrad"] is False
    train(back, range(6, 8))


def test_amsgrad_of_some_groups_and_a_maximum_that_is_not_there() -> None:
    params = new_params()
    groups = [{"params": params[:2], "amsgrad": True}, {"params": params[2:]}]
    source = Adam(groups, **FOREACH)
    train(source, range(2))
    # Switched on after the last step, and switched off.
    del source.state[params[0]]["max_exp_avg_sq"]
    source.state[params[2]]["max_exp_avg_sq"] = torch.full_like(params[2], 9.0)
    optimizer = AdamAL([{"params": params[:2]}, {"params": params[2:]}], **FOREACH)
    optimizer.load_state_dict(source.state_dict())
    for param, name in zip(params, ("exp_avg_sq", "max_exp_avg_sq", "exp_avg_sq"), strict=False):
        assert same_bits(optimizer.state[param]["exp_avg_sq"], source.state[param][name])
        assert "max_exp_avg_sq" not in optimizer.state[param]
    assert [group["amsgrad"] for group in optimizer.param_groups] == [False, False]


def _as_capturable(saved: dict[str, Any], device: torch.device) -> None:
    """What torch.optim.Adam(capturable=True) leaves, which needs an accelerator to run."""
    for group in saved["param_groups"]:
        group.update(capturable=True, lr=torch.tensor(0.03, dtype=torch.float64, device=device))
        group["initial_lr"] = group["lr"].clone()
        group["betas"] = tuple(torch.tensor(b, dtype=torch.float64) for b in group["betas"])
    for values in saved["state"].values():
        values["step"] = values["step"].to(device)


def _as_fused(saved: dict[str, Any], device: torch.device) -> None:
    for group in saved["param_groups"]:
        group.update(fused=True, lr=torch.tensor([0.03], dtype=torch.float64))


@pytest.mark.parametrize("change", [_as_capturable, _as_fused])
def test_a_tensor_lr_is_loaded_as_the_number_it_holds(
    place: Place, change: Callable[[dict[str, Any], torch.device], None]
) -> None:
    torch_params = new_params(device=place.device)
    torchs = torch.optim.Adam(torch_params, lr=0.03, foreach=False)
    train(torchs, range(3))
    saved = copy.deepcopy(torchs.state_dict())
    change(saved, place.device)

    params = new_params(device=place.device)
    copy_params(torch_params, params)
    optimizer = Adam(params, lr=1.0, backend=place.backend)
    optimizer.load_state_dict(through_file(saved))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["fused"]) == (0.03, (0.9, 0.999), None)
    assert group["capturable"] is False
    assert group.get("initial_lr", 0.03) == 0.03
    assert {type(value) for value in (group["lr"], *group["betas"])} == {float}
    assert optimizer.state[params[1]]["step"].device.type == "cpu"
    train(optimizer, range(3, 6))
    train(torchs, range(3, 6))
    torch.testing.assert_close(params, torch_params)


@pytest.mark.parametrize("saved_lr", [0.03, torch.tensor(0.03, dtype=torch.float64)], ids=repr)
def test_a_running_tensor_stays_one_of_its_type(saved_lr: Any) -> None:
    """And is not the checkpoint's tensor."""
    running = Adam(new_params(), **FOREACH).param_groups
    running[0].update(lr=torch.tensor(0.5, dtype=torch.float64), betas=(torch.tensor(0.8), 0.9))
    saved = Adam(new_params(), **FOREACH).state_dict()["param_groups"]
    saved[0].update(lr=saved_lr, betas=(0.5, torch.tensor(0.75)))
    group = merge_groups(running, saved)[0]
    assert same_bits(group["lr"], torch.tensor(0.03, dtype=torch.float64))
    assert group["lr"] is not saved_lr
    assert same_bits(group["betas"][0], torch.tensor(0.5))
    assert group["betas"][1] == 0.75
    assert type(group["betas"][1]) is float
    assert running[0]["lr"] == 0.5


@pytest.mark.parametrize("step", [7, 7.0, torch.tensor(7), torch.tensor([7.0])], ids=repr)
def test_old_forms_of_step(place: Place, step: Any) -> None:
    """torch has kept it as a number, and as a tensor of one element."""
    param = torch.ones(2, device=place.device).requires_grad_()
    optimizer = AdamAL([param], backend=place.backend)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"step": step, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.ones(2)}}
    optimizer.load_state_dict(saved)
    loaded = optimizer.state[param]["step"]
    assert (loaded.shape, loaded.dtype, loaded.item()) == ((), torch.float32, 7)
    param.grad = torch.ones(2, device=place.device)
    optimizer.step()
    assert optimizer.state[param]["step"] == 8


def test_sixteen_bit_moments_of_torch_become_float32() -> None:
    dtypes = Format(torch.bfloat16, torch.bfloat16)
    params = new_params(dtypes)
    torchs = torch.optim.Adam(params)
    train(torchs, range(2))
    optimizer = Adam(params, **FOREACH)
    optimizer.load_state_dict(torchs.state_dict())
    train(optimizer, range(2, 4))
    assert {optimizer.state[p]["exp_avg"].dtype for p in params} == {torch.float32}


def test_how_to_compute_is_not_overwritten() -> None:
    saved = Adam(new_params(), lr=0.5, backend="reference").state_dict()
    for options in ({"backend": "foreach"}, {"foreach": True}, {"fused": False}):
        optimizer = Adam(new_params(), **options)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.5
        assert {k: optimizer.param_groups[0][k] for k in options} == options
    torchs = torch.optim.Adam(new_params(), fused=True).state_dict()
    torchs["param_groups"][0].update(capturable=True, differentiable=True)
    optimizer = Adam(new_params(), foreach=True)
    optimizer.load_state_dict(torchs)
    chosen = ("backend", "fused", "foreach", "capturable", "differentiable")
    assert [optimizer.param_groups[0][name] for name in chosen] == [
        "auto",
        None,
        True,
        False,
        False,
    ]


def test_options_that_torch_lacks_stay() -> None:
    optimizer = Adam(new_params(), projection=Box(0, 1), bias_correction=False, **FOREACH)
    optimizer.load_state_dict(torch.optim.Adam(new_params()).state_dict())
    assert optimizer.param_groups[0]["projection"] == Box(0, 1)
    assert optimizer.param_groups[0]["bias_correction"] is False


def test_named_parameters_keep_their_names() -> None:
    model = nn.Linear(2, 2)
    saved = AdamAL(model.named_parameters(), **FOREACH).state_dict()
    optimizer = AdamAL(model.named_parameters(), **FOREACH)
    optimizer.load_state_dict(through_file(saved))
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_hooks_run() -> None:
    optimizer = AdamAL(new_params(), lr=0.1, **FOREACH)
    seen = []

    def double_lr(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 2 * group["lr"]} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, saved: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(double_lr)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert seen == ["saving", "saved", "loaded"]
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert saved["param_groups"][0]["lr"] == 0.1


@pytest.mark.parametrize("prepend", [False, True])
def test_hooks_see_and_replace_what_is_saved(prepend: bool) -> None:
    params = new_params()
    optimizer = AdamAL(params, projection=Box(-1, 1), lr=np.float32(0.5), **FOREACH)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    seen = []

    def wrap(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        seen.append([type(saved["param_groups"][0][name]) for name in ("projection", "lr")])
        return {"optimizer": saved, "version": 2}

    def unwrap(optimizer: Optimizer, wrapped: dict[str, Any]) -> dict[str, Any]:
        seen.append([type(wrapped["optimizer"]["param_groups"][0]["projection"])])
        return wrapped["optimizer"]

    optimizer.register_state_dict_post_hook(wrap, prepend=prepend)
    saved = through_file(optimizer.state_dict())
    assert list(saved) == ["optimizer", "version"]
    other = AdamAL(new_params(), **FOREACH)
    other.register_load_state_dict_pre_hook(unwrap, prepend=prepend)
    other.register_load_state_dict_post_hook(
        lambda o: seen.append([type(o.param_groups[0]["projection"])])
    )
    other.load_state_dict(saved)
    assert seen == [[dict, float], [dict], [Box]]
    assert saved["optimizer"]["state"].keys() == set(range(len(params)))
    moments = (held["exp_avg"] for held in other.state.values())
    assert all(map(same_bits, moments, (optimizer.state[p]["exp_avg"] for p in params)))


def test_parameters_listed_twice_are_numbered_as_torch_does() -> None:
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    numbers = []
    for cls in (torch.optim.Adam, Adam):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = cls([{"params": [first, first, second]}, {"params": [third]}])
        third.grad = torch.ones(2)
        optimizer.step()
        saved = optimizer.state_dict()
        numbers.append(([group["params"] for group in saved["param_groups"]], set(saved["state"])))
    assert numbers[0] == numbers[1]


def test_lists_of_betas_from_json() -> None:
    """They come back as the tuple that a step can compare."""
    optimizer = AdamAL(new_params(), **FOREACH)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["betas"] = [0.5, 0.75]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    saved["param_groups"][0]["betas"] = [0.5]
    with refused(optimizer, TypeError, "betas", "[0.5]"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_distributed_checkpoint_functions(place: Place, trained: bool, flatten: bool) -> None:
    """They step an optimizer without state once, with lr 0: parameters stay, also outside the box.

    In one process; its tools address parameters by name.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def make() -> tuple[nn.Module, AdamAL]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3).to(place.device)
        box = Box(-0.01, 0.01)
        return model, AdamAL(model.parameters(), lr=0.1, projection=box, backend=place.backend)

    model, optimizer = make()
    if trained:
        train(optimizer, range(3))
    before = [param.detach().clone() for param in model.parameters()]
    saved = through_file(get_optimizer_state_dict(model, optimizer, options=options))
    assert all(same_bits(a, b) for a, b in zip(before, model.parameters(), strict=True))

    other_model, other = make()
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, saved, options=options)
    train(optimizer, range(3, 6))
    train(other, range(3, 6))
    assert different_values(values_of(other), values_of(optimizer)) == []
    assert other.param_groups[0]["projection"] == Box(-0.01, 0.01)


def _group(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["param_groups"][0].update(changes)


def _state(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["state"][1].update({name: value})


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], type[Exception], list[str]]] = {
    "too few groups": (
        lambda saved: saved["param_groups"].pop(),
        ValueError,
        ["1 param groups", "the optimizer 2", "build the optimizer"],
    ),
    "too many parameters": (
        lambda saved: saved["param_groups"][0]["params"].append(99),
        ValueError,
        ["group 0", "4 parameters", "3 in the optimizer", "build the optimizer"],
    ),
    "state of an unknown parameter": (
        lambda saved: saved["state"].update({77: saved["state"][1]}),
        ValueError,
        ["parameter 77", "param groups do not name"],
    ),
    "another shape": (
        _state("exp_avg_sq", torch.zeros(2)),
        ValueError,
        ["exp_avg_sq of parameter 1", "(2,)", "another model"],
    ),
    "a shape that would broadcast": (
        _state("exp_avg", torch.zeros(1, 4)),
        ValueError,
        ["exp_avg of parameter 1", "(1, 4)"],
    ),
    "step of several elements": (
        _state("step", torch.zeros(2)),
        ValueError,
        ["step of parameter 1", "must be a number"],
    ),
    "step that is no number": (_state("step", "3"), ValueError, ["step of parameter 1", "'3'"]),
    "negative step": (_state("step", -1), ValueError, ["step of parameter 1", "-1"]),
    "NaN step": (_state("step", float("nan")), ValueError, ["step of parameter 1", "nan"]),
    "infinite step": (
        _state("step", torch.tensor(float("inf"))),
        ValueError,
        ["step of parameter 1", "inf"],
    ),
    "lr of several numbers": (
        _group(lr=torch.ones(2)),
        ValueError,
        ["lr of group 0", "one number"],
    ),
    "beta on meta": (
        _group(betas=(0.9, torch.tensor(0.9, device="meta"))),
        ValueError,
        ["betas of group 0", "one number", "meta"],
    ),
    "three betas": (_group(betas=(0.9, 0.9, 0.9)), TypeError, ["betas", "(0.9, 0.9, 0.9)"]),
    "a key of a group missing": (
        lambda saved: saved["param_groups"][1].pop("params"),
        ValueError,
        ["group 1", "no 'params'"],
    ),
    "state of SGD": (
        lambda saved: saved["state"].update({1: {"momentum_buffer": torch.zeros(5)}}),
        ValueError,
        ["parameter 1", "no 'step'", "it has 'momentum_buffer'", "another kind"],
    ),
    "a state that is none": (
        lambda saved: saved["state"].update({1: 5}),
        ValueError,
        ["parameter 1", "a dict", "5"],
    ),
    "a whole checkpoint": (
        lambda saved: saved.update(optimizer=saved.pop("state")),
        ValueError,
        ["no 'state'", "it has 'param_groups', 'optimizer'"],
    ),
    "a moment missing": (
        lambda saved: saved["state"][1].pop("exp_avg"),
        ValueError,
        ["parameter 1", "no 'exp_avg'", "'step', 'exp_avg_sq'"],
    ),
    "a moment of complex type": (
        _state("exp_avg", torch.zeros(5, dtype=torch.complex64)),
        ValueError,
        ["exp_avg of parameter 1", "torch.complex64", "floating-point"],
    ),
    "a sparse moment": (
        _state("exp_avg", torch.zeros(5).to_sparse()),
        ValueError,
        ["exp_avg of parameter 1", "torch.sparse_coo", "dense"],
    ),
    "a moment on meta": (
        _state("exp_avg_sq", torch.zeros(5, device="meta")),
        ValueError,
        ["exp_avg_sq of parameter 1", "meta", "real device"],
    ),
    "a step on meta": (
        _state("step", torch.zeros((), device="meta")),
        ValueError,
        ["step of parameter 1", "meta"],
    ),
    "a maximum of another shape": (
        lambda saved: (_group(amsgrad=True)(saved), _state("max_exp_avg_sq", torch.ones(3))(saved)),
        ValueError,
        ["max_exp_avg_sq of parameter 1", "(3,)", "(5,)"],
    ),
    "lr out of range": (_group(lr=-1.0), ValueError, ["lr=-1.0", "lr >= 0"]),
    "betas out of range": (_group(betas=(0.9, 1.0)), ValueError, ["betas[1]=1.0", "beta < 1"]),
    "an unknown set": (
        _group(projection={"set": "Ball"}),
        ValueError,
        ["projection", "'Ball'", "Box"],
    ),
    "a set that is empty": (
        _group(projection={"set": "Box", "lo": 1.0001, "hi": 1.0002}),
        ValueError,
        ["projection", "torch.bfloat16", "widen"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_and_untouched(what: str) -> None:
    spoil, error, words = REFUSED[what]
    params = new_params(Format(torch.bfloat16, torch.bfloat16))[:4]
    optimizer = AdamAL([{"params": params[:3]}, {"params": params[3:]}], lr=0.1, **FOREACH)
    train(optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    train(optimizer, range(2, 4))
    spoil(saved)
    with refused(optimizer, error, *words):
        optimizer.load_state_dict(saved)
    train(optimizer, range(4, 5))


def test_a_refusal_names_the_parameter() -> None:
    """Where the optimizer was given names."""
    model = nn.Linear(2, 2)
    optimizer = AdamAL(model.named_parameters(), **FOREACH)
    train(optimizer, range(2))
    saved = AdamAL(nn.Linear(2, 3).parameters(), **FOREACH)
    train(saved, range(1))
    words = ("exp_avg of parameter 0 (weight)", "(3, 2)", "(2, 2)", "another model")
    with refused(optimizer, ValueError, *words):
        optimizer.load_state_dict(saved.state_dict())


def test_a_parameter_on_meta_is_refused() -> None:
    """Copying to it does nothing, in silence."""
    params = new_params()
    source = AdamAL(params, **FOREACH)
    train(source, range(2))
    optimizer = AdamAL([param.detach().to("meta").requires_grad_() for param in params])
    with pytest.raises(ValueError, match=r"parameter 0 is on meta in the optimizer.*to_empty"):
        optimizer.load_state_dict(source.state_dict())
    assert len(optimizer.state) == 0


def test_state_of_frozen_parameters_is_loaded_whatever_they_are() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    source = AdamAL(params, **FOREACH)
    train(source, range(2))
    frozen = [torch.ones(3, device="meta"), torch.ones(3, dtype=torch.int8), torch.ones(3)]
    optimizer = AdamAL([nn.Parameter(p, requires_grad=False) for p in frozen], **FOREACH)
    optimizer.load_state_dict(source.state_dict())
    for held, expected in zip(optimizer.state.values(), source.state.values(), strict=True):
        assert same_bits(held["exp_avg"], expected["exp_avg"])
    saved = source.state_dict()
    saved["state"][0]["exp_avg"] = torch.empty(3, device="meta")
    optimizer.load_state_dict(saved)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].is_meta


def test_a_multiplier_that_is_none_is_refused() -> None:
    params = new_params()
    optimizer = AdamAL(params, projection=L2Ball(1.0), backend="reference")
    train(optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["multiplier"] = "none"
    with refused(optimizer, ValueError, "multiplier of parameter 0", "delete it from the check"):
        optimizer.load_state_dict(saved)


def test_a_real_moment_of_a_complex_parameter_is_refused() -> None:
    param = torch.ones(2, dtype=torch.complex64).requires_grad_()
    optimizer = AdamAL([param], **FOREACH)
    param.grad = torch.ones_like(param)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_sq"] = torch.ones(2)
    with refused(optimizer, ValueError, "exp_avg_sq of parameter 0", "complex", "torch.float32"):
        optimizer.load_state_dict(saved)


def test_moments_of_no_float_type_are_refused_and_untouched() -> None:
    optimizer = AdamAL(new_params(), **FOREACH)
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    saved["state"][1]["exp_avg"] = torch.zeros(5, dtype=torch.int64)
    words = ("exp_avg of parameter 1", "torch.int64", "floating-point")
    with refused(optimizer, ValueError, *words):
        optimizer.load_state_dict(saved)
