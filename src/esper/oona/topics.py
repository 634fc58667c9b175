"""What is talked about on the bus: the one list of topics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """A named stream of messages; messages of one key keep their order.

    ``durable``: nothing is dropped that some group still needs; a broker without room refuses instead. Of what all are
    done with about the newest ``retention`` messages stay, as long as there is room. Otherwise the broker keeps about
    the newest ``retention`` messages, whether anybody has read them or not.
    """

    name: str
    durable: bool
    retention: int = 10_000


HEALTH = Topic("kasmina.health.layer", durable=False, retention=500)
"""Telemetry of all chunks and seeds of a job at a decision point, packed."""
COMMANDS = Topic("kasmina.control.commands", durable=True)
ACKNOWLEDGEMENTS = Topic("kasmina.control.ack", durable=True)
LIFECYCLE = Topic("kasmina.lifecycle", durable=True)
"""The run's events but for the curves."""
EPOCHS = Topic("kasmina.epochs", durable=True)
"""The curves: training and held-out losses, overhead."""
FIELD_REPORTS = Topic("karn.field_reports", durable=True)
"""What became of each cohort of a training that is over."""
OBSERVATIONS = Topic("tamiyo.observations", durable=False, retention=500)
"""What a remote controller decides on."""
DECISIONS = Topic("tamiyo.decisions", durable=True)
"""What a remote controller has decided, and on what."""
HEARTBEATS = Topic("oona.heartbeats", durable=False, retention=1_000)
"""Who is there."""
DEAD_LETTERS = Topic("oona.dead_letters", durable=True)
"""What could not be understood, with the reason."""

TOPICS = {
    topic.name: topic
    for topic in (
        HEALTH, COMMANDS, ACKNOWLEDGEMENTS, LIFECYCLE, EPOCHS, FIELD_REPORTS, OBSERVATIONS, DECISIONS, HEARTBEATS,
        DEAD_LETTERS,
    )
}  # fmt: skip
