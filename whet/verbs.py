"""The verbs of the command line: each reads its words, calls `whet.api` and prints the answer for people.

Each returns the object that `--json` prints, or None. Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROWS_ON_PAGE = 12  # whose masks the page of `whet data check` shows
# Columns of the capability matrix as the terminal shows them.
SHORT = {
    "mergeable": "merge", "peft_format": "PEFT", "vllm_unmerged": "vLLM", "composable": "sum", "compiles": "compile",
}  # fmt: skip


def _prepare_libraries() -> None:
    import transformers  # noqa: F401

    from whet.base.console import quiet_libraries

    quiet_libraries()


def quickstart(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api

    _prepare_libraries()
    return api.quickstart_with(words.overrides)


def init(words: argparse.Namespace) -> dict[str, Any] | None:
    from whet import api

    text = api.init(words.name)
    if not words.json:
        sys.stdout.write(text)
    return {"name": words.name, "recipe": text}


def _is_recipe(target: str) -> bool:
    return Path(target).suffix in (".yaml", ".yml")


def _of_data(words: argparse.Namespace, *alone: str) -> Any:
    """The parsed recipe that the words name, or one for a data file, with these settings for the file alone."""
    from whet.recipe import parse

    if _is_recipe(words.target):
        return parse(words.target, words.overrides)
    return parse(None, [f"data.dataset={json.dumps(words.target)}", "data.val_size=0", *alone, *words.overrides])


def data(words: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import replace

    from whet import api
    from whet.data.check import check_strictly, print_report, report_of
    from whet.data.loss_mask import masked_rows, print_rows
    from whet.data.quality import quality_findings

    _prepare_libraries()
    source = words.target if _is_recipe(words.target) else None
    parsed = _of_data(words, "data.preference=check")
    if words.benchmark:
        given = parsed.recipe.data.benchmarks or []
        named = [*([given] if isinstance(given, str) else given), *words.benchmark]
        parsed = replace(parsed, recipe=replace(parsed.recipe, data=replace(parsed.recipe.data, benchmarks=named)))
    page, removed = _outputs_of_check(words, parsed)
    found = api.prepared(parsed, any_model=source is None)
    result = report_of(found, quality_findings(found, near=not words.fast))
    if page:
        from whet.report.data_page import write_data_page

        write_data_page(page, result, masked_rows(found, ROWS_ON_PAGE))
    if removed:
        from whet.base.files import write_text

        write_text(removed, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result["dropped"]))
    if not words.json:
        print_report(found, result, None if source else "builtin:tiny")
    if words.show:
        print_rows(found, words.show)
    found.ledger.gate()
    if words.strict:
        check_strictly(result)
    return result


def judge(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.data.judge.scores import print_judged

    parsed = _of_data(words)
    found = _asked(words, lambda to: api.judge_parsed(parsed, to, words.out, words.rubric, words.least))
    if not words.json:
        print_judged(found)
    return found


def augment(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.data.judge.added import print_augmented

    parsed = _of_data(words)
    found = _asked(words, lambda to: api.augment_parsed(parsed, to, words.out, words.copies))
    if not words.json:
        print_augmented(found)
    return found


def _asked(words: argparse.Namespace, ask: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Ask an endpoint; in an error, its settings are called as the options are."""
    from dataclasses import replace

    from whet.base.console import quiet_libraries
    from whet.base.errors import UserError
    from whet.data.judge.endpoint import Endpoint

    quiet_libraries()
    names = {"base_url": "--endpoint", "api_key_env": "--api-key-env", "model": "--model", "copies": "--copies"}
    try:
        return ask(Endpoint(base_url=words.endpoint, model=words.model, api_key_env=words.api_key_env,
                            concurrency=words.jobs, timeout_seconds=float(words.timeout)))  # fmt: skip
    except UserError as error:
        if error.field not in names:
            raise
        texts = [error.problem, error.fix]
        for name, option in list(names.items())[:2]:
            texts = [text.replace(name, option) for text in texts]
        problem, fix = texts
        raise replace(error, problem=problem, fix=fix, field=names[error.field]) from error


def _outputs_of_check(words: argparse.Namespace, parsed: Any) -> tuple[Path | None, Path | None]:
    """The page and the list of what is left out, where they are asked for. Raises UserError before anything is read."""
    from whet.base.outputs import Input, output_file
    from whet.inputs import inputs_of_recipe

    inputs = inputs_of_recipe(parsed)
    page = removed = None
    if words.html:
        page = output_file(words.html, inputs, "--html", lambda line: line.lower().startswith(b"<!doctype html"))
        inputs.append(Input(page, "the page of --html"))
    if words.removed:
        removed = output_file(words.removed, inputs, "--removed", lambda line: b'"reason"' in line)
    return page, removed


def plan(words: argparse.Namespace) -> dict[str, Any]:
    from whet.planning.plan import plan_recipe, print_plan
    from whet.recipe import parse

    _prepare_libraries()
    source = words.target if _is_recipe(words.target) else None
    extra = [] if source else [f"model.path={json.dumps(words.target)}"]
    answer = plan_recipe(parse(source, [*extra, *words.overrides]).recipe).as_dict()
    if not words.json:
        print_plan(answer)
    return answer


def train(words: argparse.Namespace) -> dict[str, Any] | None:
    from whet import api
    from whet.recipe import parse

    parsed = parse(words.target, words.overrides)
    _prepare_libraries()
    from whet.training.loop import Stopped

    try:
        run = api.train_parsed(parsed)
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        raise KeyboardInterrupt from stopped
    return {"run_dir": str(run.path), **(run.finished or {})}


def evaluate(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.runs import open_run

    open_run(words.target)
    _prepare_libraries()
    result = api.evaluate(words.target, max_rows=words.max_rows, split=words.split)
    from whet.evaluation.run import print_scores

    if not words.json:
        print_scores(result)
    return result


def chat(words: argparse.Namespace) -> dict[str, Any]:
    _prepare_libraries()
    from whet.ship.chat import open_chat, talk

    with open_chat(words.target, max_new_tokens=words.max_new_tokens, beside=_named(words.adapter)) as opened:
        return {"messages": talk(opened, words.message, words.system, quiet=words.json)}


def _named(pairs: list[str]) -> dict[str, str]:
    from whet.base.errors import UserError

    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path) or name in found or name == "base":
            raise UserError(
                "not an adapter with a name of its own", field="--adapter", found=pair, expected="NAME=RUN",
                fix="--adapter polite=runs/polite",
            )  # fmt: skip
        found[name] = path
    return found


def predict(words: argparse.Namespace) -> dict[str, Any]:
    from whet.runs import open_run

    run = open_run(words.target)
    _prepare_libraries()
    from whet.ship.predict import predict_file

    return {"predictions": predict_file(run, words.file, quiet=words.json)}


def merge(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.base.console import say
    from whet.runs import open_run

    open_run(words.target)
    _prepare_libraries()
    certificate = api.merge(words.target, words.out)
    say(f"{words.out}: {certificate['chosen']}, compared on {certificate['prompts']} held-out rows")
    return certificate


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
    _prepare_libraries()
    made = api.compose(out, parts, weights=weights, how=words.how, rank=words.rank, density=words.density)
    say(f"{' + '.join(parts)} by {words.how} -> {made}")
    return {"adapter": str(made), "parts": parts, "how": words.how, "weights": weights}


def _rename(words: argparse.Namespace) -> dict[str, Any]:
    from whet.ship.compose import rename_on_disk

    return {"adapter": str(rename_on_disk(*words.targets))}


def _delete(words: argparse.Namespace) -> dict[str, Any]:
    from whet.ship.compose import delete_on_disk

    return {"deleted": str(delete_on_disk(words.targets[0]))}


def bench(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.base.console import bytes_text, say

    _prepare_libraries()
    load = ("rows", "length", "accumulation", "lengths", "warm", "steps")
    found = api.bench_speed(words.target, words.overrides, **{name: getattr(words, name) for name in load})
    say(f"{found['tokens_per_second']:,} tokens a second ({found['median_seconds'] * 1000:.1f} ms a step), "
        f"peak {bytes_text(int(found['peak_allocated_gib'] * 2**30))}, {found['storage']} weights, {found['compute']} "
        f"arithmetic on {found['device']}", style="bold")  # fmt: skip
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
                  "usual learning rate", style="dim")  # fmt: skip
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
    from whet.base.console import bytes_text, say

    _prepare_libraries()
    found = api.doctor()
    if not words.json:
        memory = f", {bytes_text(found['memory_bytes'])}" if found["memory_bytes"] else ""
        say(f"{found['device']}: {found['device_name']}{memory}, computes in {found['compute']}")
        for name, version in found["packages"].items():
            say(f"  {'ok' if version else 'MISSING':8} {name} {version or ''}", style=None if version else "red")
        for name, facts in found["optional"].items():
            there = facts["version"]
            text = f"  {'ok' if there else 'absent':8} {name} {there or ''}"
            cost = f": {facts['without']} (pip install '{facts['extra']}')"
            say(text if there else text + cost, style=None if there else "yellow")
        for check in found["self_test"]:
            verdict = f"{check['error']:.3g} (limit {check['limit']:g})"
            word, style = ("ok", None) if check["ok"] else ("WRONG", "red")
            say(f"  {word:8} {check['check']}: {verdict}", style=style)
    return found


def schema(words: argparse.Namespace) -> dict[str, Any] | None:
    from whet.recipe import json_schema

    words.json = True
    return json_schema()
