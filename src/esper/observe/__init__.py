"""What a run leaves behind and how people see it: event log, history, report, progress lines."""
