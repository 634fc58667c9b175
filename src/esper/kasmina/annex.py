"""Permanent growth, which goes on learning: one dense bank a site (its annex) and stacks of seeds on their chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.kasmina.bank import Bank, Moments
from esper.kasmina.site import Site, overlap


@torch.no_grad()
def fossilise(site: Site, cohort: int, slots: list[int], *, betas: tuple[float, float]) -> Bank:
    """Move ``slots`` of a cohort's bank into the site's annex, or its stacks of seeds, and return the bank they are in.

    The output of the site does not change: alpha is multiplied into the output weights, columns a slot does not
    cover get zeros. Moments move along, rescaled to the annex's step count: the bias-corrected averages that Adam
    divides stay what they were for each unit. From there on all units share one count, so a young unit's averages
    take up new gradients at the annex's (slower) pace. Seeds that read their own chunks stay slots of a stack, with
    their own counts.

    Parameters
    ----------
    betas:
        The host's Adam betas; zeros where moments have no bias to correct (SGD).
    """
    bank = site.banks[cohort]
    bank.scale_output(bank.alpha)
    if bank.reads_output:
        return _stack(site, bank, slots)
    dense = [_dense_slot(bank, slot, site.geometry.out_features) for slot in slots]
    parts = dense if site.annex is None else [site.annex, *dense]
    merged = parts[0] if len(parts) == 1 else _concatenate(parts, betas)
    merged.set_learning(True)
    site.annex = merged
    return merged


def _stack(site: Site, bank: Bank, slots: list[int]) -> Bank:
    """Put slots behind those of a stack of the same size on other columns, or begin a new stack."""
    fresh = bank.frozen_copy()
    fresh.moments = Moments(dict(bank.moments.first), dict(bank.moments.second), bank.moments.steps)
    fresh.alpha = torch.ones_like(bank.alpha)
    _select(fresh, slots)
    for stack in site.fossils:
        same = (stack.blueprint, stack.units, stack.width) == (fresh.blueprint, fresh.units, fresh.width)
        if same and not overlap([stack, fresh]):
            _append(stack, fresh)
            stack.set_learning(True)
            return stack
    fresh.set_learning(True)
    site.fossils.append(fresh)
    return fresh


def _select(bank: Bank, slots: list[int]) -> None:
    index = torch.tensor(slots, device=bank.device)
    for store in (bank.params, bank.moments.first, bank.moments.second):
        store.update({name: value.detach().index_select(0, index) for name, value in store.items()})
    bank.moments.steps = bank.moments.steps[index]
    bank.alpha = bank.alpha[index]
    bank.set_columns(None if bank.columns is None else bank.columns[slots])


def _append(stack: Bank, fresh: Bank) -> None:
    assert stack.columns is not None and fresh.columns is not None  # a seed on all columns overlaps any other
    zeros = [{name: torch.zeros_like(value) for name, value in bank.params.items()} for bank in (stack, fresh)]
    for ours, theirs in (
        (stack.moments.first, fresh.moments.first),
        (stack.moments.second, fresh.moments.second),
    ):
        for name in list(ours.keys() | theirs.keys()):
            ours[name] = torch.cat([ours.get(name, zeros[0][name]), theirs.get(name, zeros[1][name])])
    for name, value in fresh.params.items():
        stack.params[name] = torch.cat([stack.params[name].detach(), value.detach()])
    stack.moments.steps = torch.cat([stack.moments.steps, fresh.moments.steps])
    stack.alpha = torch.cat([stack.alpha, fresh.alpha])
    stack.set_columns(torch.cat([stack.columns, fresh.columns]))


def _dense_slot(bank: Bank, slot: int, out_features: int) -> Bank:
    """One slot as a bank of its own over all columns."""
    dense = bank.frozen_copy()
    dense.set_columns(None)
    columns = None if bank.columns is None else bank.columns[slot].to(bank.alpha.device)

    def spread(name: str, value: Tensor) -> Tensor:
        row = value[slot : slot + 1].detach().clone()
        axes = bank.plan.axes.get(name)
        if columns is None or axes is None or axes.column is None:
            return row
        shape = list(row.shape)
        shape[axes.column] = out_features
        return row.new_zeros(shape).index_copy_(axes.column, columns, row)

    dense.params = {name: spread(name, value) for name, value in bank.params.items()}
    dense.buffers = {name: value[slot : slot + 1].clone() for name, value in bank.buffers.items()}
    dense.alpha = torch.ones(1, device=bank.alpha.device)
    dense.moments = Moments(
        {name: spread(name, value) for name, value in bank.moments.first.items()},
        {name: spread(name, value) for name, value in bank.moments.second.items()},
        bank.moments.steps[slot : slot + 1].clone(),
    )
    return dense


def _concatenate(parts: list[Bank], betas: tuple[float, float]) -> Bank:
    reads = max(part.reads for part in parts)
    for part in parts:
        part.widen_reads(reads - part.reads)
    target = max(parts, key=lambda part: float(part.moments.steps[0]))
    steps = float(target.moments.steps[0])
    params = {
        name: torch.cat([part.params[name].detach() for part in parts], dim=axes.unit)
        for name, axes in target.plan.axes.items()
        if name in target.params
    }
    buffers = {
        name: torch.cat([part.buffers[name] for part in parts], dim=axes.unit)
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


def _join_moments(parts: list[Bank], which: str, beta: float, steps: float) -> dict[str, Tensor]:
    joined: dict[str, Tensor] = {}
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
        joined[name] = torch.cat(pieces, dim=unit)
    return joined
