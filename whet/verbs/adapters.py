"""The verbs on adapters: list, compose, rename and delete them."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
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
    from whet.adapters.files import find, head_score
    from whet.base.console import bytes_text, say
    from whet.base.language import column_name

    found = find(words.targets[0])
    rows = [
        (str(one.path), one.kind, str(one.rank or ""), f"{one.parameters:,}", bytes_text(one.bytes),
         Path(one.base).name if one.base else "", head_score(one.scores))
        for one in found
    ]  # fmt: skip
    if not words.json and rows:
        names = ("adapter", "kind", "rank", "parameters", "size", "base", "score")
        _print_aligned([tuple(map(column_name, names)), *rows], right=(2, 3, 4))
    elif not words.json:
        say(f"no adapters in {words.targets[0]}")
    return {"adapters": [asdict(one) | {"path": str(one.path)} for one in found]}


def _print_aligned(rows: Sequence[Sequence[str]], right: Collection[int]) -> None:
    """Print columns to stdout, whole however wide: a path that is cut cannot be used in the next command."""
    from rich.cells import cell_len
    from rich.text import Text

    from whet.base.console import console

    widths = [max(cell_len(row[place]) for row in rows) for place in range(len(rows[0]))]
    out = console(stdout=True)
    for row in rows:
        gaps = [" " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True)]
        cells = [
            gap + text if place in right else text + gap
            for place, (text, gap) in enumerate(zip(row, gaps, strict=True))
        ]
        out.print(Text("  ".join(cells).rstrip()), soft_wrap=True)


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
    prepare_libraries(f"compose: opening {', '.join(parts)}")
    made = api.compose(out, parts, weights=weights, how=words.how, rank=words.rank, density=words.density)
    say(f"{' + '.join(parts)} by {words.how} -> {made}")
    return {"adapter": str(made), "parts": parts, "how": words.how, "weights": weights}


def _rename(words: argparse.Namespace) -> dict[str, Any]:
    from whet.ship.compose import rename_on_disk

    return {"adapter": str(rename_on_disk(*words.targets))}


def _delete(words: argparse.Namespace) -> dict[str, Any]:
    from whet.ship.compose import delete_on_disk

    return {"deleted": str(delete_on_disk(words.targets[0]))}
