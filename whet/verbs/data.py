"""The verbs on rows: what is in them, what a judge thinks of them, paraphrases of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS_ON_PAGE = 12  # whose masks the page of `whet data check` shows


def is_recipe(target: str) -> bool:
    return Path(target).suffix in (".yaml", ".yml")


def _of_data(words: argparse.Namespace, *alone: str) -> Any:
    """The parsed recipe that the words name, or one for a data file, with these settings for the file alone."""
    from whet.recipe import parse

    if is_recipe(words.target):
        return parse(words.target, words.overrides)
    return parse(None, [f"data.dataset={json.dumps(words.target)}", "data.val_size=0", *alone, *words.overrides])


def data(words: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import replace

    from whet import api
    from whet.base.console import say
    from whet.base.secrets import hide
    from whet.data.check import check_strictly, print_report, report_of
    from whet.data.loss_mask import masked_rows, print_rows
    from whet.data.quality import quality_findings

    source = words.target if is_recipe(words.target) else None
    parsed = _of_data(words, "data.preference=check")
    if words.benchmark:
        given = parsed.recipe.data.benchmarks or []
        named = [*([given] if isinstance(given, str) else given), *words.benchmark]
        parsed = replace(parsed, recipe=replace(parsed.recipe, data=replace(parsed.recipe.data, benchmarks=named)))
    page, removed = _outputs_of_check(words, parsed)
    if not parsed.recipe.model.path.startswith("builtin:"):  # the first look at a model's tokenizer takes seconds
        say(f"data check: {hide(words.target)}", style="dim")
    found = api.prepared(parsed, any_model=source is None)
    result = report_of(found, quality_findings(found, near=not words.fast))
    if page:
        from whet.report.data_page import write_data_page

        write_data_page(page, result, masked_rows(found, ROWS_ON_PAGE))
    if removed:
        from whet.base.files import write_text

        write_text(removed, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result["dropped"]))
    if not words.json:
        named = source is not None or not {"model.path", "model.tokenizer"}.isdisjoint(parsed.origins)
        print_report(found, result, None if named else "builtin:tiny")
    if words.show and not words.json:
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
