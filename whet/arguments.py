"""The words of the command line: verbs, what each takes, and errors in the shape of all others.

What the verbs do stands in `whet.verbs`; nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from whet.base.errors import UserError, nearest
from whet.base.language import LANGUAGES, help_format
from whet.spelling.aliases import NAMES
from whet.verbs import about, answers, data, training
from whet.verbs import adapters as adapter_verbs

DESCRIPTION = "Fine-tune a language model on your own data, fast, and prove that it worked."
EPILOG = """\
start here:
  whet quickstart                            everything on a built-in model and data, offline
  whet init lora > tickets.yaml              a commented recipe
  whet data check tickets.yaml --show 3      what exactly is learned
  whet train tickets.yaml train.learning_rate=1e-4
"""
LANGUAGE = "language of what people read (that of WHET_LANG or LANG)"
OVERRIDES = "settings as section.key=value, laid over the recipe"
_SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")

VERBS = (
    "quickstart", "init", "data", "plan", "train", "eval", "chat", "predict", "merge", "adapters", "bench", "methods",
    "doctor", "schema",
)  # fmt: skip


class Words(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, with one thing to do about them."""

    def error(self, message: str) -> NoReturn:
        """Raise the error in the one shape of bad input."""
        problem, _, found = message.partition(": ")
        if problem.startswith("the following arguments are required"):
            raise UserError(
                "words are missing", expected=f"{self.prog} {found}", fix=f"{self.prog} --help shows an example"
            )
        if problem.startswith("argument "):
            name, (problem, _, found) = problem.removeprefix("argument "), found.partition(": ")
            raise UserError(
                f"the option cannot be read: {problem}", field=name, found=found or None, fix=f"{self.prog} --help"
            )
        raise UserError(message, fix=f"{self.prog} --help shows the words and an example")


def parse_words(arguments: Sequence[str]) -> argparse.Namespace:
    """The verb and its words; settings may stand among the options. Raises UserError, and SystemExit after help."""
    given = list(arguments)
    _check_verb(given)
    words, left = parser_of_words().parse_known_args(given or ["--help"])
    settings = [word for word in left if _SETTING.match(word)] if hasattr(words, "overrides") else []
    if settings:
        words.overrides = [*words.overrides, *settings]
    strange = [word for word in left if word not in settings]
    if strange:
        raise _unknown(strange, words)
    return words


def _check_verb(given: Sequence[str]) -> None:
    """Name the nearest verb for a misspelt one; argparse's own list of choices is longer than it helps."""
    if given and not given[0].startswith("-") and given[0] not in VERBS:
        near = nearest(given[0], VERBS)
        raise UserError(f"there is no verb {given[0]}", f"whet {near or '--help'}", expected=", ".join(VERBS))


def _unknown(strange: Sequence[str], words: argparse.Namespace) -> UserError:
    """The error for words that the verb does not take; an option that is a setting is shown as one."""
    verb, found = f"whet {words.verb}", " ".join(strange)
    option = next((word for word in strange if word.startswith("-")), None)
    if option is None:
        return UserError(f"{verb} takes no more words", f"{verb} --help shows them", found=found)
    name, equals, value = option.lstrip("-").partition("=")
    loose = [word for word in getattr(words, "overrides", []) if not _SETTING.match(word)]  # taken for a setting
    after = [*strange[strange.index(option) + 1 :], *loose]
    value = value if equals else after[0] if after else "VALUE"
    word = name.replace("-", "_")
    options = sorted({*re.findall(r"--[a-z-]+", words.help_text())})
    near = nearest(f"--{name}", options)
    path = NAMES.get(word) or (None if near else NAMES.get(nearest(word, NAMES) or ""))
    if path and hasattr(words, "overrides"):
        named = f" {words.target}" if hasattr(words, "target") else ""
        return UserError(
            "settings are written without dashes", f"{verb}{named} {path}={value}", found=found,
            expected="section.key=value",
        )  # fmt: skip
    fix = f"did you mean {near}?" if near else f"{verb} --help shows them"
    return UserError(f"{verb} has no such option", fix, found=found, expected=", ".join(options))


def parser_of_words() -> Words:
    """The parser of the whole command line."""
    parser = Words(prog="whet", description=DESCRIPTION, epilog=EPILOG, formatter_class=help_format())
    parser.add_argument("--version", action="version", version=f"whet {_version()}")
    parser.add_argument("--lang", choices=LANGUAGES, help=LANGUAGE)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _verb(verbs, "quickstart", "everything on the built-in model and data", training.quickstart,
          "whet quickstart --json", overrides=True)  # fmt: skip
    init = _verb(verbs, "init", "print a commented recipe", training.init, "whet init qlora > tickets.yaml")
    init.add_argument("name", help="lora, qlora, full or classify")
    _data_verbs(verbs)
    plan = _verb(verbs, "plan", "parameters, memory and time before anything is loaded", training.plan,
                 'whet plan tickets.yaml\n  whet plan config.json base.storage=nf4 --gpu "RTX 4090"',
                 target="a recipe, or a model's config.json", overrides=True)  # fmt: skip
    plan.add_argument("--gpu", metavar="NAME|SIZE", help="plan for this card, which need not be here: RTX 4090, 24GB")
    plan.add_argument("--gpus", metavar="N", type=int, default=1, help="what each of N such cards would need")
    plan.add_argument("--html", metavar="FILE", help="write a page with memory by class and phase, and time")
    _verb(verbs, "train", "train a recipe; the same command continues it", training.train,
          "whet train tickets.yaml train.learning_rate=1e-4\n  whet train tickets.yaml method=ia3 "
          "output_dir=runs/tickets-ia3   # a second run beside the first",
          target="a recipe (.yaml)", overrides=True)  # fmt: skip
    _run_verbs(verbs)
    adapters = _verb(verbs, "adapters", "list, compose, rename and delete adapters", adapter_verbs.adapters,
                     "whet adapters list runs\n  whet adapters compose both/ runs/a runs/b --weights 0.7,0.3"
                     )  # fmt: skip
    _adapter_options(adapters)
    bench = _verb(verbs, "bench", "training speed and memory of a model on this machine", about.bench,
                  "whet bench speed Qwen/Qwen3-0.6B --rows 8 --length 512\n  whet bench speed model/ base.storage=nf4 "
                  "train.gradient_checkpointing=true --steps 30 --json")  # fmt: skip
    _bench_options(bench)
    _verb(verbs, "methods", "what can be trained, and how", about.methods, "whet methods")
    _verb(verbs, "doctor", "what is installed, what is missing, does the arithmetic hold", about.doctor, "whet doctor")
    _verb(verbs, "schema", "the JSON schema of a recipe", about.schema, "whet schema --json > recipe.schema.json")
    return parser


def _verb(
    verbs: Any, name: str, what: str, call: Callable[[argparse.Namespace], Any], example: str, *,
    target: str | None = None, overrides: bool = False,
) -> argparse.ArgumentParser:  # fmt: skip
    parser = verbs.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"example:\n  {example}",
        formatter_class=help_format(),
    )  # fmt: skip
    if target:
        parser.add_argument("target", help=target)
    if overrides:
        parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    parser.add_argument("--json", action="store_true", help="print the answer as one JSON object on stdout")
    parser.add_argument("--offline", action="store_true", help="never use the network, also not for a hub name")
    parser.add_argument("--lang", choices=LANGUAGES, help=LANGUAGE)
    parser.add_argument("--traceback", action="store_true", help="show where a failure of whet itself happened")
    parser.set_defaults(call=call, help_text=parser.format_help)
    return parser


def _run_verbs(verbs: Any) -> None:
    """The verbs on what was trained."""
    scores = _verb(verbs, "eval", "base against tuned on the held-out rows, or on another file", answers.evaluate,
                   "whet eval runs/tickets\n  whet eval runs/tickets --split test\n"
                   "  whet eval runs/tickets --data new.csv", target="a run directory")  # fmt: skip
    scores.add_argument("--split", choices=["eval", "test"], default="eval", help="the held-out or the test rows")
    scores.add_argument("--data", action="append", default=[], metavar="FILE",
                        help="score these rows instead: any file that training reads")  # fmt: skip
    scores.add_argument("--max-rows", type=_positive, metavar="N", help="score only the first N rows")
    chat = _verb(verbs, "chat", "talk to a run or a model", answers.chat, 'whet chat runs/tickets --message "Hello"',
                 target="a run directory, a model directory or a model name")  # fmt: skip
    chat.add_argument("--message", help="say this once instead of reading lines; /help among them lists commands")
    chat.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=RUN",
        help="load this adapter too; a line `/use NAME` answers with it, `/use base` without any",
    )  # fmt: skip
    chat.add_argument("--system", help="system message")
    chat.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="longest answer (256)")
    predict = _verb(verbs, "predict", "labels, values or texts of a run for new rows", answers.predict,
                    "whet predict runs/intents new.csv --top 3 --out labels.csv\n"
                    "  whet predict runs/tickets new.jsonl > answers.jsonl", target="a run directory")  # fmt: skip
    predict.add_argument("file", nargs="?", default="-",
                         help="any file that training reads; .txt and standard input (-): a text a line")  # fmt: skip
    predict.add_argument("--out", metavar="FILE", help="write here instead of stdout: .jsonl or .csv")
    predict.add_argument("--csv", action="store_true", help="CSV instead of JSON lines")
    predict.add_argument("--top", type=_positive, metavar="K", help="the K likeliest classes of each row (all)")
    predict.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="longest text (256)")
    merge = _verb(verbs, "merge", "plain weights, with a certificate of agreement", answers.merge,
                  "whet merge runs/tickets out/\n  whet merge adapters/theirs out/ --data rows.jsonl",
                  target="a run directory, or the folder of an adapter")  # fmt: skip
    merge.add_argument("out", help="a new directory for the merged model")
    merge.add_argument("--data", metavar="FILE", help="rows to compare an adapter without a run on (built-in ones)")


def _data_verbs(verbs: Any) -> None:
    what = "look at data before training, have it judged, add paraphrases"
    example = "whet data check tickets.yaml --show 3\n  whet data judge --help"
    parser = verbs.add_parser("data", help=what, description=what[0].upper() + what[1:] + ".",
                              epilog=f"example:\n  {example}", formatter_class=help_format()
                              )  # fmt: skip
    parser.add_argument("--lang", choices=LANGUAGES, help=LANGUAGE)
    inner = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    target = "a recipe (.yaml) or a data file, directory, glob or hub:owner/name"
    check = _verb(inner, "check", "what is in the data and what exactly is learned", data.data,
                  "whet data check tickets.yaml --show 3\n  whet data check tickets.yaml --html data.html --strict\n"
                  "  whet data check tickets.yaml --benchmark gsm8k_test.jsonl\n"
                  "  whet data check rows.csv data.columns.prompt=question data.columns.completion=answer",
                  target=target, overrides=True)  # fmt: skip
    check.add_argument("--html", metavar="FILE", help="write a page with the findings and masks of real rows")
    check.add_argument("--removed", metavar="FILE", help="write what is left out, and why, as JSONL")
    check.add_argument("--strict", action="store_true", help="exit code 2 where anything deserves a second look")
    check.add_argument("--fast", action="store_true", help="leave out near duplicates")
    check.add_argument("--benchmark", action="append", default=[], metavar="FILE",
                       help="count rows that stand in this test too; more with data.benchmarks")  # fmt: skip
    check.add_argument("--show", type=int, default=0, metavar="N", help="print N rows, learned text in colour")
    judge = _verb(inner, "judge", "a score from 1 to 5 for each row to learn from, by a model", data.judge,
                  "whet data judge tickets.yaml --endpoint http://127.0.0.1:8000/v1 --model qwen3-32b\n"
                  "  whet data judge tickets.yaml --endpoint https://api.example.com/v1 --model big --api-key-env KEY\n"
                  "  whet train tickets.yaml data.scores=scores.jsonl data.least_score=3",
                  target=target, overrides=True)  # fmt: skip
    judge.add_argument("--rubric", choices=["quality", "harm"], default="quality", help="what is judged (quality)")
    judge.add_argument("--least", type=int, choices=range(1, 6), default=1, metavar="N",
                       help="count the rows below this score, 1 to 5")  # fmt: skip
    _endpoint_options(judge, "scores.jsonl")
    augment = _verb(inner, "augment", "paraphrases of the rows to learn from, by a model", data.augment,
                    "whet data augment tickets.yaml --endpoint http://127.0.0.1:8000/v1 --model qwen3-32b --copies 2\n"
                    "  whet train tickets.yaml data.added_dataset=added.jsonl",
                    target=target, overrides=True)  # fmt: skip
    augment.add_argument("--copies", type=_positive, default=2, metavar="N", help="of each row, 1 to 3 (2)")
    _endpoint_options(augment, "added.jsonl")


def _endpoint_options(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--endpoint", required=True, metavar="URL", help="of chat completions, up to /v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="the model's name there")
    parser.add_argument("--api-key-env", metavar="VAR", help="environment variable that holds the key (no key)")
    parser.add_argument("--out", default=out, metavar="FILE", help=f"JSONL to write; replies wait beside it ({out})")
    parser.add_argument("--jobs", type=_positive, default=4, metavar="N", help="questions on their way at a time (4)")
    parser.add_argument("--timeout", type=_positive, default=60, metavar="S", help="seconds for one whole reply (60)")


def _adapter_options(adapters: argparse.ArgumentParser) -> None:
    adapters.add_argument("what", choices=["list", "compose", "rename", "delete"],
                          help="list FOLDER; compose OUT A B ...; rename ADAPTER NEW; delete ADAPTER")  # fmt: skip
    adapters.add_argument("targets", nargs="+", metavar="PATH", help="runs or folders of adapters")
    adapters.add_argument("--how", choices=["cat", "linear", "svd", "ties", "dare"], default="cat",
                          help="compose: cat is the exact weighted sum of the updates (cat)")  # fmt: skip
    adapters.add_argument("--weights", metavar="W,W", help="compose: one number an adapter (1 each)")
    adapters.add_argument("--rank", type=_positive, metavar="N", help="compose by svd, ties, dare: rank (the largest)")
    adapters.add_argument("--density", type=float, default=0.5, metavar="D",
                          help="compose by ties, dare: share of each update that is kept (0.5)")  # fmt: skip


def _bench_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("what", choices=["speed"], help="speed: tokens a second and peak memory of training with LoRA")
    bench.add_argument("target", help="a model directory, a hub name, builtin:tiny, or a config.json")
    bench.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings as in a recipe; before the options"
    )
    for name, default, what in (
        ("rows", 8, "rows in a forward pass"), ("length", 512, "tokens of a row"),
        ("accumulation", 1, "forward passes in a step"), ("steps", 15, "timed steps"),
    ):  # fmt: skip
        bench.add_argument(f"--{name}", type=_positive, default=default, metavar="N", help=f"{what} ({default})")
    bench.add_argument("--warm", type=_count, default=5, metavar="N", help="steps before the timed ones (5)")
    bench.add_argument("--lengths", metavar="FILE", help="JSON list of document lengths to pack into rows x length")


def _positive(text: str) -> int:
    return _whole(text, 1)


def _count(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.lstrip("-").isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}: {text}")
    return int(text)


def _version() -> str:
    from whet import __version__

    return __version__
