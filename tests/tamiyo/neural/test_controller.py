"""The neural controller: decides within what it was trained on, hands over elsewhere, and says so."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.models import Pair
from tests.rigs import attach
from tests.tamiyo.observations import make

import esper
from esper.config import TamiyoConfig
from esper.errors import ConfigError, StateError
from esper.greenhouse.family import HostSpec
from esper.greenhouse.real import RealHost, make_model
from esper.protocol import SITE_FEATURES, Observation, Warned
from esper.tamiyo import HeuristicController, Noting, make_controller
from esper.tamiyo.actions import Scope, commands, masks
from esper.tamiyo.features import LIMIT, FeatureReader
from esper.tamiyo.neural import policy_file
from esper.tamiyo.neural.controller import NeuralController
from esper.tamiyo.neural.policy import Policy
from esper.tamiyo.neural.policy_file import Card
from esper.tamiyo.neural.ranges import Ranges

pytestmark = pytest.mark.component
Observe = Callable[..., Observation]
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


def some_observations(num: int = 40) -> list[Observation]:
    rng = np.random.default_rng(0)
    return [make(rng, int(rng.integers(1, 6))) for _ in range(num)]


def train(
    folder: Path, seen: list[Observation], *, scope: Scope | None = None, seed: int = 0, anywhere: bool = False
) -> TamiyoConfig:
    """A policy that claims to have been trained on ``seen``, or ``anywhere``."""
    reader = FeatureReader()
    ranges = Ranges.of(reader.read(observation) for observation in seen)
    if anywhere:
        wide = (-LIMIT, LIMIT)
        ranges = Ranges(
            world=(wide,) * len(ranges.world), sites=(wide,) * len(ranges.sites), num_sites=(1, 99)
        )  # fmt: skip
    card = Card(ranges=ranges, scope=scope or Scope())
    policy = Policy(seed=seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    policy_file.save(folder, policy, card)
    return TamiyoConfig(controller="neural", policy=str(folder))


def test_decides_within_the_masks_of_its_scope(tmp_path: Path) -> None:
    seen = some_observations()
    scope = Scope(sizes=(0.5,), strategies=("fixed_ramp",))
    for sampled in (False, True):
        subject = NeuralController(train(tmp_path, seen, scope=scope), seed=3, sampled=sampled)
        kinds = set()
        for observation in seen:
            found = subject.decide(observation)
            valid = {commands(action, observation, reason="neural") for action in _actions(observation, scope)}
            assert found in valid
            kinds |= {type(command).__name__ for command in found}
        assert subject.notes() == ()
        assert len(kinds) > 1


def _actions(observation: Observation, scope: Scope) -> list[object]:
    from esper.tamiyo.actions import every_action

    return list(every_action(masks(observation, scope)))  # type: ignore[return-value]


@pytest.mark.parametrize("sampled", [False, True])
def test_a_loaded_one_goes_on_alike(tmp_path: Path, sampled: bool) -> None:
    seen = some_observations()
    config = train(tmp_path, seen)
    subject, other = (NeuralController(config, seed=1, sampled=sampled) for _ in range(2))
    for observation in seen[:20]:
        subject.decide(observation)
    other.load(json.loads(json.dumps(subject.state())))
    assert [subject.decide(o) for o in seen[20:]] == [other.decide(o) for o in seen[20:]]
    one, two = (NeuralController(config, seed=seed, sampled=sampled) for seed in (1, 2))
    assert ([one.decide(o) for o in seen] == [two.decide(o) for o in seen]) != sampled


def test_states_of_something_else_are_refused(tmp_path: Path) -> None:
    seen = some_observations(5)
    subject = NeuralController(train(tmp_path / "a", seen))
    other = NeuralController(train(tmp_path / "b", seen, seed=1))
    with pytest.raises(ConfigError, match="goes on with the policy it began with"):
        other.load(subject.state())
    with pytest.raises(ConfigError, match="must have the keys"):
        other.load({"policy": None})


def test_hands_over_where_it_has_no_experience(tmp_path: Path, observe: Observe) -> None:
    seen = [observe(spans=num, train_loss=1.0, step=step) for num in (2, 4) for step in (100, 120, 140, 160)]
    config = train(tmp_path, seen)
    known = observe(spans=3, train_loss=1.0)
    subject = NeuralController(config)
    subject.decide(known)
    assert subject.notes() == ()
    conv = known.sites.copy()
    conv[1, SITE_FEATURES.index("is_conv")] = 1
    for stranger, changes in (
        ("num_sites", observe(spans=5)),
        ("is_conv", dataclasses.replace(known, sites=conv)),
        ("progress.missing", dataclasses.replace(known, total_steps=None)),
        ("loss_drop", dataclasses.replace(known, held_out_initial=100.0)),
    ):
        subject = NeuralController(config)
        found = subject.decide(changes)
        assert found == HeuristicController(TamiyoConfig()).decide(changes)
        (note,) = subject.notes()
        assert f"({stranger} lies outside" in note


def test_the_policy_of_the_package_is_followed_where_none_is_named(
    tmp_path: Path, observe: Observe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_file, "SHIPPED", tmp_path / "shipped")
    with pytest.raises(StateError):
        NeuralController(TamiyoConfig())
    seen = [observe(spans=num, train_loss=1.0, step=step) for num in (2, 4) for step in (100, 120)]
    own, named = train(tmp_path / "shipped", seen), train(tmp_path / "other", seen, seed=1)
    subject = NeuralController(TamiyoConfig(controller="neural"))
    assert subject.state()["policy"] == NeuralController(own).state()["policy"]
    assert NeuralController(named).state()["policy"] != subject.state()["policy"]


def test_what_ships_is_small_whole_and_says_what_it_is() -> None:
    folder = policy_file.SHIPPED
    _, card = policy_file.load(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    assert card.data and card.hosts and card.seeds and card.limits
    assert {"teacher", "waves_long, minus the heuristic", "teacher_long, minus no growth"} <= set(card.scores)


def test_what_ships_grows_a_host_like_those_it_was_trained_on() -> None:
    subject = make_controller("neural", TamiyoConfig())
    assert isinstance(subject, NeuralController) and isinstance(subject, Noting)
    host = HostSpec(family="spirals", task=0, seed=0, lr=4e-2)
    end = RealHost(host, subject).run()
    assert subject.state()["decisions"] > 0 and subject.notes() == ()
    assert end.params > sum(parameter.numel() for parameter in make_model(host).parameters())


def test_ranges(observe: Observe) -> None:
    reader = FeatureReader()
    one, two = (reader.read(observe(spans=num, held_out=loss)) for num, loss in ((2, 1.0), (4, 1.5)))
    ranges = Ranges.of([one, two])
    assert ranges == Ranges.of([one]).joined(Ranges.of([two])) and ranges.num_sites == (2, 4)
    assert ranges.stranger(one) is ranges.stranger(two) is None
    assert Ranges.of([one]).stranger(two) == "num_sites"
    silent = reader.read(observe(spans=3, held_out=-1.0))
    assert ranges.stranger(silent) == "loss_drop.missing"


def test_notes_reach_the_user_and_the_log_once() -> None:
    """A run that does not say how long it is is none that the policy knows."""
    rig = attach(Pair(), controller=NeuralController(TamiyoConfig(first=10**6)))
    with pytest.warns(RuntimeWarning, match="progress.missing lies outside") as caught:
        rig.train(45)
    assert len(caught) == 1
    assert len([event for event in rig.events if isinstance(event, Warned)]) == 1


def test_grows_a_model_without_touching_global_state(tmp_path: Path) -> None:
    """A real run: features come from the grower's own observations."""
    config = train(tmp_path, some_observations(), anywhere=True)
    rig = attach(Pair(), total_steps=200, controller=NeuralController(config, sampled=True))
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    rig.train(60)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not rig.refused() and rig.grower.controller.state()["decisions"] > 0
    saved = rig.grower.state_dict()
    again = attach(Pair(), total_steps=200, controller=NeuralController(config, sampled=True))
    again.grower.load_state_dict(saved)
    assert json.dumps(again.grower.controller.state()) == json.dumps(rig.grower.controller.state())


def test_defaults_of_the_process_do_not_matter(tmp_path: Path) -> None:
    seen = some_observations(10)
    config = train(tmp_path, seen)
    wanted = [NeuralController(config).decide(observation) for observation in seen]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu"):
            assert [NeuralController(config).decide(observation) for observation in seen] == wanted
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.integration
def test_nothing_imports_torch_before_it_is_asked_for(run_python: RunPython) -> None:
    done = run_python("import sys, esper.tamiyo, esper.tamiyo.sight\nassert 'torch' not in sys.modules\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_by_name_in_a_configuration() -> None:
    config = esper.Config(tamiyo=TamiyoConfig(controller="neural"))
    assert isinstance(make_controller(config.tamiyo.controller, config.tamiyo), NeuralController)
