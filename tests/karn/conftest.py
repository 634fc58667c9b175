"""Each engine that a Karn database may have, in turn."""

from __future__ import annotations

from tests.karn.engines import engine  # noqa: F401  the fixture
