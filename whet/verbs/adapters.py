"""The verbs on adapters: list, compose, rename and delete them."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from whet.verbs.libraries import prepare_libraries


def adapters(words: argparse.Namespace) -> dict[str, Any]:
    from whet.base.errors import UserError

    wanted = {"list": (1, 1), "compose": (2, None), "rename": (2, 2), "delete": (1, 1)}[words.what]
    if len(words.targets) < wanted[0] or (wanted[1] and len(words.targets) > wanted[1]):
        raise UserError(
            f"whet adapters {words.what} takes other words", found=" ".join(words.targets),
            expected={"list": "a folder", "compose": "OUT and the adapters", "rename": "ADAPTER NEW",
                      "delete": "ADAPTER"}[words.what],
            fix="whet adapters --help shows each",
        )  # fmt: skip
    return {"list": _list_adapters, "compose": _compose, "rename": _rename, "delete": _delete}[words.what](words)


def _list_adapters(words: argparse.Namespace) -> dict[str, Any]:
    from whet.adapters import find

    found = find(words.targets[0])
    if not words.json:
        from rich.table import Table

        from whet.base.console import bytes_text, console, say

        table = Table(box=None, pad_edge=False)
        for name in ("adapter", "kind", "rank", "parameters", "size", "base"):
            table.add_column(name, justify="right" if name in ("rank", "parameters", "size") else "left")
        for one in found:
            base = Path(one.base).name if one.base else ""
            table.add_row(
                str(one.path), one.kind, str(one.rank or ""), f"{one.parameters:,}", bytes_text(one.bytes), base
            )
        if found:
            console(stdout=True).print(table)
        else:
            say(f"no adapters in {words.targets[0]}")
    return {"adapters": [asdict(one) | {"path": str(one.path)} for one in found]}


def _compose(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.base.console import say
    from whet.base.errors import UserError

    try:
        weights = None if words.weights is None else [float(part) for part in words.weights.split(",")]
    except ValueError as error:
        raise UserError(
            "these are no weights", field="--weights", found=words.weights, expected="numbers with commas",
            fix="--weights 0.5,0.5",
        ) from error  # fmt: skip
    out, *parts = words.targets
    prepare_libraries()
    made = api.compose(out, parts, weights=weights, how=words.how, rank=words.rank, density=words.density)
    say(f"{' + '.join(parts)} by {words.how} -> {made}")
    return {"adapter": str(made), "parts": parts, "how": words.how, "weights": weights}


def _rename(words: argparse.Namespace) -> dict[str, Any]:
    from whet.ship.compose import rename_on_disk

    return {"adapter": str(rename_on_disk(*words.targets))}


def _delete(words: argparse.Namespace) -> dict[str, Any]:
    from whet.ship.compose import delete_on_disk

    return {"deleted": str(delete_on_disk(words.targets[0]))}
