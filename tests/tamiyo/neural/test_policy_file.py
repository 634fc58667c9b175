"""A policy's folder: what was written comes back, anything else is refused with what is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors
from tests.tamiyo.observations import make

from esper.errors import StateError
from esper.tamiyo.actions import Scope
from esper.tamiyo.features import FeatureReader
from esper.tamiyo.neural import policy_file
from esper.tamiyo.neural.policy import Policy
from esper.tamiyo.neural.policy_file import CARD, TENSORS, Card
from esper.tamiyo.neural.ranges import Ranges

pytestmark = pytest.mark.component


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    ranges = Ranges.of(FeatureReader().read(make(rng, 3)) for _ in range(5))
    card = Card(
        ranges=ranges, scope=Scope(sizes=(0.5, 1.0), most_on_trial=None), data="five looks", hosts=("mlp",),
        seeds=(1, 2), scores={"planted": 0.9}, limits=("never tried on anything",),
    )  # fmt: skip
    policy_file.save(tmp_path / "policy", Policy(seed=4), card)
    return tmp_path / "policy"


def test_what_was_written_comes_back(folder: Path) -> None:
    policy, card = policy_file.load(folder)
    wanted = Policy(seed=4)
    pairs = zip(policy.state_dict().values(), wanted.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert card.scope == Scope(sizes=(0.5, 1.0), most_on_trial=None)
    assert (card.size, card.hosts, card.seeds, card.scores) == ("small", ("mlp",), (1, 2), {"planted": 0.9})
    assert card.sha256 == hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    assert policy_file.save(folder, policy, card) == card
    assert sorted(path.name for path in folder.iterdir()) == [CARD, TENSORS]


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda card: card.update(format="theirs"), "must be a card of format 'esper-policy', got 'theirs'"),
        (lambda card: card.update(version=99), "version must be 1, got 99 in .*: it is of a newer Esper"),
        (lambda card: card.update(feature_version=0), "feature version must be 1, got 0 in .*: it is of another Esper"),
        (lambda card: card.update(action_version=None), "action version must be 1, got None"),
        (lambda card: card["global_columns"].append("mood"), "global columns must be .*, got mood"),
        (lambda card: card["site_columns"].reverse(), "site columns must be .*, got another order"),
        (lambda card: card["ranges"]["sites"].pop(), "must hold a range for each of 42 site columns, got 41"),
        (lambda card: card.update(size="huge"), "must name a known size .*huge.* newer Esper"),
        (lambda card: card.update(size="plan"), "must hold this network's tensors, got others"),
        (lambda card: card.update(sha256="0"), "must be the file that card.json was written with"),
        (lambda card: card.pop("ranges"), "must hold all of a card, got an error"),
        (lambda card: card["scope"].update(sizes=[7.0]), "must hold all of a card, .*scope.sizes must be some of"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(folder: Path, change: Change, complaint: str) -> None:
    card = json.loads((folder / CARD).read_text())
    change(card)
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(StateError, match=complaint):
        policy_file.load(folder)


def replace_tensors(folder: Path, data: bytes) -> None:
    """As somebody would who also corrects the hash."""
    (folder / TENSORS).write_bytes(data)
    card = json.loads((folder / CARD).read_text())
    card["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / CARD).write_text(json.dumps(card))


def test_tensors_that_do_not_fit_are_refused(folder: Path) -> None:
    state = Policy(seed=4).state_dict()
    name = next(iter(state))
    for data, complaint in (
        (b"no tensors", "must be a safetensors file"),
        (save_tensors({**state, name: state[name].double()}), "must hold this network's tensors"),
        (save_tensors({**state, name: state[name] * torch.nan}), "weights must be finite"),
        (save_tensors({**state, "more": torch.zeros(1 << 19)}), "may have at most"),
    ):
        replace_tensors(folder, data)
        with pytest.raises(StateError, match=complaint):
            policy_file.load(folder)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "no"])
def test_a_card_that_is_none(folder: Path, text: str) -> None:
    (folder / CARD).write_text(text)
    with pytest.raises(StateError, match="must be the card of a policy, got no JSON"):
        policy_file.load(folder)


def test_a_missing_or_huge_file(folder: Path) -> None:
    (folder / CARD).write_bytes(b" " * (policy_file._MOST_CARD_BYTES + 1))
    with pytest.raises(StateError, match="may have at most"):
        policy_file.load(folder)
    with pytest.raises(StateError, match="a policy is a folder with card"):
        policy_file.load(folder / "nowhere")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    card = Card(ranges=Ranges(world=(), sites=(), num_sites=(0, 0)))
    with pytest.raises(StateError, match="needs a folder it can be written to"):
        policy_file.save(tmp_path / "file", Policy(), card)
