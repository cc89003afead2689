"""Checkpoints of other packages' Adams, made here in their layouts: read, continued, refused.

The layouts of optimi and bitsandbytes are as those packages wrote them on a CPU; those of apex,
Transformer Engine and DeepSpeed, which need a GPU to run, as their sources have them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.checkpoints import copy_params, new_params, through_file, train, values_of
from helpers.support import refused
from torch import Tensor
from torch.optim import Optimizer

from adamal_kernels import Adam, AdamAL, AdamALW, AdamW
from adamal_kernels.core.storage import FORMATS, Format
from adamal_kernels.verify import different_values

FOREACH = {"backend": "foreach"}
OPTIONS = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
STEPS = 4
Saved = dict[str, Any]


def train_all(optimizer: Optimizer, steps: range) -> list[list[Tensor]]:
    """Step with gradients for all parameters, as a count per group needs it; return them."""
    taken = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for param in params:
            values = torch.randn(param.shape, generator=generator)
            param.grad = torch.empty_like(param, requires_grad=False).copy_(values)
        taken.append([param.grad for param in params])
        optimizer.step()
    return taken


class Run:
    """A run of torch.optim.Adam or AdamW, and what it leaves in another package's layout."""

    def __init__(self, *, decoupled: bool, dtypes: Format = FORMATS[0]) -> None:
        self.params = new_params(dtypes)
        cls = torch.optim.AdamW if decoupled else torch.optim.Adam
        groups = [{"params": self.params[:3]}, {"params": self.params[3:], "lr": 0.01}]
        self.optimizer = cls(groups, foreach=False, **OPTIONS)
        self.grads = train_all(self.optimizer, range(STEPS))

    def resumed(self, cls: type, saved: Saved) -> Optimizer:
        """Return an optimizer over copies of the parameters that has loaded ``saved``."""
        params = [param.detach().clone().requires_grad_() for param in self.params]
        optimizer = cls([{"params": params[:3]}, {"params": params[3:]}], **FOREACH)
        optimizer.load_state_dict(saved)
        return optimizer

    def saved(self) -> Saved:
        return copy.deepcopy(self.optimizer.state_dict())

    def in_groups(self, names: tuple[str, ...], **more: Any) -> Saved:
        """Return the checkpoint with only the options ``names`` in its groups, and ``more``."""
        saved = self.saved()
        for group in saved["param_groups"]:
            kept = {name: group[name] for name in ("params", *names)}
            group.clear()
            group.update(kept, **more)
        return saved


FUSED_ADAM = ("lr", "betas", "eps", "weight_decay")


def apex(run: Run) -> Saved:
    saved = run.in_groups(FUSED_ADAM, bias_correction=True, step=STEPS)
    for values in saved["state"].values():
        del values["step"]
    return saved


def apex_capturable(run: Run) -> Saved:
    """lr and step are tensors on the device."""
    saved = apex(run)
    for group in saved["param_groups"]:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
        group["step"] = torch.tensor([STEPS], dtype=torch.int)
    return saved


def transformer_engine(run: Run) -> Saved:
    saved = apex(run)
    for param, values in zip(run.params, saved["state"].values(), strict=True):
        values["master_param"] = param.detach().float()
    return saved


def deepspeed(run: Run) -> Saved:
    """Counts in the state of each group's last parameter alone: the others', and its own, stay."""
    saved = run.in_groups(FUSED_ADAM, bias_correction=True, step=0)
    last = {group["params"][-1] for group in saved["param_groups"]}
    for key, values in saved["state"].items():
        values["step"] = STEPS if key in last else 0
    return saved


def optimi(run: Run, **options: Any) -> Saved:
    """Moments are averages with betas that are bias-corrected in every step."""
    saved = run.in_groups(
        ("lr", "eps", "weight_decay"),
        beta1=OPTIONS["betas"][0],
        beta2=OPTIONS["betas"][1],
        max_lr=None,
        decouple_wd=isinstance(run.optimizer, torch.optim.AdamW),
        decouple_lr=False,
        kahan_sum=None,
        foreach=None,
        triton=False,
        gradient_release=False,
        setup=True,
        step=torch.tensor(STEPS, dtype=torch.int32),
    )
    for i, param in enumerate(run.params):
        m, v = torch.zeros_like(param), torch.zeros_like(param)
        for step, grads in enumerate(run.grads, start=1):
            # What coupled decay adds to a gradient is left out: the tests have none of it here.
            for moment, value, beta in ((m, grads[i], 0), (v, grads[i] * grads[i], 1)):
                beta = OPTIONS["betas"][beta]
                weight = 1 - (beta**step - beta) / (beta**step - 1)
                moment.data.lerp_(value, weight)
        saved["state"][i] = {"exp_avg": m.detach(), "exp_avg_sq": v.detach(), "kahan_comp": None}
    for group in saved["param_groups"]:
        group.update(options)
    return saved


def optimi_lr_decoupled(run: Run) -> Saved:
    """The decay is lr / max_lr * weight_decay, whatever decouple_wd says."""
    saved = optimi(run, max_lr=0.5, decouple_lr=True, decouple_wd=False)
    for group in saved["param_groups"]:
        group["weight_decay"] *= group["max_lr"]
    return saved


def optimi_gradient_release(run: Run) -> Saved:
    """Every state counts its own steps and refers to its group."""
    saved = optimi(run, gradient_release=True, setup=False)
    for group in saved["param_groups"]:
        step = group.pop("step")
        for i in group["params"]:
            saved["state"][i].update(step=step.clone(), group={"lr": group["lr"]})
    return saved


def bitsandbytes(run: Run) -> Saved:
    saved = run.in_groups(FUSED_ADAM, alpha=0.0, t_alpha=None, t_beta3=None)
    for key, values in saved["state"].items():
        moments = {"state1": values["exp_avg"], "state2": values["exp_avg_sq"]}
        saved["state"][key] = {"step": STEPS, "__bnb_optimizer_quant_state__": moments}
    return saved


def bitsandbytes_flat(run: Run) -> Saved:
    """As older versions wrote it, before FSDP was to gather nothing of it."""
    saved = bitsandbytes(run)
    for group in saved["param_groups"]:
        for name in ("alpha", "t_alpha", "t_beta3"):
            del group[name]
    for values in saved["state"].values():
        values.update(values.pop("__bnb_optimizer_quant_state__"))
    return saved


LAYOUTS: dict[str, Callable[[Run], Saved]] = {
    make.__name__: make
    for make in (
        apex,
        apex_capturable,
        transformer_engine,
        deepspeed,
        optimi,
        optimi_lr_decoupled,
        optimi_gradient_release,
        bitsandbytes,
        bitsandbytes_flat,
    )
}


@pytest.mark.filterwarnings("ignore:load_state_dict. 'master_param'")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_goes_on_as_torchs_does(layout: str) -> None:
    run = Run(decoupled=True)
    optimizer = run.resumed(AdamW, through_file(LAYOUTS[layout](run)))
    train(optimizer, range(STEPS, STEPS + 4))
    train(run.optimizer, range(STEPS, STEPS + 4))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    torch.testing.assert_close(params, run.params)
    for ours, theirs in zip(params, run.params, strict=True):
        state = dict(optimizer.state[ours])
        torch.testing.assert_close(state, dict(run.optimizer.state[theirs]))


EXACT = [name for name in LAYOUTS if not name.startswith("optimi")]


@pytest.mark.filterwarnings("ignore:load_state_dict. 'master_param'")
@pytest.mark.parametrize("cls", [AdamAL, AdamALW, Adam, AdamW])
@pytest.mark.parametrize("layout", EXACT)
def test_what_is_loaded_equals_torchs_own_to_the_bit(layout: str, cls: type) -> None:
    """Every moment, count and option that torch's checkpoint of the same run has."""
    run = Run(decoupled=True)
    found = run.resumed(cls, LAYOUTS[layout](run))
    expected = run.resumed(cls, run.saved())
    assert different_values(values_of(found), values_of(expected)) == []
    for ours, theirs in zip(found.param_groups, expected.param_groups, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"params", "lr", "decoupled_weight_decay"}:
            assert ours[name] == theirs[name], name
        # apex's capturable lr is a float32 tensor.
        assert type(ours["lr"]) is float
        assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-7)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith("optimi")])
def test_optimis_moments_lose_their_bias_correction(layout: str) -> None:
    """Loaded as they are, v would be off by a factor of 1 - beta2^t: here 5.4."""
    run = Run(decoupled=True)
    optimizer = run.resumed(AdamAL, LAYOUTS[layout](run))
    for group, theirs in zip(optimizer.param_groups, run.optimizer.param_groups, strict=True):
        assert group["betas"] == OPTIONS["betas"]
        assert group["weight_decay"] == pytest.approx(OPTIONS["weight_decay"])
        assert group["decoupled_weight_decay"] is True
        assert group["lr"] == theirs["lr"]
        for ours, their in zip(group["params"], theirs["params"], strict=True):
            torch.testing.assert_close(
                dict(optimizer.state[ours]), dict(run.optimizer.state[their])
            )


def test_optimis_coupled_decay_stays_coupled() -> None:
    run = Run(decoupled=False)
    optimizer = run.resumed(AdamAL, optimi(run))
    assert {group["decoupled_weight_decay"] for group in optimizer.param_groups} == {False}


@pytest.mark.parametrize("layout", EXACT)
def test_decay_stays_the_running_optimizers(layout: str) -> None:
    """These checkpoints do not say whether it was decoupled."""
    run = Run(decoupled=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cls, decoupled in ((AdamAL, False), (AdamALW, True)):
            groups = run.resumed(cls, LAYOUTS[layout](run)).param_groups
            assert {group["decoupled_weight_decay"] for group in groups} == {decoupled}


def test_bias_correction_that_was_off_stays_off() -> None:
    saved = apex(run := Run(decoupled=True))
    for group in saved["param_groups"]:
        group["bias_correction"] = 0
    groups = run.resumed(AdamAL, saved).param_groups
    assert [group["bias_correction"] for group in groups] == [False, False]


def test_float32_moments_of_sixteen_bit_parameters_are_kept() -> None:
    run = Run(decoupled=True, dtypes=Format(torch.bfloat16, torch.bfloat16))
    saved = apex(run)
    for values in saved["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            values[name] = values[name].float() + 2**-12
    optimizer = run.resumed(AdamAL, through_file(saved))
    for values, loaded in zip(saved["state"].values(), values_of(optimizer), strict=True):
        assert loaded["exp_avg"].dtype == torch.float32
        assert torch.equal(loaded["exp_avg"], values["exp_avg"])
        assert torch.equal(loaded["exp_avg_sq"], values["exp_avg_sq"])


def test_parameters_and_groups_without_state() -> None:
    """apex counts no step in a group that was never stepped."""
    run = Run(decoupled=True)
    saved = apex(run)
    for i in saved["param_groups"][1]["params"]:
        del saved["state"][i]
    del saved["param_groups"][1]["step"]
    optimizer = run.resumed(AdamAL, saved)
    assert [len(optimizer.state.get(p, {})) for p in optimizer.param_groups[1]["params"]] == [0, 0]
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == STEPS


def test_a_step_of_ones_own_in_a_group_is_none_of_fused_adams() -> None:
    """Groups may hold what their user puts there."""
    params = new_params()
    optimizer = AdamAL(params, **FOREACH)
    train_all(optimizer, range(2))
    optimizer.param_groups[0]["step"] = 77
    saved = through_file(optimizer.state_dict())
    other = AdamAL(new_params(), **FOREACH)
    other.load_state_dict(saved)
    assert other.param_groups[0]["step"] == 77
    assert {other.state[p]["step"].item() for p in other.param_groups[0]["params"]} == {2}


def _in_every_state(name: str, value: Any) -> Callable[[Saved], None]:
    def add(saved: Saved) -> None:
        for values in saved["state"].values():
            values.get("__bnb_optimizer_quant_state__", values)[name] = value

    return add


LEFT_OUT = {
    "master_param": (apex, torch.ones(2)),
    "master_param, remainders": (apex, torch.ones(2, dtype=torch.int16)),
    "kahan_comp": (optimi, torch.ones(2, dtype=torch.bfloat16)),
    "gnorm_vec": (bitsandbytes, torch.ones(100)),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_has_no_place_is_left_out_with_a_warning(kind: str) -> None:
    make, value = LEFT_OUT[kind]
    name = kind.partition(",")[0]
    run = Run(decoupled=True)
    saved = make(run)
    _in_every_state(name, value)(saved)
    with pytest.warns(UserWarning, match=f"'{name}' of 5 parameters .* left out") as caught:
        optimizer = run.resumed(AdamAL, saved)
    assert caught[0].filename == __file__
    assert {key for values in values_of(optimizer) for key in values} == {
        "param",
        "step",
        "exp_avg",
        "exp_avg_sq",
    }


def test_optimis_marks_of_no_compensation_are_no_loss() -> None:
    """It writes None, or one byte where Triton ran."""
    run = Run(decoupled=True)
    saved = optimi(run)
    saved["state"][1]["kahan_comp"] = torch.zeros(1, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.resumed(AdamAL, saved)


def _one_moment(saved: Saved) -> None:
    for values in saved["state"].values():
        del values["__bnb_optimizer_quant_state__"]["state2"]


def _eight_bit(saved: Saved) -> None:
    values = saved["state"][2]["__bnb_optimizer_quant_state__"]
    values.update(state1=torch.zeros(3, 4, dtype=torch.uint8), absmax1=torch.zeros(1))


def _groups(**changes: Any) -> Callable[[Saved], None]:
    return lambda saved: [group.update(changes) for group in saved["param_groups"]]


REFUSED: dict[str, tuple[Callable[[Run], Saved], Callable[[Saved], Any], list[str]]] = {
    "8-bit state": (
        bitsandbytes,
        _eight_bit,
        ["parameter 2", "'state1'", "8-bit", "optim_bits=32"],
    ),
    "one moment": (bitsandbytes, _one_moment, ["parameter 0", "no 'state2'", "one moment"]),
    "AdEMAMix": (
        bitsandbytes,
        _groups(betas=(0.9, 0.999, 0.9999), alpha=5.0),
        ["group 0", "'alpha'=5.0", "AdEMAMix"],
    ),
    "a key of a group missing": (
        bitsandbytes,
        lambda saved: saved["param_groups"][1].pop("params"),
        ["group 1", "no 'params'"],
    ),
    "LAMB": (
        bitsandbytes,
        _in_every_state("unorm_vec", torch.zeros(1)),
        ["parameter 0", "'unorm_vec'", "another kind"],
    ),
    "StableAdam": (
        optimi,
        _in_every_state("eps_sq", torch.zeros(1)),
        ["parameter 0", "'eps_sq'", "optimi", "another kind"],
    ),
    "a key FusedAdam does not write": (
        apex,
        _in_every_state("exp_inf", torch.zeros(1)),
        ["parameter 0", "'exp_inf'", "FusedAdam"],
    ),
    "apex without a moment": (
        apex,
        lambda saved: saved["state"][3].pop("exp_avg_sq"),
        ["parameter 3", "no 'exp_avg_sq'"],
    ),
    "apex without a count": (
        apex,
        lambda saved: saved["param_groups"][1].pop("step"),
        ["parameter 3", "no 'step'", "'exp_avg'"],
    ),
    "optimi without a count": (
        optimi,
        lambda saved: saved["param_groups"][0].pop("step"),
        ["parameter 0", "no 'step'"],
    ),
    "a count that is none": (apex, _groups(step="three"), ["step of group 0", "'three'"]),
    "another shape": (
        bitsandbytes,
        lambda saved: saved["state"][1]["__bnb_optimizer_quant_state__"].update(
            state1=torch.zeros(7)
        ),
        ["exp_avg of parameter 1", "(7,)", "(5,)", "another model"],
    ),
    "too few parameters": (
        apex,
        lambda saved: saved["param_groups"][1]["params"].pop(),
        ["group 1", "1 parameters", "2 in the optimizer"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_and_untouched(what: str) -> None:
    make, spoil, words = REFUSED[what]
    run = Run(decoupled=True)
    optimizer = run.resumed(AdamAL, run.saved())
    train(optimizer, range(2))
    saved = make(run)
    spoil(saved)
    before = copy.deepcopy(saved["param_groups"])
    with refused(optimizer, ValueError, *words):
        optimizer.load_state_dict(saved)
    assert saved["param_groups"] == before
    train(optimizer, range(2, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:load_state_dict. 'master_param'")
def test_the_checkpoint_itself_is_left_alone(layout: str) -> None:
    run = Run(decoupled=True)
    saved = LAYOUTS[layout](run)
    before = copy.deepcopy(saved)
    train(run.resumed(AdamAL, saved), range(STEPS, STEPS + 2))
    torch.testing.assert_close(saved["state"], before["state"], rtol=0, atol=0)
    assert str(saved["param_groups"]) == str(before["param_groups"])


def test_a_checkpoint_of_ours_is_read_by_torch_after_a_foreign_start() -> None:
    """What came in another layout leaves in torch's."""
    run = Run(decoupled=True)
    optimizer = run.resumed(AdamW, bitsandbytes(run))
    params = [param.detach().clone().requires_grad_() for param in run.params]
    back = torch.optim.AdamW([{"params": params[:3]}, {"params": params[3:]}], foreach=False)
    back.load_state_dict(through_file(optimizer.state_dict()))
    copy_params(run.params, params)
    train(back, range(STEPS, STEPS + 2))
    train(run.optimizer, range(STEPS, STEPS + 2))
    torch.testing.assert_close(params, run.params)
