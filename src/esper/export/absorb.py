"""Put what was grown into the host's own layers, in place: wider tensors, and the optimizer's state widened with them.

The exported copy says what each layer becomes. Moments go through the same merge as the weights they belong to, so that
every number ends up beside its own: Adam's are rescaled first, because the optimizer will divide them by the bias
correction of the *host's* step count (m_hat = m / (1 - beta^t)).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.export.merge import grown_sites
from esper.kasmina.bank import Bank
from esper.kasmina.blueprints import Parts
from esper.kasmina.discovery import SitePlan
from esper.kasmina.execution import Kasmina
from esper.kasmina.layers import is_batch_norm

_ABSORBS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_SIZES = ("in_features", "out_features", "in_channels", "out_channels", "num_features", "nf", "nx")
_FIRST, _SECOND, _MOMENTUM = "exp_avg", "exp_avg_sq", "momentum_buffer"


def refusal(model: nn.Module, kasmina: Kasmina, optimizers: Sequence[Optimizer]) -> str | None:
    """Why growth cannot move into the host's own tensors now, or ``None``."""
    if kasmina.cohorts:
        return f"no cohort may be on trial, got {sorted(kasmina.cohorts)}; let them end, or cancel them first"
    for optimizer in optimizers:
        kind = type(optimizer)
        if kind not in _ABSORBS or any(bool(group.get("amsgrad", False)) for group in optimizer.param_groups):
            known = ", ".join(cls.__name__ for cls in _ABSORBS)
            return (
                f"only the state of {known} (without amsgrad) can be widened, got {kind.__name__}; "
                "go on with the annex, or export() and start a new optimizer"
            )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "a process group is running: its reducers hold the old tensors; absorb before it starts, or export()"
    plans = grown_sites(kasmina)
    layers = [plan.info.name for plan in plans if not plan.info.kind.is_span]
    if layers:
        return (
            f"growth of single layers stays beside them until export(), got it on {', '.join(layers[:4])}; "
            "use export() for a plain model"
        )
    owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for plan in plans:
        for name in plan.module_names:
            reason = _holds(name, model.get_submodule(name), owned) or _uneven(plan, model, optimizers)
            if reason is not None:
                return reason
    return None


def _holds(name: str, module: nn.Module, owned: set[int]) -> str | None:
    """What else holds on to a layer's tensors."""
    for leaf, parameter in module.named_parameters(recurse=False):
        if parameter.grad is not None:
            return f"{name}.{leaf} holds a gradient of its present shape; call optimizer.step() and zero_grad() first"
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"{name}.{leaf} has a hook of yours, which would be lost; remove it and add it again afterwards"
        if parameter.requires_grad and id(parameter) not in owned:
            return f"{name}.{leaf} is in no optimizer that the grower knows; pass them all to the Grower"
    return None


def _uneven(plan: SitePlan, model: nn.Module, optimizers: Sequence[Optimizer]) -> str | None:
    counts = (_step(p, optimizers) for name in plan.module_names for p in model.get_submodule(name).parameters(False))
    steps = sorted({count for count in counts if count is not None})
    if len(steps) > 1:
        return (
            f"the layers of {plan.info.name!r} must have taken equally many steps, got {steps}; "
            "freeze and unfreeze them together"
        )
    return None


def absorb(model: nn.Module, plain: nn.Module, kasmina: Kasmina, optimizers: Sequence[Optimizer]) -> tuple[str, ...]:
    """Give the host's layers the weights and shapes of ``plain`` (an export of this very state); returns their names.

    Ask :func:`refusal` first. Modules stay the objects they are; their parameters become new ones, which take their
    places in the optimizers' groups and state.
    """
    plans = grown_sites(kasmina)
    states = {key: _merged_state(model, plans, kasmina, optimizers, key) for key in (_FIRST, _SECOND, _MOMENTUM)}
    names = tuple(dict.fromkeys(name for plan in plans for name in plan.module_names))
    for name in names:
        layer, wider = model.get_submodule(name), plain.get_submodule(name)
        for leaf, old in list(layer.named_parameters(recurse=False)):
            new = nn.Parameter(wider.get_parameter(leaf).detach().clone(), requires_grad=old.requires_grad)
            setattr(layer, leaf, new)
            moments = {key: merged[name].get_parameter(leaf).detach() for key, merged in states.items()}
            _hand_over(old, new, moments, optimizers)
        for leaf, _ in list(layer.named_buffers(recurse=False)):
            setattr(layer, leaf, wider.get_buffer(leaf).detach().clone())
        for size in _SIZES:
            if hasattr(layer, size):
                setattr(layer, size, getattr(wider, size))
    return names


def _hand_over(old: Tensor, new: Tensor, moments: dict[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
    """Put ``new`` where ``old`` was, with state of its own shape."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        state = optimizer.state.pop(old, None)
        if state is None:
            continue
        for key, value in moments.items():
            if isinstance(state.get(key), Tensor):
                state[key] = value.to(state[key].dtype)
        optimizer.state[new] = state


# ---------------------------------------------------------------------------------------------- moments


def _state(parameter: Tensor, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    return next((optimizer.state[parameter] for optimizer in optimizers if parameter in optimizer.state), {})


def _step(parameter: Tensor, optimizers: Sequence[Optimizer]) -> float | None:
    value = _state(parameter, optimizers).get("step")
    return None if value is None else float(value)


def _betas(parameter: Tensor, optimizers: Sequence[Optimizer]) -> tuple[float, float]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(parameter is member for member in group["params"]):
                return tuple(float(beta) for beta in group.get("betas", (0.0, 0.0)))  # type: ignore[return-value]
    return 0.0, 0.0


def _merged_state(
    model: nn.Module, plans: Sequence[SitePlan], kasmina: Kasmina, optimizers: Sequence[Optimizer], key: str
) -> dict[str, nn.Module]:
    """Every changed layer with its moments in the place of its weights, widened as the weights are."""

    def value_of(parameter: Tensor) -> Tensor:
        found = _state(parameter, optimizers).get(key)
        return torch.zeros_like(parameter) if found is None else found

    names = dict.fromkeys(name for plan in plans for name in plan.module_names)
    layers = {name: _holding(model.get_submodule(name), value_of) for name in names}
    for plan in plans:  # upstream spans come first, as in the export
        annex = kasmina.sites[plan.info.name].permanent[0]
        norm = None if plan.norm_name is None else layers[plan.norm_name]
        assert norm is None or is_batch_norm(norm)
        up = None if plan.up_name is None else layers[plan.up_name]
        parts = Parts(layers[plan.head_name], layers[plan.tail_name], norm, up)
        wider = annex.plan.merge(parts, _annex_moments(annex, plan, optimizers, key), annex.buffers, plan.geometry)
        layers[plan.head_name], layers[plan.tail_name] = wider.head, wider.tail
        for name, layer in ((plan.norm_name, wider.norm), (plan.up_name, wider.up)):
            if name is not None and layer is not None:
                layers[name] = layer
    return layers


def _holding(module: nn.Module, value_of: Callable[[Tensor], Tensor]) -> nn.Module:
    """A layer like this one with other numbers; the module itself is not touched."""
    twin = copy.copy(module)
    values = {leaf: value_of(parameter).detach().clone() for leaf, parameter in module.named_parameters(recurse=False)}
    empty = dict.fromkeys(leaf for leaf in ("bias",) if getattr(module, leaf, 0) is None)
    held = {leaf: nn.Parameter(value, requires_grad=False) for leaf, value in values.items()}
    twin.__dict__["_parameters"] = empty | held  # a shallow copy shares this dictionary with the module
    return twin


def _annex_moments(annex: Bank, plan: SitePlan, optimizers: Sequence[Optimizer], key: str) -> dict[str, Tensor]:
    store = annex.moments.second if key == _SECOND else annex.moments.first
    weight = plan.weight
    beta, theirs, own = _betas(weight, optimizers)[key == _SECOND], _step(weight, optimizers), annex.moments.steps
    factor = 1.0
    if theirs is not None and beta > 0 and float(own[0]) > 0:
        factor = (1.0 - beta**theirs) / (1.0 - beta ** float(own[0]))
    return {name: store.get(name, torch.zeros_like(value)).detach() * factor for name, value in annex.params.items()}
