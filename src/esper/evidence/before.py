"""The host as it was before a graft: the second control of branches that fold into the host's own weights.

What the host's layer could have expressed shows no gain against a stand-in by construction, whatever it is worth as a
step of training. Such a cohort has to help two hosts: the present one, which has come to lean on it, and the one from
before the graft, which has never seen it and so cannot.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from esper.kasmina import memory
from esper.kasmina.site import Site


class HostBefore:
    """Copies of the host's parameters, and of permanent and other grafted branches, at the time of a graft.

    They lie in the CPU's memory, and come to the network's device only while something is measured with them.
    """

    def __init__(self, model: nn.Module, sites: dict[str, Site], cohort: int) -> None:
        banks = [bank for site in sites.values() for bank in site.permanent]
        banks += [site.banks[number] for site in sites.values() for number in site.grafted if number != cohort]
        tensors: list[Tensor] = [*model.parameters(), *(value for bank in banks for value in bank.params.values())]
        self._parked = memory.Parked(tensors)
        self._pairs = list(zip(tensors, self._parked.copies, strict=True))

    def state(self, names: Mapping[int, str]) -> dict[str, Tensor]:
        """The copies by the names of what they are copies of (``names`` by the tensors' id); not copied again.

        What has left the network since then is left out: it would not run.
        """
        self._parked.wait()
        return {names[id(tensor)]: before for tensor, before in self._pairs if id(tensor) in names}

    @classmethod
    def of(cls, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> HostBefore:
        """The copies that :meth:`state` has told of, for a network with these tensors."""
        before = object.__new__(cls)
        before._parked = memory.Parked(state.values())
        before._pairs = list(zip((tensors[name] for name in state), before._parked.copies, strict=True))
        return before

    @contextmanager
    def restored(self) -> Generator[None, None, None]:
        """The network as it was then, the judged cohort as it is now; weights are the same tensors again on exit."""
        self._parked.wait()
        now = [tensor.data for tensor, _ in self._pairs]
        try:
            for tensor, before in self._pairs:
                tensor.data = before.to(tensor.device)
            yield
        finally:
            for (tensor, _), data in zip(self._pairs, now, strict=True):
                tensor.data = data


def tensors_by_name(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Every parameter of the network as it is now: the host's, and those of all that grows."""
    found: dict[str, Tensor] = {f"host/{name}": value for name, value in model.named_parameters()}
    for name, site in sites.items():
        banks = {f"permanent/{number}": bank for number, bank in enumerate(site.permanent)}
        banks.update({f"cohort/{cohort}": bank for cohort, bank in site.banks.items()})
        for place, bank in banks.items():
            found.update({f"{name}/{place}/{key}": value for key, value in bank.params.items()})
    return found


def only_folds(sites: dict[str, Site], cohort: int) -> bool:
    """Whether every branch of a cohort is one that its host's layer could hold in its own weights."""
    members = [site for site in sites.values() if cohort in site.banks]
    return bool(members) and all(
        not site.info.kind.is_span and site.banks[cohort].plan.folds(site.geometry) for site in members
    )


def smaller(one: list[float], two: list[float]) -> list[float]:
    """Pairwise minimum; NaN where either is NaN."""
    pairs = torch.tensor([one, two], dtype=torch.float64)
    return [float(value) for value in torch.minimum(pairs[0], pairs[1])]
