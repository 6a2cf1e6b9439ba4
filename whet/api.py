"""whet in Python: the same verbs as on the command line.

import whet
run = whet.train("tickets.yaml", **{"train.learning_rate": 1e-4})
print(whet.evaluate(run.path)["tuned"]["metrics"])
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from whet.recipe import Parsed, parse
from whet.runs import Run, open_run

if TYPE_CHECKING:
    from whet.data.judge.endpoint import Endpoint
    from whet.data.prepare import Prepared

PACKAGE = Path(__file__).parent


def _parsed(recipe: str | Path | None, overrides: dict[str, Any]) -> Parsed:
    return parse(recipe, [f"{path}={json.dumps(value, ensure_ascii=False)}" for path, value in overrides.items()])


def train(recipe: str | Path | None = None, /, **overrides: Any) -> Run:
    """Train what a recipe file says (None: the defaults). overrides: dotted path to value.

    The same call continues an unfinished run and leaves a finished one alone. Raises UserError for bad input.
    """
    return train_parsed(_parsed(recipe, overrides))


def train_parsed(parsed: Parsed) -> Run:
    """Train a parsed recipe and write its report."""
    from whet.report.charts import write_loss_plot
    from whet.report.page import write_page
    from whet.training.run import train as run_training

    run = run_training(parsed)
    write_loss_plot(run.path, "per row" if run.task.labelled else "per supervised token")
    write_page(run.path)
    return run


def evaluate(
    run: str | Path, *, max_rows: int | None = None, split: Literal["eval", "test"] = "eval"
) -> dict[str, Any]:
    """Score base and tuned model of a run on its held-out rows, or those kept for a test; updates its report."""
    from whet.evaluation.run import evaluate as run_evaluation
    from whet.report.page import write_page

    opened = open_run(run)
    result = run_evaluation(opened, max_rows=max_rows, split=split)
    write_page(opened.path)
    return result


def merge(run: str | Path, out: str | Path) -> dict[str, Any]:
    """Fold a run's adapter into a plain model in `out`; returns the certificate of agreement."""
    from whet.report.page import write_page
    from whet.ship.merge import merge as run_merge

    opened = open_run(run)
    certificate = run_merge(opened, Path(out))
    write_page(opened.path)
    return certificate


def predict(run: str | Path, texts: Iterable[Any]) -> list[dict[str, Any]]:
    """What a run with labels, or of an encoder-decoder, says of each text: label and probabilities, value or text.

    texts: strings, pairs of strings, or objects with `text` and `text_pair`. Raises UserError for bad rows.
    """
    from whet.ship.predict import given, open_predictor
    from whet.ship.predict import predict as run_prediction

    return list(run_prediction(open_predictor(open_run(run)), given(texts)))


def plan(recipe: str | Path | None = None, /, **overrides: Any) -> dict[str, Any]:
    """Parameters and memory of a recipe, from the model's config alone."""
    from whet.training.plan import plan as make_plan

    return make_plan(_parsed(recipe, overrides).recipe)


def check(recipe: str | Path | None = None, /, **overrides: Any) -> dict[str, Any]:
    """The ledger of a recipe's data: what exactly would be learned."""
    from whet.data.check import report_of

    return report_of(prepared(_parsed(recipe, overrides)))


def prepared(parsed: Parsed, *, any_model: bool = False) -> Prepared:
    """The rows of a recipe, read, tokenised and checked against model and method as training would.

    any_model: rows are not limited to what the recipe's model can read.
    """
    from dataclasses import replace

    from whet.engine.load.load import load_config
    from whet.runs import prepared as prepare_rows
    from whet.training.padded import check_recipe, data_for

    found = prepare_rows(replace(parsed.recipe, data=data_for(parsed.recipe)), any_model=any_model)
    check_recipe(parsed.recipe, load_config(parsed.recipe.model), found.task)
    return found


def judge(
    recipe: str | Path | None = None, /, *, endpoint: str, model: str, api_key_env: str | None = None,
    rubric: Literal["quality", "harm"] = "quality", least: int = 1, out: str | Path = "scores.jsonl", jobs: int = 4,
    **overrides: Any,
) -> dict[str, Any]:  # fmt: skip
    """Have the rows to learn from scored by the model at an OpenAI-compatible endpoint, for `data.scores`.

    api_key_env: the environment variable that holds the key. Returns the counts and the worst rows. Raises UserError.
    """
    from whet.data.judge.endpoint import Endpoint

    asked = Endpoint(base_url=endpoint, model=model, api_key_env=api_key_env, concurrency=jobs)
    return judge_parsed(_parsed(recipe, overrides), asked, out, rubric, least)


def judge_parsed(
    parsed: Parsed, endpoint: Endpoint, out: str | Path, rubric: Literal["quality", "harm"], least: int
) -> dict[str, Any]:
    """The same for a parsed recipe."""
    from whet.data.collect import candidates
    from whet.data.judge.scores import judge_rows

    with candidates(parsed.recipe.data, paraphrase=False) as sides:
        return judge_rows(sides.train, endpoint, Path(out).expanduser(), rubric, least)


def augment(
    recipe: str | Path | None = None, /, *, endpoint: str, model: str, api_key_env: str | None = None, copies: int = 2,
    out: str | Path = "added.jsonl", jobs: int = 4, **overrides: Any,
) -> dict[str, Any]:  # fmt: skip
    """Have the rows to learn from paraphrased by the model at an endpoint, for `data.added_dataset`; as `judge`."""
    from whet.data.judge.endpoint import Endpoint

    asked = Endpoint(base_url=endpoint, model=model, api_key_env=api_key_env, concurrency=jobs)
    return augment_parsed(_parsed(recipe, overrides), asked, out, copies)


def augment_parsed(parsed: Parsed, endpoint: Endpoint, out: str | Path, copies: int) -> dict[str, Any]:
    """The same for a parsed recipe."""
    from whet.data.collect import candidates
    from whet.data.judge.added import augment_rows

    with candidates(parsed.recipe.data, paraphrase=True) as sides:
        held_out = {f"{number:016x}" for side in (sides.evaluation, sides.test) for number in side.ids.tolist()}
        return augment_rows(sides.train, held_out, endpoint, Path(out).expanduser(), copies)


def chat(target: str, message: str, *, system: str | None = None, max_new_tokens: int = 256) -> str:
    """One answer of a run, a model directory, a hub name or a built-in model."""
    from whet.data.example import Message
    from whet.ship.chat import open_chat

    messages = [Message("system", system)] if system else []
    return open_chat(target, max_new_tokens=max_new_tokens).reply([*messages, Message("user", message)])


def compose(
    out: str | Path, parts: Sequence[str | Path], *, weights: Sequence[float] | None = None, how: Any = "cat",
    rank: int | None = None, density: float = 0.5,
) -> Path:  # fmt: skip
    """Make one adapter of several runs' or folders' LoRA adapters of one base, in the new folder `out`.

    See `whet.ship.adapters.Adapters.compose`. Raises UserError.
    """
    from whet.ship.adapters import compose_on_disk

    return compose_on_disk(out, parts, weights=weights, how=how, rank=rank, density=density)


def bench_speed(
    model: str, *, storage: str | None = None, compute: str | None = None, checkpointing: str = "auto",
    optim: str = "adamw", fp8_head: bool = False, offload_embedding: bool = False, offload_head: bool = False,
    offload_optimizer: bool = False, keep_transposed: bool = False,
    tile_mlp: int | None = None, compile: bool | None = None, cuda_graphs: bool | None = None, **load: Any,
) -> dict[str, Any]:  # fmt: skip
    """Training speed and memory of LoRA on `model` here; load: fields of `whet.speed.Load`, the rest as in a recipe."""
    import torch

    from whet.base.console import quiet_libraries
    from whet.engine.config import Base
    from whet.settings import Train
    from whet.speed import MODES, Load, measure_speed

    quiet_libraries()
    base = Base(
        storage=storage, compute=compute, fp8_head=fp8_head, offload_embedding=offload_embedding,  # type: ignore[arg-type]
        keep_transposed=keep_transposed or None, offload_head=offload_head,
    )  # fmt: skip
    settled = {"optim": optim, "tile_mlp": tile_mlp, "cuda_graphs": cuda_graphs, **MODES[checkpointing]}
    settled["offload_optimizer"] = offload_optimizer or None
    settled["compile"] = torch.cuda.is_available() if compile is None else compile
    return measure_speed(model, base, Train(**settled), Load(**load))


def capabilities() -> list[dict[str, Any]]:
    """The capability matrix."""
    from whet.methods.all import capability_rows

    return capability_rows()


def doctor() -> dict[str, Any]:
    """What is installed, what is missing and what that costs, and a short numerical self-test."""
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
