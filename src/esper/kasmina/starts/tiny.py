"""``tiny``: the units that follow the part of the gradient which the host's own layer cannot (to first order).

TINY (Verbockhaven et al. 2024, arXiv:2405.19816). The wanted change of the output is -dL/dy less what a change of the
span's last layer could do about it (least squares on that layer's own inputs, grown units included). With S the second
moment of what a unit reads (its bias as a constant input) and N the correlation of that with the wanted change, the
best R units, linearised at zero, are the top R singular triples ``(u, lambda, v)`` of ``N S^{-1/2}`` (pseudo-inverse):
in-weights ``sqrt(lambda) S^{-1/2} v``, out-weights ``sqrt(lambda) u``. For convolutions S and N are taken over unfolded
patches, and taps of the tail are treated as independent.

The size is then set as for ``negative_gradient``: a share of the site's output, chosen by real forward losses.

**Rank cap**: at most ``min(columns * taps of the tail, features read * taps of the head + bias)`` units a seed. Where
the rows carry fewer directions, the rest start random in, zero out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.config import FitConfig
from esper.kasmina.bank import Bank
from esper.kasmina.capture import Rows
from esper.kasmina.geometry import Geometry
from esper.kasmina.incubator import check
from esper.kasmina.starts.correlation import (
    blocks,
    by_slot,
    correlate,
    rank_cap,
    refusal,
    taps,
    unit_inputs,
    write_units,
)
from esper.kasmina.starts.start import (
    STARTS,
    HostUnits,
    Start,
    StartReport,
    fit_and_check_rows,
    set_output_size,
)

_RELATIVE_RANK = 1e-5
"""Eigen- and singular values below this share of the largest count as zero."""


@STARTS.register("tiny")
class Tiny(Start):
    needs_rows = True
    needs_host = True
    preserves_function = False
    sanity = "gradient"

    def refusal(self, blueprint: str, geometry: Geometry) -> str | None:
        return refusal("tiny", blueprint, geometry)

    def max_units(self, geometry: Geometry, *, columns: int, reads: int) -> int | None:
        return rank_cap(geometry, columns=columns, reads=reads, constant=True)

    @torch.no_grad()
    def prepare(
        self,
        bank: Bank,
        rows: Rows | None,
        config: FitConfig,
        generator: torch.Generator,
        host: HostUnits | None = None,
    ) -> StartReport:
        if rows is None or torch.unique(rows.batch).numel() < 2:
            return StartReport()
        assert host is not None
        train, held = fit_and_check_rows(rows)
        wanted, flops = _beyond_the_layer(bank, train, host)
        flops += _set_units(bank, train, wanted)
        report = check(bank, held, -held.g, batch_rows=config.batch_rows)
        set_output_size(bank, held, config)
        return StartReport(report.explained, report.t_statistic, flops + report.flops)


def _set_units(bank: Bank, rows: Rows, wanted: Tensor) -> float:
    """Write the optimal units; returns the FLOPs of their matrices."""
    geometry = bank.geometry
    moment, correlation = None, None
    for part in blocks(rows.x, geometry):
        inputs = unit_inputs(rows.x[part], geometry, constant=True)
        flat = inputs.movedim(1, -1).flatten(0, -2).double()
        more = flat.t() @ flat / flat.shape[0] * (flat.shape[0] / rows.x.shape[0])
        moment = more if moment is None else moment + more
        crossed = correlate(inputs, wanted[part], geometry).double() / rows.positions
        correlation = crossed if correlation is None else correlation + crossed
    assert moment is not None and correlation is not None
    write, inward = optimal_units(by_slot(correlation, bank), moment, bank.units)
    write_units(bank, write, write.any(dim=1))
    _write_inputs(bank, inward, write.any(dim=1))
    head = moment.shape[0]
    return 2.0 * rows.positions * head * (head + geometry.out_features * taps(geometry)[1])


def optimal_units(correlation: Tensor, moment: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """Out-weights ``(S, K, R)`` and in-weights ``(S, R, J)``, float32, of the best R <= ``units`` units a seed.

    ``correlation (S, K, J)`` is that of the wanted change with what a unit reads, ``moment (J, J)`` the second moment
    of the latter, both float64. Directions that the rows do not carry write zeros.
    """
    root = inverse_root(moment)
    left, values, right = torch.linalg.svd(correlation @ root, full_matrices=False)
    num = min(units, values.shape[1])
    values = values[:, :num]
    chosen, strength = values > _RELATIVE_RANK * values[:, :1], values.sqrt()
    write = (left[:, :, :num] * strength[:, None, :] * chosen[:, None, :]).float()
    return write, (right[:, :num] @ root * strength[:, :, None]).float()


def _write_inputs(bank: Bank, directions: Tensor, chosen: Tensor) -> None:
    """``directions (S, R, J)``: in-weights, and the bias behind them."""
    w1, num = bank.params["w1"], directions.shape[1]
    size = w1[0, 0].numel()
    weights = directions[:, :, :size].reshape(w1.shape[0], num, *w1.shape[2:])
    mask = chosen.view(*chosen.shape, *[1] * (w1.dim() - 2))
    w1[:, :num] = torch.where(mask, weights, w1[:, :num])
    if "b1" in bank.params:
        bank.params["b1"][:, :num] = torch.where(chosen, directions[:, :, size], bank.params["b1"][:, :num])


def inverse_root(moment: Tensor) -> Tensor:
    """``S^{-1/2}`` on the directions that the rows hold (a pseudo-inverse), float64."""
    values, vectors = torch.linalg.eigh(moment)
    kept = values > _RELATIVE_RANK * values[-1].clamp_min(0)
    inverse = torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0)
    return (vectors * inverse) @ vectors.t()


def _beyond_the_layer(bank: Bank, rows: Rows, host: HostUnits) -> tuple[Tensor, float]:
    """-dL/dy less its least squares fit on what the span's last layer reads; and the FLOPs spent on that."""
    geometry = bank.geometry
    moment, crossed = None, None
    for part in blocks(rows.x, geometry):
        flat = _layer_inputs(_hidden(bank, rows.x[part].float(), host), geometry, constant=host.tail_bias)
        target = -rows.g[part].movedim(1, -1).flatten(0, -2).double()
        more, cross = flat.t() @ flat, target.t() @ flat
        moment = more if moment is None else moment + more
        crossed = cross if crossed is None else crossed + cross
    assert moment is not None and crossed is not None
    root = inverse_root(moment)
    weight = crossed @ root @ root  # (O, D)
    wanted = torch.empty_like(rows.g)
    for part in blocks(rows.x, geometry):
        flat = _layer_inputs(_hidden(bank, rows.x[part].float(), host), geometry, constant=host.tail_bias)
        taken = (flat @ weight.t()).to(wanted.dtype)
        g = rows.g[part].movedim(1, -1)
        wanted[part] = (-g - taken.view(g.shape)).movedim(-1, 1)
    width = weight.shape[1]
    before = 0 if host.further is None else host.further.shape[2]
    read = geometry.hidden_features * (geometry.in_features + before)
    if host.annex is not None:
        read += host.annex.units * host.annex.reads
    units = 2 * 2.0 * rows.positions * read * taps(geometry)[0]
    return wanted, units + 2.0 * rows.positions * width * (width + 2 * geometry.out_features)


def _hidden(bank: Bank, x: Tensor, host: HostUnits) -> Tensor:
    """Hidden activations of the host, fed by what the span before has grown too, and of what the span has grown."""
    params = host.params
    if host.further is not None:
        params = params | {"w1": torch.cat([params["w1"], host.further.to(x.device)], dim=2)}
    own = x[:, : params["w1"].shape[2]]
    h = bank.plan.hidden(params, host.buffers, own, bank.geometry, training=False, generator=None)
    if host.annex is None:
        return h
    return torch.cat([h, host.annex.hidden(x[:, : host.annex.reads], training=False, generator=None)], dim=1)


def _layer_inputs(h: Tensor, geometry: Geometry, *, constant: bool) -> Tensor:
    """``(rows, D)`` float64: what an output of the tail reads (patches for convolutions), and its bias's constant."""
    conv = geometry.tail_conv
    if conv is not None:
        h = F.unfold(h, conv.kernel, conv.dilation, conv.padding, conv.stride).transpose(1, 2).flatten(0, 1)
    return torch.cat([h, torch.ones_like(h[:, :1])], dim=1).double() if constant else h.double()
