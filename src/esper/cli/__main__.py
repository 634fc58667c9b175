"""``python -m esper.cli`` is ``esper``."""

from esper.cli.entry import main

if __name__ == "__main__":  # worker processes import this module again
    raise SystemExit(main())
