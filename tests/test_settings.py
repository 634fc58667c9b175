"""Settings by dotted name."""

from __future__ import annotations

import dataclasses

import pytest

from esper.config import Config
from esper.errors import ConfigError
from esper.runs.arms import configure
from esper.runs.options import RunOptions
from esper.settings import with_settings

pytestmark = pytest.mark.unit


def test_every_kind_of_setting_is_read() -> None:
    changed = with_settings(
        Config(),
        {
            "graft.lr_boost": "1.5", "graft.lr_ceiling": "none", "fit.scales": "1,2.5", "tamiyo.compound": "true",
            "total_steps": "50", "sites.include": "a.*,b", "fit.start": "random_zero",
        },
    )  # fmt: skip
    assert (changed.graft.lr_boost, changed.graft.lr_ceiling, changed.total_steps) == (1.5, None, 50)
    assert changed.fit.scales == (1.0, 2.5) and changed.sites.include == ("a.*", "b")
    assert changed.tamiyo.compound is True and changed.fit.start == "random_zero"
    assert dataclasses.replace(changed.graft, lr_boost=2.0, lr_ceiling=1.0) == Config().graft  # the rest stays


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("graft.lr_bost", "1", "no setting is called 'graft.lr_bost'; near names: graft.lr_boost"),
        ("graft", "1", "no setting is called 'graft'"),
        ("graft.lr_boost", "fast", "graft.lr_boost must fit its type, got 'fast'"),
        ("graft.lr_boost", "-1", "graft.lr_boost must be positive, got -1.0"),
        ("interval", "1.5", "interval must fit its type"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_settings(Config(), {name: value})


def test_a_run_takes_settings_over_the_presets() -> None:
    config = configure(Config(), RunOptions(growth=2.0, settings=("tamiyo.growth=3", "graft.ramp_steps = 7")), seed=4)
    assert (config.tamiyo.growth, config.graft.ramp_steps, config.seed) == (3.0, 7, 4)
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        RunOptions(settings=("tamiyo.growth",))
