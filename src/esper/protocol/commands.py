"""What a controller or an operator may ask for."""

from __future__ import annotations

import msgspec


class SeedPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One seed to germinate, or many of a kind. ``None``: the default for this site's kind and the host's optimizer.

    ``chunks`` empty means all free chunks of the site. ``width`` is the blueprint's size (hidden units or rank).

    ``seeds`` above 1 shares the chunks out, in their order and evenly, to so many seeds of that width each (at most
    one a chunk; what does not come out even stays dormant). ``keep`` is how many of them go on after the isolated
    training: those with the largest first-order gain on held-out batches; ``None`` keeps all.

    ``scale`` multiplies the random weights by which the branch's units read, before any fit; refused where there are
    none, or where the start makes weights of its own. ``lr_scale`` multiplies the learning rate of the seeds until
    they become permanent. ``design`` is the name of the design that this plan follows, if any; it is only recorded.
    """

    site: str
    chunks: tuple[int, ...] = ()
    blueprint: str | None = None
    width: int | None = None
    start: str | None = None
    strategy: str | None = None
    seeds: int = 1
    keep: int | None = None
    scale: float = 1.0
    lr_scale: float = 1.0
    design: str | None = None


class Germinate(msgspec.Struct, frozen=True, kw_only=True, tag="germinate"):
    """Germinate one cohort: its seeds are fitted, grafted and judged together."""

    seeds: tuple[SeedPlan, ...]
    reason: str = ""


class Cull(msgspec.Struct, frozen=True, kw_only=True, tag="cull"):
    """Take a cohort out: its alpha ramps to zero, then its storage is freed."""

    cohort: int
    reason: str


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """A person or a system withdraws a cohort; legal in every active state."""

    cohort: int
    reason: str


class RollBack(msgspec.Struct, frozen=True, kw_only=True, tag="roll_back"):
    """Remove a cohort at once, without a ramp.

    ``exact`` takes the whole training back to the snapshot from before its graft as well; refused where there is none.
    """

    cohort: int
    reason: str
    exact: bool = False


class Pause(msgspec.Struct, frozen=True, kw_only=True, tag="pause"):
    """Hold a cohort where it is: alpha stays as it is, timers stand still.

    ``None``: growth as a whole. The controller is not asked and nothing germinates until :class:`Resume`; cohorts that
    are alive go on.
    """

    cohort: int | None = None
    reason: str = ""


class Resume(msgspec.Struct, frozen=True, kw_only=True, tag="resume"):
    """Let a paused cohort go on, or with ``None`` growth as a whole."""

    cohort: int | None = None
    reason: str = ""


class SetBudget(msgspec.Struct, frozen=True, kw_only=True, tag="set_budget"):
    """Change the ceiling. ``None`` removes it."""

    params: int | None = None
    flops: float | None = None


class SetStrategy(msgspec.Struct, frozen=True, kw_only=True, tag="set_strategy"):
    """Change how a cohort's alpha moves from here on."""

    cohort: int
    strategy: str


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """Start no further cohort. Cohorts that are alive are brought to their end.

    ``emergency`` removes them at once instead; what is permanent stays. Training goes on either way.
    """

    reason: str
    emergency: bool = False


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, tag="snapshot"):
    """Write a checkpoint now; refused where the training keeps none."""

    reason: str = ""


Command = Germinate | Cull | Cancel | RollBack | Pause | Resume | SetBudget | SetStrategy | Stop | Snapshot
