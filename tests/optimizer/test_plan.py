"""Any layout, any type, any tensor put in another's place: right, and never stale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.support import Place, name_of
from torch import Tensor, nn

from adamal_kernels import Adam, AdamAL, Box
from adamal_kernels.build_info import load_extension
from adamal_kernels.core.buffers import BUFFERS, SecondMoment
from adamal_kernels.core.storage import FORMATS, Format
from adamal_kernels.verify import different_values, same_bits

SHAPE = (2, 3, 4, 5)
OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "projection": Box(-0.5, 0.9)}


def draw(seed: int, dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=torch.Generator().manual_seed(seed)).to(dtype)


def misaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def negated(x: Tensor) -> Tensor:
    """Return the same values by the lazy negative bit."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "sliced": lambda x: torch.cat([x, x], dim=1)[:, :3],
    "misaligned": misaligned,
}


def with_dtypes(param: Tensor, dtypes: Format) -> Tensor:
    param.requires_grad_()
    if dtypes.grad != dtypes.param:
        param.grad_dtype = dtypes.grad
    return param


def stepped(
    place: Place,
    dtypes: Format,
    param_layout: Callable[[Tensor], Tensor],
    grad_layout: Callable[[Tensor], Tensor],
    cls: type = AdamAL,
) -> dict[str, Tensor]:
    """Return a parameter and its state after some steps."""
    param = param_layout(draw(1, dtypes.param).to(place.device))
    strides = param.stride()
    with_dtypes(param, dtypes)
    optimizer = cls([param], backend=place.backend, **OPTIONS)
    for step in range(4):
        param.grad = grad_layout(draw(2 + step, dtypes.grad).to(place.device))
        optimizer.step()
    assert param.stride() == strides
    return {"param": param.detach(), **optimizer.state[param]}


@pytest.mark.parametrize("dtypes", FORMATS, ids=name_of)
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_layouts_change_no_bit(place: Place, param_layout: str, dtypes: Format) -> None:
    place.skip_unless_supported(dtypes)
    expected = stepped(place, dtypes, LAYOUTS["contiguous"], LAYOUTS["contiguous"])
    wrong = {}
    for name, grad_layout in LAYOUTS.items():
        found = stepped(place, dtypes, LAYOUTS[param_layout], grad_layout)
        if names := different_values([found], [expected]):
            wrong[name] = names
    assert wrong == {}


@pytest.mark.parametrize("side", ["param", "grad"])
def test_negative_bit(place: Place, side: str) -> None:
    dtypes = FORMATS[0]
    layouts = {"param": LAYOUTS["contiguous"], "grad": LAYOUTS["contiguous"]}
    expected = stepped(place, dtypes, *layouts.values())
    layouts[side] = negated
    found = stepped(place, dtypes, *layouts.values())
    assert different_values([found], [expected]) == []


def test_expanded_gradient(place: Place) -> None:
    """As the backward of sum() makes them: one element, with strides of zero."""
    dtypes = FORMATS[0]
    expected = stepped(place, dtypes, lambda x: x, lambda x: torch.full_like(x, 0.25))
    found = stepped(place, dtypes, lambda x: x, lambda x: x.new_tensor(0.25).expand(x.shape))
    assert different_values([found], [expected]) == []


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("cls", [AdamAL, Adam])
def test_complex_parameters_are_pairs_of_reals(place: Place, cls: type, dtype: torch.dtype) -> None:
    real = dtype.to_real()
    place.skip_unless_supported(Format(real, real), SecondMoment.PLAIN)
    values = [draw(seed, dtype) for seed in range(4)]
    as_complex = values[0].to(place.device, copy=True).requires_grad_()
    as_real = torch.view_as_real(values[0]).to(place.device, copy=True).requires_grad_()
    # Without the set, which is one of real numbers.
    options = {**OPTIONS, "backend": place.backend, "projection": None}
    optimizers = [cls([p], **options) for p in (as_complex, as_real)]
    for value in values[1:]:
        # A lazily conjugated gradient of the same value.
        as_complex.grad = value.conj().resolve_conj().to(place.device).conj()
        assert as_complex.grad.is_conj()
        as_real.grad = torch.view_as_real(value).to(place.device)
        for optimizer in optimizers:
            optimizer.step()
    assert same_bits(torch.view_as_real(as_complex.detach()), as_real)
    found, expected = optimizers[0].state[as_complex], optimizers[1].state[as_real]
    for name in ("exp_avg", "exp_avg_sq"):
        assert found[name].dtype == dtype
        assert same_bits(torch.view_as_real(found[name]), expected[name])


@pytest.mark.parametrize("dtypes", FORMATS, ids=name_of)
def test_state(place: Place, dtypes: Format) -> None:
    """torch.optim.Adam's keys; moments in the compute type, laid out as the parameter."""
    place.skip_unless_supported(dtypes, SecondMoment.AMSGRAD)
    param = with_dtypes(LAYOUTS["transposed"](draw(1, dtypes.param)).to(place.device), dtypes)
    optimizer = Adam([param], amsgrad=True, backend=place.backend)
    param.grad = draw(2, dtypes.grad).to(place.device)
    optimizer.step()
    state = optimizer.state[param]
    assert list(state) == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert (state["step"].dtype, state["step"].shape) == (torch.float32, ())
    assert state["step"].device.type == "cpu"
    moment = torch.float64 if dtypes.param == torch.float64 else torch.float32
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert (state[name].dtype, state[name].device) == (moment, param.device)
        assert state[name].stride() == param.stride()


def test_all_types_in_one_group(place: Place) -> None:
    """They step as each does alone."""
    pairs = [pair for pair in FORMATS if pair.param != torch.float64]
    together = [with_dtypes(draw(1, p.param, (37,)).to(place.device), p) for p in pairs]
    alone = [with_dtypes(draw(1, p.param, (37,)).to(place.device), p) for p in pairs]
    optimizers = [AdamAL([p], backend=place.backend) for p in alone]
    optimizers.append(AdamAL(together, backend=place.backend))
    for step in range(3):
        for pair, a, b in zip(pairs, together, alone, strict=True):
            for param in (a, b):
                param.grad = draw(2 + step, pair.grad, (37,)).to(place.device)
        for optimizer in optimizers:
            optimizer.step()
    assert [same_bits(a, b) for a, b in zip(together, alone, strict=True)] == [True] * len(pairs)


def test_parameters_without_elements_or_gradients(place: Place) -> None:
    empty = nn.Parameter(torch.ones(0, 3, device=place.device))
    scalar = nn.Parameter(torch.tensor(1.0, device=place.device))
    idle = nn.Parameter(torch.ones(3, device=place.device))
    frozen = torch.ones(3, device=place.device)
    optimizer = AdamAL([empty, scalar, idle, frozen], lr=0.5, backend=place.backend)
    optimizer.step()
    assert len(optimizer.state) == 0
    for _ in range(2):
        empty.grad, scalar.grad = torch.ones_like(empty), torch.ones_like(scalar)
        optimizer.step()
    assert set(optimizer.state) == {empty, scalar}
    assert scalar.item() < 0.1
    assert idle.tolist() == frozen.tolist() == [1.0] * 3


def test_counts_are_each_parameters_own(place: Place) -> None:
    """A parameter that was left out for some steps moves as one that never knew of them."""
    often, seldom, alone = (nn.Parameter(torch.ones(5, device=place.device)) for _ in range(3))
    optimizer = AdamAL([often, seldom], lr=0.1, backend=place.backend)
    other = AdamAL([alone], lr=0.1, backend=place.backend)
    for step in range(9):
        often.grad = draw(step, torch.float32, (5,)).to(place.device)
        seldom.grad = alone.grad = None
        if step % 4 == 1:
            seldom.grad = draw(step, torch.float32, (5,)).to(place.device)
            alone.grad = seldom.grad.clone()
        optimizer.step()
        other.step()
    assert optimizer.state[often]["step"] == 9
    assert optimizer.state[seldom]["step"] == 2
    assert same_bits(seldom, alone)


@pytest.mark.parametrize("dtypes", FORMATS, ids=name_of)
def test_gradients_are_only_read(place: Place, dtypes: Format) -> None:
    place.skip_unless_supported(dtypes)
    param = with_dtypes(draw(1, dtypes.param).to(place.device), dtypes)
    options: dict[str, Any] = {"maximize": True, "weight_decay": 0.5, "backend": place.backend}
    optimizer = AdamAL([param], **options)
    grad = draw(2, dtypes.grad).to(place.device)
    before = grad.clone()
    param.grad = grad
    for _ in range(3):
        optimizer.step()
    assert param.grad is grad
    assert same_bits(grad, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_model_cast_while_training(place: Place, dtype: torch.dtype) -> None:
    """The moments go along, by value, to the new parameters' compute type."""
    place.skip_unless_supported(Format(dtype, dtype))
    model = nn.Linear(3, 2).to(place.device)
    optimizer = AdamAL(model.parameters(), lr=0.01, backend=place.backend)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3, dtype=model.weight.dtype, device=place.device)).sum().backward()
        optimizer.step()

    step()
    step()
    before = optimizer.state[model.weight]["exp_avg_sq"].clone()
    model.to(dtype)
    optimizer.param_groups[0]["lr"] = 0.0
    weight = model.weight.detach().clone()
    step()
    state = optimizer.state[model.weight]
    assert state["exp_avg_sq"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The gradient is 1 throughout: v grows by (1 - beta2) * (1 - v).
    torch.testing.assert_close(state["exp_avg_sq"].float(), before + 0.001 * (1 - before))
    assert state["step"] == 3
    assert same_bits(model.weight, weight)


Params = list[Tensor]
Edit = Callable[[Any, Params], None]


def _replace(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    def edit(optimizer: Any, params: Params) -> None:
        state = optimizer.state[params[0]]
        state[name] = change(state[name])

    return edit


def _set(**options: Any) -> Edit:
    return lambda optimizer, params: optimizer.param_groups[0].update(options)


def _set_data(change: Callable[[Tensor], Tensor]) -> Edit:
    def edit(optimizer: Any, params: Params) -> None:
        params[0].data = change(params[0].data)

    return edit


def _swap_state(optimizer: Any, params: Params) -> None:
    state = optimizer.state
    state[params[0]], state[params[1]] = state[params[1]], state[params[0]]


def _reorder_state(optimizer: Any, params: Params) -> None:
    optimizer.state[params[0]] = optimizer.state.pop(params[0])


def _exchange_groups(optimizer: Any, params: Params) -> None:
    optimizer.param_groups.reverse()


def _exchange_params(optimizer: Any, params: Params) -> None:
    first, second = (group["params"] for group in optimizer.param_groups[:2])
    first[0], second[0] = second[0], first[0]


EDITS: dict[str, Edit] = {
    "nothing": lambda optimizer, params: None,
    "lr": _set(lr=0.3),
    "lr 0": _set(lr=0.0),
    "integer lr": _set(lr=1),
    "betas": _set(betas=(0.5, 0.6)),
    "list of betas": _set(betas=[0.5, 0.6]),
    "eps": _set(eps=0.1),
    "weight_decay": _set(weight_decay=0.3),
    "decoupled_weight_decay": _set(decoupled_weight_decay=True, weight_decay=0.3),
    "maximize": _set(maximize=True),
    "bias_correction": _set(bias_correction=False),
    "projection": _set(projection=Box(-0.01, 0.02)),
    "projection gone": _set(projection=None),
    "moment by value": lambda o, ps: o.state[ps[0]]["exp_avg"].fill_(2.0),
    "step by value": lambda o, ps: o.state[ps[0]]["step"].fill_(100),
    "step replaced": _replace("step", lambda step: torch.tensor(50.0)),
    "step of one element in one dimension": _replace("step", lambda step: torch.tensor([50.0])),
    "step an integer tensor": _replace("step", lambda step: torch.tensor(50)),
    "step in float64": _replace("step", lambda step: step.double()),
    "moment replaced": _replace("exp_avg_sq", lambda v: torch.full_like(v, 0.25)),
    "moment in float64": _replace("exp_avg", lambda m: m.double()),
    "moment in bfloat16": _replace("exp_avg", lambda m: m.bfloat16()),
    "moment transposed": _replace("exp_avg", lambda m: m.t().contiguous().t()),
    "moment strided": _replace("exp_avg_sq", lambda v: v.repeat_interleave(2, -1)[..., ::2]),
    "moment misaligned": _replace("exp_avg", misaligned),
    "moment with the negative bit": _replace("exp_avg", negated),
    "a parameter's state cleared": lambda o, ps: o.state[ps[0]].clear(),
    "a parameter's state deleted": lambda o, ps: o.state.pop(ps[0]),
    "all state cleared": lambda o, ps: o.state.clear(),
    "states exchanged": _swap_state,
    "states reordered": _reorder_state,
    "parameter by value": lambda o, ps: ps[0].detach().fill_(0.7),
    "parameter's data replaced": _set_data(lambda data: torch.full_like(data, 0.7)),
    "parameter's data transposed": _set_data(lambda data: data.t().contiguous().t()),
    "parameter's data strided": _set_data(lambda data: data.repeat_interleave(2, -1)[..., ::2]),
    "parameter's data misaligned": _set_data(misaligned),
    "a group added": lambda o, ps: o.add_param_group({"params": [ps[2]], "lr": 0.2}),
    "groups exchanged": _exchange_groups,
    "parameters exchanged between groups": _exchange_params,
    "a parameter removed": lambda o, ps: o.param_groups[0]["params"].pop(0),
    "state loaded": lambda o, ps: o.load_state_dict(o.state_dict()),
}


EXTRAS: dict[str, Any] = {
    "a number": 7,
    "a word": "x",
    "None": None,
    "sparse": torch.ones(3).to_sparse(),
    "meta": torch.ones(3, device="meta"),
}


@pytest.mark.parametrize("is_loaded", [False, True], ids=["put there", "loaded"])
@pytest.mark.parametrize("kind", EXTRAS)
def test_what_else_a_state_holds_is_left_alone(place: Place, kind: str, is_loaded: bool) -> None:
    results = []
    for extra in ({}, {"note": EXTRAS[kind]}):
        param = nn.Parameter(torch.ones(3, device=place.device))
        optimizer = AdamAL([param], lr=0.1, backend=place.backend)
        for step in range(4):
            if step == 2:
                optimizer.state[param].update(extra)
                if is_loaded:
                    optimizer.load_state_dict(optimizer.state_dict())
            param.grad = torch.full_like(param, step + 1)
            optimizer.step()
        held = dict(optimizer.state[param])
        if extra:
            held.pop("note")
        results.append([{"param": param.detach(), **held}])
    assert different_values(*results) == []


@pytest.mark.parametrize("edit", EDITS)
def test_nothing_is_stale(place: Place, edit: str) -> None:
    """What a user does between steps counts in the next one, as with the reference."""
    results = []
    for backend in (place.backend, "reference"):
        params = [draw(i, torch.float32, (4, 6)).to(place.device) for i in range(4)]
        params = [nn.Parameter(param) for param in params]
        groups = [{"params": params[:1], **OPTIONS}, {"params": params[1:2], "lr": 0.01}]
        groups.append({"params": params[3:]})
        optimizer = AdamAL(groups, backend=backend)
        for step in range(7):
            if step == 4:
                EDITS[edit](optimizer, params)
            for i, param in enumerate(params):
                # None is missing in the step after the edit nor in the one before it.
                present = step in (3, 4) or (step + i) % 5 != 0
                grad = draw(10 * step + i, torch.float32, (4, 6)).to(place.device)
                param.grad = grad if present else None
            optimizer.step()
        results.append([{"param": p.detach(), **optimizer.state.get(p, {})} for p in params])
    assert different_values(*results) == []


GRADS: dict[str, Callable[[Tensor, int], Tensor | None]] = {
    "in place": lambda grad, step: grad,
    "new every step": lambda grad, step: grad.clone(),
    "none at times": lambda grad, step: None if step % 3 == 1 else grad,
    "never": lambda grad, step: None,
    "transposed at times": lambda grad, step: grad.t().contiguous().t() if step % 2 else grad,
    "misaligned at times": lambda grad, step: misaligned(grad) if step % 2 else grad,
    "all zero at times": lambda grad, step: grad * (step % 2),
    "NaN at times": lambda grad, step: grad * (math.nan if step == 3 else 1),
}


@pytest.mark.parametrize("kind", GRADS)
def test_gradients_come_go_and_move(place: Place, kind: str) -> None:
    results = []
    for backend in (place.backend, "reference"):
        params = [draw(i, torch.float32, (4, 6)).to(place.device) for i in range(3)]
        params = [nn.Parameter(param) for param in params]
        optimizer = AdamAL(params, lr=0.1, backend=backend)
        buffers = [torch.zeros_like(param) for param in params]
        for step in range(8):
            for i, (param, buffer) in enumerate(zip(params, buffers, strict=True)):
                buffer.copy_(draw(10 * step + i, torch.float32, (4, 6)))
                param.grad = GRADS[kind](buffer, step + i)
            optimizer.step()
        results.append([{"param": p.detach(), **optimizer.state.get(p, {})} for p in params])
    assert different_values(*results) == []


def test_a_replaced_moment_is_stepped_itself(place: Place) -> None:
    """Who replaces a state tensor by one of the same type keeps a view of what goes on."""
    param = nn.Parameter(torch.ones(4, 6, device=place.device))
    optimizer = AdamAL([param], backend=place.backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    for layout in ("contiguous", "transposed", "strided"):
        mine = {
            "contiguous": lambda x: x.clone(),
            "transposed": lambda x: x.t().contiguous().t(),
            "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        }[layout](optimizer.state[param]["exp_avg"])
        optimizer.state[param]["exp_avg"] = mine
        before = mine.clone()
        optimizer.step()
        assert optimizer.state[param]["exp_avg"] is mine
        assert (mine > before).all()


def test_amsgrad_switched_on_while_training(place: Place) -> None:
    """The largest v so far is then the v at hand."""
    param = nn.Parameter(torch.ones(3, device=place.device))
    optimizer = Adam([param], betas=(0.9, 0.5), backend=place.backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    largest = optimizer.state[param]["exp_avg_sq"].clone()
    optimizer.param_groups[0]["amsgrad"] = True
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert same_bits(optimizer.state[param]["max_exp_avg_sq"], largest)
    assert (optimizer.state[param]["exp_avg_sq"] < largest).all()


def test_state_tensors_are_the_same_in_cpp() -> None:
    """``ADAMAL_BUFFERS`` lists what ``BUFFERS`` does, in its order: entries are bound by it."""
    types = {"format.exp_avg": "exp_avg", "format.exp_avg_sq": "exp_avg_sq"}
    types["Dtype::float64"] = torch.float64
    listed = load_extension("_C").buffers
    assert [(*words, types[type]) for *words, type in listed] == [
        (buffer.key, buffer.shape, buffer.needs, buffer.stored_as) for buffer in BUFFERS
    ]
