"""The host's side of the clock: real optimizer steps, learning rates, loss scale. It only listens."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from esper.errors import AttachError
from esper.kasmina.discovery import SitePlan
from esper.kasmina.layer_kinds import weight_name, weight_of
from esper.kasmina.optim import Hyperparameters, approximation, hyperparameters, is_adaptive, refusal

_RULE = ("lr", "weight_decay", "betas", "eps", "momentum", "nesterov", "decoupled_weight_decay")
"""What of a parameter group says how it steps."""


@dataclass
class _Group:
    """One parameter group and the sites whose weights are in it."""

    optimizer: Optimizer
    number: int
    sites: list[str] = field(default_factory=list[str])
    lr: object = None
    """Its learning rate, as it was read last."""
    _seen: tuple[object, ...] = ()

    def has_changed(self) -> bool:
        """Whether its settings are others than at the last call; a tensor may have changed unseen."""
        group = self.optimizer.param_groups[self.number]
        self.lr = group["lr"]
        if isinstance(self.lr, Tensor):
            return True
        found = tuple([group.get(name) for name in _RULE])
        if found == self._seen:
            return False
        self._seen = found
        return True

    def forget(self) -> None:
        """Take the settings for changed at the next call."""
        self._seen = ()


class HostClock:
    """Counts real steps of the first optimizer and notes, for each site, what its optimizer does.

    Parameters
    ----------
    optimizers:
        The user's optimizers, in order; the first one's steps are the clock.
    tracked:
        Whatever the user named with ``track=``; a GradScaler among it tells the loss scale. One that is not among it is
        found when it takes its first step.
    """

    def __init__(self, optimizers: Sequence[Optimizer], plans: Iterable[SitePlan], tracked: Iterable[Any]) -> None:
        self.optimizers = list(optimizers)
        reasons = [reason for optimizer in self.optimizers if (reason := refusal(optimizer)) is not None]
        if reasons:
            raise AttachError(reasons[0])
        self.steps = 0
        self.backwards_since_step = 0
        self.passes = 0
        """Backward passes that made the last step of those in which they were counted."""
        self.hosts: dict[str, Hyperparameters] = {}
        self._had_gradient: set[str] = set()
        self._scaler = next((t for t in tracked if hasattr(t, "get_scale") and hasattr(t, "unscale_")), None)
        self._scale_at_step = 1.0
        self._last_scale = 0.0
        self._measured: tuple[str, ...] = ()
        self._norms: dict[str, Tensor] = {}
        self.rests = False
        """Whether only steps are counted at present (:meth:`rest`)."""
        self._may_rest = self._was_traced = False
        self._watch: Any = None
        self.follow(plans)
        self._handles: list[Any] = [
            self.optimizers[0].register_step_pre_hook(self._before_step),
            self.optimizers[0].register_step_post_hook(self._after_step),
            *(optimizer.register_step_pre_hook(self._measure_gradients) for optimizer in self.optimizers[1:]),
        ]

    def follow(self, plans: Iterable[SitePlan]) -> None:
        """Listen to these sites from now on.

        Raises
        ------
        AttachError
            A site's weight is in none of the optimizers.
        """
        self._plans = {plan.info.name: plan for plan in plans}
        self._groups = {name: self._find_group(plan) for name, plan in self._plans.items()}
        shared: dict[tuple[int, int], _Group] = {}
        for name, (optimizer, number) in self._groups.items():
            shared.setdefault((id(optimizer), number), _Group(optimizer, number)).sites.append(name)
        self._shared = tuple(shared.values())
        self.let_go()
        self.rests = self._may_rest = False
        self._watched_steps = 0
        watched = next(iter(self._plans.values())).weight
        self._watch = watched.register_post_accumulate_grad_hook(self._after_backward)
        self.note_hyperparameters()

    def let_go(self) -> None:
        """Take the hook off the host's weight, so that its layers may change; :meth:`follow` puts it back."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _find_group(self, plan: SitePlan) -> tuple[Optimizer, int]:
        weight = plan.weight
        for optimizer in self.optimizers:
            for number, group in enumerate(optimizer.param_groups):
                if any(parameter is weight for parameter in group["params"]):
                    return optimizer, number
        raise AttachError(
            f"the optimizers must own the model's parameters, {plan.tail_name}.{weight_name(plan.tail)} is in none of "
            f"{len(self.optimizers)}; build the optimizer from model.parameters() before the Grower and pass that one"
        )

    @property
    def approximations(self) -> list[str]:
        """What to tell the user of optimizers whose rule grown units cannot repeat."""
        return [text for optimizer in self.optimizers if (text := approximation(optimizer)) is not None]

    @property
    def adaptive(self) -> bool:
        return is_adaptive(self.optimizers[0])

    def rest(self) -> None:
        """Until :meth:`rouse` only count steps, and follow the learning rates, if that is safe by now.

        Everything else that is read before a step is for what learns beside the host. A scaler that comes in the
        meantime is found afterwards.
        """
        self._may_rest = True
        self.rests = (
            self._watch is None  # backward passes are counted at first
            and self._scaler is None
            and not (self._measured or self._was_traced)
            and not any(isinstance(shared.lr, Tensor) for shared in self._shared)
        )

    def rouse(self) -> None:
        """Read everything from the next step on, and what has been missed of the last one."""
        self._may_rest = False
        if self.rests:
            self.rests = False
            self.note_hyperparameters()

    def overflowed(self, *, stepped: bool) -> bool:
        """Whether the GradScaler has skipped a step since the last call: it lowers its scale only then.

        ``stepped`` says whether the host has stepped since: the scale of that step then tells, for ``update()`` may
        come before or after :meth:`Grower.step`.
        """
        if self._scaler is None:
            return False
        before, self._last_scale = self._last_scale, float(self._scaler.get_scale())
        return (self._scale_at_step if stepped else self._last_scale) < before

    @property
    def has_scaler(self) -> bool:
        return self._scaler is not None

    @property
    def inverse_scale(self) -> float:
        """Undoes the loss scale of the step just taken."""
        return 1.0 / self._scale_at_step

    def weights(self, site: str) -> tuple[Tensor, ...]:
        """The host's weights at a site, for strategies that watch their drift."""
        plan = self._plans[site]
        modules = dict.fromkeys(module for module in (plan.head, plan.up, plan.tail) if module is not None)
        return tuple(weight_of(module) for module in modules)

    def measure_gradients(self, sites: Collection[str]) -> None:
        """Name the sites whose gradient norm is wanted in the next step; earlier norms are forgotten."""
        self._measured = tuple(sites)
        self._norms.clear()

    def gradient_norm(self, site: str) -> float | None:
        """L2 norm of the gradient of the host's weights at a site in the step just taken, the loss scale divided out.

        ``None`` if it was not asked for before that step, or if there was no gradient. Waits for the device.
        """
        norm = self._norms.get(site)
        return None if norm is None else float(norm)

    def gradients_live(self, site: str) -> bool:
        """Whether a site's weight had a gradient in the step just taken."""
        return site in self._had_gradient

    def note_hyperparameters(self) -> None:
        """Read each site's group; called before each real step, when the user's scheduler has set it."""
        for shared in self._shared:
            if shared.has_changed():
                read = hyperparameters(shared.optimizer, shared.optimizer.param_groups[shared.number])
                for name in shared.sites:
                    before = self.hosts[name].peak_lr if name in self.hosts else 0.0
                    self.hosts[name] = replace(read, peak_lr=max(before, read.lr))
        if self.steps == 0:  # asked for after the first step only
            self._had_gradient = {name for name, plan in self._plans.items() if plan.weight.grad is not None}

    def _measure_gradients(self, optimizer: Optimizer, *_: Any) -> None:
        """Read what this optimizer is about to use: afterwards the user may have zeroed it."""
        for site in self._measured:
            gradients = [weight.grad for weight in self.weights(site) if weight.grad is not None]
            if gradients and self._groups[site][0] is optimizer:
                norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
                total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
                # a fused optimizer divides by the loss scale inside its step
                scale: Tensor | None = getattr(optimizer, "grad_scale", None)
                self._norms[site] = total if scale is None else total / scale.to(total.device)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self.rests:
            return
        self.note_hyperparameters()
        if torch.compiler.is_compiling():
            self._was_traced = True
        elif self._scaler is None:
            self._scaler = _calling_scaler()
        if self._scaler is not None:
            self._scale_at_step = float(self._scaler.get_scale())
        if self._measured:
            self._measure_gradients(optimizer)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self.rests:
            self._count_at_rest(optimizer)
            return
        if self._watched_steps == _WATCHED_STEPS:
            self.let_go()
            if self._may_rest:
                self.rest()
        self._watched_steps += 1
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer skips by itself: the scaler tells it here
        if found_inf is None or float(found_inf) == 0.0:
            self.steps += 1
        if self.backwards_since_step:
            self.passes = self.backwards_since_step
        self.backwards_since_step = 0

    def _count_at_rest(self, optimizer: Optimizer) -> None:
        for shared in self._shared:
            lr = shared.optimizer.param_groups[shared.number]["lr"]
            if lr is shared.lr and isinstance(lr, float):
                continue
            if isinstance(lr, torch.Tensor) or lr != shared.lr:  # a tensor is changed in place
                self.note_hyperparameters()  # a scheduler has set it: the largest one must not be missed
                break
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or float(found_inf) == 0.0:
            self.steps += 1

    def _after_backward(self, _: torch.Tensor) -> None:
        self.backwards_since_step += 1

    def state(self) -> dict[str, Any]:
        """What was counted and noted, as a state tree; the tensors are its own, not copies."""
        return {
            "steps": self.steps,
            "backwards_since_step": self.backwards_since_step,
            "hosts": {name: asdict(host) for name, host in self.hosts.items()},
            "scale_at_step": self._scale_at_step,
            "last_scale": self._last_scale,
            "measured": self._measured,
            "norms": dict(self._norms),
            "had_gradient": sorted(self._had_gradient),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told; it takes over the tensors."""
        hosts = {name: Hyperparameters(**host) for name, host in state["hosts"].items()}
        self.steps, self.backwards_since_step = state["steps"], state["backwards_since_step"]
        self.hosts.clear()
        self.hosts.update(hosts)
        self._scale_at_step, self._last_scale = state["scale_at_step"], state["last_scale"]
        self._measured = state["measured"]
        self._norms = {name: norm.to(weight_of(self._plans[name].tail).device) for name, norm in state["norms"].items()}
        self._had_gradient = set(state["had_gradient"])
        self.rests = self._may_rest = False
        for shared in self._shared:
            shared.forget()

    def detach(self) -> None:
        self.let_go()
        for handle in self._handles:
            handle.remove()
        self._handles = []


_WATCHED_STEPS = 20
"""Steps in which backward passes are counted: who calls the grower at the wrong place does so from the start."""
_FRAMES = 16
"""How far up the stack a scaler is looked for: a scheduler and a trainer may have wrapped the optimizer's step."""


def _calling_scaler() -> GradScaler | None:
    """The GradScaler that is calling the optimizer's step, if one is.

    Gradients are unscaled by then and, unless the optimizer is fused, nothing on it tells of the scale; grown units,
    which the scaler does not know, would learn from gradients that are still scaled.
    """
    frame = inspect.currentframe()
    for _ in range(_FRAMES):
        frame = None if frame is None else frame.f_back
        if frame is None:
            return None
        if frame.f_code.co_name == "step":
            caller = frame.f_locals.get("self")
            if isinstance(caller, GradScaler):
                return caller
    return None


def read_loss(loss: Tensor | float) -> Tensor | float:
    """A copy of the user's loss: a static buffer is overwritten by the next step.

    A number, unless it lies on a device that would have to be waited for.
    """
    if not isinstance(loss, Tensor):
        try:
            return float(loss)
        except (TypeError, ValueError):
            raise AttachError(
                f"grower.step(loss) takes the training loss, one number, got {type(loss).__name__}; pass the value "
                "on which backward() was called"
            ) from None
    if loss.numel() != 1:
        raise AttachError(
            f"grower.step(loss) takes one number, got a tensor of shape {tuple(loss.shape)}; pass the mean loss"
        )
    if loss.is_cpu:
        return float(loss.item())
    copied = loss.detach().clone()
    return copied if copied.dim() == 0 else copied.reshape(())


def stacked(losses: Collection[Tensor | float]) -> Tensor:
    """Losses ``(N,)`` fp32, oldest first, where the newest one lies (restored ones come from the CPU)."""
    values = list(losses)
    device = values[-1].device if isinstance(values[-1], Tensor) else torch.device("cpu")
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=torch.float32)
    return torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])


def as_tensors(losses: Iterable[Tensor | float]) -> list[Tensor]:
    """The same for a state tree."""
    return [loss if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64) for loss in losses]
