"""The command line: verbs only. Each one parses its words, calls `whet.api` and prints the answer.

People read stderr; with `--json` the answer is one object on stdout. Bad input ends with exit code 2 and one clear
error, Ctrl-C with 130. Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from whet.base.errors import UserError, nearest

DESCRIPTION = "Fine-tune a language model on your own data, fast, and prove that it worked."
EPILOG = """\
start here:
  whet quickstart                            everything on a built-in model and data, offline
  whet init lora > tickets.yaml              a commented recipe
  whet data check tickets.yaml --show 3      what exactly is learned
  whet train tickets.yaml train.learning_rate=1e-4
"""
OVERRIDES = "settings as section.key=value, laid over the recipe"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 1 our mistake, 2 bad input, 130 interrupted."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one verb; returns the exit code."""
    words = _parser().parse_args(_normalised(list(arguments)))
    if words.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        answer = words.call(words)
    except UserError as error:
        return _refused(error, words.json)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:  # the one place that may catch everything
        if words.traceback:
            raise
        problem = f"{type(error).__name__}: {error}"
        sys.stderr.write(
            f"error: whet itself failed: {problem}\n  fix:      the same command with --traceback says where\n"
        )
        return 1
    if words.json and answer is not None:
        sys.stdout.write(json.dumps(answer, ensure_ascii=False, indent=1, default=str) + "\n")
    return 0


def _refused(error: UserError, as_json: bool) -> int:
    sys.stderr.write(f"error: {error}\n")
    if as_json:
        sys.stdout.write(json.dumps({"error": error.as_dict()}, ensure_ascii=False, indent=1) + "\n")
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="whet", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"whet {_version()}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _verb(verbs, "quickstart", "everything on the built-in model and data", _quickstart, "whet quickstart --json",
          overrides=True)  # fmt: skip
    init = _verb(verbs, "init", "print a commented recipe", _init, "whet init qlora > tickets.yaml")
    init.add_argument("name", help="lora, qlora or full")
    data = _verb(verbs, "data", "look at data before training", _data,
                 "whet data check tickets.yaml --show 3\n  whet data check rows.jsonl data.columns.prompt=question "
                 "data.columns.completion=answer")  # fmt: skip
    data.add_argument("what", choices=["check"], help="check: what is in the data and what exactly is learned")
    data.add_argument("target", help="a recipe (.yaml) or a data file, directory or glob")
    data.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    data.add_argument("--show", type=int, default=0, metavar="N", help="print N rows, learned text in colour")
    _verb(verbs, "plan", "parameters and memory before anything is loaded", _plan,
          "whet plan tickets.yaml\n  whet plan config.json method.r=8", target="a recipe, or a model's config.json",
          overrides=True)  # fmt: skip
    _verb(verbs, "train", "train a recipe; the same command continues it", _train,
          "whet train tickets.yaml train.learning_rate=1e-4", target="a recipe (.yaml)", overrides=True)  # fmt: skip
    evaluation = _verb(verbs, "eval", "base against tuned on the held-out rows", _eval, "whet eval runs/tickets",
                       target="a run directory")  # fmt: skip
    evaluation.add_argument("--max-rows", type=_positive, metavar="N", help="score only the first N held-out rows")
    chat = _verb(verbs, "chat", "talk to a run or a model", _chat, 'whet chat runs/tickets --message "Hello"',
                 target="a run directory, a model directory or a model name")  # fmt: skip
    chat.add_argument("--message", help="say this once instead of reading lines")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="longest answer (256)")
    predict = _verb(verbs, "predict", "labels, values or texts of a run for new rows", _predict,
                    "whet predict runs/intents new.txt > labels.jsonl", target="a run directory")  # fmt: skip
    predict.add_argument("file", nargs="?", default="-", help="lines of text, or JSON lines with text (standard input)")
    merge = _verb(verbs, "merge", "plain weights, with a certificate of agreement", _merge,
                  "whet merge runs/tickets out/", target="a run directory")  # fmt: skip
    merge.add_argument("out", help="a new directory for the merged model")
    bench = _verb(verbs, "bench", "training speed and memory of a model on this machine", _bench,
                  "whet bench speed Qwen/Qwen3-0.6B --rows 8 --length 512\n  whet bench speed model/ --storage nf4 "
                  "--checkpointing recompute --json")  # fmt: skip
    _bench_options(bench)
    _verb(verbs, "methods", "what can be trained, and how", _methods, "whet methods")
    _verb(verbs, "doctor", "what is installed, what is missing, does the arithmetic hold", _doctor, "whet doctor")
    _verb(verbs, "schema", "the JSON schema of a recipe", _schema, "whet schema --json > recipe.schema.json")
    return parser


def _verb(
    verbs: Any, name: str, what: str, call: Callable[[argparse.Namespace], Any], example: str, *,
    target: str | None = None, overrides: bool = False,
) -> argparse.ArgumentParser:  # fmt: skip
    parser = verbs.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    if target:
        parser.add_argument("target", help=target)
    if overrides:
        parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    parser.add_argument("--json", action="store_true", help="print the answer as one JSON object on stdout")
    parser.add_argument("--offline", action="store_true", help="never use the network, also not for a hub name")
    parser.add_argument("--traceback", action="store_true", help="show where a failure of whet itself happened")
    parser.set_defaults(call=call)
    return parser


def _bench_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("what", choices=["speed"], help="speed: tokens a second and peak memory of training with LoRA")
    bench.add_argument("target", help="a model directory, a hub name, builtin:tiny, or a config.json")
    for name, default, what in (
        ("rows", 8, "rows in a forward pass"), ("length", 512, "tokens of a row"),
        ("accumulation", 1, "forward passes in a step"), ("steps", 15, "timed steps"),
    ):  # fmt: skip
        bench.add_argument(f"--{name}", type=_positive, default=default, metavar="N", help=f"{what} ({default})")
    bench.add_argument("--warm", type=_count, default=5, metavar="N", help="steps before the timed ones (5)")
    bench.add_argument("--lengths", metavar="FILE", help="JSON list of document lengths to pack into rows x length")
    bench.add_argument("--storage", choices=["fp32", "bf16", "fp8", "int8", "nf4"], help="as base.storage (auto)")
    bench.add_argument("--compute", choices=["fp32", "bf16", "fp8"], help="as base.compute (auto)")
    bench.add_argument("--checkpointing", choices=["auto", "off", "recompute", "offload"], default="auto",
                       help="what is kept for the backward pass (auto)")  # fmt: skip
    bench.add_argument("--optim", choices=["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"],
                       default="adamw", help="as train.optim (adamw)")  # fmt: skip
    bench.add_argument("--fp8-head", action="store_true", help="as base.fp8_head")
    bench.add_argument("--offload-embedding", action="store_true", help="as base.offload_embedding")
    bench.add_argument("--keep-transposed", action="store_true", help="as base.keep_transposed")
    bench.add_argument("--tile-mlp", type=_positive, metavar="N", help="as train.tile_mlp")
    bench.add_argument("--no-compile", action="store_true", help="do not compile, as short runs do")
    bench.add_argument("--no-graphs", action="store_true", help="start every kernel from Python")


def _normalised(arguments: list[str]) -> list[str]:
    """A misspelt verb gets the nearest one named; argparse's own list of choices is longer than it helps."""
    verbs = (
        "quickstart", "init", "data", "plan", "train", "eval", "chat", "predict", "merge", "bench", "methods", "doctor",
        "schema",
    )  # fmt: skip
    if arguments and not arguments[0].startswith("-") and arguments[0] not in verbs:
        near = nearest(arguments[0], verbs)
        sys.stderr.write(f"error: there is no verb {arguments[0]}\n  expected: {', '.join(verbs)}\n")
        sys.stderr.write(f"  fix:      whet {near or '--help'}\n")
        sys.exit(2)
    return arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number


def _version() -> str:
    from whet import __version__

    return __version__


def _prepare_libraries() -> None:
    import transformers  # noqa: F401

    from whet.base.console import quiet_libraries

    quiet_libraries()


def _quickstart(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api

    _prepare_libraries()
    return api.quickstart_with(words.overrides)


def _init(words: argparse.Namespace) -> dict[str, Any] | None:
    from whet import api

    text = api.init(words.name)
    if not words.json:
        sys.stdout.write(text)
    return {"name": words.name, "recipe": text}


def _is_recipe(target: str) -> bool:
    return Path(target).suffix in (".yaml", ".yml")


def _data(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.data.check import report, show
    from whet.data.show import show_rows
    from whet.recipe import parse

    _prepare_libraries()
    source = words.target if _is_recipe(words.target) else None
    extra = [] if source else [f"data.dataset={json.dumps(words.target)}", "data.val_size=0"]
    found = api.prepared(parse(source, [*extra, *words.overrides]))
    if not words.json:
        show(found)
    if words.show:
        show_rows(found, words.show)
    found.ledger.gate()
    return report(found)


def _plan(words: argparse.Namespace) -> dict[str, Any]:
    from whet.recipe import parse
    from whet.train.plan import plan, show

    _prepare_libraries()
    source = words.target if _is_recipe(words.target) else None
    extra = [] if source else [f"model.path={json.dumps(words.target)}"]
    found = plan(parse(source, [*extra, *words.overrides]).recipe)
    if not words.json:
        show(found)
    return found


def _train(words: argparse.Namespace) -> dict[str, Any] | None:
    from whet import api
    from whet.recipe import parse

    parsed = parse(words.target, words.overrides)
    _prepare_libraries()
    from whet.train.run import Stopped

    try:
        run = api.train_parsed(parsed)
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        raise KeyboardInterrupt from stopped
    return {"run_dir": str(run.path), **(run.finished or {})}


def _eval(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.runs import open_run

    open_run(words.target)
    _prepare_libraries()
    result = api.evaluate(words.target, max_rows=words.max_rows)
    from whet.evaluate.run import show

    if not words.json:
        show(result)
    return result


def _chat(words: argparse.Namespace) -> dict[str, Any]:
    _prepare_libraries()
    from whet.ship.chat import open_chat, talk

    chat = open_chat(words.target, max_new_tokens=words.max_new_tokens)
    return {"messages": talk(chat, words.message, words.system, quiet=words.json)}


def _predict(words: argparse.Namespace) -> dict[str, Any]:
    from whet.runs import open_run

    run = open_run(words.target)
    _prepare_libraries()
    from whet.ship.predict import predict_file

    return {"predictions": predict_file(run, words.file, quiet=words.json)}


def _merge(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.base.console import say
    from whet.runs import open_run

    open_run(words.target)
    _prepare_libraries()
    certificate = api.merge(words.target, words.out)
    say(f"{certificate['chosen']}, on {certificate['prompts']} held-out rows: {certificate['summary']} -> {words.out}")
    return certificate


def _bench(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api
    from whet.base.console import bytes_text, say

    _prepare_libraries()
    found = api.bench_speed(words.target, **{
        name: getattr(words, name) for name in (
            "rows", "length", "accumulation", "steps", "warm", "lengths", "storage", "compute", "checkpointing",
            "optim", "fp8_head", "offload_embedding", "keep_transposed", "tile_mlp",
        )
    }, compile=False if words.no_compile else None, cuda_graphs=False if words.no_graphs else None)  # fmt: skip
    say(f"{found['tokens_per_second']:,} tokens a second ({found['median_seconds'] * 1000:.1f} ms a step), "
        f"peak {bytes_text(int(found['peak_allocated_gib'] * 2**30))}, {found['storage']} weights, {found['compute']} "
        f"arithmetic on {found['device']}", style="bold")  # fmt: skip
    return found


def _methods(words: argparse.Namespace) -> dict[str, Any]:
    from whet import api

    rows = api.methods()
    if not words.json:
        from rich.table import Table

        from whet.base.console import console

        table = Table(box=None, pad_edge=False)
        names = [name for name in rows[0] if name != "what"]
        for name in names:
            table.add_column(name.replace("_", " "))
        for row in rows:
            table.add_row(*(_cell(row[name]) for name in names))
        console(stdout=True).print(table)
        for row in rows:
            console(stdout=True).print(f"{row['method']}: {row['what']}", style="dim")
    return {"methods": rows}


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0e}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _doctor(words: argparse.Namespace) -> dict[str, Any]:
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


def _schema(words: argparse.Namespace) -> dict[str, Any] | None:
    from whet.recipe import json_schema

    words.json = True
    return json_schema()
