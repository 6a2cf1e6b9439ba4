"""Every field of a recipe changes something that can be seen, and not only in the recipe that is written down.

Each row of the table sets one field and names what must differ: the rows that are learned, the numbers of a run, how
often a layer runs, what lies on the host, how answers are asked for. Settings of the layout must leave the numbers as
they are. A field that is in no row, and a row of no field, are failures; so a new field needs a row.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn.modules import module as hooks
from torch.optim.optimizer import register_optimizer_step_post_hook

import whet
from whet import runs
from whet.base.errors import UserError
from whet.data.config import Data
from whet.engine.config import Base, Model
from whet.engine.memory.host_tables import OffloadedEmbedding, OffloadedHead
from whet.engine.memory.stash import Stash
from whet.recipe import parse
from whet.settings import Eval, Train
from whet.training.run import train

Seen = dict[str, Any]
ONE_BYTE = (torch.uint8, torch.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class Row:
    """Setting `field` to `value` beside `also` changes what `shows` names, as `look` sees it.

    same: the losses stay what they were, up to rounding.
    """

    field: str
    value: Any
    shows: str
    look: Callable[..., Seen]
    also: dict[str, Any] = dataclasses.field(default_factory=dict)
    same: bool = False


# what can be seen


class Files:
    """Models and rows that the table names; made once."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.model = tiny.save_model(tiny.llama(tie_word_embeddings=False), place / "model")
        self.other = tiny.save_model(tiny.llama(num_hidden_layers=3, tie_word_embeddings=False), place / "other")
        self.data = tiny.write_rows(place / "rows.jsonl", tiny.rows())
        self._chats()
        self._adapter()
        template = self.other / "chat_template.jinja"
        template.write_text(template.read_text(encoding="utf-8").replace("<|im_end|>", "<|im_end|> "), encoding="utf-8")

    def _adapter(self) -> None:
        import peft
        import theirs

        settings = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        theirs.save_adapter(self.model, self.place / "theirs", settings, keep_tokenizer=False)

    def _chats(self) -> None:
        def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
            return {"prompt": question, "completion": answer, **more}

        words = tiny.ENGLISH
        plain = [chat(f"{n} {' '.join(words[n % 7 : n % 7 + 8])}", f"answer {n}", who=f"c{n % 5}") for n in range(16)]
        odd = [
            chat("same question", "same answer", who="x"), chat("same question", "same answer", who="y"),
            chat("write to me", "at jo@example.org please", who="x"), chat("a forbidden word", "no", who="z"),
        ]  # fmt: skip
        tables = {
            "chats": plain + odd, "second": [chat(f"second {n}", "two", who="s") for n in range(4)],
            "held": [chat(f"0 {' '.join(words[:8])}", "held")],
            "general": [chat(f"general {n}", "g") for n in range(9)], "added": [chat("a paraphrase", "p")],
            "empty": [*plain, chat("nothing", "")], "renamed": [{"question": "q", "answer": "a"}] * 3,
            "preferred": [{"prompt": f"p {n}", "chosen": "good", "rejected": "bad"} for n in range(4)],
            "numbers": [{"text": f"{n} {words[n % 9]}", "label": n % 4} for n in range(12)],
            "labels": [{"text": f"{n} {words[n % 9]}", "label": "ab"[n % 5 == 0]} for n in range(40)],
            "long": [chat("why", " ".join(words * 4)), *plain],
            "turns": [{"messages": [{"role": role, "content": f"{role} {n}"} for n in (1, 2)
                                    for role in ("user", "assistant")]}] * 4,
        }  # fmt: skip
        for name, records in tables.items():
            tiny.write_rows(self.place / f"{name}.jsonl", records)
        (self.place / "texts.txt").write_text("\n\n".join(" ".join(words[n % 9 :]) for n in range(12)), "utf-8")
        (self.place / "blocked.txt").write_text("forbidden\n", encoding="utf-8")
        tests = [{"question": record["prompt"], "answer": "x"} for record in plain[:2]]
        tiny.write_rows(self.place / "bench.jsonl", tests)
        examples = runs.prepared(parse(None, self.words(**{"data.dataset": "chats.jsonl"})).recipe).train_examples
        scores: list[dict[str, Any]] = [
            {"id": name, "score": 1 + index % 5, "reason": "r", "rubric": "quality", "model": "j"}
            for index, name in enumerate(dict.fromkeys(one.id for one in examples))
        ]
        tiny.write_rows(self.place / "scores.jsonl", scores)

    def words(self, out: str = "run", **changes: Any) -> list[str]:
        """The settings of a run, with names of files made whole."""
        values = tiny.settings(self.model, self.data, self.place / out) | {k: self.whole(v) for k, v in changes.items()}
        return tiny.words({path: value for path, value in values.items() if value != "unset"})

    def whole(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.whole(item) for item in value]
        if isinstance(value, dict):
            return {self.whole(name): item for name, item in value.items()}
        if isinstance(value, str) and (self.place / value).exists():
            return str(self.place / value)
        return value


def rows_of(files: Files, out: str, **changes: Any) -> Seen:
    """The rows to learn from and those held out, as token ids and marks; or the field that was refused."""
    try:
        found = runs.prepared(parse(None, files.words(out, **changes)).recipe)
    except UserError as error:
        return {"rows": f"refused: {error.field} {error.problem}"}

    def plain(rows: Any) -> list[Any]:
        return [(rows.row(i)[0].tolist(), rows.row(i)[1].tolist()) for i in range(len(rows))]

    return {
        "rows": [plain(side) for side in (found.train, found.evaluation, found.test)], "bins": found.bins or "none",
        "task": str(found.task), "benchmarks": [Path(name).name for name in found.benchmarks],
        "held out": [one.text for one in found.held_out],
    }  # fmt: skip


def alive_now() -> dict[str, int]:
    """Tables that wait on the host, and numbers of one byte."""
    found = [one for one in gc.get_objects() if issubclass(type(one), torch.nn.Module | torch.Tensor)]
    return {
        "embeddings": sum(isinstance(one, OffloadedEmbedding) for one in found),
        "heads": sum(isinstance(one, OffloadedHead) for one in found),
        "bytes": sum(one.numel() for one in found if getattr(one, "dtype", None) in ONE_BYTE),
    }


@contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """What happens inside: how often MLPs run, the widest batch, the optimiser, what is alive when it steps."""
    calls: Counter[str] = Counter()
    widest = [0, 0]

    def before(module: torch.nn.Module, args: Any) -> None:
        name = type(module).__name__
        calls["mlp"] += "SiLU" in name
        if isinstance(module, torch.nn.Embedding) and args and args[0].ndim == 2:
            widest[0] = max(widest[0], args[0].shape[0])
            widest[1] = max(widest[1], args[0].shape[1])

    def stepped(optimiser: Any, *_: Any) -> None:
        seen["optimiser"] = type(optimiser).__name__
        if "alive" not in seen:
            seen["alive"] = alive_now()

    put = Stash.put
    handles = [hooks.register_module_forward_pre_hook(before), register_optimizer_step_post_hook(stepped)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stash, "put", lambda self, tensor: (calls.update(["stash"]), put(self, tensor))[1])
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
    seen |= {"mlp runs": calls["mlp"], "stashed": calls["stash"], "widest": tuple(widest)}


def run_of(files: Files, out: str, **changes: Any) -> Seen:
    """A run of a few steps: its numbers, its files, and how it was computed; or the field that was refused."""
    seen: Seen = {}
    gc.collect()
    values = {"train.max_steps": 3, "data.max_rows": 16, "train.per_device_train_batch_size": 4} | changes
    try:
        with watched(seen):
            run = train(parse(None, files.words(out, **values)))
    except UserError as error:
        return {"refused": error.field}
    lines = run.lines("metrics.jsonl")
    finished = run.finished or {}
    trained = next(run.trained.glob("*model*.safetensors")).read_bytes()
    return seen | {
        "losses": [line["loss"] for line in lines if line["kind"] == "train"],
        "looks": [line["step"] for line in lines if line["kind"] == "eval"],
        "rates": [line["learning_rate"] for line in lines if line["kind"] == "train"],
        "logged": [line["step"] for line in lines if line["kind"] == "train"],
        "tokens": [line["tokens"] for line in lines if line["kind"] == "train"],
        "norms": [line["grad_norm"] for line in lines if line["kind"] == "train"],
        "end": {name: finished[name] for name in ("steps", "kept_step", "stopped", "trainable_params", "all_params")},
        "checkpoints": sorted(path.name for path in run.checkpoints.iterdir()),
        "folders": sorted(path.name for path in run.path.iterdir() if path.is_dir()), "weights": trained,
        "where": str(run.path),
    }  # fmt: skip


def answers_of(files: Files, out: str, **changes: Any) -> Seen:
    """The evaluation of a run that is trained for one step."""
    seen: Seen = {}
    run = _answering(files)
    recipe = run.path / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    from whet.recipe import resolve, to_yaml

    recipe.write_text(to_yaml(resolve(run.recipe, changes)), encoding="utf-8")
    try:
        with watched(seen):
            result = whet.evaluate(run.path)
    finally:
        recipe.write_text(text, encoding="utf-8")
    shown = (run.results / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return seen | {"rows": len(shown), "metrics": sorted(result["tuned"]["metrics"]), "answers": shown}


@functools.cache
def _answering(files: Files) -> Any:
    return train(parse(None, files.words("answering", **{"data.val_size": 6, "train.max_steps": 1})))


def revision_of(files: Files, out: str, **changes: Any) -> Seen:
    """The revisions that transformers is asked for."""
    import transformers

    asked: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        for owner in (transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
            right = owner.from_pretrained

            def recorded(source: Any, *args: Any, _right: Any = right, _name: str = owner.__name__, **more: Any) -> Any:
                asked.add(f"{_name} {more.get('revision')}")
                return _right(source, *args, **more)

            patch.setattr(owner, "from_pretrained", recorded)
        run_of(files, out, **changes)
    return {"revisions": asked}


# the table

WSD = {"train.lr_scheduler_type": "warmup_stable_decay", "train.warmup_ratio": 0.0}
CHATS = {"data.dataset": "chats.jsonl"}
HELD = {"data.val_size": 4, "train.eval_steps": 1}
FP8 = {"base.storage": "fp8", "base.compute": "fp8"}
STEEP = HELD | {
    "train.learning_rate": 0.1, "train.max_steps": 8, "train.lr_scheduler_type": "constant", "data.max_rows": 24,
    "train.per_device_train_batch_size": 4,
}  # fmt: skip
rows, run, answers = rows_of, run_of, answers_of

TABLE = [
    Row("model.path", "other", "end", run),
    Row("model.revision", "v2", "revisions", revision_of),
    Row("model.tokenizer", "other", "rows", rows),
    Row("model.chat_template", "alpaca", "rows", rows),
    Row("model.task", "regression", "task", rows, {"data.dataset": "numbers.jsonl"}),
    Row("model.new_tokens", ["<order>"], "end", run),
    Row("model.adapter", "theirs", "losses", run, {"method.r": "unset"}),
    Row("model.from_config", True, "losses", run, {"method.name": "full", "method.r": "unset", "train.seed": 7}),
    Row("base.storage", "int8", "losses", run, {"base.compute": "fp32"}),
    Row("base.compute", "bf16", "losses", run),
    Row("base.double_quant", False, "losses", run, {"base.storage": "nf4", "base.double_quant": True}),
    Row("base.keep_transposed", True, "alive", run, FP8, same=True),
    Row("base.fp8_head", True, "losses", run, FP8),
    Row("base.offload_embedding", True, "alive", run, same=True),
    Row("base.offload_head", True, "alive", run, same=True),
    Row("base.device", "mps", "refused", run),
    Row("data.dataset", "chats.jsonl", "rows", rows),
    Row("data.eval_dataset", "held.jsonl", "rows", rows),
    Row("data.test_dataset", "held.jsonl", "rows", rows),
    Row("data.format", "text", "rows", rows, {"data.dataset": "labels.jsonl"}),
    Row("data.columns", {"prompt": "question", "completion": "answer"}, "rows", rows,
        {"data.dataset": "renamed.jsonl", "data.format": "prompt_completion"}),
    Row("data.preference", "chosen", "rows", rows, {"data.dataset": "preferred.jsonl"}),
    Row("data.val_size", 3, "rows", rows),
    Row("data.test_size", 3, "rows", rows),
    Row("data.stratify", True, "held out", rows, {"data.dataset": "labels.jsonl", "data.val_size": 0.2}),
    Row("data.group", "who", "rows", rows, CHATS | {"data.val_size": 0.3}),
    Row("data.weights", {"chats.jsonl": 1.0, "second.jsonl": 1.0}, "rows", rows,
        {"data.dataset": ["chats.jsonl", "second.jsonl"]}),
    Row("data.replay_dataset", "general.jsonl", "rows", rows, CHATS),
    Row("data.replay", 0.3, "rows", rows, CHATS | {"data.replay_dataset": "general.jsonl"}),
    Row("data.added_dataset", "added.jsonl", "rows", rows, CHATS),
    Row("data.duplicates", "drop", "rows", rows, CHATS),
    Row("data.leakage", "drop", "rows", rows, CHATS | {"data.eval_dataset": "held.jsonl"}),
    Row("data.benchmarks", "bench.jsonl", "benchmarks", rows, CHATS),
    Row("data.personal", "redact", "rows", rows, CHATS),
    Row("data.blocklist", "blocked.txt", "rows", rows, CHATS),
    Row("data.scores", "scores.jsonl", "rows", rows, CHATS | {"data.least_score": 3}),
    Row("data.least_score", 4, "rows", rows, CHATS | {"data.scores": "scores.jsonl", "data.least_score": 3}),
    Row("data.order", "short_first", "tokens", run),
    Row("data.max_rows", 5, "rows", rows),
    Row("data.max_length", 40, "rows", rows),
    Row("data.over_length", "truncate", "rows", rows, {"data.dataset": "long.jsonl", "data.max_length": 60}),
    Row("data.empty", "drop", "rows", rows, {"data.dataset": "empty.jsonl"}),
    Row("data.loss_on", "last_assistant", "rows", rows, {"data.dataset": "turns.jsonl"}),
    Row("data.packing", False, "bins", rows, {"data.dataset": "texts.txt"}),
    Row("data.padding_free", False, "widest", run, same=True),
    Row("train.num_train_epochs", 2.0, "end", run, {"train.max_steps": "unset", "train.num_train_epochs": 1.0}),
    Row("train.max_steps", 2, "end", run),
    Row("train.per_device_train_batch_size", 2, "tokens", run),
    Row("train.gradient_accumulation_steps", 2, "tokens", run, {"train.per_device_train_batch_size": 2}),
    Row("train.learning_rate", 0.001, "rates", run),
    Row("train.lr_scheduler_type", "constant", "rates", run),
    Row("train.warmup_ratio", 0.5, "rates", run),
    Row("train.warmup_steps", 2, "rates", run),
    Row("train.decay_ratio", 0.75, "rates", run, WSD),
    Row("train.optim", "sgd", "optimiser", run),
    Row("train.weight_decay", 0.5, "losses", run, {"train.learning_rate": 0.1}),
    Row("train.adam_beta1", 0.5, "losses", run),
    Row("train.adam_beta2", 0.5, "losses", run),
    Row("train.adam_epsilon", 0.1, "losses", run),
    Row("train.max_grad_norm", 0.001, "losses", run, {"train.optim": "sgd"}),
    Row("train.gradient_checkpointing", True, "mlp runs", run, same=True),
    Row("train.activation_offload", True, "stashed", run, {"train.gradient_checkpointing": True, "model.path": "other"},
        same=True),
    Row("train.tile_mlp", 16, "mlp runs", run, {"train.gradient_checkpointing": True}, same=True),
    Row("train.offload_optimizer", True, "optimiser", run, same=True),
    Row("train.compile", True, "refused", run),
    Row("train.cuda_graphs", True, "refused", run),
    Row("train.fit_micro_batches", True, "refused", run),
    Row("train.eval_steps", 2, "looks", run, HELD),
    Row("train.save_steps", 2, "checkpoints", run, {"train.save_steps": 1, "train.max_steps": 4}),
    Row("train.save_total_limit", 3, "checkpoints", run, {"train.save_steps": 1}),
    Row("train.logging_steps", 2, "logged", run),
    Row("train.load_best_model_at_end", False, "weights", run, STEEP),
    Row("train.early_stopping_patience", 1, "end", run, STEEP),
    Row("train.report_to", ["tensorboard"], "folders", run),
    Row("train.seed", 5, "losses", run),
    Row("eval.metrics", ["exact_match"], "metrics", answers),
    Row("eval.max_new_tokens", 2, "answers", answers, {"eval.max_new_tokens": 12}),
    Row("eval.per_device_eval_batch_size", 2, "widest", answers, {"eval.max_new_tokens": 12}),
    Row("eval.max_rows", 3, "rows", answers),
    Row("output_dir", "elsewhere", "where", run),
]  # fmt: skip
# What cannot be shown by a run in one process: where it is shown instead.
ELSEWHERE = {
    "data.num_proc": "test_row_builder.py", "data.invalid": "hostile/test_hostile_data.py",
    "model.adapter": "test_further.py",
}  # fmt: skip
OWNERS = {"model": Model, "base": Base, "data": Data, "train": Train, "eval": Eval}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("fields"))


@pytest.fixture(scope="module")
def usual(files: Files) -> Callable[[Row], Seen]:
    """What is seen without the field; made once for all rows that have the same beside them."""
    known: dict[str, Seen] = {}

    def look(row: Row) -> Seen:
        name = f"{row.look.__name__} {json.dumps(row.also, sort_keys=True)}"
        if name not in known:
            known[name] = row.look(files, f"usual{len(known)}", **row.also)
        return known[name]

    return look


def test_every_field_has_a_row() -> None:
    fields = {f"{name}.{field.name}" for name, owner in OWNERS.items() for field in dataclasses.fields(owner)}
    assert {row.field for row in TABLE} | set(ELSEWHERE) == fields | {"output_dir"}
    assert len({row.field for row in TABLE}) == len(TABLE)
    for field, name in ELSEWHERE.items():
        text = (Path(__file__).parent / name).read_text(encoding="utf-8")
        assert field.partition(".")[2] in text


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.field)
def test_a_field_changes_what_it_should(row: Row, files: Files, usual: Callable[[Row], Seen]) -> None:
    before = usual(row)
    value = files.place / row.value if row.field == "output_dir" else row.value
    after = row.look(files, row.field, **(row.also | {row.field: str(value) if isinstance(value, Path) else value}))
    assert before.get(row.shows) != after.get(row.shows), f"{row.field} changes nothing"
    assert after.get(row.shows) is not None
    if row.same:
        np.testing.assert_allclose(after["losses"], before["losses"], rtol=2e-5)
        np.testing.assert_allclose(after["norms"], before["norms"], rtol=2e-4)


@pytest.mark.parametrize("look", [rows_of, run_of, answers_of], ids=lambda look: look.__name__)
def test_what_is_seen_twice_is_the_same(look: Callable[..., Seen], files: Files) -> None:
    """Else a difference would say nothing of the field: the planted fault is a field that is ignored."""
    first, again = look(files, "twice1"), look(files, "twice2")
    for seen in (first, again):
        seen.pop("where", None)
    assert first == again


def test_the_embedding_of_a_labelled_run_waits_on_the_host_too(files: Files) -> None:
    """Padded rows take another way through the layout, which could forget it."""
    seen = [
        run_of(files, f"labels{there}", **{"data.dataset": "labels.jsonl", "base.offload_embedding": there})
        for there in (False, True)
    ]
    assert [one["alive"]["embeddings"] for one in seen] == [0, 1]
    assert seen[0]["losses"] == seen[1]["losses"]


def test_the_plan_counts_the_embedding_on_the_host(files: Files) -> None:
    plans = [
        whet.plan(None, **tiny.settings(files.model, files.data, files.place / "p", base__offload_embedding=there))
        for there in (False, True)
    ]
    table = tiny.VOCABULARY * 64 * 4
    assert [plan["host_bytes"] for plan in plans] == [0, table]
    assert plans[0]["memory"]["frozen weights"] - plans[1]["memory"]["frozen weights"] == table


def test_a_revision_is_asked_of_config_tokenizer_and_weights_alike(files: Files) -> None:
    asked = revision_of(files, "revised", **{"model.revision": "v3"})["revisions"]
    assert asked == {f"{owner} v3" for owner in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")}
