"""``module``: branches that are the user's own modules.

    branch(y) = g * module(y)

The gain g (one number a column; ReZero: Bachlechner et al. 2020) makes any module start from a zero output: it learns
first, then everything behind it. Seeds of one size run as one call (``torch.func.vmap``) where the module allows it,
one by one where it does not. Cost is measured, not declared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap  # type: ignore[reportPrivateImportUsage]

from esper.errors import EsperError
from esper.kasmina.blueprints.blueprint import BLUEPRINTS, Axes, Blueprint, Cost, Port, Tensors
from esper.kasmina.geometry import Geometry
from esper.kasmina.isolation import preserved_rng
from esper.kasmina.ledger import forward_flops
from esper.kasmina.plain import traced
from esper.protocol import SiteKind

Factory = Callable[[int, int], nn.Module]
AnyFactory = TypeVar("AnyFactory", bound=Factory)

_PREFIX = "module."
FEATURES_LAST = (
    SiteKind.LINEAR_LAYER,
    SiteKind.NORM_LAYER,
    SiteKind.EMBEDDING_LAYER,
    SiteKind.ATTENTION_LAYER,
    SiteKind.RECURRENT_LAYER,
)


def register_module(
    name: str, *, kinds: Iterable[SiteKind] = FEATURES_LAST, reads: str = "output"
) -> Callable[[AnyFactory], AnyFactory]:
    """Decorator: file a module class, or a function that makes modules, as the blueprint ``name``.

    The factory is called as ``factory(in_features, out_features)``. Its modules map a tensor shaped like the site's
    output (``reads="output"``) or input (``"input"``), with ``in_features`` on the feature axis, to one of
    ``out_features`` there (channels on axis 1 for convolutions and channel norms, else the last axis). They must not
    draw random numbers: dropout would advance the host's random stream.

    Raises
    ------
    EsperError
        For kinds that are spans, or an embedding that would be read by its token ids.
    ConfigError
        The name is taken. A factory that is defined anew under its own name replaces the earlier one.
    """
    file = BLUEPRINTS.register(name)
    named = list(kinds)
    if not set(named) <= set(SiteKind):
        known = ", ".join(SiteKind)
        raise EsperError(f"kinds must be of esper.protocol.SiteKind, got {', '.join(map(str, named))}; known: {known}")
    chosen = frozenset(map(SiteKind, named))
    unfit = [k for k in chosen if k.is_span or (k is SiteKind.EMBEDDING_LAYER and reads == "input")]
    if unfit or not chosen or reads not in ("input", "output"):
        raise EsperError(
            f"a module sits on layer kinds and reads 'output' or 'input' (an embedding's input are ids, not features), "
            f"got kinds {sorted(chosen)} and reads={reads!r}; choose other kinds, or reads='output'"
        )

    def decorator(factory: AnyFactory) -> AnyFactory:
        known = type(BLUEPRINTS[name]) if name in BLUEPRINTS else None
        if getattr(known, "factory", None) is not factory:
            known = _blueprint_of(factory, name, kinds=chosen, port=Port(reads))
        assert known is not None
        file(known)
        return factory

    return decorator


def _blueprint_of(factory: Factory, name: str, **attributes: object) -> type[ModuleBlueprint]:
    """A class that counts as the factory's own: by its module and name the registry tells a cell that is run again."""
    named = {"__module__": getattr(factory, "__module__", __name__), "__doc__": __doc__}
    named["__qualname__"] = getattr(factory, "__qualname__", name)
    return type(name, (ModuleBlueprint,), {"factory": staticmethod(factory), **attributes, **named})


class ModuleBlueprint(Blueprint):
    """Parameters: ``gain`` (S, K), and ``module.NAME`` (S, ...) for each of the module's own; buffers likewise."""

    factory: ClassVar[Factory]
    axes = {"gain": Axes(column=1)}  # noqa: RUF012
    absorbs = False
    fits_rows = False

    def __init__(self) -> None:
        self._templates: dict[tuple[int, int], nn.Module] = {}
        self._costs: dict[tuple[object, ...], Cost] = {}
        self._stacks: dict[tuple[object, ...], bool] = {}

    def refusal(self, geometry: Geometry) -> str | None:
        features = self._features(geometry)
        template = self._template(features, geometry.out_features)
        random = [type(m).__name__ for m in template.modules() if _drops(m)]
        if random:
            return f"its {random[0]} would advance the host's random stream; build it without dropout"
        x = self._example(geometry)
        with torch.no_grad(), preserved_rng():
            try:
                out = template.eval()(x)
            except (RuntimeError, TypeError, ValueError) as error:
                return f"it does not take what the site offers, shape {tuple(x.shape)}: {error}"
        wanted = list(x.shape if self.port is Port.OUTPUT else (*geometry.y_shape,))
        wanted[0], wanted[geometry.feature_axis] = x.shape[0], geometry.out_features
        if not isinstance(out, Tensor) or list(out.shape) != wanted:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            return f"it must return shape {tuple(wanted)} for {tuple(x.shape)}, got {got}; change its factory"
        return None

    def resolve_units(self, geometry: Geometry, asked: int | None) -> int:
        return 1

    def folds(self, geometry: Geometry) -> bool:
        return False

    def init(
        self, geometry: Geometry, *, num_slots: int, units: int, columns: int, reads: int, generator: torch.Generator
    ) -> tuple[Tensors, Tensors]:
        seed = int(torch.randint(1 << 62, (), generator=generator))
        with preserved_rng():
            torch.manual_seed(seed)
            modules = [self._make(self._features(geometry), columns) for _ in range(num_slots)]
        params, buffers = stack_module_state(modules)  # type: ignore[reportUnknownArgumentType]
        stacked = {_PREFIX + name: value.detach().float() for name, value in params.items()}
        return {"gain": torch.ones(num_slots, columns), **stacked}, {_PREFIX + k: v for k, v in buffers.items()}

    def hidden(
        self,
        params: Tensors,
        buffers: Tensors,
        x: Tensor,
        geometry: Geometry,
        *,
        training: bool,
        generator: torch.Generator | None,
        norm_momentum: float | None = None,
    ) -> Tensor:
        slots, columns = params["gain"].shape
        template = self._template(x.shape[geometry.feature_axis], columns)
        # momentum of norms inside is theirs; while norms are recalibrated they run on batch statistics, like the host's
        template.train(training or norm_momentum is not None)
        own = {name.removeprefix(_PREFIX): value.to(x.dtype) for name, value in params.items() if name != "gain"}
        kept = {name.removeprefix(_PREFIX): value for name, value in buffers.items()}
        if slots > 1 and self._is_stackable(template, own, kept, x, geometry):
            out = vmap(_call(template), in_dims=(0, 0, None))(own, kept, x)
        else:
            one_by_one = [
                _call(template)({k: v[s] for k, v in own.items()}, {k: v[s] for k, v in kept.items()}, x)
                for s in range(slots)
            ]
            out = torch.stack(one_by_one)
        if geometry.feature_axis == 1:
            return out.movedim(0, 1).flatten(1, 2)
        return out.movedim(0, -2).flatten(-2)

    def project(self, params: Tensors, h: Tensor, geometry: Geometry, *, alpha: Tensor) -> Tensor:
        gain = (params["gain"] * alpha[:, None]).to(h.dtype).flatten()
        return h * gain.view(-1, *[1] * (h.dim() - 2)) if geometry.feature_axis == 1 else h * gain

    def cost(self, geometry: Geometry, *, units: int, columns: int, reads: int) -> Cost:
        """Measured: parameters counted, FLOPs of the matrix products and convolutions in one call."""
        key = (columns, geometry.kind, geometry.x_shape, geometry.y_shape)
        if key not in self._costs:
            template, x = self._template(self._features(geometry), columns).eval(), self._example(geometry)
            with torch.no_grad(), preserved_rng():
                out = template(x)
                flops = forward_flops(template, lambda: template(x))
            params = columns + sum(p.numel() for p in template.parameters())
            self._costs[key] = Cost(params, flops * columns / max(1, out.numel()))
        return self._costs[key]

    def plain(self, params: Tensors, buffers: Tensors, geometry: Geometry) -> nn.Module:
        gain = params["gain"][0]
        with preserved_rng():
            module = self._make(self._features(geometry), gain.shape[0])
        own = {name: value for name, value in {**params, **buffers}.items() if name != "gain"}
        module.load_state_dict({name.removeprefix(_PREFIX): value[0].detach() for name, value in own.items()})
        shape = (-1, *[1] * (len(geometry.y_shape) - 2)) if geometry.feature_axis == 1 else (-1,)
        return traced(_Gained(module, gain.detach().view(shape)), "Gained")

    # ---------------------------------------------------------------------------------------------- how

    def _make(self, in_features: int, out_features: int) -> nn.Module:
        made = type(self).factory(in_features, out_features)
        if not isinstance(made, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers need not type-check
            raise TypeError(f"its factory must return an nn.Module, got {type(made).__name__}")
        return made

    def _features(self, geometry: Geometry) -> int:
        return geometry.in_features if self.port is Port.INPUT else geometry.out_features

    def _example(self, geometry: Geometry) -> Tensor:
        """Zeros shaped like what it reads, two samples where there are several."""
        shape = list(geometry.x_shape if self.port is Port.INPUT else geometry.y_shape)
        shape[geometry.sample_axis] = min(2, shape[geometry.sample_axis])
        return torch.zeros(shape)

    def _template(self, in_features: int, out_features: int) -> nn.Module:
        """A module whose parameters are never used: what runs is called with those of the slots."""
        key = (in_features, out_features)
        if key not in self._templates:
            with preserved_rng():
                self._templates[key] = self._make(in_features, out_features)
        return self._templates[key]

    def _is_stackable(
        self, template: nn.Module, params: Tensors, buffers: Tensors, x: Tensor, geometry: Geometry
    ) -> bool:
        """Whether its seeds can run as one call: tried once a size, on one sample (some modules write in place)."""
        key = (x.shape[geometry.feature_axis], params[next(iter(params))].shape if params else (), template.training)
        if key not in self._stacks:
            few = x.detach().narrow(geometry.sample_axis, 0, min(2, x.shape[geometry.sample_axis]))
            copies = {name: value.clone() for name, value in buffers.items()}
            try:
                with torch.no_grad():
                    vmap(_call(template), in_dims=(0, 0, None))(params, copies, few)
                self._stacks[key] = True
            except (RuntimeError, ValueError, NotImplementedError):
                self._stacks[key] = False
        return self._stacks[key]


def _drops(module: nn.Module) -> bool:
    """Whether a module of torch's own draws random numbers while it trains."""
    if isinstance(module, nn.modules.dropout._DropoutNd):  # pyright: ignore[reportPrivateUsage]  # what dropouts share
        return module.p > 0
    return isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0


def _call(template: nn.Module) -> Callable[[Tensors, Tensors, Tensor], Tensor]:
    def run(params: Tensors, buffers: Tensors, x: Tensor) -> Any:
        return functional_call(template, (params, buffers), (x,))  # type: ignore[reportArgumentType]

    return run


class _Gained(nn.Module):
    def __init__(self, module: nn.Module, gain: Tensor) -> None:
        super().__init__()
        self.module, self.gain = module, nn.Parameter(gain.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) * self.gain
