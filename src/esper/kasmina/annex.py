"""The annex: a site's permanent growth as one dense bank that goes on learning."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.kasmina.bank import Bank, Moments
from esper.kasmina.site import Site


@torch.no_grad()
def fossilise(site: Site, cohort: int, slots: list[int], *, betas: tuple[float, float]) -> Bank:
    """Move ``slots`` of a cohort's bank into the site's annex, or beside it, and return where they are.

    The output of the site does not change: alpha is multiplied into the output weights, columns a slot does not
    cover get zeros. Moments move along, rescaled to the annex's step count: the bias-corrected averages that Adam
    divides stay what they were for each unit. From there on all units share one count, so a young unit's averages
    take up new gradients at the annex's (slower) pace. A bank of another blueprint than the annex's, or of one that
    absorbs nothing, stays a bank of its own.

    Parameters
    ----------
    betas:
        The host's Adam betas; zeros where moments have no bias to correct (SGD).
    """
    bank = site.banks[cohort]
    bank.scale_output(bank.alpha)
    bank.lr_scale = 1.0  # from here on it learns with its neighbours
    if not bank.plan.absorbs:
        bank.alpha.fill_(1.0)
        bank.set_learning(True)
        site.beside.append(bank)
        return bank
    dense = _dense(bank, slots, site.geometry.out_features, betas)
    known = next((other for other in site.permanent if other.blueprint == bank.blueprint), None)
    merged = dense if known is None else _concatenate([known, dense], betas)
    merged.set_learning(True)
    if site.annex is None or site.annex is known:
        site.annex = merged
    else:
        site.beside = [*(other for other in site.beside if other is not known), merged]
    return merged


def _dense(bank: Bank, slots: list[int], out_features: int, betas: tuple[float, float]) -> Bank:
    """Some slots of a bank as one slot over all columns, without a loop over slots.

    Their units lie side by side; what has no units adds up (each slot has columns of its own).
    """
    dense = bank.frozen_copy()
    index = torch.tensor(slots, device=bank.alpha.device)
    columns = None if bank.columns is None else bank.columns[slots].to(bank.alpha.device)
    taken = bank.moments.steps[index]
    most = taken.max()

    def as_one(value: Tensor, unit: int | None) -> Tensor:
        if unit is None:
            return value.sum(0, keepdim=True)
        return value.movedim(0, unit - 1).flatten(unit - 1, unit)[None].contiguous()

    def spread(name: str, value: Tensor) -> Tensor:
        axes, rows = bank.plan.axes[name], value[index].detach()
        if columns is not None and axes.column is not None:
            shape = list(rows.shape)
            shape[axes.column] = out_features
            where = columns.view(len(slots), *[-1 if axis == axes.column else 1 for axis in range(1, rows.dim())])
            rows = rows.new_zeros(shape).scatter_(axes.column, where.expand_as(rows), rows)
        return as_one(rows, axes.unit)

    def spread_moment(name: str, value: Tensor, beta: float) -> Tensor:
        factor = torch.where(taken > 0, (1.0 - beta**most) / (1.0 - beta**taken), 1.0)
        scaled = value.clone()
        scaled[index] *= factor.to(value.dtype).view(-1, *[1] * (value.dim() - 1))
        return spread(name, scaled)

    first, second, moments = betas[0], betas[1], bank.moments
    dense.set_columns(None)
    dense.units = bank.units * len(slots)
    dense.params = {name: spread(name, value) for name, value in bank.params.items()}
    dense.buffers = {
        name: as_one(value[index], bank.plan.buffer_axes[name].unit) for name, value in bank.buffers.items()
    }
    dense.alpha = torch.ones(1, device=bank.alpha.device)
    dense.moments = Moments(
        {name: spread_moment(name, value, first) for name, value in moments.first.items()},
        {name: spread_moment(name, value, second) for name, value in moments.second.items()},
        most.reshape(1).clone(),
    )
    return dense


def _concatenate(parts: list[Bank], betas: tuple[float, float]) -> Bank:
    reads = max(part.reads for part in parts)
    for part in parts:
        part.widen_reads(reads - part.reads)
    target = max(parts, key=lambda part: float(part.moments.steps[0]))
    steps = float(target.moments.steps[0])
    params = {
        name: _join([part.params[name].detach() for part in parts], axes.unit)
        for name, axes in target.plan.axes.items()
        if name in target.params
    }
    buffers = {
        name: _join([part.buffers[name] for part in parts], axes.unit)
        for name, axes in target.plan.buffer_axes.items()
        if name in target.buffers
    }
    moments = Moments(
        _join_moments(parts, "first", betas[0], steps),
        _join_moments(parts, "second", betas[1], steps),
        target.moments.steps,
    )
    target.params, target.buffers, target.moments = params, buffers, moments
    target.units = sum(part.units for part in parts)
    return target


def _join(values: list[Tensor], unit: int | None) -> Tensor:
    """Units side by side; what has no units is one function of the same input, and adds up."""
    return torch.stack(values).sum(0) if unit is None else torch.cat(values, dim=unit)


def _join_moments(parts: list[Bank], which: str, beta: float, steps: float) -> dict[str, Tensor]:
    joined: dict[str, Tensor] = {}
    longest = max(range(len(parts)), key=lambda index: float(parts[index].moments.steps[0]))
    stores = [getattr(part.moments, which) for part in parts]
    names = {name for store in stores for name in store}
    for name in names:
        unit = parts[0].plan.axes[name].unit
        pieces: list[Tensor] = []
        for part, store in zip(parts, stores, strict=True):
            value = store.get(name)
            if value is None:
                value = torch.zeros_like(part.params[name])
            taken = float(part.moments.steps[0])
            if taken > 0 and steps > 0:
                value = value * (1.0 - beta**steps) / (1.0 - beta**taken)
            pieces.append(value)
        # a sum keeps the moments of the longest-serving part: all of them saw the same gradients
        joined[name] = torch.cat(pieces, dim=unit) if unit is not None else pieces[longest]
    return joined
