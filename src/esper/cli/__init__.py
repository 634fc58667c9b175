"""The shell command ``esper``."""
