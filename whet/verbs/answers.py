"""The verbs on a run: scores, a conversation, answers to new rows, plain weights."""

from __future__ import annotations

import argparse
from typing import Any

from whet.verbs.libraries import prepare_libraries


def evaluate(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.runs import open_run

    open_run(words.target)
    prepare_libraries()
    result = api.evaluate(words.target, max_rows=words.max_rows, split=words.split, data=words.data or None)
    from whet.evaluation.printed import print_scores

    if not words.json:
        print_scores(result)
    return result


def chat(words: argparse.Namespace) -> dict[str, Any]:
    prepare_libraries()
    from whet.ship.chat import open_chat
    from whet.ship.talk import talk

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
    from whet.base.console import say
    from whet.runs import open_run

    run = open_run(words.target)
    prepare_libraries()
    from whet.ship.predict import Wanted, predict_file

    wanted = Wanted(words.top, words.max_new_tokens)
    answers = predict_file(run, words.file, quiet=words.json, out=words.out, table=words.csv, wanted=wanted)
    if words.out:
        say(f"answers -> {words.out}")
    return {"predictions": answers}


def merge(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.base.console import answer
    from whet.runs import open_run

    open_run(words.target)
    prepare_libraries()
    certificate = api.merge(words.target, words.out)
    if not words.json:
        rows = f"on {certificate['prompts']} held-out rows"
        answer(f"merged on {certificate['chosen']}; {rows}: {certificate['summary']} -> {words.out}")
    return certificate
