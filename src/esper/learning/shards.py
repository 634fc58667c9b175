"""One environment dealt out to several workers: its episodes in parts, each with a random stream of its own.

What happens follows from the seed, the actions and the number of parts, wherever the parts run. The first part has the
seed itself, so that one part alone is the environment as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from esper.errors import ConfigError, StateError
from esper.learning.environment import EnvironmentFactory, HostEnvironment, Ints, Stepped
from esper.protocol import Observation
from esper.tamiyo.actions import Scope
from esper.tamiyo.sight import Sight


class Worker(Protocol):
    """Holds one part and is asked one thing at a time; several are asked before the first answer is waited for."""

    def ask(self, call: str, *given: Any) -> None:
        """Begin with what the method ``call`` of :class:`Part` does."""
        ...

    def answer(self) -> Any:
        """What it has returned, or the error that it has raised."""
        ...


@dataclasses.dataclass(frozen=True)
class About:
    """What an environment says of itself."""

    num: int
    scope: Scope
    families: tuple[str, ...]
    best: float | None


class Part:
    """An environment in the words of its worker: plain questions and answers that can travel."""

    def __init__(self, environment: HostEnvironment) -> None:
        self._environment = environment
        self.look, self.observations = environment.look, environment.observations
        self.reset, self.state, self.load = environment.reset, environment.state, environment.load

    def about(self) -> About:
        """How many episodes it has, and of what."""
        part = self._environment
        return About(part.num, part.scope, part.families, part.best)

    def step(self, actions: Ints) -> tuple[Stepped[Sight], list[Sight]]:
        """Act, and look at what follows: both in one answer."""
        return self._environment.step(actions), self._environment.look()


class Here:
    """A worker that is this process."""

    def __init__(self, part: Part) -> None:
        self._part, self._answer = part, None

    def ask(self, call: str, *given: Any) -> None:
        """Does it at once."""
        self._answer = getattr(self._part, call)(*given)

    def answer(self) -> Any:
        """What came of it."""
        return self._answer


class Shards:
    """The parts as one :class:`~esper.learning.environment.HostEnvironment`, their episodes in the workers' order."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers
        abouts: list[About] = self._each("about")
        self._sizes = [about.num for about in abouts]
        self.num = sum(self._sizes)
        self.scope, self.best = abouts[0].scope, abouts[0].best
        self.families = tuple(dict.fromkeys(name for about in abouts for name in about.families))
        self._seen: list[Sight] | None = None

    def _each(self, call: str, given: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        for number, worker in enumerate(self._workers):
            worker.ask(call, *(given[number] if given else ()))
        return [worker.answer() for worker in self._workers]

    def reset(self, seed: int) -> None:
        """Begin all episodes anew."""
        more = np.random.SeedSequence(seed).generate_state(len(self._workers) - 1)
        self._each("reset", [(part,) for part in (seed, *(int(word) >> 1 for word in more))])
        self._seen = None

    def look(self) -> list[Sight]:
        """What is to be seen now."""
        if self._seen is None:
            self._seen = _joined(self._each("look"))
        return self._seen

    def observations(self) -> list[Observation]:
        """The same look, as any controller sees it."""
        return _joined(self._each("observations"))

    def step(self, actions: Ints) -> Stepped[Sight]:
        """Act once in each episode."""
        parts = np.split(actions, np.cumsum(self._sizes)[:-1])
        answers: list[tuple[Stepped[Sight], list[Sight]]] = self._each("step", [(part,) for part in parts])
        stepped = [found for found, _ in answers]
        self._seen = _joined([seen for _, seen in answers])
        firsts = np.cumsum([0, *self._sizes[:-1]]).tolist()
        cut = [(first, found.last) for first, found in zip(firsts, stepped, strict=True)]
        return Stepped(
            np.concatenate([found.rewards for found in stepped]),
            np.concatenate([found.terminated for found in stepped]),
            np.concatenate([found.truncated for found in stepped]),
            {first + row: last for first, lasts in cut for row, last in lasts.items()},
        )

    def state(self) -> dict[str, Any]:
        """That of each part; one alone has the environment's own."""
        states = self._each("state")
        return states[0] if len(states) == 1 else {"parts": states}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`.

        Raises
        ------
        StateError
            It is of another number of parts.
        """
        states = [state] if len(self._workers) == 1 else state.get("parts", [state])
        if len(states) != len(self._workers):
            raise StateError(
                f"a state of {len(self._workers)} workers is needed, got one of {len(states)}; use as many as it has"
            )
        self._each("load", [(part,) for part in states])
        self._seen = None


def _joined(parts: list[list[Any]]) -> list[Any]:
    return [one for part in parts for one in part]


def sizes(num: int, workers: int) -> list[int]:
    """Episodes of each of the workers: as even as can be.

    Raises
    ------
    ConfigError
        One of them would have none.
    """
    if not 1 <= workers <= num:
        raise ConfigError(f"workers must lie between 1 and the {num} episodes side by side, got {workers}; use fewer")
    return [num // workers + (number < num % workers) for number in range(workers)]


@contextmanager
def spread(factory: EnvironmentFactory, num: int, workers: int, ray: str | None) -> Generator[HostEnvironment]:
    """``num`` episodes with ``workers`` workers, in the Ray cluster at ``ray`` or in this process.

    Raises
    ------
    ConfigError
        More workers than episodes, or Ray is not installed.
    WorkerError
        The cluster does not answer, or has no room for the workers.
    """
    dealt = sizes(num, workers)
    if ray is not None:
        with _in_ray(ray, factory, dealt) as there:
            yield Shards(list(there))
    elif workers > 1:
        yield Shards([Here(Part(factory(size))) for size in dealt])
    else:
        yield factory(num)


@contextmanager
def _in_ray(address: str, factory: EnvironmentFactory, dealt: Sequence[int]) -> Generator[Sequence[Worker]]:
    try:
        from esper.learning.ray_workers import ray_workers
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("workers in Ray need ray, which is not installed; pip install 'esper-morph[ray]'") from error
    with ray_workers(address, factory, dealt) as workers:
        yield workers
