"""Checkpoints of earlier versions: what they hold is the same afterwards, and a run goes on from them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import Pair
from tests.rigs import Rig, attach

import esper
from esper.protocol import Lifecycle
from esper.safety.checkpoint import load
from esper.safety.migrations import MIGRATIONS, migrated
from esper.safety.tree import digest

pytestmark = pytest.mark.component

GROWER_V1 = Path(__file__).parent / "golden" / "grower-v1"
"""A ``Grower.save`` of version 1: four cohorts have ended, each in another way, a fifth is being grafted."""


def host() -> Rig:
    """As the one that was saved."""
    torch.manual_seed(0)
    return attach(Pair(3), evidence=esper.EvidenceConfig(accept="always"))


@pytest.fixture
def of_today() -> dict[str, Any]:
    """The golden tree as a Grower of today's settings takes it: those may gain fields without a new version."""
    return {**load(GROWER_V1).tree, "setup": host().grower._setup.state()}


def test_verdicts_of_version_1_are_all_there(of_today: dict[str, Any]) -> None:
    rig = host()
    rig.grower.load_state_dict(of_today)
    ends = [Lifecycle.FOSSILIZED, Lifecycle.CULLED, Lifecycle.CANCELLED, Lifecycle.ROLLED_BACK]
    verdicts = rig.grower.verdicts
    assert [(v.cohort, v.step) for v in verdicts] == [(1, 17), (2, 50), (3, 83), (4, 116)]
    assert [v.state for v in verdicts] == ends
    kept = verdicts[0]
    assert (kept.gain, kept.gain_low, kept.gain_high, kept.gain_shrunken) == (0.25, 0.125, 0.5, 0.1875)
    assert (kept.added_params, kept.added_flops_share, kept.sites) == (26, 2 / 3, ("fc1-fc2",))
    assert [v.reason for v in verdicts[1:]] == ["test: Cull", "test: Cancel", "test: RollBack"]
    found = rig.grower.stages.verdicts
    assert rig.grower.ended == dict.fromkeys(ends, 1) and found.num_untold == 0
    assert repr(found.last_gain) == "{'fc1-fc2': nan}" and found.last_growth == {"fc1-fc2": 17}
    assert list(found._looks) == [(0.25, 0.0625)]


def test_a_run_goes_on_from_version_1_and_is_saved_as_the_newest(of_today: dict[str, Any], tmp_path: Path) -> None:
    digests = []
    for _ in range(2):
        rig = host()
        rig.turn = 0
        rig.grower.load_state_dict(of_today)
        rig.until(next(iter(rig.grower.kasmina.cohorts.values())), Lifecycle.FOSSILIZED)
        assert rig.grower.ended[Lifecycle.FOSSILIZED] == 2
        digests.append(digest(rig.grower.state_dict()))
    assert digests[0] == digests[1]
    rig.grower.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.manifest.schema == max(MIGRATIONS) + 1 and digest(loaded.tree) == digests[1]


def test_the_part_of_a_run_and_of_its_training_are_found() -> None:
    before = load(GROWER_V1, migrations=dict.fromkeys(MIGRATIONS, lambda tree: tree)).tree
    kept = copy.deepcopy(before)
    alone = migrated(before, 1)
    within = migrated({"cell": "x", "done": False, "training": before}, 1)
    assert within["cell"] == "x" and digest(within["training"]) == digest(alone)
    assert alone["version"] == 3 and alone["esper"]["stages"].keys() == {"held_out", "verdicts"}
    assert digest(before) == digest(kept), "a migration was to leave what it was given"


def test_what_holds_no_run_stays_as_it_is() -> None:
    plain_training = {"cell": "x", "training": {"host": 1, "training": {}}}
    for tree in ([1, 2], {"step": 1}, {"cell": "x", "done": True}, plain_training):
        assert digest(migrated(tree, 1)) == digest(tree)
