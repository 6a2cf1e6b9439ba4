"""The verbs on whet and this machine: speed, methods, what is installed, the schema of a recipe."""

from __future__ import annotations

import argparse
from typing import Any

from whet.verbs.libraries import prepare_libraries

# Columns of the capability matrix as the terminal shows them.
SHORT = {
    "mergeable": "merge", "peft_format": "PEFT", "vllm_unmerged": "vLLM", "composable": "sum", "compiles": "compile",
}  # fmt: skip


def bench(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.base.console import answer, bytes_text

    prepare_libraries(f"bench: opening {words.target}")
    load = ("rows", "length", "accumulation", "lengths", "warm", "steps")
    found = api.bench_speed(words.target, words.overrides, **{name: getattr(words, name) for name in load})
    if not words.json:
        peak = bytes_text(int(found["peak_allocated_gib"] * 2**30))
        answer(f"{found['tokens_per_second']:,} tokens a second ({found['median_seconds'] * 1000:.1f} ms a step), "
               f"peak {peak}, {found['storage']} weights, {found['compute']} arithmetic on {found['device']}",
               style="bold")  # fmt: skip
    return found


def methods(words: argparse.Namespace) -> dict[str, Any]:
    from whet.methods.all import capability_rows

    rows = capability_rows()
    if not words.json:
        from rich.table import Table

        from whet.base.console import console

        table = Table(box=None, pad_edge=False)
        for name in ("method", "base", "tasks", *SHORT.values(), "rate"):
            table.add_column(name, no_wrap=True, justify="right" if name == "rate" else "left")
        for row in rows:
            marks = ["yes" if row[name] else "-" for name in SHORT]
            table.add_row(
                str(row["method"]), _base(row["storages"]), _tasks(row["tasks"]), *marks, f"{row['learning_rate']:.0e}"
            )
        out = console(stdout=True)
        out.print(table)
        out.print("base: storages of the frozen weights, any = fp32 bf16 fp8 int8 nf4, dense = fp32 bf16; rate: the "
                  "usual learning rate for 7 B; lora and full take more for narrower models", style="dim")  # fmt: skip
        for row in rows:
            out.print(f"{row['method']}: {row['what']}", style="dim")
    return {"methods": rows}


def _base(storages: Any) -> str:
    return "any" if len(storages) == 5 else "dense" if len(storages) == 2 else ", ".join(storages)


def _tasks(tasks: Any) -> str:
    names = ", ".join(tasks) if isinstance(tasks, list) else str(tasks)
    return names.replace("classification", "labels").replace(", multi_label, regression", "")


def doctor(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.base.console import answer, bytes_text

    prepare_libraries("doctor: what is installed, and does the arithmetic hold")
    found = api.doctor()
    if not words.json:
        memory = f", {bytes_text(found['memory_bytes'])}" if found["memory_bytes"] else ""
        answer(f"{found['device']}: {found['device_name']}{memory}, computes in {found['compute']}")
        for name, version in found["packages"].items():
            answer(f"  {'ok' if version else 'MISSING':8} {name} {version or ''}", style=None if version else "red")
        for name, facts in found["optional"].items():
            there = facts["version"]
            text = f"  {'ok' if there else 'absent':8} {name} {there or ''}"
            cost = f": {facts['without']} (pip install '{facts['extra']}')"
            answer(text if there else text + cost, style=None if there else "yellow")
        for check in found["self_test"]:
            verdict = f"{check['error']:.3g} (limit {check['limit']:g})"
            word, style = ("ok", None) if check["ok"] else ("WRONG", "red")
            answer(f"  {word:8} {check['check']}: {verdict}", style=style)
    return found


def schema(words: argparse.Namespace) -> dict[str, Any] | None:
    from whet.recipe import json_schema

    words.json = True
    return json_schema()
