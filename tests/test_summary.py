from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import Mlp
from tests.rigs import attach
from torch import nn

import esper
from esper.tamiyo import HeuristicController

pytestmark = pytest.mark.integration


def deep(depth: int, frozen: int) -> nn.Sequential:
    """A chain of ``depth`` layers whose last ``frozen`` ones are not trained."""
    layers = [nn.Linear(4, 4) for _ in range(depth)]
    for layer in layers[depth - frozen :]:
        layer.requires_grad_(False)
    chained = [module for layer in layers for module in (layer, nn.ReLU())][:-1]
    return nn.Sequential(*chained)


def test_many_sites_and_skipped_layers_still_fit_on_fifteen_lines() -> None:
    model = deep(16, 6)
    x = torch.randn(8, 4)
    grower = esper.Grower(
        model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1),
        loss=lambda m, batch: (m(batch) - 1).square().mean(), evaluate=[x] * 16,
    )  # fmt: skip
    lines = repr(grower).splitlines()
    assert len(lines) <= 15
    assert lines[0].startswith("Grower: 9 sites covering 62% of weights") and "state_dict keys unchanged" in lines[0]
    assert grower.discovery.covered_params == 10 * 20, "a layer between two sites counts once"
    assert "  ... and 3 more: grower.sites()" in lines
    assert "skipped 6:" in lines and "  ... and 2 more: grower.discovery.skipped" in lines
    assert lines[-1] == "0 cohorts alive, 0 of 0 kept | nothing germinates before step 100"


def test_until_it_may_grow_it_is_told_from_when_on() -> None:
    def shown(controller: Any, **settings: Any) -> str:
        return repr(attach(Mlp(), controller=controller, total_steps=2000, **settings).grower)

    heuristic = HeuristicController(esper.TamiyoConfig())
    assert shown(heuristic, interval=40).endswith("0 of 0 kept | nothing germinates before step 800")
    assert shown(None, interval=40).endswith("| growing"), "one that cannot tell"
    life = attach(Mlp(), controller=heuristic, total_steps=2000, interval=300)
    assert repr(life.grower).endswith("before step 900"), "the first decision point from then on"
    life.grower.loop.last_step = 899
    assert repr(life.grower).endswith("| growing")
    life.grower.loop.stopped = "enough"
    assert repr(life.grower).endswith("| stopped: enough")


def test_the_notebook_form_is_escaped() -> None:
    grower = attach(Mlp()).grower
    shown = grower._repr_html_()
    assert shown.startswith("<pre>Grower: 2 sites") and "fc1-fc2: 8 -&gt; 10 hidden (+0) -&gt;" in shown


def test_a_report_counts_what_was_kept_and_what_it_cost() -> None:
    rig = attach(Mlp(), evidence=esper.EvidenceConfig(accept="always"))
    rig.germinate("fc1-fc2", width=3)
    rig.train(40)
    rig.grower.finish()
    report = rig.grower.report()
    assert report.widths == {"fc1-fc2": 13, "fc2-fc3": 12}
    assert report.params - report.host_params == sum(verdict.added_params for verdict in report.verdicts) > 0
    assert sum(report.flops.values()) == pytest.approx(rig.grower.ledger.total)
    text = str(report).splitlines()
    assert text[0].startswith(f"{report.host_params:,} -> {report.params:,} parameters (+")
    assert text[1].startswith("cost: host ") and "KEPT fc1-fc2: not measured for" in text[2]
    assert text[-1] == "stopped: end of training"
