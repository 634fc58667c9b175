"""The optimizer of grafted seeds and annexes.

It follows the host: its learning rate, betas, momentum and weight decay are those the host's optimizer used for the
layer in the step just taken, and it steps only when the host stepped. Each slot counts its own steps: a fresh slot in
an Adam pool that shares one count would take steps several times too large.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper.kasmina.bank import Bank
from esper.kasmina.ops.slot_adam import Rates, Stacks, step, step_all

_ADAPTIVE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)
_FOLLOWED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers whose own rule grown units repeat exactly."""


@dataclass(frozen=True)
class Hyperparameters:
    """What the host's optimizer did for one parameter group in the step just taken."""

    rule: str
    """``adamw`` (decoupled decay), ``adam`` (decay in the gradient) or ``sgd``."""
    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    nesterov: bool = False
    peak_lr: float = 0.0
    """Largest learning rate the group has had since attach."""


def is_adaptive(optimizer: Optimizer) -> bool:
    """Whether the optimizer scales steps by gradient statistics (Adam and its kin, by class or by its ``betas``)."""
    return isinstance(optimizer, _ADAPTIVE) or any("betas" in group for group in optimizer.param_groups)


def refusal(optimizer: Optimizer) -> str | None:
    """Why grown units cannot learn beside this optimizer, or ``None``."""
    for group in optimizer.param_groups:
        if bool(group.get("maximize", False)):
            return "the optimizer must minimise, got maximize=True; negate the loss instead"
        if not isinstance(group.get("lr"), (int, float, Tensor)):
            return f"the optimizer must state a learning rate, got lr={group.get('lr')!r}; set one"
    return None


def approximation(optimizer: Optimizer) -> str | None:
    """What to tell the user of an optimizer whose rule is not repeated exactly, or ``None``."""
    if isinstance(optimizer, _FOLLOWED):
        return None
    rule = "AdamW" if is_adaptive(optimizer) else "SGD with its momentum"
    return f"grown units learn by {rule} at the learning rate of {type(optimizer).__name__}, whose rule is not known"


def hyperparameters(optimizer: Optimizer, group: dict[str, object]) -> Hyperparameters:
    """Read one parameter group of the host's optimizer as it stands now."""
    lr = float(group["lr"])  # type: ignore[reportArgumentType]  (a float or a 0-d tensor)
    decay = float(group.get("weight_decay", 0.0))  # type: ignore[reportArgumentType]
    if is_adaptive(optimizer):
        betas = group.get("betas", (0.9, 0.999))
        decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay", False))
        rule = "adam" if isinstance(optimizer, torch.optim.Adam) and not decoupled else "adamw"
        first, second = float(betas[0]), float(betas[1])  # type: ignore[reportIndexIssue]
        return Hyperparameters(rule, lr, decay, (first, second), float(group.get("eps", 1e-8)))  # type: ignore[reportArgumentType]
    momentum, nesterov = float(group.get("momentum", 0.0)), bool(group.get("nesterov", False))  # type: ignore[reportArgumentType]
    # betas of zero: a momentum buffer is a plain sum and has no bias to correct when growth is merged
    return Hyperparameters("sgd", lr, decay, betas=(0.0, 0.0), momentum=momentum, nesterov=nesterov)


class SlotAdamW:
    """One update of a bank from the gradients its parameters hold (AdamW: Loshchilov & Hutter 2019; or the host's SGD).

    Parameters
    ----------
    lr_boost:
        Learning rate over the host's for adaptive rules (new units have ground to make up).
    lr_ceiling:
        Largest learning rate a boost may lead to, as a multiple of the host's largest so far; ``None`` sets none.
    warmup_steps:
        Real steps over which a slot's learning rate rises linearly from zero.
    """

    def __init__(self, *, lr_boost: float, warmup_steps: int, lr_ceiling: float | None = None) -> None:
        self.lr_boost = lr_boost
        self.lr_ceiling = lr_ceiling
        self.warmup_steps = warmup_steps

    @torch.no_grad()
    def step(
        self, bank: Bank, host: Hyperparameters, *, learning: Tensor | None = None, inverse_scale: float = 1.0
    ) -> None:
        """Update ``bank`` in place and drop its gradients.

        ``learning`` is a bool mask ``(S,)`` of slots that learn (``None``: all); ``inverse_scale`` undoes a
        GradScaler's factor. A non-finite gradient changes nothing (parameters, moments and step count stay) and is
        counted in ``bank.bad_steps``, on the device: nothing here waits for it.
        """
        stacks = _taken(bank, host)
        if stacks is not None:
            step(stacks, self._rates(host, bank.lr_scale), learning=learning, inverse_scale=inverse_scale)

    @torch.no_grad()
    def step_all(self, banks: Iterable[tuple[Bank, Hyperparameters]], *, inverse_scale: float = 1.0) -> None:
        """:meth:`step` of each bank beside its host: those that learn alike take it together."""
        alike: dict[tuple[Hyperparameters, float, torch.device], list[Stacks]] = {}
        for bank, host in banks:
            stacks = _taken(bank, host)
            if stacks is not None:
                alike.setdefault((host, bank.lr_scale, stacks.steps.device), []).append(stacks)
        for (host, lr_scale, _), group in alike.items():
            step_all(group, self._rates(host, lr_scale), inverse_scale=inverse_scale)

    def _rates(self, host: Hyperparameters, lr_scale: float) -> Rates:
        lr = host.lr
        if host.rule != "sgd":
            lr *= self.lr_boost
            if self.lr_ceiling is not None:
                lr = min(lr, max(host.lr, self.lr_ceiling * host.peak_lr))
        return Rates(
            rule=host.rule,
            lr=lr * lr_scale,
            weight_decay=host.weight_decay,
            betas=host.betas,
            eps=host.eps,
            momentum=host.momentum,
            nesterov=host.nesterov,
            warmup_steps=self.warmup_steps,
        )


def _taken(bank: Bank, host: Hyperparameters) -> Stacks | None:
    """What a step of ``bank`` reads and writes; it holds no gradients afterwards. ``None`` where it had none."""
    gradients: dict[str, Tensor] = {}
    for name, value in bank.params.items():
        if value.grad is not None:
            gradients[name], value.grad = value.grad, None
    if not gradients:
        return None
    moments, stateful = bank.moments, host.rule != "sgd"
    for store in (moments.first, moments.second) if stateful else (moments.first,):
        for name in gradients:
            if name not in store:
                store[name] = torch.zeros_like(bank.params[name])
    return Stacks(
        values=[bank.params[name] for name in gradients],
        gradients=list(gradients.values()),
        firsts=[moments.first[name] for name in gradients],
        seconds=[moments.second[name] for name in gradients] if stateful else [],
        steps=moments.steps,
        bad_steps=bank.bad_steps,
    )
