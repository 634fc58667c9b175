"""Oona: the message bus. It carries telemetry, events and observations out of a training, and commands into it.

::

    training thread                        courier thread (asyncio)                   bus
    ---------------                        ------------------------                   ---
    events.jsonl, commands.jsonl  ------>  outbox: reads the logs from a cursor  -->  lifecycle, epochs, acks
    health reports (bounded)      ------>  publisher: batches, spools, drops     -->  health, observations
    grower.step applies, journals <------  desk: checks, dedupes, queues         <--  commands

Training never waits for the bus. What must not be lost is written to the run's own logs before it is sent, so the bus
is never the system of record; only telemetry may drop, and every drop is counted. Delivery is at least once: whoever
receives goes by the envelope's id.
"""
