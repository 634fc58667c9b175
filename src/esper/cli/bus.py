"""``esper bus``."""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal

from esper.cli.command import Context, Outcome, UsageError, unknown_name
from esper.cli.parsing import JsonPath, Option
from esper.cli.terminal import labelled, write_lines

if TYPE_CHECKING:
    from esper.oona.bus import Bus as Connection
    from esper.oona.bus import Delivery
    from esper.oona.sender import Sender
    from esper.oona.topics import Topic
    from esper.protocol import Command as Order

_ACTIONS = ("tail", "send", "dead-letters", "forget")
_COMMANDS = (
    "germinate", "cancel", "cull", "pause", "resume", "roll-back", "set-budget", "set-strategy", "snapshot", "stop",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bus:
    """Look at a message bus, command a training, read the dead letters.

    tail shows messages as they come. send COMMAND steers one training and waits for its answer: esper bus send stop
    --run digits-01 --job grown-seed0-lr0.003 --reason "enough". dead-letters lists what nobody could read, and with
    --resend sends it again. forget GROUP removes a group of readers that will not come back.

    ESPER_BUS_KEY signs; ESPER_BUS_USERNAME and ESPER_BUS_PASSWORD are for the broker.
    """

    action: Annotated[
        str, Option(is_positional=True, metavar="ACTION", help=", ".join(_ACTIONS) + ".", completes=_ACTIONS)
    ]
    what: Annotated[
        str | None,
        Option(
            is_positional=True, metavar="WHAT", help="send: the command; forget: the group.", default="",
            completes=_COMMANDS,
        ),
    ] = None  # fmt: skip
    bus: Annotated[str, Option(metavar="URL", help="redis://, rediss://, redis+cluster://, kafka:// or memory://.")] = (
        "redis://localhost:6379"
    )
    run: Annotated[str, Option(metavar="NAME", help="The run, or a pattern for tail.", default="")] = ""
    job: Annotated[str, Option(metavar="NAME", help="The training in it, or a pattern for tail.", default="")] = ""
    topics: Annotated[
        tuple[str, ...], Option(metavar="TOPIC", name="--topic", help="Topics or patterns.", default="all of them")
    ] = ()
    begin: Annotated[
        Literal["oldest", "newest"], Option(name="--from", help="Where tail begins.", default="newest")
    ] = "newest"
    count: Annotated[
        int | None, Option(metavar="N", help="End after so many messages.", default="tail: never; else 1000")
    ] = None
    resend: Annotated[bool, Option(help="Send dead letters to their topics again.", default="no")] = False
    cohort: Annotated[int | None, Option(metavar="N", help="The cohort a command is about.", default="")] = None
    site: Annotated[str | None, Option(metavar="NAME", help="Where to germinate.", default="")] = None
    blueprint: Annotated[str | None, Option(metavar="NAME", help="What to germinate.", default="by site")] = None
    width: Annotated[int | None, Option(metavar="N", help="Units or rank.", default="by site")] = None
    strategy: Annotated[str | None, Option(metavar="NAME", help="How alpha moves.", default="")] = None
    params: Annotated[int | None, Option(metavar="N", help="set-budget: parameters.", default="no ceiling")] = None
    flops: Annotated[
        float | None, Option(metavar="X", help="set-budget: FLOPs as a multiple of the host's.", default="no ceiling")
    ] = None
    unlimited: Annotated[bool, Option(help="set-budget: remove the ceilings.", default="no")] = False
    reason: Annotated[str, Option(metavar="TEXT", help="Why; it is kept in the run's log.", default="")] = ""
    exact: Annotated[bool, Option(help="roll-back: take the whole training back.", default="no")] = False
    emergency: Annotated[bool, Option(help="stop: remove everything alive at once.", default="no")] = False
    wait: Annotated[float, Option(metavar="SECONDS", help="How long to wait for an answer.")] = 30.0
    issuer: Annotated[
        str | None,
        Option(metavar="NAME", help="Who commands, for the run's log.", default="whose the key is, else operator"),
    ] = None
    json: JsonPath = None

    def execute(self, context: Context) -> Outcome:
        """Do it on the bus named."""
        if self.action not in _ACTIONS:
            raise unknown_name("action", self.action, _ACTIONS)
        self._check()
        act = {"tail": self._tail, "send": self._send, "dead-letters": self._letters, "forget": self._forget}
        import asyncio  # a tenth of a second of imports, which help and completion do without

        return asyncio.run(self._on_bus(act[self.action]))

    def _check(self) -> None:
        if self.action in ("send", "forget") and self.what is None:
            example = "stop --run digits-01 --job JOB" if self.action == "send" else "GROUP"
            raise UsageError(f"{self.action} needs to know what; say: esper bus {self.action} {example}")
        if self.action in ("tail", "dead-letters") and self.what is not None:
            raise UsageError(f"{self.action} takes no further word, got {self.what!r}; leave it out")
        if self.action == "send" and not (self.run and self.job):
            raise UsageError("send needs --run and --job; esper bus tail --topic oona.heartbeats shows who is there")
        if self.count is not None and self.count < 1:
            raise UsageError(f"--count must be at least 1, got {self.count}; leave it out for no end")
        if not 0 < self.wait <= 3600:
            raise UsageError(f"--wait must be above 0 and at most 3600 seconds, got {self.wait:g}; say --wait 30")

    async def _on_bus(self, act: Any) -> Outcome:
        from esper.oona.address import open_bus

        bus = open_bus(self.bus)
        try:
            action: Coroutine[Any, Any, Outcome] = act(bus)
            return await action
        finally:
            await bus.close()

    # -------------------------------------------------------------------------------------------------- the actions

    async def _tail(self, bus: Connection) -> Outcome:
        from contextlib import aclosing

        from esper.oona.envelope import describe
        from esper.oona.operators import passing

        topics, shown = self._topics(), 0
        async with aclosing(passing(bus, topics, self.begin)) as batches:  # pyright: ignore[reportArgumentType]
            async for batch in batches:
                for delivery in filter(self._is_wanted, batch):
                    write_lines([f"{delivery.topic} {describe(delivery.value)}"], sys.stdout)
                    shown += 1
                    if self.count is not None and shown >= self.count:
                        return Outcome(result={"shown": shown})
        raise AssertionError("messages do not end by themselves")

    async def _send(self, bus: Connection) -> Outcome:
        from esper.oona.operators import ask

        assert self.what is not None
        sender, issuer = self._sender(), self.issuer or "operator"
        if sender.keyring is not None:
            issuer = sender.keyring.issuer(self.issuer, issuer)
        told = await ask(bus, sender, self._command(self.what), issuer=issuer, wait_s=self.wait)
        if told is None:
            text = f"no answer in {self.wait:g} s; is {self.run} {self.job} running, and on this bus?"
            return Outcome(result={"outcome": "no answer"}, lines=[labelled("unanswered", text)], ok=False)
        import msgspec

        why = f": {told.reason}" if told.reason else ""
        lines = [labelled(told.outcome, f"{told.kind} in {told.run} {told.job} at step {told.step}{why}")]
        return Outcome(result=msgspec.to_builtins(told), lines=lines, ok=told.outcome == "applied")

    async def _letters(self, bus: Connection) -> Outcome:
        from esper.oona.operators import held
        from esper.oona.topics import DEAD_LETTERS

        deliveries = await held(bus, DEAD_LETTERS, self.count or 1000)
        letters = [await self._letter(bus, delivery) for delivery in deliveries]
        lines = [labelled(x["state"], f"{x['topic']} {x['position']}: {x['reason']}") for x in letters]
        lines.append(labelled("letters", f"{len(letters)}"))
        return Outcome(result={"letters": letters}, lines=lines, ok=all(x["state"] != "failed" for x in letters))

    async def _letter(self, bus: Connection, delivery: Delivery) -> dict[str, Any]:
        from esper.errors import EnvelopeError
        from esper.oona.dead_letters import read_letter, revived
        from esper.oona.topics import TOPICS

        about: dict[str, Any] = {"topic": delivery.topic, "position": delivery.position, "state": "unreadable"}
        try:
            letter = read_letter(delivery)
            about |= {"topic": letter.topic, "position": letter.position, "reason": letter.reason, "state": "dead"}
            about |= {"bytes": letter.size, "sha256": letter.sha256, "attempts": letter.attempts}
            if self.resend and letter.topic in TOPICS:
                await bus.publish(TOPICS[letter.topic], [revived(letter)])
                about["state"] = "sent again"
        except EnvelopeError as error:
            about |= {"reason": str(error), "state": "failed" if self.resend else about["state"]}
        return about

    async def _forget(self, bus: Connection) -> Outcome:
        assert self.what is not None
        topics = self._topics()
        await bus.forget(topics, self.what)
        text = f"group {self.what!r} in {len(topics)} topics"
        names = [topic.name for topic in topics]
        return Outcome(result={"group": self.what, "topics": names}, lines=[labelled("forgotten", text)])

    # -------------------------------------------------------------------------------------------------- what they need

    def _topics(self) -> list[Topic]:
        from esper.oona.topics import TOPICS

        patterns = self.topics or ("*",)
        chosen = [topic for name, topic in TOPICS.items() if any(fnmatchcase(name, p) for p in patterns)]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in TOPICS):
                raise unknown_name("topic", pattern, TOPICS)
        return chosen

    def _is_wanted(self, delivery: Delivery) -> bool:
        if not (self.run or self.job):
            return True
        run, _, job = delivery.key.partition("/")
        return fnmatchcase(run, self.run or "*") and fnmatchcase(job, self.job or "*")

    def _sender(self) -> Sender:
        from esper.oona.sender import Sender
        from esper.oona.signing import Keyring

        return Sender(source="esper/operator", run=self.run, subject=self.job, keyring=Keyring.from_environment())

    def _command(self, kind: str) -> Order:
        from esper.errors import EnvelopeError
        from esper.oona.operators import command_from

        if kind.replace("_", "-") not in _COMMANDS:
            raise unknown_name("command", kind, _COMMANDS)
        fields: dict[str, object] = {
            name: value
            for name in ("cohort", "params", "flops", "strategy", "reason", "exact", "emergency")
            if (value := getattr(self, name)) is not None and value is not False and value != ""
        }
        if kind.replace("_", "-") == "set-budget" and self.unlimited == bool({"params", "flops"} & set(fields)):
            raise UsageError("set-budget needs --params N or --flops X, or --unlimited, and not both")
        if kind == "germinate":
            if self.site is None:
                raise UsageError("germinate needs a site; say --site NAME (esper sites lists them)")
            plan: dict[str, object] = {"site": self.site, "blueprint": self.blueprint, "width": self.width}
            plan["strategy"] = fields.pop("strategy", None)
            fields["seeds"] = [plan]
        try:
            return command_from(kind, fields)
        except EnvelopeError as error:
            raise UsageError(str(error)) from error
