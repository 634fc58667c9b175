"""Write docs/configuration.md from the fields, docstrings and rules in src/esper/config.py.

Run from the repository root::

    python docs/generate_configuration.py

The source is read, not imported, so that defaults appear as they are written there.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "esper" / "config.py"
TARGET = ROOT / "docs" / "configuration.md"

_HEAD = """\
# Configuration

<!-- Written by docs/generate_configuration.py from src/esper/config.py; change that file, not this one. -->

All settings are frozen, keyword-only dataclasses, checked once when they are made. A value out of range raises
`esper.ConfigError`, which names the rule, the value and a remedy. Durations are counted in real optimizer steps.

```python
import esper

config = esper.Config(
    total_steps=3000,
    budget=esper.BudgetConfig(params=50_000),
    tamiyo=esper.TamiyoConfig(temper="conservative"),
)
```
"""


def render(source: str) -> str:
    """The page for the text of config.py. ``Config`` comes first, its parts follow in the order of its fields."""
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    top = classes["Config"]
    parts = {_text(field.annotation): _name(field) for field, _ in _fields(top) if _text(field.annotation) in classes}
    sections = [_section("Config", top, "")]
    sections += [_section(name, classes[name], f"{field}.") for name, field in parts.items()]
    return "\n".join([_HEAD, *sections])


def _section(name: str, node: ast.ClassDef, prefix: str) -> str:
    summary = (ast.get_docstring(node) or "").replace(":class:`esper.Grower`", "`esper.Grower`").replace("``", "`")
    lines = [f"## {name}", "", summary, "", "| setting | type | default | meaning |", "|---|---|---|---|"]
    for field, meaning in _fields(node):
        kind = _text(field.annotation).replace("|", "\\|")
        default = "" if field.value is None else _default(field.value)
        lines.append(f"| `{prefix}{_name(field)}` | `{kind}` | {default} | {meaning} |")
    rules = _rules(node)
    if rules:
        lines += ["", "Rules: " + "; ".join(rules) + "."]
    return "\n".join(lines) + "\n"


def _fields(node: ast.ClassDef) -> list[tuple[ast.AnnAssign, str]]:
    """Fields with the docstring below each, on one line."""
    found: list[tuple[ast.AnnAssign, str]] = []
    for item, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(item, ast.AnnAssign):
            continue
        meaning = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            meaning = " ".join(str(following.value.value).split()).replace("``", "`").replace("|", "\\|")
        elif _is_part(item):
            meaning = f"See [{_text(item.annotation)}](#{_text(item.annotation).lower()})."
        found.append((item, meaning))
    return found


def _is_part(item: ast.AnnAssign) -> bool:
    return isinstance(item.value, ast.Call) and _text(item.value.func) == "field"


def _default(value: ast.expr) -> str:
    if isinstance(value, ast.Call) and _text(value.func) == "field":
        factory = next(keyword.value for keyword in value.keywords if keyword.arg == "default_factory")
        return f"`{_text(factory)}()`"
    return f"`{_text(value)}`"


def _rules(node: ast.ClassDef) -> list[str]:
    """The first text of every check, in order."""
    calls = [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and _text(call.func) == "_check" and isinstance(call.args[1], ast.Constant)
    ]
    calls.sort(key=lambda call: call.lineno)
    return [f"`{first}` {rest}" for first, _, rest in (str(call.args[1].value).partition(" ") for call in calls)]  # type: ignore[attr-defined]


def _name(field: ast.AnnAssign) -> str:
    return _text(field.target)


def _text(node: ast.expr) -> str:
    return ast.unparse(node)


if __name__ == "__main__":
    TARGET.write_text(render(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
