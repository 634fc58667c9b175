"""A step in which nothing is due costs next to nothing, however many sites there are; and what is due still happens."""

from __future__ import annotations

import copy
import gc
import sys
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import Mlp, Pair, mse, rows, snapshot
from tests.rigs import Rig, attach, graft
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import esper
from esper.evidence.audit import Network
from esper.kasmina.hooks import HeadEnter, TailLeave, is_attached

pytestmark = pytest.mark.integration

SOURCE = str(Path(esper.__file__).parent)
MOST_CALLS = 22
"""Functions of Esper that a quiet ``grower.step`` may call, those of the optimizer's hooks included."""


class Chain(nn.Sequential):
    def __init__(self, num_sites: int) -> None:
        super().__init__(nn.Linear(8, 4), *(part for _ in range(num_sites) for part in (nn.GELU(), nn.Linear(4, 4))))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Generator[Counter[str]]:
    """Calls of functions that belong to Esper, by name."""
    calls: Counter[str] = Counter()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(SOURCE):
            calls[frame.f_code.co_qualname] += 1

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def quiet(model: nn.Module, steps: int = 4, **settings: Any) -> Rig:
    """A rig that stands before a step in which nothing is due."""
    settings = {"interval": 1000, "telemetry": esper.TelemetryConfig(every=1000), **settings}
    rig = attach(model, **settings)
    rig.train(steps)
    return rig


def hooks_on(model: nn.Module) -> list[Any]:
    stores = [store for m in model.modules() for store in (m._forward_hooks, m._forward_pre_hooks)]
    return [hook for store in stores for hook in store.values()]


@pytest.mark.parametrize("num_sites", [1, 8])
def test_a_quiet_step_calls_nothing_in_the_model_and_little_besides(num_sites: int) -> None:
    rig = quiet(Chain(num_sites))
    assert len(rig.grower.sites()) == num_sites and hooks_on(rig.model) == []
    loss = torch.tensor(1.0)
    gc.collect()
    with counted() as calls:
        mse(rig.model, rig.batches[0]).backward()
    assert not [name for name in calls if "_after_backward" not in name], calls
    with counted() as calls, Operations() as operations:
        rig.optimizer.step()
        own = len(operations.seen)
        rig.grower.step(loss)
    assert operations.seen[own:] in ([], ["aten._local_scalar_dense.default"]), "reading the loss is all"
    assert calls.total() <= MOST_CALLS, calls
    assert rig.grower.loop.last_step == 5 and len(rig.grower.loop.losses) == 5


def test_the_optimizer_alone_is_listened_to_after_some_steps() -> None:
    rig = quiet(Pair(), steps=19)
    heard = rig.model.fc2.weight._post_accumulate_grad_hooks
    assert heard
    rig.train(3)
    assert not heard and rig.grower.clock.backwards_since_step == 0


def test_what_is_due_happens_although_hooks_were_off() -> None:
    rig = quiet(Pair(), interval=5, telemetry=esper.TelemetryConfig(every=3))
    (site,) = rig.grower.kasmina.sites.values()
    seen = [int(site.telemetry.reports)]
    for _ in range(12):
        rig.train(1)
        seen.append(int(site.telemetry.reports))
    steps = [4 + number for number in range(1, 13) if seen[number] > seen[number - 1]]
    assert steps == [5, 8, 11, 14], "a step before the multiples: at them it has arrived"


@pytest.mark.parametrize("ask", ["order", "graft", "probe"])
def test_whatever_asks_for_the_hooks_gets_them(ask: str) -> None:
    rig = quiet(Pair())
    site = rig.grower.kasmina.sites["fc1-fc2"]
    assert hooks_on(rig.model) == []
    if ask == "order":
        rig.germinate("fc1-fc2", start="negative_gradient")
        assert site.capture is not None
        before = site.capture.filled
        rig.train(2)
        assert site.capture.filled > before
    elif ask == "graft":
        plain = rig.model(rig.batches[0][0])
        cohort = graft(rig, "fc1-fc2")
        rig.grower.kasmina.set_alpha(cohort, 1.0)
        assert not torch.equal(rig.model(rig.batches[0][0]), plain)
    else:
        seen: list[Tensor] = []

        class Probe:
            def leave(self, site: Any, x: Tensor, layer_input: Tensor, y: Tensor, training: bool) -> Tensor:
                seen.append(y)
                return y

        site.probe = Probe()
        site.refresh()
        rig.model(rig.batches[0][0])
        assert len(seen) == 1


def test_a_users_hook_keeps_its_place() -> None:
    def note(calls: list[str], name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    early, calls = Pair(), list[str]()
    early.fc2.register_forward_hook(note(calls, "before"))
    rig = quiet(early)
    assert [type(hook) for hook in early.fc2._forward_hooks.values()][1:] == [TailLeave], "ours stays behind it"
    assert not early.fc1._forward_pre_hooks

    late = Pair()
    rig = quiet(late)
    late.fc2.register_forward_hook(note(calls, "after"))
    late.fc1.register_forward_pre_hook(note(calls, "after"), with_kwargs=True)
    rig.grower.kasmina.watch(True)
    for store, ours in ((late.fc2._forward_hooks, TailLeave), (late.fc1._forward_pre_hooks, HeadEnter)):
        first, second = store.values()
        assert isinstance(first, ours) and not isinstance(second, ours)
    assert len(late.fc1._forward_pre_hooks_with_kwargs) == 2
    rig.grower.kasmina.watch(False)
    assert len(late.fc2._forward_hooks) == 2, "beside another hook nothing is gained"


def test_one_grower_a_model_and_none_after_detaching() -> None:
    rig = quiet(Pair())
    assert hooks_on(rig.model) == [] and is_attached(rig.model) and not is_attached(copy.deepcopy(rig.model))
    with pytest.raises(esper.AttachError, match="one Grower"):
        attach(rig.model)
    rig.grower.detach()
    assert not is_attached(rig.model)
    rig.grower.kasmina.watch(True)
    assert hooks_on(rig.model) == []
    attach(rig.model)


def test_a_copy_with_its_sites_has_the_hooks() -> None:
    rig = quiet(Mlp())
    network = Network.of(rig.model, rig.grower.kasmina.sites)
    assert hooks_on(rig.model) == [], "the host's own are off again"
    found = [hook for hook in hooks_on(network.model) if isinstance(hook, TailLeave)]
    assert [hook.site for hook in found] == list(network.sites.values())


def test_how_many_passes_make_a_step_is_remembered_when_nobody_counts_them_any_more() -> None:
    rig = quiet(Mlp(), interval=5)
    for _ in range(25):
        for part in zip(*(values.chunk(2) for values in rig.batches[0]), strict=True):
            loss = mse(rig.model, part)
            loss.backward()
        rig.optimizer.step()
        rig.optimizer.zero_grad()
        rig.grower.step(loss)
    assert rig.grower.clock.passes == 2


@pytest.fixture
def compiler() -> Generator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("reset", [False, True])
def test_compiled_in_a_quiet_step_the_hooks_are_in_the_graph(compiler: None, reset: bool) -> None:
    rig = quiet(Mlp(), interval=5, telemetry=esper.TelemetryConfig(every=4))
    assert hooks_on(rig.model) == []
    if reset:  # forgets who listens, until hooks go off the next time
        torch._dynamo.reset()
        rig.train(4)
        assert hooks_on(rig.model) == []
    compiled = torch.compile(rig.model, backend="aot_eager", fullgraph=True)
    sites, before = rig.grower.kasmina.sites, {}
    for number in range(9):
        loss = mse(compiled, rig.batches[number % 10])
        loss.backward()
        rig.optimizer.step()
        rig.optimizer.zero_grad()
        rig.grower.step(loss)
        before = before or {name: int(site.telemetry.reports) for name, site in sites.items()}
    assert all(int(site.telemetry.reports) == before[name] + 2 for name, site in sites.items())
    assert hooks_on(rig.model), "a graph that looks for its hooks finds them"
    cohort = graft(rig, "fc1-fc2")
    rig.grower.kasmina.set_alpha(cohort, 1.0)
    x = rows(1, seed=3)[0][0]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), rig.model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiler_that_was_reset_in_between_traces_anew(compiler: None) -> None:
    """Nobody tells the hooks of a compilation after a reset: they ask when they are needed next."""
    rig = quiet(Mlp(), interval=5, telemetry=esper.TelemetryConfig(every=4))
    assert hooks_on(rig.model) == []
    torch._dynamo.reset()
    compiled = torch.compile(rig.model, backend="aot_eager", fullgraph=True)
    sites = rig.grower.kasmina.sites.values()
    before = {site.info.name: int(site.telemetry.reports) for site in sites}
    with pytest.warns(RuntimeWarning, match="compiler was reset"):
        for number in range(16):
            loss = mse(compiled, rig.batches[number % 10])
            loss.backward()
            rig.optimizer.step()
            rig.optimizer.zero_grad()
            rig.grower.step(loss)
    assert all(int(site.telemetry.reports) >= before[site.info.name] + 3 for site in sites)


def test_another_compilation_only_delays(compiler: None) -> None:
    rig = quiet(Pair(), interval=5, telemetry=esper.TelemetryConfig(every=4))
    assert hooks_on(rig.model) == []
    torch.compile(lambda x: x.sin(), backend="eager")(torch.ones(2))
    assert hooks_on(rig.model)
    rig.train(5)
    assert hooks_on(rig.model) == [], "Python has called them since"


def test_a_scaler_that_comes_later_is_found() -> None:
    rig = quiet(Pair())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = mse(rig.model, rig.batches[0])
    scaler.scale(loss).backward()
    scaler.step(rig.optimizer)
    scaler.update()
    rig.grower.step(loss)
    assert rig.grower.clock.has_scaler and rig.grower.clock.inverse_scale == 0.25


def test_losses_survive_a_saved_state() -> None:
    rig = quiet(Pair(), steps=7)
    saved = rig.grower.state_dict()
    before = [float(loss) for loss in rig.grower.loop.losses]
    rig.train(3)
    rig.grower.load_state_dict(saved)
    assert [float(loss) for loss in rig.grower.loop.losses] == before
    again = rig.grower.state_dict()
    kept, back = (tree["esper"]["loop"]["losses"] for tree in (saved, again))
    assert all(torch.equal(one, two) and one.dtype == two.dtype for one, two in zip(kept, back, strict=True))
    rig.train(2)
    assert len(rig.grower.loop.losses) == min(9, rig.grower.config.graft.stabilize_window)


def test_nobody_observes_what_nobody_reads() -> None:
    rig = quiet(Pair(), interval=1)
    grower = rig.grower
    looked: list[int] = []
    decide = grower.controller.decide
    grower.controller.decide = lambda observation: looked.append(observation.step) or decide(observation)
    grower.journal._on_event = None
    rig.train(2)
    with counted() as calls:
        grower.stop("enough")
        rig.train(2)
    assert looked == [5, 6] and "observe" not in calls
    seen: list[Any] = []
    grower.watcher = seen.append
    rig.train(1)
    assert [observation.step for observation in seen] == [9]


def test_chunks_that_rest_are_free_later_without_any_change() -> None:
    rig = quiet(Pair(), interval=1, graft=esper.GraftConfig(embargo=6))
    cohort = rig.germinate("fc1-fc2")
    step = rig.grower.clock.steps
    rig.grower.stages.expel(cohort, step, "test")
    eligible: list[bool] = []
    grower = rig.grower
    grower.watcher = lambda observation: eligible.append(bool(observation.eligible[0]))
    rig.train(9)
    assert eligible == [False] * 5 + [True] * 4


def test_the_weights_are_those_of_a_run_without(unchanged_rng: None) -> None:
    def run(watched: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Mlp()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        rig = attach(model, optimizer, interval=4, telemetry=esper.TelemetryConfig(every=3)) if watched else None
        for batch in rows(30):
            loss = mse(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if rig is not None:
                rig.grower.step(loss)
        return snapshot(model)

    state = torch.get_rng_state()
    alone, watched = run(False), run(True)
    torch.set_rng_state(state)
    assert all(torch.equal(alone[name], watched[name]) for name in alone)
