"""Commands on one host of a stack: the same ones, and the same refusals in kind, as :mod:`esper.commands`."""

from __future__ import annotations

from esper.errors import EsperError
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.life import Capture, Cohort, Seed
from esper.greenhouse.stages import end
from esper.kasmina.defaults import default_start
from esper.kasmina.lifecycle import LEGAL, is_active
from esper.protocol import Cancel, Command, Cull, Germinate, Lifecycle, SeedPlan, Stop

STRATEGY = "fixed_ramp"


def apply(hosts: Hosts, host: int, command: Command) -> str | None:
    """Apply ``command`` at a decision point; returns why it was refused, or ``None``.

    Raises
    ------
    EsperError
        A command, blueprint, start, strategy or site that stacks do not have.
    """
    life = hosts.lives[host]
    if isinstance(command, Stop):
        life.stopped = life.stopped or command.reason
        return None
    if isinstance(command, Germinate):
        reason = _germinate(hosts, host, command)
        if reason is not None:
            life.refused.append(reason)
        return reason
    if not isinstance(command, Cull | Cancel):
        raise EsperError(f"stacked hosts obey germinate, cull, cancel and stop, got {type(command).__name__}")
    cohort = life.cohorts.get(command.cohort)
    if cohort is None or not bool(is_active(int(cohort.state))):
        life.refused.append(f"no active cohort has the number {command.cohort}")
        return life.refused[-1]
    target = Lifecycle.CULLED if isinstance(command, Cull) else Lifecycle.CANCELLED
    if not LEGAL[cohort.state, target]:
        life.refused.append(f"{cohort.state.name} -> {target.name} is not a legal transition")
        return life.refused[-1]
    end(hosts, host, cohort, target, command.reason)
    return None


def eligible(hosts: Hosts, host: int, site: int) -> bool:
    """Whether a site has no seed and rests no longer, and there is room for the largest germination."""
    life = hosts.lives[host]
    room = hosts.family.max_width - life.widths[site] - life.grown[site]
    free = life.seed_on(site) is None and life.embargo[site] <= hosts.step_count
    return free and room >= max(4, 2 * life.widths[site])


def _germinate(hosts: Hosts, host: int, command: Germinate) -> str | None:
    life = hosts.lives[host]
    if life.stopped is not None:
        return f"growth has stopped: {life.stopped}"
    sites = [_site(hosts, plan) for plan in command.seeds]
    if not sites or len(set(sites)) < len(sites):
        return "a cohort needs at least one seed, and each site once"
    for site, plan in zip(sites, command.seeds, strict=True):
        _check(hosts, plan)
        if life.seed_on(site) is not None or life.embargo[site] > hosts.step_count:
            return f"{plan.site}: the site has a seed or rests"
        if life.widths[site] + life.grown[site] + _units(hosts, host, site, plan) > hosts.family.max_width:
            return f"{plan.site}: a layer may have at most {hosts.family.max_width} units"
    _create(hosts, host, sites, command)
    return None


def _create(hosts: Hosts, host: int, sites: list[int], command: Germinate) -> None:
    life, batch = hosts.lives[host], hosts.family.batch_rows
    before = hosts.host_flops(host, batch) + hosts.added_flops(host, batch, waiting=True)
    seeds: dict[int, Seed] = {}
    for site, plan in zip(sites, command.seeds, strict=True):
        places = hosts.network.seat(host, site, _units(hosts, host, site, plan))
        reads, columns = hosts.inputs_of(host, site), hosts.outputs_of(host, site)
        seed = Seed(hosts.body.spans[site], places, _start(hosts, plan), reads, columns)
        seeds[site] = seed
        if seed.start != "random_zero":
            life.captures[site] = Capture()
    for seed in seeds.values():
        seed.flops_share = batch * seed.flops_per_row / before
    number, life.next_cohort = life.next_cohort, life.next_cohort + 1
    life.cohorts[number] = Cohort(
        number, seeds, hosts.step_count, sum(seed.params for seed in seeds.values()),
        sum(seed.flops_share for seed in seeds.values()),
    )  # fmt: skip
    hosts.network.refresh(host)


def _units(hosts: Hosts, host: int, site: int, plan: SeedPlan) -> int:
    """As many as asked for, at most as many as the start has directions for."""
    asked = hosts.lives[host].widths[site] if plan.width is None else plan.width
    if _start(hosts, plan) != "tiny":
        return asked
    return min(asked, hosts.outputs_of(host, site), hosts.inputs_of(host, site) + 1)


def _start(hosts: Hosts, plan: SeedPlan) -> str:
    """The start that the plan names, else the configuration, else the default of the body's sites."""
    body = hosts.body
    rows = hosts.family.batch_rows * body.spans[0].positions * hosts.config.capture.batches
    start = plan.start or hosts.config.fit.start or default_start(body.kind, adaptive=True, expected_rows=rows)
    if start not in body.starts:
        raise EsperError(
            f"stacked hosts know the start {', '.join(body.starts)}, got {start!r}; use a grower for others"
        )
    return start


def _site(hosts: Hosts, plan: SeedPlan) -> int:
    if plan.site not in hosts.site_names:
        raise EsperError(f"no site is called {plan.site!r}; known: {', '.join(hosts.site_names)}")
    return hosts.site_names.index(plan.site)


def _check(hosts: Hosts, plan: SeedPlan) -> None:
    _start(hosts, plan)
    for what, got, known in (
        ("blueprint", plan.blueprint, hosts.body.blueprint),
        ("strategy", plan.strategy, STRATEGY),
    ):
        if got not in (None, known):
            raise EsperError(f"stacked hosts know the {what} {known}, got {got!r}; use a grower for others")
    if plan.chunks or plan.seeds != 1 or plan.keep is not None:
        raise EsperError(f"a seed of stacked hosts takes a whole site, got a share of {plan.site!r}; leave chunks out")
    if plan.width is not None and plan.width < 1:
        raise EsperError(f"a seed's width must be at least 1, got {plan.width} on {plan.site!r}; leave it None")
