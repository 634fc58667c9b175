"""``ChunkedKasminaLayer``: a layer that names its own number of chunks and shows the seeds on them."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.compat.chunks import ChunkManager
from esper.errors import SiteError
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.chunked import ChunkedLayer, feature_axis, out_features
from esper.kasmina.seeds import SeedTable
from esper.protocol import Germinate, SeedPlan

if TYPE_CHECKING:
    from esper.grower import Grower

_logger = logging.getLogger("esper.compat")


class ChunkedKasminaLayer(ChunkedLayer):
    """A module around one layer, in its place in the model: :class:`~esper.kasmina.chunked.ChunkedLayer`.

    It computes ``base_layer(x)`` and nothing else. Dormant chunks cost nothing and change no bit, so there is no
    splitting to pay for; what seeds add comes from the hooks of the Grower that is attached to the whole model. The
    Grower finds the layer by itself and divides its output into ``chunk_manager.num_chunks`` chunks.

    Parameters
    ----------
    base_layer:
        The layer; its parameters keep their names behind the prefix ``base_layer.``.
    chunks_per_layer:
        Chunks wanted. A layer has at most as many as output features: with more asked for it has one a feature, which
        is logged once for each such pair of numbers (logger ``esper.compat``).

    Raises
    ------
    SiteError
        The layer's output has no known number of features, or ``chunks_per_layer`` is less than one or no whole number.
    """

    def __init__(self, base_layer: nn.Module, chunks_per_layer: int = 1000) -> None:
        super().__init__(base_layer, chunks_per_layer)
        self._grower: Grower | None = None
        if self.num_chunks < chunks_per_layer:
            _say_clamped(chunks_per_layer, self.num_chunks)

    @property
    def chunk_manager(self) -> ChunkManager:
        """Splits this layer's output into its chunks."""
        return ChunkManager(out_features(self.base_layer), self.num_chunks, dim=feature_axis(self.base_layer))

    @property
    def state_tensor(self) -> Tensor:
        """``(C, 4)`` int32 on the CPU, a copy: state, blueprint, epochs in state and strategy of each chunk.

        A dormant chunk's row is ``[0, -1, 0, -1]``; before :meth:`connect` all of them are.
        """
        if self._grower is None:
            table, index = SeedTable([out_features(self.base_layer)], [self.num_chunks]), 0
        else:
            table, index = self._grower.kasmina.table, self._grower.kasmina.index[self.site]
        return torch.from_numpy(table.state_tensor(index))

    # ---------------------------------------------------------------------------------------------- with a Grower

    def connect(self, grower: Grower) -> str:
        """Show the seeds of this Grower from now on, and pass requests to it; returns the name of the layer's site.

        Raises
        ------
        SiteError
            The Grower has no site that ends at this layer.
        """
        names = [name for name, plan in grower.kasmina.plans.items() if plan.tail is self.base_layer]
        if not names:
            raise SiteError(
                f"a chunked layer must end one of the Grower's sites, {self._why_not(grower)}; see grower.sites()"
            )
        self._grower, self._site = grower, names[0]
        return self._site

    def _why_not(self, grower: Grower) -> str:
        name = next((name for name, module in grower.model.named_modules() if module is self.base_layer), None)
        if name is None:
            return f"this {type(self.base_layer).__name__} is in another model"
        reason = next((item.reason for item in grower.discovery.skipped if item.name == name), "it is excluded")
        return f"{name!r} ends none ({reason})"

    @property
    def site(self) -> str:
        """Name of the layer's site. Raises ``SiteError`` before :meth:`connect`."""
        if self._grower is None:
            raise SiteError("a chunked layer has a site only under a Grower, got none; call connect(grower) first")
        return self._site

    def request_germination(
        self, seed_id: int, blueprint_id: str | int | None = None, grafting_strategy: str | None = None
    ) -> bool:
        """Ask for a seed on chunk ``seed_id``; safe from any thread, judged in the next ``grower.step``.

        Parameters
        ----------
        blueprint_id:
            Registered name, or its code as in :attr:`state_tensor`; ``None`` takes the default of the site.
        grafting_strategy:
            Registered name; ``None`` takes the configured one.

        Returns
        -------
        Whether the request was queued. It is not when the chunk has a seed or rests under an embargo.

        Raises
        ------
        SiteError
            Before :meth:`connect`, or the chunk does not exist.
        """
        site, grower = self.site, self._grower
        assert grower is not None  # site has raised otherwise
        if not 0 <= seed_id < self.num_chunks:
            raise SiteError(f"seed_id must be between 0 and {self.num_chunks - 1}, got {seed_id}; see num_chunks")
        if seed_id not in grower.kasmina.table.free_chunks(grower.kasmina.index[site], grower.clock.steps):
            return False
        blueprint = BLUEPRINTS.name(blueprint_id) if isinstance(blueprint_id, int) else blueprint_id
        plan = SeedPlan(site=site, chunks=(seed_id,), blueprint=blueprint, strategy=grafting_strategy)
        grower.submit(Germinate(seeds=(plan,), reason="request_germination"))
        return True

    def __getstate__(self) -> dict[str, Any]:
        """A copied or saved layer does not take its Grower along."""
        return {**self.__dict__, "_grower": None}


def connect(grower: Grower) -> dict[str, str]:
    """Connect every chunked layer of a Grower's model; returns their sites by the layers' names.

    Raises
    ------
    SiteError
        A layer ends no site (see :meth:`ChunkedKasminaLayer.connect`).
    """
    layers = {name: module for name, module in grower.model.named_modules() if isinstance(module, ChunkedKasminaLayer)}
    return {name: layer.connect(grower) for name, layer in layers.items()}


def unwrap(model: nn.Module) -> nn.Module:
    """Put every chunked layer's base layer back in its place; returns the model (or the layer, where it was one).

    For what :meth:`esper.Grower.export` returns: the wrappers are in the copy as they were in the model.
    """
    if isinstance(model, ChunkedLayer):
        return unwrap(model.base_layer)
    for name, child in list(model.named_children()):
        setattr(model, name, unwrap(child))
    return model


@functools.cache
def _say_clamped(wanted: int, features: int) -> None:
    _logger.warning(
        "chunks_per_layer must be at most the layer's %d output features, got %d; going on with %d, one a feature",
        features, wanted, features,
    )  # fmt: skip
