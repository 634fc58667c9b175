"""One registry class for every family of plug-ins: one file and one registration each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from esper.errors import ConfigError, UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to instances of one plug-in family.

    Parameters
    ----------
    family:
        What the plug-ins are, for error messages ("blueprint").
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: instantiate without arguments and file under ``name``.

        A taken name raises :class:`~esper.errors.ConfigError`, unless the same class is defined anew (a notebook cell
        run twice): then the new one takes the place of the old.
        """

        _check_name(self.family, name)

        def decorator(cls: type[T]) -> type[T]:
            if name in self._items and not _is_redefined(type(self._items[name]), cls):
                raise ConfigError(f"{self.family} names must be unique, got {name!r} twice; choose another name")
            self._items[name] = cls()
            return cls

        return decorator

    def replace(self, name: str, cls: type[T]) -> None:
        """Put another class in the place of a known name, whose code stays."""
        self[name]  # unknown names raise with the list of known ones
        self._items[name] = cls()

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            near = difflib.get_close_matches(name, self._items, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            known = ", ".join(sorted(self._items))
            raise UnknownNameError(f"no {self.family} is called {name!r}; {hint}known: {known}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    @property
    def names(self) -> list[str]:
        """All names, in the order of their codes."""
        return list(self._items)

    def code(self, name: str) -> int:
        """Small integer for structure-of-arrays storage: the position in registration order."""
        self[name]  # unknown names raise with the list of known ones
        return list(self._items).index(name)

    def name(self, code: int) -> str:
        """Inverse of :meth:`code`."""
        return list(self._items)[code]

    def translated(self, codes: npt.NDArray[Any], names: list[str]) -> npt.NDArray[Any]:
        """Codes of a state whose plug-ins were registered as ``names``, as they are here; -1 stays."""
        used = set(codes[codes >= 0].tolist())
        here = [self.code(name) if number in used else -1 for number, name in enumerate(names)]
        return np.array([*here, -1], dtype=codes.dtype)[codes]


def _check_name(family: str, name: object) -> None:
    """Raise :class:`~esper.errors.ConfigError` for a decorator used without a name."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"a {family} is registered under a name, got {name!r}; write the decorator with ('name')")


def _is_redefined(old: type, new: type) -> bool:
    return old is not new and (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)
