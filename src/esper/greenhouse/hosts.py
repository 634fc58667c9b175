"""Many hosts of one family, trained side by side in one process: what a grower does to one host, done to a stack.

::

    y = body(weights, x)                    # one batched product a layer; grown units times alpha
    loss, gradients, AdamW                  # host and grown units, each group with its own step count and warm-up
    advance                                 # cohorts by their state's gate (stages.py)
    every `interval` steps: held-out loss   # then the caller observes and applies commands

Everything random follows from a host's own spec, so what happens to a host does not depend on its neighbours (beyond
rounding: products are summed in another order). One thread is fastest: ``torch.set_num_threads(1)``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from esper.config import Config
from esper.errors import ConfigError
from esper.evidence.acceptance import Acceptance, splits_of
from esper.greenhouse.bodies.body import Pass
from esper.greenhouse.bodies.kinds import body_of
from esper.greenhouse.family import (
    HELD_OUT_BATCHES,
    Family,
    HostSpec,
    batch_order,
    data_of,
    family_named,
    weights_stream,
)
from esper.greenhouse.isolated import Units
from esper.greenhouse.layout import HOST, Weights
from esper.greenhouse.life import Capture, Life
from esper.greenhouse.network import Network
from esper.greenhouse.stack import BETAS, Rates, adamw, losses, output_gradient
from esper.kasmina.ops.telemetry.reference import row_step


class Hosts:
    """A stack of N hosts of one family, all at the same step.

    Parameters
    ----------
    specs:
        One for each host; family and number of steps must be the same for all.
    config:
        Settings of a :class:`esper.Grower`; ``None``: the family's. Those that concern growth hold here as well.
    dtype:
        float64 makes stacks agree with single hosts to many digits, over whole runs.

    Raises
    ------
    ConfigError
        Specs that do not go together.
    """

    def __init__(
        self, specs: Sequence[HostSpec], config: Config | None = None, *, dtype: torch.dtype = torch.float32
    ) -> None:
        kinds = {(spec.family, spec.steps) for spec in specs}
        if len(kinds) != 1:
            raise ConfigError(
                f"hosts of one stack must share family and steps, got {sorted(map(str, kinds)) or 'no host'}; "
                "make a stack for each"
            )
        self.specs = list(specs)
        self.family: Family = family_named(specs[0].family)
        self.body = body_of(specs[0].family)
        self.total_steps = specs[0].steps or self.family.steps
        self.config = replace(self.family.config, total_steps=self.total_steps) if config is None else config
        self.dtype, self.step_count = dtype, 0
        self._load_data()
        self._start_lives()

    def _load_data(self) -> None:
        tasks = sorted({spec.task for spec in self.specs})
        found = [data_of(self.family, task) for task in tasks]
        self._x, self._y = self._stacked([data.train for data in found])
        self._held_out = self._stacked([data.held_out for data in found])
        self._test = self._stacked([data.test for data in found])
        self._task_row = torch.tensor([tasks.index(spec.task) for spec in self.specs])
        self._order = torch.stack([batch_order(spec, self.family, self.total_steps) for spec in self.specs])
        self._order_row = torch.arange(len(self.specs))

    def _stacked(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = (torch.stack([part[side] for part in parts]) for side in (0, 1))
        typed = [part.to(self.dtype) if part.is_floating_point() else part for part in (x, y)]
        return typed[0], typed[1]

    def _start_lives(self) -> None:
        config, sites = self.config, self.num_sites
        widths = [spec.widths or data_of(self.family, spec.task).widths for spec in self.specs]
        streams = [weights_stream(spec) for spec in self.specs]
        self.network = Network(self.body, widths, streams, self.dtype)
        splits = splits_of(config.evidence, HELD_OUT_BATCHES, config.seed)
        window = config.graft.stabilize_window
        self.lives = [
            Life(width, [0] * sites, Acceptance(splits, config.evidence), deque(maxlen=window), [0] * sites)
            for width in widths
        ]
        self._own_flops = [self.body.host_flops(width) for width in widths]
        self.lr = np.array([spec.lr for spec in self.specs])
        self.given_units: dict[tuple[int, int, int], Units] = {}
        """First weights to use instead of drawn ones, by host, cohort and site (a replay of another run's)."""

    # ---------------------------------------------------------------------------------------------- what it is

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def num_sites(self) -> int:
        return self.family.num_sites

    @property
    def site_names(self) -> tuple[str, ...]:
        """As a grower names the spans of the same module."""
        return self.body.names

    @property
    def done(self) -> bool:
        return self.step_count >= self.total_steps

    @property
    def lr_share(self) -> float:
        """The cosine's share of the first learning rate in the step that comes next."""
        return 0.5 + 0.5 * math.cos(math.pi * min(self.step_count, self.total_steps) / self.total_steps)

    def inputs_of(self, host: int, site: int) -> int:
        """Features that a site's units can read: the host's, and what the site before has grown for good."""
        head, life = self.body.head(site), self.lives[host]
        before = head.columns_of
        return head.columns if before is None else life.widths[before] + life.grown[before]

    def own_inputs_of(self, host: int, site: int) -> int:
        """Those of them that are the host's."""
        return self.body.head(site).shape(self.lives[host].widths)[1]

    def outputs_of(self, host: int, site: int) -> int:
        """Columns that a site's units add to: features of the host, its own units of the next site."""
        return self.body.tail(site).shape(self.lives[host].widths)[0]

    def hidden_flops(self, host: int, site: int) -> float:
        """FLOPs of a row through a site's hidden units, its annex included."""
        life = self.lives[host]
        return 2.0 * (life.widths[site] + life.grown[site]) * self.inputs_of(host, site)

    def params(self, host: int, *, own: bool = False) -> int:
        """Parameters of the host alone (``own``), or of everything: annexes and live seeds too."""
        life = self.lives[host]
        total = self.body.params(life.widths)
        if own:
            return total
        for site, units in enumerate(life.grown):
            total += self.body.spans[site].params(units, self.inputs_of(host, site), self.outputs_of(host, site))
        return total + sum(seed.params for cohort in life.cohorts.values() for seed in cohort.seeds.values())

    def host_flops(self, host: int, rows: int) -> float:
        """Forward FLOPs of the host alone on so many rows."""
        return rows * self._own_flops[host]

    def added_flops(self, host: int, rows: int, *, waiting: bool = False) -> float:
        """Forward FLOPs of what is grown and in the forward pass; ``waiting`` adds live seeds that are not yet."""
        life, total = self.lives[host], 0.0
        for site, units in enumerate(life.grown):
            if units:
                total += self.body.spans[site].flops(units, self.inputs_of(host, site), self.outputs_of(host, site))
        for cohort in life.cohorts.values():
            if cohort.grafted or waiting:
                total += sum(seed.flops_per_row for seed in cohort.seeds.values())
        return rows * total

    def flops(self, host: int, rows: int) -> float:
        """Forward FLOPs of the network as it is now."""
        return self.host_flops(host, rows) + self.added_flops(host, rows)

    def select(self, hosts: Sequence[int]) -> Hosts:
        """A stack of copies of some hosts, in this order, as they are now; one may be named many times.

        This is the snapshot (all hosts) and the branching (one host many times) of a stack. Copies share nothing that
        changes, and go on with the same batches and draws: common random numbers.
        """
        index = torch.as_tensor(list(hosts))
        twin = object.__new__(Hosts)
        twin.__dict__.update(self.__dict__)
        twin.specs = [self.specs[n] for n in hosts]
        twin.network = self.network.select(index)
        twin._task_row, twin._order_row = self._task_row[index], self._order_row[index]
        twin.lr = self.lr[index.numpy()].copy()
        twin._own_flops = [self._own_flops[n] for n in hosts]
        twin.lives = [self.lives[n].clone() for n in hosts]
        twin.given_units = {}
        return twin

    # ---------------------------------------------------------------------------------------------- the step

    def advance(self, steps: int) -> None:
        """Train ``steps`` steps (never past the end)."""
        from esper.greenhouse.stages import advance  # stages read and change hosts

        for _ in range(min(steps, self.total_steps - self.step_count)):
            values = self._train()
            self.step_count += 1
            for number, life in enumerate(self.lives):
                life.losses.append(values[number])
                if life.cohorts:
                    advance(self, number)
                if any(cohort.grafted for cohort in life.cohorts.values()):
                    life.last_grafted = self.step_count
            if self.step_count % self.config.interval == 0:
                self._look()
            if (self.step_count + 1) % self.config.interval == 0:
                self._foresee()

    def _train(self) -> list[float]:
        index = self._order[self._order_row, self.step_count]
        rows = self._task_row[:, None]
        x, y = self._x[rows, index], self._y[rows, index]
        net, blended = self.network, self._blended()
        weights = net.weights
        run = self.body.forward(weights, x, blended, learns=True)
        loss, delta = output_gradient(run.output, y)
        deltas = self.body.backward(weights, net.layout.views(net.gradients), run, delta, blended)
        self._sense(run, deltas)
        self._learn()
        batch = self.family.batch_rows
        for number, life in enumerate(self.lives):
            life.ledger.add("host", 3.0 * self.host_flops(number, batch))
            if life.cohorts or any(life.grown):
                life.ledger.add("branches", 3.0 * self.added_flops(number, batch))
        return loss.tolist()

    def _blended(self) -> list[Tensor] | None:
        """Alphas, where any unit is not wholly in."""
        return self.network.alphas if any(life.cohorts for life in self.lives) else None

    def _learn(self) -> None:
        at_rest = not any(life.cohorts or any(life.grown) for life in self.lives)
        net = self.network
        adamw(net.values, net.gradients, net.moments, self._rates(), None if at_rest else net.owner)

    def _rates(self) -> Rates:
        """One step of AdamW for the host, and of the slot optimizer for what is grown."""
        graft, steps, learns = self.config.graft, self.network.steps, self.network.learns
        steps += learns
        counted = np.maximum(steps, 1.0)
        host = self.lr * self.lr_share
        boosted = host * graft.lr_boost
        if graft.lr_ceiling is not None:
            boosted = np.minimum(boosted, np.maximum(host, graft.lr_ceiling * self.lr))
        lr = boosted[:, None] * np.minimum(steps / max(1, graft.warmup_steps), 1.0)
        lr[:, HOST] = host
        lr *= learns
        made = (
            lr / (1.0 - BETAS[0] ** counted),
            1.0 / np.sqrt(1.0 - BETAS[1] ** counted),
            1.0 - lr * self.family.weight_decay,
            learns,
        )
        return Rates(*(torch.from_numpy(part) for part in made))

    def _sense(self, run: Pass, deltas: Sequence[Tensor]) -> None:
        """Telemetry where a grower takes it, rows for the fits where a seed waits for them."""
        due = self.config.telemetry.is_due(self.step_count + 1)
        for number, life in enumerate(self.lives):
            for site, capture in life.captures.items():
                if len(capture.x) < self.config.capture.batches:
                    self._record(number, site, capture, run, deltas)
            if due:
                for site in range(self.num_sites):
                    y = self._plain_output(number, site, run, most=self.config.telemetry.rows)
                    life.sensed[site] = (float(y.mean()), float(y.var(0, correction=0).mean()))

    def _record(self, host: int, site: int, capture: Capture, run: Pass, deltas: Sequence[Tensor]) -> None:
        capture.x.append(self.body.head_rows(run, site, host, self.network.read_places(host, site)).clone())
        capture.y.append(self._plain_output(host, site, run))
        tail = self.body.spans[site].tail
        capture.g.append(deltas[tail][host][:, : self.outputs_of(host, site)].clone())

    def _plain_output(self, host: int, site: int, run: Pass, *, most: int | None = None) -> Tensor:
        """What the host's own layer puts out at a site, without anything grown; ``most`` rows, strided over all."""
        weight, bias = self.network.weights[self.body.spans[site].tail]
        own, columns = self.lives[host].widths[site], self.outputs_of(host, site)
        rows = self.body.tail_rows(run, site, host, slice(0, own))
        if most is not None and len(rows) > most:
            rows = rows[:: row_step(len(rows), most)]
        weight = weight[host, :columns, :own].flatten(1)
        return torch.addmm(bias[host, :columns], rows, weight.t())

    def _look(self) -> None:
        """A point of the held-out curve, where that is due."""
        due = self.step_count % self.config.held_out_every == 0
        asked = [n for n, life in enumerate(self.lives) if due or math.isnan(life.held_out_initial)]
        if asked:
            self.measure(asked)
        for number in asked:
            self.lives[number].early = None  # what comes after a measurement is read anew

    def _foresee(self) -> None:
        """Begin what the next decision reads where nothing is alive or has just left, as a grower does."""
        late = self.step_count + 1 - 2 * self.config.interval
        for life in self.lives:
            is_calm = not life.cohorts and (life.last_grafted is None or life.last_grafted < late)
            life.early = tuple(life.losses) if is_calm else None

    # ---------------------------------------------------------------------------------------------- evaluation

    def measure(self, hosts: Sequence[int]) -> None:
        """Held-out loss over the first gate batches, counted as evidence."""
        splits = self.lives[0].evidence.splits
        batches = sorted(splits.gate)[: self.config.evidence.held_out_batches]
        values = self.batch_losses(hosts, batches).mean(1).tolist()
        for number, value in zip(hosts, values, strict=True):
            life = self.lives[number]
            self.count_evaluations(number, len(batches))
            life.held_out = value
            if math.isnan(life.held_out_initial):
                life.held_out_initial = value

    def batch_losses(
        self,
        hosts: Sequence[int],
        batches: Sequence[int] | None = None,
        alphas: Sequence[Tensor] | None = None,
        weights: Weights | None = None,
    ) -> Tensor:
        """``(n, batches)`` held-out losses of some hosts, as they are or at other alphas or weights; counts nothing.

        ``batches`` are numbers of held-out batches, ``None``: all of them.
        """
        x, y = (part[self._task_row[list(hosts)]] for part in self._held_out)
        rows = self.family.held_out_rows
        if batches is not None:
            x, y = (part.unflatten(1, (-1, rows))[:, list(batches)].flatten(1, 2) for part in (x, y))
        return self._evaluated(hosts, x, y, alphas, weights).view(len(hosts), -1, rows).mean(2).double()

    def held_out_rows(self, host: int, batches: Sequence[int]) -> Tensor:
        """Inputs of some held-out batches, one after the other ``(B, ...)``."""
        x = self._held_out[0][self._task_row[host]]
        return x.unflatten(0, (-1, self.family.held_out_rows))[list(batches)].flatten(0, 1)

    def count_evaluations(self, host: int, batches: int) -> None:
        """Book forward passes over so many held-out batches."""
        self.lives[host].ledger.add("evidence", batches * self.flops(host, self.family.held_out_rows))

    def test_losses(self) -> Tensor:
        """``(N,)`` losses on rows that nothing else has touched; read it once, at the end."""
        x, y = (part[self._task_row] for part in self._test)
        return self._evaluated(range(len(self)), x, y).mean(1).double()

    def held_out_losses(self) -> Tensor:
        """``(N,)`` losses over all held-out rows: what learning rates are chosen by."""
        return self.batch_losses(range(len(self))).mean(1)

    def _evaluated(
        self,
        hosts: Sequence[int],
        x: Tensor,
        y: Tensor,
        alphas: Sequence[Tensor] | None = None,
        weights: Weights | None = None,
    ) -> Tensor:
        index = torch.as_tensor(list(hosts))
        weights = [(w[index], b[index]) for w, b in self.network.weights] if weights is None else weights
        chosen = [alpha[index] for alpha in self.network.alphas] if alphas is None else alphas
        return losses(self.body.forward(weights, x, chosen).output, y, per_row=True)
