"""The verbs from a recipe to a run: a recipe to start from, what it will need, training."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from whet.base.language import translated
from whet.verbs.data import is_recipe
from whet.verbs.libraries import prepare_libraries


def quickstart(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api

    prepare_libraries()
    return api.quickstart_with(words.overrides)


def init(words: argparse.Namespace) -> dict[str, Any] | None:
    from whet import api

    text = api.init(words.name)
    if not words.json:
        sys.stdout.write(text)
    return {"name": words.name, "recipe": text}


def plan(words: argparse.Namespace) -> dict[str, Any]:
    from whet.planning.plan import plan_recipe, print_plan
    from whet.recipe import parse

    prepare_libraries()
    source = words.target if is_recipe(words.target) else None
    extra = [] if source else [f"model.path={json.dumps(words.target)}"]
    answer = plan_recipe(parse(source, [*extra, *words.overrides]).recipe).as_dict()
    if not words.json:
        print_plan(answer)
    return answer


def train(words: argparse.Namespace) -> dict[str, Any] | None:
    from whet import api
    from whet.recipe import parse

    parsed = parse(words.target, words.overrides)
    prepare_libraries()
    from whet.training.loop import Stopped

    try:
        run = api.train_parsed(parsed)
    except Stopped as stopped:
        sys.stderr.write(translated(f"{stopped}") + "\n")
        raise KeyboardInterrupt from stopped
    return {"run_dir": str(run.path), **(run.finished or {})}
