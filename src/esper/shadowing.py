"""Does another package called ``esper`` stand in the way?

``esper`` on PyPI is an unrelated entity-component library (it defines ``World`` and ``Processor``). Both it and this
distribution, ``esper-morph``, install into ``site-packages/esper/``: whichever was installed last owns
``esper/__init__.py``, and uninstalling either breaks the other. This is looked at on demand (``esper doctor``), never
at import time.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path

_REMEDY = "pip uninstall -y esper esper-morph && pip install esper-morph"


def shadowing_problem() -> str | None:
    """Say what is wrong when ``import esper`` does not, or may soon not, give this package.

    Returns
    -------
    str or None
        Cause and remedy in one or two sentences, or ``None`` when nothing stands in the way.
    """
    imported = importlib.import_module("esper")
    location = getattr(imported, "__file__", None)
    ours = Path(__file__).with_name("__init__.py")
    if hasattr(imported, "World") or hasattr(imported, "Processor"):
        return (
            f"`import esper` gives the unrelated entity-component library 'esper', not esper-morph "
            f"({location}); use separate environments, or: {_REMEDY}"
        )
    if location is None or Path(location).resolve() != ours.resolve():
        return f"`import esper` gives {location}, not esper-morph ({ours}); rename or remove what is in the way"
    try:
        other = importlib.metadata.distribution("esper")
    except importlib.metadata.PackageNotFoundError:
        return None
    return (
        f"the unrelated entity-component library 'esper' {other.version} is installed beside esper-morph and owns the "
        f"same folder, so an update or uninstall of either breaks the other; use separate environments, or: {_REMEDY}"
    )
