"""The shell command ``esper``. One file a command; a command's file is imported only when that command runs."""

from esper.cli.entry import main

__all__ = ["main"]
