"""The policy: a transformer over one token for the run and one a site, a head for every factor of an action, a value.

The encoder knows no positions, so sites may come in any number and order. Every decision point is encoded once; the
heads then go through the factors, each seeing what the ones before have chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.errors import UnknownNameError
from esper.tamiyo.actions import BLUEPRINTS, FACTORS, SIZES, STRATEGIES, Operation
from esper.tamiyo.features import GLOBAL_COLUMNS, SITE_COLUMNS
from esper.tamiyo.neural.batch import Batch
from esper.tamiyo.neural.choice import Choice, choose


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a policy is."""

    width: int
    heads: int
    layers: int
    inner: int
    """Width inside the encoder's feed-forward parts."""


SIZES_BY_NAME = {
    "small": Size(width=64, heads=4, layers=2, inner=128),
    "plan": Size(width=256, heads=8, layers=4, inner=2048),
}
"""``plan`` is the specification's: d_model 256, 8 heads, 4 layers, and torch's own feed-forward width."""


def size_named(name: str) -> Size:
    """One of the sizes.

    Raises
    ------
    UnknownNameError
        No size has that name.
    """
    if name not in SIZES_BY_NAME:
        raise UnknownNameError(f"no policy size is called {name!r}; known: {', '.join(SIZES_BY_NAME)}")
    return SIZES_BY_NAME[name]


@dataclass(frozen=True)
class Decided:
    """What a policy says of N decision points; H factors.

    Attributes
    ----------
    actions:
        ``(N, H)`` int64, as :class:`~esper.tamiyo.actions.Action`.
    log_prob:
        ``(N,)``: of the composed action.
    entropy, free:
        ``(N, H)``: normalised entropy of each factor given those before it; whether there was anything to choose.
    value:
        ``(N,)``: the return that is expected from here.
    """

    actions: Tensor
    log_prob: Tensor
    entropy: Tensor
    free: Tensor
    value: Tensor


class Policy(nn.Module):
    """Actions and a value from decision points.

    Parameters
    ----------
    size:
        Name of a size (``small`` or ``plan``).
    seed:
        Its first weights are drawn from a generator of their own; the global stream stays as it is.
    """

    heads = FACTORS
    collate = staticmethod(Batch.of)

    def __init__(self, size: str = "small", *, seed: int = 0) -> None:
        super().__init__()
        self.size, shape = size, size_named(size)
        width = shape.width
        # Whatever defaults the process has set: a controller computes on the CPU in float32.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            self.world_in = nn.Linear(len(GLOBAL_COLUMNS), width)
            self.site_in = nn.Linear(len(SITE_COLUMNS), width)
            layer = nn.TransformerEncoderLayer(
                width, shape.heads, shape.inner, dropout=0.0, batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, shape.layers, nn.LayerNorm(width), enable_nested_tensor=False)
            self.operation = _head(width, len(Operation))
            self.asked = nn.Embedding(len(Operation), width)
            self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
            self.sized, self.formed = nn.Embedding(len(SIZES), width), nn.Embedding(len(BLUEPRINTS), width)
            self.growth, self.blueprint = _head(width, len(SIZES)), _head(width, len(BLUEPRINTS))
            self.strategy = _head(width, len(STRATEGIES))
            self.value = nn.Linear(width, 1)
            self._reset()
        self.float()

    def _reset(self) -> None:
        """Layers of an encoder are copies of one; and a first policy should be near uniform, its value near zero."""
        for block in self.encoder.layers:
            for parameter in block.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        nn.init.orthogonal_(self.query.weight, 0.1)
        nn.init.zeros_(self.query.bias)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def encode(self, batch: Batch) -> Tensor:
        """``(N, S + 1, width)``: tokens, the run as a whole first."""
        tokens = torch.cat([self.world_in(batch.world)[:, None], self.site_in(batch.sites)], dim=1)
        padding = batch.absent if bool(batch.absent.any()) else None
        return self.encoder(tokens, src_key_padding_mask=padding)

    def forward(self, batch: Batch, actions: Tensor | None = None, generator: torch.Generator | None = None) -> Decided:
        """Decide, or look at ``actions (N, 5)`` decided earlier.

        Without ``actions`` each factor is drawn with ``generator``, or is the likeliest one without it.
        """
        tokens = self.encode(batch)
        made: list[Choice] = []

        def make(logits: Tensor, valid: Tensor, asked: Tensor) -> Tensor:
            given = None if actions is None else actions[:, len(made)]
            made.append(choose(logits, valid, asked, chosen=given, generator=generator))
            return made[-1].value.clamp(min=0)

        rows = torch.arange(len(tokens), device=tokens.device)
        world = tokens[:, 0]
        operation = make(self.operation(world), batch.operation, torch.ones_like(rows, dtype=torch.bool))
        grows, culls = operation == Operation.GERMINATE, operation == Operation.CULL
        where = torch.where(culls[:, None], batch.cullable, batch.fits.any((2, 3)))
        site = make(self._point(tokens, world + self.asked(operation)), where, grows | culls)
        seen = world + tokens[rows, site]
        size = make(self.growth(seen), batch.fits[rows, site].any(2), grows)
        seen = seen + self.sized(size)
        form = make(self.blueprint(seen), batch.fits[rows, site, size], grows)
        make(self.strategy(seen + self.formed(form)), batch.strategy, grows)
        return Decided(
            actions=torch.stack([choice.value for choice in made], 1),
            log_prob=torch.stack([choice.log_prob for choice in made]).sum(0),
            entropy=torch.stack([choice.entropy for choice in made], 1),
            free=torch.stack([choice.free for choice in made], 1),
            value=self.value(world).squeeze(-1),
        )

    def _point(self, tokens: Tensor, asking: Tensor) -> Tensor:
        """``(N, S + 1)`` logits of the sites."""
        query, key = self.query(asking), self.key(tokens)
        return (key @ query[:, :, None]).squeeze(-1) / query.shape[-1] ** 0.5


def _head(width: int, num: int) -> nn.Sequential:
    last = nn.Linear(2 * width, num)
    nn.init.orthogonal_(last.weight, 0.01)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), last)
