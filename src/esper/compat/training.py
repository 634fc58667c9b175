"""``SelfSupervisedTrainer``: the isolated fit of :mod:`esper.kasmina.incubator`, for a module and data of your own."""

from __future__ import annotations

import enum

import torch
from torch import Tensor, nn

from esper.config import FitConfig
from esper.errors import ConfigError, DataError
from esper.kasmina.capture import Rows
from esper.kasmina.chunks import is_whole
from esper.kasmina.gates import Gate, sanity_gate
from esper.kasmina.geometry import Geometry
from esper.kasmina.incubator import FitReport, check, fit
from esper.kasmina.isolation import preserved_modes, preserved_rng
from esper.kasmina.starts.start import fit_and_check_rows
from esper.protocol import SiteKind

_PARTS = 4
"""A quarter of the data is held back for the check, as of a seed's captured batches."""


class TrainingResult(enum.Enum):
    """Whether a branch may be grafted."""

    SUCCESS = "success"
    FAILED = "failed"


class SelfSupervisedTrainer:
    """Train a branch to reproduce data, apart from any network: what a seed goes through in TRAINING.

    Parameters
    ----------
    config:
        ``steps`` of Adam at ``lr`` over ``batch_rows`` rows each; SUCCESS when at most the share
        ``reconstruction_threshold`` of the energy of rows that were held back is left unexplained.
    seed:
        Seed of the minibatches, together with a seed's id.

    Attributes
    ----------
    reports, gates:
        By seed id: how well the fit holds on held-back rows, and what the sanity gate said to it.
    """

    def __init__(self, config: FitConfig | None = None, *, seed: int = 0) -> None:
        if config is not None and not isinstance(config, FitConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(
                f"config must be an esper.FitConfig, got {type(config).__name__}; say FitConfig(steps=...)"
            )
        self.config = config or FitConfig()
        self.seed = seed
        self.reports: dict[int, FitReport] = {}
        self.gates: dict[int, Gate] = {}

    def train_seed(self, seed_id: int, blueprint: nn.Module, data: Tensor) -> TrainingResult:
        """Fit ``blueprint`` in place by mean squared error between ``blueprint(data)`` and ``data``.

        It runs in evaluation mode (dropout off, norm statistics as they are); flags and the global random streams are
        afterwards as before. Inside Esper the same fit runs on captured rows of a site.

        Parameters
        ----------
        seed_id:
            Not negative; the same id, data and weights give the same result.
        data:
            ``(N, ...)`` floats on the blueprint's device, N at least 2; the last quarter of the rows is held back.

        Raises
        ------
        DataError
            The data is no tensor of real numbers, there are fewer than two rows or no features, or a value is not
            finite.
        ConfigError
            ``seed_id`` is negative, or the blueprint is no module, has nothing to learn, or an output that has not the
            shape of its input.
        """
        _check_seed(seed_id)
        rows, branch = _rows(data), _ModuleBranch(blueprint, data)
        generator = torch.Generator().manual_seed((self.seed << 32) + seed_id)
        train, held = fit_and_check_rows(rows)
        settings = self.config
        with preserved_rng(), preserved_modes(blueprint):
            blueprint.eval()
            branch.check_shape(rows)
            fit(
                branch, train, train.y, steps=settings.steps, batch_rows=settings.batch_rows, lr=settings.lr,
                generator=generator,
            )  # fmt: skip
            report = check(branch, held, held.y, batch_rows=settings.batch_rows)
        gate = sanity_gate(
            "reconstruction", explained=report.explained, max_unexplained=settings.reconstruction_threshold,
            capture_age=0, max_age=0,
        )  # fmt: skip
        self.reports[seed_id], self.gates[seed_id] = report, gate
        return TrainingResult.SUCCESS if gate.passed else TrainingResult.FAILED


def _check_seed(seed_id: int) -> None:
    if not is_whole(seed_id) or seed_id < 0:
        raise ConfigError(f"seed_id must be a whole number of at least 0, got {seed_id!r}; count seeds from 0")


def _rows(data: Tensor) -> Rows:
    if not isinstance(data, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers need not type-check
        raise DataError(f"data must be a tensor, got {type(data).__name__}; use torch.as_tensor")
    if data.is_complex():
        raise DataError(f"data must hold real numbers, got {data.dtype}; use torch.view_as_real")
    if data.dim() >= 2 and 0 in data.shape[1:]:
        raise DataError(f"data must have features, got shape {tuple(data.shape)}; pass (N, features)")
    if data.dim() < 2 or data.shape[0] < 2:
        raise DataError(f"data must have at least two rows (N, features), got shape {tuple(data.shape)}")
    if not bool(torch.isfinite(data).all()):
        raise DataError("data must be finite, got NaN or infinity; clean it first")
    values = data.detach().float()
    index = torch.arange(data.shape[0], device=data.device)
    return Rows(values, values, values, index, index * min(_PARTS, data.shape[0]) // data.shape[0])


class _ModuleBranch:
    """A module in the form in which :func:`~esper.kasmina.incubator.fit` sees a bank of one slot."""

    def __init__(self, module: nn.Module, data: Tensor) -> None:
        if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # untyped callers
            raise ConfigError(f"a blueprint must be an nn.Module, got {type(module).__name__}; pass an instance of one")
        self.params: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self.params:
            raise ConfigError(f"a blueprint must have parameters to learn, {type(module).__name__} has none")
        features, kind = data.shape[1], SiteKind.CONV_LAYER if data.dim() == 4 else SiteKind.LINEAR_LAYER
        self.geometry = Geometry(
            kind=kind, in_features=features, out_features=features, hidden_features=0, head_bias=False
        )
        self.alpha = torch.ones(1)
        self.columns: Tensor | None = None
        self._module = module
        self._dtype = next(iter(self.params.values())).dtype

    @property
    def flops_per_row(self) -> float:
        """Two a parameter: exact for dense layers, an estimate for others."""
        return 2.0 * sum(value.numel() for value in self.params.values())

    @property
    def own_seats(self) -> None:
        """It has no columns of its own."""
        return

    def pick(self, x: Tensor, y: Tensor) -> Tensor:
        """It reads what it is to reproduce."""
        return x

    def set_learning(self, learning: bool) -> None:
        """The module's own flags stay; gradients never stay behind."""
        for value in self.params.values():
            value.grad = None

    def branch(
        self, x: Tensor, *, alpha: Tensor | None = None, training: bool, generator: torch.Generator | None
    ) -> Tensor:
        out = self._module(x.to(self._dtype))
        if not isinstance(out, Tensor):
            raise ConfigError(
                f"a blueprint must return one tensor, {type(self._module).__name__} returned a {type(out).__name__}; "
                "wrap it in a module that picks the output"
            )
        return out.float()

    @torch.no_grad()
    def check_shape(self, rows: Rows) -> None:
        out = self.branch(rows.x[:2], training=False, generator=None)
        if out.shape != rows.x[:2].shape:
            raise ConfigError(
                f"a blueprint must reproduce its input, got output {tuple(out.shape)} for input "
                f"{tuple(rows.x[:2].shape)}; end it in as many features as the data has"
            )
