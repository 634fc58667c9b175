"""What is no order, or none for this training, never reaches the desk's queue."""

from __future__ import annotations

from typing import Any

import pytest
from tests.oona.served import RUN, an_order, sealed
from tests.oona.test_desk import Fixture, budget, fix

from esper.errors import EnvelopeError
from esper.oona.incoming import nobody
from esper.protocol import Order, SetBudget, Stop

pytestmark = pytest.mark.component

__all__ = ["fix"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataschema": "esper:order:2"}, "an order is 'esper:order:1'"),
        ({"datacontenttype": "text/plain"}, "an order is"),
        ({"data": b"{"}, "must be what their schema says"),
        ({"data": b"[" * 9000}, "deep"),
        ({"data": b'{"command":{"type":"rm"}}'}, "schema says"),
        ({"data": b" " * (129 << 10)}, "131072 bytes"),
        ({"type": "esper.order.stop"}, "holds; got 'esper.order.stop'"),
        ({"type": "esper.command"}, "or esper.order.set_budget"),
        ({"id": "b"}, "id is its envelope's 'b'"),
        ({"esperexpires": "soon"}, "RFC 3339"),
    ],
)
def test_what_is_no_order_is_for_the_dead_letters(changes: dict[str, Any], says: str, fix: Fixture) -> None:
    with pytest.raises(EnvelopeError, match=says):
        fix.desk.take(sealed(an_order("a", budget(1)), **changes))
    assert fix.train() == [] and not fix.desk.is_open("a")


@pytest.mark.parametrize(
    ("order", "says"),
    [
        (an_order("", budget(1)), "an order's id"),
        (an_order("x" * 129, budget(1)), "an order's id"),
        (an_order("a b", budget(1)), "an order's id"),
        (an_order("a", budget(1), issuer=""), "issuer is a name"),
        (an_order("a", budget(1), issuer="a\nb"), "issuer is a name"),
        (an_order("a", budget(1), deadline="tomorrow"), "RFC 3339"),
        (an_order("a", SetBudget(flops=float("nan"))), "numbers that are none"),
        (an_order("a", Stop(reason="x" * 140_000)), "not too large"),
        (an_order("a", Stop(reason="\ud800")), "plain values"),
    ],
)
def test_what_could_not_be_written_down(order: Order, says: str, fix: Fixture) -> None:
    with pytest.raises(EnvelopeError, match=says):
        fix.desk.submit(order)
    assert fix.train() == []


@pytest.mark.parametrize("kind", ["esper.order", "esper.order.set_budget"])
def test_an_envelope_may_say_what_it_holds(kind: str, fix: Fixture) -> None:
    assert fix.desk.take(sealed(an_order("a", budget(1)), type=kind)) is None
    assert fix.train() == ["a"]


def test_orders_of_this_process_need_no_address(fix: Fixture) -> None:
    assert fix.desk.submit(Order(id="a", command=budget(1))) is None
    assert fix.train() == ["a"] and fix.desk.answer_to("a").run == RUN


@pytest.mark.parametrize("changes", [{"esperrun": "other"}, {"subject": "other"}])
def test_orders_of_other_trainings_are_passed_over(changes: dict[str, Any]) -> None:
    fix = Fixture(verify=nobody)
    assert fix.desk.take(sealed(an_order("a", budget(1)), **changes)) is None
    assert not fix.desk.is_open("a")
