"""``copy``: duplicates of the host's own hidden units (Net2WiderNet: Chen et al. 2016, arXiv:1511.05641).

Net2WiderNet copies a unit and divides its outgoing weights between the original and the copy. The host's weights are
the user's and do not change here, so a copy can only be added to a unit that keeps all of its outgoing weight: the
form that preserves the function is a copy with outgoing weights of zero. What remains of the method is what it is for:
features that have already been learnt. In-weights, bias and norm channel are those of units drawn without repetition
for as long as there are any; noise on the in-weights (a tenth of their spread) breaks the symmetry between copies.

No rank cap: any number of copies can be made. No rows are needed.
"""

from __future__ import annotations

import torch

from esper.config import FitConfig
from esper.kasmina.bank import Bank
from esper.kasmina.capture import Rows
from esper.kasmina.geometry import Geometry
from esper.kasmina.starts.start import SPAN_BLUEPRINTS, STARTS, HostUnits, Start, StartReport

NOISE = 0.1
"""Standard deviation of the noise on copied in-weights, as a share of the host's."""


@STARTS.register("copy")
class Copy(Start):
    needs_rows = False
    needs_host = True
    preserves_function = True
    sanity = "none"

    def refusal(self, blueprint: str, geometry: Geometry) -> str | None:
        if blueprint in SPAN_BLUEPRINTS:
            return None
        return f"copy duplicates hidden units of a span, and {blueprint!r} on a {geometry.kind} has none like them"

    @torch.no_grad()
    def prepare(
        self,
        bank: Bank,
        rows: Rows | None,
        config: FitConfig,
        generator: torch.Generator,
        host: HostUnits | None = None,
    ) -> StartReport:
        assert host is not None
        picked = _draw(host.params["w1"].shape[1], bank.num_slots, bank.units, generator)
        for store, source in ((bank.params, host.params), (bank.buffers, host.buffers)):
            for name, value in source.items():
                if name != "w1":
                    store[name].copy_(value[0, picked.to(value.device)])
        weight, known = bank.params["w1"], host.params["w1"]
        noise = torch.randn(weight.shape, generator=generator).to(weight.device) * (NOISE * bank.geometry.head_std)
        weight.zero_()  # features that an upstream span has grown since are not the host's: they are not copied
        weight[:, :, : known.shape[2]] = known[0, picked.to(known.device)]
        weight.add_(noise)
        bank.scale_output(0.0)
        return StartReport()


def _draw(num_units: int, num_slots: int, units: int, generator: torch.Generator) -> torch.Tensor:
    """``(S, U)``: all units of the host in random order, over and over until there are enough."""
    rounds = -(-num_slots * units // num_units)
    order = torch.cat([torch.randperm(num_units, generator=generator) for _ in range(rounds)])
    return order[: num_slots * units].view(num_slots, units)
