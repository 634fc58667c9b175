"""What a run leaves behind and how people see it: event log, history, report, progress lines."""

from esper.observe.console import Console
from esper.observe.event_log import EventLog, read_events
from esper.observe.history import RunHistory, fold
from esper.observe.report import render, write_report

__all__ = ["Console", "EventLog", "RunHistory", "fold", "read_events", "render", "write_report"]
