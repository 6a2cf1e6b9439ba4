"""Take out of rows what Arrow and Parquet put in: a null for every field that another row has.

A column of objects has one set of fields for all rows, so a call of one tool gets the parameters of all others, as
null, and a template would write them all. What is null and was not a parameter of that tool was absent. A null for a
parameter of the tool itself may be meant: it stays, and is counted, so that it can be said. JSON in a string is left as
it is: there an absent field is absent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_ARGUMENTS = ("arguments", "parameters")


@dataclass(slots=True)
class Nulls:
    """absent: nulls that were taken out; meant: those that stay, since the tool has such a parameter."""

    absent: int = 0
    meant: int = 0


def without_absent(value: dict[str, Any], nulls: Nulls) -> dict[str, Any]:
    """The row without the nulls that its columns put into tools and calls; those are counted in `nulls`."""
    fields = {name: tools for name in ("tools", "functions") if isinstance(tools := value.get(name), list)}
    cleaned: dict[str, Any] = {}
    for name, tools in fields.items():
        cleaned[name] = [_defined(tool, nulls) if isinstance(tool, dict) else tool for tool in tools]
    schemas = _parameters({**value, **cleaned})
    return {name: cleaned.get(name) or _walked(item, schemas, nulls) for name, item in value.items()}


def _defined(node: Any, nulls: Nulls) -> Any:
    """A tool's definition without any null: nothing in a schema is null but a value that it allows."""
    if isinstance(node, list):
        return [_defined(item, nulls) for item in node]
    if not isinstance(node, dict):
        return node
    nulls.absent += sum(item is None for item in node.values())
    return {name: _defined(item, nulls) for name, item in node.items() if item is not None}


def _parameters(value: dict[str, Any]) -> dict[str, Any]:
    """The schema of each tool's parameters, by its name; of tools in JSON text too."""
    schemas: dict[str, Any] = {}
    for field in ("tools", "functions"):
        given = _from_text(value.get(field))
        for tool in given if isinstance(given, list) else ():
            tool = _from_text(tool)
            function = tool.get("function", tool) if isinstance(tool, dict) else None
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                schemas[function["name"]] = function.get("parameters") or {}
    return schemas


def _from_text(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None  # the reader of the field says what is wrong


def _walked(node: Any, schemas: dict[str, Any], nulls: Nulls) -> Any:
    """`node` with every call in it cleaned."""
    if isinstance(node, list):
        return [_walked(item, schemas, nulls) for item in node]
    if not isinstance(node, dict):
        return node
    given = next((name for name in _ARGUMENTS if isinstance(node.get(name), dict)), None)
    if given is None or not isinstance(node.get("name"), str):
        return {name: _walked(item, schemas, nulls) for name, item in node.items()}
    arguments = _matched(node[given], schemas.get(node["name"]), nulls)
    return {name: arguments if name == given else item for name, item in node.items() if item is not None}


def _matched(value: Any, schema: Any, nulls: Nulls) -> Any:
    """A value of a call without the nulls that its schema does not know."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, list):
        return [_matched(item, schema.get("items"), nulls) for item in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties") if isinstance(schema.get("properties"), dict) else {}
    kept = {}
    for name, item in value.items():
        if item is None and name not in known:
            nulls.absent += 1
            continue
        nulls.meant += item is None
        kept[name] = _matched(item, known.get(name), nulls)
    return kept
