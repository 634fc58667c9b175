"""What a fault does to messages. Whose bus it is does not matter: the harness's own asks here before it carries any."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from esper.safety.faults.fault import Strikes, Subject

Trouble = Literal["gone", "loses", "doubles", "disorders"]


@dataclass
class Traffic:
    """Messages of a training on their way out and in."""

    trouble: Trouble | None = None
    """``gone``: nothing passes. ``loses``: a message, or the answer to it, is lost, and whoever sent or fetched it
    sees an error. ``doubles``: each arrives twice. ``disorders``: each is late, and comes after later ones."""
    strikes: Strikes = field(default_factory=Strikes)


@contextmanager
def in_trouble(subject: Subject, trouble: Trouble) -> Generator[Strikes]:
    """The subject's messages are in trouble while the context lasts."""
    traffic = subject.traffic
    assert traffic is not None  # whoever injects these faults has a bus
    traffic.trouble, traffic.strikes = trouble, Strikes()
    try:
        yield traffic.strikes
    finally:
        traffic.trouble = None
