"""``gromo`` (0.1.0): TINY (Verbockhaven et al., 2024) and GradMax (Evci et al., 2022) by its documented loop.

The loop: statistics over batches, the optimal update, a line search of its scale on those batches, the change. The
package leaves open when to grow and by how much; its caller says so. Neither method can add more units at a time than
the rank of its statistics (the layer's outputs among others). An optimizer holds tensors that are no longer the model's
after a growth, so its owner makes it anew.

Three things differ from the package's examples, each in the peer's favour: no singular value is too small to be used,
the line search does not try a scale of zero (units of no weight at all never learn), and ReLU has slope 1 at zero.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SEARCH_BATCHES = 8
SCALES = (1.0, 0.5, 0.1)  # the largest wins a tie: GradMax's units change nothing at first, whatever their scale
THRESHOLD = 0.0  # of singular values; the package's default (1e-3) fits sums of gradients, and adds one unit on means
METHODS: dict[str, dict[str, bool]] = {
    "gromo_tiny": {
        "compute_delta": False, "use_covariance": True, "alpha_zero": False, "omega_zero": False,
        "use_projection": True, "ignore_singular_values": False,
    },
    "gromo_gradmax": {
        "compute_delta": False, "use_covariance": False, "alpha_zero": True, "omega_zero": False,
        "use_projection": False, "ignore_singular_values": True,
    },
}  # fmt: skip


class ReLU(nn.Module):
    """ReLU with slope 1 at zero, as GradMax asks for: its units start with inputs of zero and would stay dead."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0, x, torch.zeros_like(x))


class Extended(nn.Module):
    """The model with the update that is being tried, for the line search."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.extended_forward(x)


def growing_mlp(in_features: int, width: int, depth: int, outputs: int, device: torch.device) -> Any:
    """The package's MLP: ``depth`` inner layers of ``width`` units, weights from the global stream.

    Raises
    ------
    ModuleNotFoundError
        Without the package; the extra ``bench`` brings it.
    """
    container = importlib.import_module("gromo.containers.growing_mlp")
    return container.GrowingMLP(
        in_features=in_features, out_features=outputs, hidden_size=width, number_hidden_layers=depth,
        activation=ReLU(), device=device,
    )  # fmt: skip


def widths(model: Any) -> tuple[int, ...]:
    """Inner widths as they are now."""
    return tuple(layer.out_features for layer in model.layers[:-1])


def grow_layer(
    model: Any,
    index: int,
    units: int,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    method: str,
) -> None:
    """Grow inner layer ``index`` by up to ``units``, with statistics from ``batches``; ``method``: one of
    :data:`METHODS`."""
    model.eval()
    model.set_growing_layers(index=index)
    model.init_computation()
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        model.update_computation()
    model.compute_optimal_updates(maximum_added_neurons=units, statistical_threshold=THRESHOLD, **METHODS[method])
    model.dummy_select_update()
    extended = Extended(model)
    losses: list[float] = []
    with torch.no_grad():
        for scale in SCALES:
            model.set_scaling_factor(scale)
            losses.append(sum(float(loss(extended, batch)) for batch in batches[:SEARCH_BATCHES]))
    model.set_scaling_factor(SCALES[losses.index(min(losses))])
    model.apply_change()
    model.reset_computation()
    model.zero_grad(set_to_none=True)
    model.train()


@contextmanager
def quiet() -> Generator[None]:
    """Without what the package says of singular matrices at every growth."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"gromo\.")
        yield
