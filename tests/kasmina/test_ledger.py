"""FLOPs are counted as they are spent."""

from __future__ import annotations

import pytest
import torch
from tests.example_sites import attached
from torch import nn

from esper.kasmina.ledger import PARTS, Ledger, forward_flops
from esper.kasmina.rows import count_rows

pytestmark = pytest.mark.unit


def test_parts_add_up_beyond_what_an_int_holds() -> None:
    ledger = Ledger()
    for number, part in enumerate(PARTS, 1):
        ledger.add(part, 1e18 * number)
        ledger.add(part, 0.5)
    assert ledger.total == pytest.approx(1e19) and ledger.spent["host"] == 1e18 + 0.5
    with pytest.raises(KeyError):
        ledger.add("elsewhere", 1.0)


def test_forward_flops_known_answers() -> None:
    linear, conv = nn.Linear(7, 5), nn.Conv2d(3, 4, 3, padding=1)
    assert forward_flops(linear, lambda: linear(torch.randn(11, 7))) == 2 * 11 * 7 * 5
    assert forward_flops(conv, lambda: conv(torch.randn(2, 3, 6, 6))) == 2 * 2 * 36 * 27 * 4


@pytest.mark.component
def test_rows_are_counted_by_output_position_and_hooks_are_removed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2, padding=1))
    x = torch.randn(2, 3, 6, 6)
    kasmina = attached(model, x)
    hooks = len(model[2]._forward_hooks)
    rows, dtypes = count_rows(kasmina.plans.values(), lambda: (model(x), model(x)))
    assert rows == {"0-2": 2 * 2 * 9} and dtypes == {torch.float32}
    assert len(model[2]._forward_hooks) == hooks
    with pytest.raises(ZeroDivisionError):
        count_rows(kasmina.plans.values(), lambda: 1 / 0)
    assert len(model[2]._forward_hooks) == hooks
