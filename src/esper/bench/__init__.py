"""What Esper costs, measured: its operations, whole training steps, and a growing run. Importing this is light.

``ops``
    every kernel against its reference, then against the read floor, PyTorch and the plan's loop (GPU only);
``step``
    a whole training step with and without Esper, memory, and how busy the device is;
``growth``
    the plan's five metrics on a small run that grows.
"""

from __future__ import annotations

PARTS = ("ops", "step", "growth")
"""In this order; each writes files of its own."""
