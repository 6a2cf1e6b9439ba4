"""whet in Python: the same verbs as on the command line.

import whet
run = whet.train("tickets.yaml", **{"train.learning_rate": 1e-4})
print(whet.evaluate(run.path)["tuned"]["metrics"])
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from whet.recipe import Parsed, parse
from whet.report.of_run import lacks_report, write_report
from whet.runs import Run, is_adapter_alone, open_run

if TYPE_CHECKING:
    from whet.data.judge.endpoint import Endpoint
    from whet.data.prepare import Prepared
    from whet.evaluation.custom import ComputeMetrics
    from whet.handle import Handle
    from whet.ship.chat import Chat
    from whet.training.observers import Callback

PACKAGE = Path(__file__).parent

Given = str | Path | Mapping[str, Any] | None  # a recipe: a file, its settings, or None for the defaults


def _parsed(recipe: Given, overrides: Mapping[str, Any]) -> Parsed:
    """The recipe with settings over it; rows and loaded models among them are written to files."""
    from whet.given import refuse_rows, settings_of

    if isinstance(recipe, Mapping):
        recipe, overrides = None, {**recipe, **overrides}
    elif recipe is not None:
        refuse_rows(recipe)
    return parse(recipe, settings_of(overrides))


def _quiet() -> None:
    """Keep transformers' load reports and bars out of what a caller sees."""
    import transformers  # noqa: F401  (its own logging is quietened only once it is there)

    from whet.base.console import quiet_libraries

    quiet_libraries()


def train(recipe: Given = None, /, *, callbacks: Sequence[Callback] = (), **overrides: Any) -> Run:
    """Train a recipe: a file, a dict of settings, or None for the defaults. overrides: dotted path to value.

    Where data are named, rows may stand: a list of dicts, a datasets.Dataset, a pandas DataFrame; and for `model` a
    loaded one, with `tokenizer`. callbacks: functions that get each line of metrics.jsonl as a dict, or
    `whet.training.observers.Observer`s. The same call continues an unfinished run and leaves a finished one alone.
    Raises UserError for bad input.
    """
    return train_parsed(_parsed(recipe, overrides), callbacks)


def train_parsed(parsed: Parsed, callbacks: Sequence[Callback] = ()) -> Run:
    """Train a parsed recipe and write its report; a finished run is left alone, but for a report that it lacks."""
    if (done := already_trained(parsed)) is not None:
        return done
    _quiet()
    from whet.training.observers import observer_of
    from whet.training.run import train as run_training

    run = run_training(parsed, [observer_of(one) for one in callbacks])
    write_report(run.path, per_row=run.task.labelled)
    return run


def already_trained(parsed: Parsed) -> Run | None:
    """The run of a recipe if it is finished, which is said, or None; a report that it lacks is written. Imports little.

    Raises UserError where a model or a file that the recipe names is not there.
    """
    from whet.base.console import say
    from whet.data.named_files import check_sources
    from whet.engine.load.locate import locate
    from whet.runs import finished_run

    if (run := finished_run(parsed)) is not None and run.finished is not None:
        say(f"{run.path} is finished ({run.finished['steps']} steps): nothing to do")
        if lacks_report(run.path):
            write_report(run.path, per_row=run.task.labelled)
        return run
    locate(parsed.recipe.model.path)
    check_sources(parsed.recipe.data)
    return None


def evaluate(
    run: str | Path | Run, *, max_rows: int | None = None, split: Literal["eval", "test"] = "eval",
    data: Any = None, compute_metrics: ComputeMetrics | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score base and tuned model of a run on its held-out rows, those kept for a test, or other rows.

    data: a file or several, or rows as `train` takes them. compute_metrics: a function of predictions and references
    that gives more metrics by name. Updates the report.
    """
    from whet.base.lock import DirectoryLock
    from whet.evaluation.run import evaluate as run_evaluation
    from whet.given import files_of_rows
    from whet.report.page import write_page

    _quiet()
    found = opened(run)
    files = [] if data is None else files_of_rows(data, found.path)
    with DirectoryLock(found.path) if found.has_recipe else contextlib.nullcontext() as lock:
        if lock is not None:
            lock.take()
        result = run_evaluation(found, max_rows=max_rows, split=split, data=files, compute_metrics=compute_metrics)
        if found.has_recipe:
            write_page(found.path)
    return result


def merge(run: str | Path | Run, out: str | Path, *, data: str | None = None) -> dict[str, Any]:
    """Fold the adapter of a run, or in a folder of its own, into a plain model in `out`; returns the certificate.

    data: rows on which an adapter without a run is compared; None: the built-in ones.
    """
    from whet.adapters.folder import with_rows
    from whet.report.page import write_page
    from whet.ship.merge import merge as run_merge

    _quiet()
    found = with_rows(opened(run), data)
    certificate = run_merge(found, Path(out))
    if found.has_recipe:
        write_page(found.path)
    return certificate


def predict(
    run: str | Path | Run, rows: str | Iterable[Any], *, top: int | None = None, max_new_tokens: int = 256
) -> list[dict[str, Any]]:
    """The answer of a run to each row: label and probabilities, value, or text.

    rows: strings, pairs of strings, lists of messages, or objects as in a data file; one string is one row. top: the
    likeliest classes alone. Raises UserError for bad rows.
    """
    from whet.ship.predict import Wanted, open_predictor
    from whet.ship.predict import predict as run_prediction
    from whet.ship.questions import Asks, given

    _quiet()
    found = opened(run)
    questions = list(given([rows] if isinstance(rows, str) else rows, Asks.of(found)))
    with open_predictor(found, Wanted(top, max_new_tokens)) as predictor:
        return [answer for _, answer in run_prediction(predictor, questions)]


def opened(run: str | Path | Run) -> Run:
    """A run, or the folder of an adapter alone, as what answers. Raises UserError."""
    if isinstance(run, Run):
        return run
    if is_adapter_alone(run):
        from whet.adapters.folder import open_folder

        return open_folder(run)
    return open_run(run)


def plan(recipe: Given = None, /, *, gpu: str | None = None, gpus: int = 1, **overrides: Any) -> dict[str, Any]:
    """Memory and time of a recipe, from its config. gpu: for this card ("RTX 4090", "24GB"); gpus: for so many."""
    return plan_parsed(_parsed(recipe, overrides), gpu, gpus)


def plan_parsed(parsed: Parsed, gpu: str | None = None, gpus: int = 1) -> dict[str, Any]:
    """`plan` of a parsed recipe: what `whet plan --json` prints."""
    from whet.adapters.further import with_starting_adapter
    from whet.planning.plan import plan_recipe

    return plan_recipe(with_starting_adapter(parsed).recipe, gpu).with_options(gpus)


def check(recipe: Given = None, /, **overrides: Any) -> dict[str, Any]:
    """The ledger of a recipe's data: what exactly would be learned."""
    from whet.data.check import report_of

    return report_of(prepared(_parsed(recipe, overrides)))


def prepared(parsed: Parsed, *, any_model: bool = False) -> Prepared:
    """The rows of a recipe, read, tokenised and checked against model and method as training would.

    any_model: rows are not limited to what the recipe's model can read.
    """
    from dataclasses import replace

    from whet.data.row_model import remembered_row_model
    from whet.planning.asked import Asked
    from whet.planning.rules import ROWS, TASK, check, data_for_method
    from whet.runs import prepared as prepare_rows

    if parsed.recipe.model.adapter is not None:
        from whet.adapters.further import with_starting_adapter

        parsed = with_starting_adapter(parsed)
    asked = Asked.of(parsed.recipe)
    check(asked, ROWS)
    model = remembered_row_model(parsed.recipe.model)
    recipe = replace(parsed.recipe, data=data_for_method(parsed.recipe))
    rows = prepare_rows(recipe, any_model=any_model, model=model)
    if rows.task.name not in model.tasks:  # a rule says why
        from whet.engine.load.load import load_config

        asked = replace(asked, config=load_config(parsed.recipe.model))
    check(replace(asked, task=rows.task.name), TASK)
    return rows


def judge(
    recipe: Given = None, /, *, endpoint: Endpoint | Mapping[str, Any],
    rubric: Literal["quality", "harm"] = "quality", least: int = 1, out: str | Path = "scores.jsonl", **overrides: Any,
) -> dict[str, Any]:  # fmt: skip
    """Have the rows to learn from scored by the model at an OpenAI-compatible endpoint, for `data.scores`.

    endpoint: `{"base_url": "http://127.0.0.1:8000/v1", "model": "qwen3-32b"}`, and what else
    `whet.data.judge.endpoint.Endpoint` has. Returns the counts and the worst rows. Raises UserError.
    """
    return judge_parsed(_parsed(recipe, overrides), _endpoint(endpoint), out, rubric, least)


def _endpoint(given: Endpoint | Mapping[str, Any]) -> Endpoint:
    from dataclasses import fields

    from whet.base.errors import UserError, nearest
    from whet.data.judge.endpoint import Endpoint

    if isinstance(given, Endpoint):
        return given
    known = [field.name for field in fields(Endpoint)]
    for name in given:
        if name not in known:
            near = nearest(name, known)
            raise UserError(
                "an endpoint has no such setting", field=f"endpoint.{name}", found=str(given[name]),
                expected=", ".join(known), fix=f"write {near}" if near else "remove it",
            )  # fmt: skip
    return Endpoint(**given)


def judge_parsed(
    parsed: Parsed, endpoint: Endpoint, out: str | Path, rubric: Literal["quality", "harm"], least: int
) -> dict[str, Any]:
    """The same for a parsed recipe."""
    from whet.base.outputs import output_file
    from whet.data.collect import candidates
    from whet.data.judge.output import replies_beside
    from whet.data.judge.scores import judge_rows
    from whet.inputs import inputs_of_recipe

    inputs = inputs_of_recipe(parsed)
    target = output_file(out, inputs, "--out")
    output_file(replies_beside(target), inputs, "--out")
    with candidates(parsed.recipe.data, paraphrase=False) as sides:
        return judge_rows(sides.train, endpoint, target, rubric, least)


def augment(
    recipe: Given = None, /, *, endpoint: Endpoint | Mapping[str, Any], copies: int = 2,
    out: str | Path = "added.jsonl", **overrides: Any,
) -> dict[str, Any]:  # fmt: skip
    """Have the rows to learn from paraphrased by the model at an endpoint, for `data.added_dataset`; as `judge`."""
    return augment_parsed(_parsed(recipe, overrides), _endpoint(endpoint), out, copies)


def augment_parsed(parsed: Parsed, endpoint: Endpoint, out: str | Path, copies: int) -> dict[str, Any]:
    """The same for a parsed recipe."""
    from whet.base.outputs import output_file
    from whet.data.collect import candidates
    from whet.data.judge.added import augment_rows, refused_beside
    from whet.data.judge.output import replies_beside
    from whet.inputs import inputs_of_recipe

    inputs = inputs_of_recipe(parsed)
    target = output_file(out, inputs, "--out")
    for beside in (replies_beside(target), refused_beside(target)):
        output_file(beside, inputs, "--out")
    with candidates(parsed.recipe.data, paraphrase=True) as sides:
        held_out = {f"{number:016x}" for side in (sides.evaluation, sides.test) for number in side.ids.tolist()}
        return augment_rows(sides.train, held_out, endpoint, target, copies)


def open(target: str | Path | Run) -> Handle:
    """Open a run, an adapter, a model directory, a hub name or a built-in model, to be asked any number of times.

    A context manager with `chat(message)`, `predict(rows)` and `close()`. Raises UserError.
    """
    from whet.handle import open_handle

    _quiet()
    if isinstance(target, Run):
        return open_handle(str(target.path), target)
    run = open_run(target) if (Path(target) / "recipe.yaml").is_file() else None
    return open_handle(str(target), run)


def chat(
    target: str | Path | Run | Chat, message: str | Sequence[Mapping[str, Any]], *, system: str | None = None,
    max_new_tokens: int = 256,
) -> str:  # fmt: skip
    """One answer of a run, a model directory, a hub name or a built-in model.

    message: a text, or a conversation as a list of `{"role", "content"}`. target: or what `whet.ship.chat.open_chat`
    gave, which loads the model once for any number of messages, and has a `max_new_tokens` of its own.
    """
    from whet.handle import messages_of
    from whet.ship.chat import Chat, open_chat

    messages = messages_of(message, system)
    if isinstance(target, Chat):
        return target.reply(messages)
    _quiet()
    with open_chat(str(target.path if isinstance(target, Run) else target), max_new_tokens=max_new_tokens) as opened:
        return opened.reply(messages)


def compose(
    out: str | Path, parts: Sequence[str | Path], *, weights: Sequence[float] | None = None, how: Any = "cat",
    rank: int | None = None, density: float = 0.5,
) -> Path:  # fmt: skip
    """Make one adapter of several runs' or folders' LoRA adapters of one base, in the new folder `out`.

    See `whet.adapters.loaded.Adapters.compose`. Raises UserError.
    """
    from whet.ship.compose import compose_on_disk

    return compose_on_disk(out, parts, weights=weights, how=how, rank=rank, density=density)


def bench_speed(model: str, overrides: Sequence[str] = (), **load: Any) -> dict[str, Any]:
    """Training speed and memory of LoRA on `model` here, or on random weights of a config.json.

    overrides: `section.key=value` as on the command line; load: fields of `whet.speed.Load`. Raises UserError.
    """
    from whet.base.console import quiet_libraries, say
    from whet.speed import Load, check_used, measure_speed

    quiet_libraries()
    drawn = ["model.from_config=true"] if model.endswith(".json") else []
    parsed = parse(None, [*overrides, f"model.path={json.dumps(model)}", *drawn])
    for note in parsed.notes:
        say(note, style="dim")
    recipe = parsed.recipe
    check_used(recipe.method, parsed.origins)
    return measure_speed(recipe.model, recipe.base, recipe.method, recipe.train, Load(**load))


def capabilities() -> list[dict[str, Any]]:
    """The capability matrix."""
    from whet.methods.all import capability_rows

    return capability_rows()


def doctor() -> dict[str, Any]:
    """Report installed and missing packages with what their absence costs, and run a short numerical self-test."""
    from whet.engine.doctor import examine

    return examine()


def recipes() -> dict[str, Path]:
    """The recipes that `init` prints, by name."""
    installed = PACKAGE / "builtin" / "recipes"
    folder = installed if installed.is_dir() else PACKAGE.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def init(name: str) -> str:
    """The text of a commented recipe: lora, qlora, full or classify."""
    from whet.base.errors import UserError, nearest

    found = recipes()
    if name not in found:
        raise UserError(
            "there is no such recipe to start from", found=name, expected=", ".join(found),
            fix=f"whet init {nearest(name, found) or 'lora'}",
        )  # fmt: skip
    return found[name].read_text(encoding="utf-8")


def quickstart(**overrides: Any) -> dict[str, Any]:
    """Everything on the built-in model and data: train, evaluate, merge, report. overrides: dotted path to value."""
    return quickstart_with([f"{path}={json.dumps(value, ensure_ascii=False)}" for path, value in overrides.items()])


def quickstart_with(overrides: list[str]) -> dict[str, Any]:
    """The same with overrides as on the command line."""
    from whet.first_run import run_quickstart

    return run_quickstart(recipes()["quickstart"], overrides)
