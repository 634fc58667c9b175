"""One row for a place and a choice: every column named, the unknown flagged, always finite."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.protocol import Lifecycle
from esper.worth import FEATURE_NAMES, Choice, Place, encode, gain_share, prior_precision, reference_width, targets
from esper.worth.features import _NUMBERS

pytestmark = pytest.mark.unit

CHOICE = Choice(blueprint="bottleneck", start="random_zero", growth=1.0)
PLACE = Place(kind="linear_span", family="mlp", optimizer="adaptive", **{n: c for n, (c, _) in _NUMBERS.items()})


def column(name: str, place: Place = PLACE, choice: Choice = CHOICE) -> float:
    return float(encode(place, choice)[FEATURE_NAMES.index(name)])


def test_every_column_has_a_name_of_its_own() -> None:
    assert encode(PLACE, CHOICE).shape == (len(FEATURE_NAMES),) == prior_precision().shape
    assert len(set(FEATURE_NAMES)) == len(FEATURE_NAMES)
    assert column("1") == 1.0


@pytest.mark.parametrize("name", list(_NUMBERS))
def test_unknown_is_not_the_ordinary_value(name: str) -> None:
    unknown = msgspec.structs.replace(PLACE, **{name: None})
    assert column(name) == 0.0 == column(name, unknown)
    assert column(f"{name}?") == 0.0 and column(f"{name}?", unknown) == 1.0


def test_categories_and_what_is_not_listed() -> None:
    assert column("kind=linear_span") == column("start=random_zero") == column("family=mlp") == 1.0
    own = msgspec.structs.replace(CHOICE, blueprint="mine", start="mine")
    assert column("blueprint=other", choice=own) == column("start=other", choice=own) == 1.0
    assert column("kind=other", Place()) == column("family=other", Place()) == column("optimizer=other", Place()) == 1.0


def test_what_matters_with_what() -> None:
    sgd = msgspec.structs.replace(PLACE, optimizer="sgd")
    assert column("start=random_zero*adaptive") == 1.0 == -column("start=random_zero*adaptive", sgd)
    assert column("start=tiny*adaptive") == 0.0
    wide = msgspec.structs.replace(CHOICE, growth=4.0, lr_scale=0.25)
    assert column("growth", choice=wide) == 1.0 and column("lr_scale", choice=wide) == -1.0
    assert column("growth*adaptive", sgd, wide) == -1.0


numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.builds(Place, **dict.fromkeys(_NUMBERS, numbers), kind=st.text(), family=st.text(), optimizer=st.text()),
    st.builds(
        Choice, blueprint=st.text(), start=st.text(), growth=st.floats(0, 1e300), seeds=st.integers(-5, 10**9),
        scale=st.floats(0, 1e300), lr_scale=st.floats(0, 1e300),
    ),
)  # fmt: skip
def test_rows_are_finite_and_of_ordinary_size(place: Place, choice: Choice) -> None:
    row = encode(place, choice)
    assert np.isfinite(row).all() and np.abs(row).max() <= 30


@pytest.mark.parametrize(
    ("sizes", "width"), [((64, 10, 8), 8.0), ((64, 32, 0), 4.0), ((4, 4, 0), 1.0), ((0, 0, 0), 1.0)]
)
def test_width_of_reference(sizes: tuple[int, int, int], width: float) -> None:
    assert reference_width(*sizes) == width


KEPT = Lifecycle.FOSSILIZED


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ((KEPT, 0.1, 0.5), (0.2, 0.1, 1.0)),
        ((KEPT, 0.1, 0.0), (3.0, 0.1, 1.0)),
        ((KEPT, -5.0, 0.5), (-3.0, -5.0, 1.0)),
        ((Lifecycle.CULLED, 0.1, 0.5), (0.0, 0.0, 0.0)),
        ((Lifecycle.ROLLED_BACK, None, None), (0.0, 0.0, 0.0)),
        ((Lifecycle.ROLLED_BACK, None, None, "training ended before it was judged"), None),
        ((Lifecycle.CANCELLED, 0.1, 0.5), None),
        ((KEPT, None, 0.5), None),
        ((KEPT, 0.1, None), None),
        ((KEPT, math.nan, 0.5), None),
        ((KEPT, 0.1, -0.5), None),
    ],
)
def test_what_a_fate_is_worth(told: tuple[Any, ...], wanted: tuple[float, ...] | None) -> None:
    assert targets(*told) == (None if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize(
    ("gain", "held", "wanted"), [(0.1, -0.5, 0.2), (None, 1.0, None), (1.0, 0.0, None), (math.nan, 1.0, None)]
)
def test_share_of_the_held_out_loss(gain: Any, held: Any, wanted: Any) -> None:
    assert gain_share(gain, held) == wanted


def test_everything_built_in_has_a_column_of_its_own() -> None:
    from esper.kasmina.blueprints import BLUEPRINTS
    from esper.kasmina.starts import STARTS
    from esper.protocol import SiteKind
    from esper.worth import features

    def built_in(registry: Any) -> set[str]:
        return {name for name in registry if type(registry[name]).__module__.startswith("esper.")}

    # a start's second name and blueprints that other tests have registered have none
    assert built_in(BLUEPRINTS) - set(features.BLUEPRINTS) <= {"own_mlp", "own_channels"}
    assert built_in(STARTS) - set(features.STARTS) == {"gradient_svd"}
    assert {f"kind={kind}" for kind in SiteKind} <= set(FEATURE_NAMES)
