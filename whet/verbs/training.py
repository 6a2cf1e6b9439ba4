"""The verbs from a recipe to a run: a recipe to start from, what it will need, training."""

from __future__ import annotations

import argparse
import json
from typing import Any

from whet.base.console import write_answer, write_error
from whet.base.language import translated
from whet.verbs.data import is_recipe
from whet.verbs.libraries import prepare_libraries


def quickstart(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api

    prepare_libraries("train: builtin:tiny learns to triage support tickets", style="bold")
    return api.quickstart_with(words.overrides)


def init(words: argparse.Namespace) -> dict[str, Any] | None:
    from whet import api
    from whet.base.language import recipe_text

    text = api.init(words.name)
    if not words.json:
        write_answer(recipe_text(text))
    return {"name": words.name, "recipe": text}


def plan(words: argparse.Namespace) -> dict[str, Any]:
    from whet.recipe import parse

    prepare_libraries(f"plan: {words.target}")
    source = words.target if is_recipe(words.target) else None
    extra = [] if source else [f"model.path={json.dumps(words.target)}"]
    parsed = parse(source, [*extra, *words.overrides])
    page = None
    if words.html:
        from whet.base.outputs import output_file
        from whet.inputs import inputs_of_recipe

        inputs = inputs_of_recipe(parsed)
        page = output_file(words.html, inputs, "--html", lambda line: line.lower().startswith(b"<!doctype html"))
    from whet import api
    from whet.planning.printed import print_plan

    answer = api.plan_parsed(parsed, words.gpu, words.gpus)
    if page is not None:
        from whet.report.plan_page import write_plan_page

        write_plan_page(page, answer)
    if not words.json:
        print_plan(answer)
    return answer


def train(words: argparse.Namespace) -> dict[str, Any] | None:
    from whet import api
    from whet.given import refuse_rows
    from whet.recipe import parse

    refuse_rows(words.target)
    parsed = parse(words.target, words.overrides)
    run = api.already_trained(parsed)
    if run is None:
        recipe = parsed.recipe
        prepare_libraries(f"train: {recipe.method.name} on {recipe.model.path} -> {recipe.output_dir or 'runs/run'}")
        from whet.training.loop import Stopped

        try:
            run = api.train_parsed(parsed)
        except Stopped as stopped:
            write_error(translated(f"{stopped}") + "\n")
            raise KeyboardInterrupt from stopped
    return {"run_dir": str(run.path), **(run.finished or {})}
