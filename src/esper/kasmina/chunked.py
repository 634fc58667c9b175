"""A layer of the host that says itself into how many chunks its output is divided."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from esper.errors import SiteError
from esper.kasmina.chunks import check_whole
from esper.kasmina.layer_kinds import kind_of
from esper.kasmina.layers import features, is_conv, is_growable


def out_features(layer: nn.Module) -> int:
    """Features of a layer's output: those of a layer that can be a site, else what its ``out_features`` says.

    Raises
    ------
    SiteError
        Neither is known, or not yet.
    """
    if any(map(is_lazy, getattr(layer, "_parameters", {}).values())):
        raise SiteError(
            f"a chunked layer must know its shapes, got {type(layer).__name__}; run it once on a batch first"
        )
    if is_growable(layer):
        return features(layer)[1]
    row = kind_of(layer)
    if row is not None and row.refusal(layer) is None:
        return row.features(layer)[1]
    for attribute in ("out_features", "out_channels"):
        size = getattr(layer, attribute, None)
        if isinstance(size, int):
            return size
    raise SiteError(
        f"a chunked layer must be of a kind that can grow or must have out_features or out_channels, got "
        f"{type(layer).__name__}; wrap a Linear, a convolution, a norm, an embedding, attention or a recurrent layer"
    )


def feature_axis(layer: nn.Module) -> int:
    """Axis of the layer's output that holds features: 1 for convolutions and channel norms, else the last one."""
    row = kind_of(layer)
    return 1 if is_conv(layer) or (row is not None and row.kind.channels_first) else -1


class ChunkedLayer(nn.Module):
    """A module around one layer, in its place in the host; it computes what the layer computes.

    Discovery gives the site that ends at the layer ``num_chunks`` chunks, whatever ``SitesConfig.chunks`` says, and
    offers the layer as a site of its own where no span ends at it.

    Parameters
    ----------
    base_layer:
        The layer; its parameters keep their names behind the prefix ``base_layer.``.
    chunks:
        Chunks wanted, at least 1; there are never more than output features.

    Raises
    ------
    SiteError
        The layer's output has no known number of features, or ``chunks`` is less than one or no whole number.
    """

    def __init__(self, base_layer: nn.Module, chunks: int) -> None:
        super().__init__()
        out_features(base_layer)  # raises for a layer whose output cannot be divided
        check_whole("chunks", chunks)
        if chunks < 1:
            raise SiteError(f"chunks must be at least 1, got {chunks}; use 1 for the whole layer")
        self.base_layer = base_layer
        self._chunks = chunks

    @property
    def num_chunks(self) -> int:
        """Chunks there are: as many as wanted, or one a feature."""
        return min(self._chunks, out_features(self.base_layer))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)


def chunked_layers(model: nn.Module) -> dict[int, int]:
    """Chunks wanted by layer, by the layer's id."""
    return {id(module.base_layer): module.num_chunks for module in model.modules() if isinstance(module, ChunkedLayer)}
