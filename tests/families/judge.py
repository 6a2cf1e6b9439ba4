"""One family through whet, judged by plain transformers: eager attention, one row at a time, no padding.

Right means: the loss of the first step, greedy answers, answers in a batch and alone, and the held-out loss of the
merged model are what plain transformers computes; the merged model also when it is opened as anybody would, with the
attention that transformers or its own config chooses. Refused means: a UserError that needs no weights. A family that
is refused because its rows may not share a batch is tried once more with one row in each.
"""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import task_nets
import tiny
import torch
from families.configs import Entry, config_of
from torch.nn.functional import cross_entropy

from whet.base.errors import UserError

LARGEST = 20_000_000  # parameters; a family that does not get small is only asked for its refusal
WORDS = (3, 34, 20, 27)  # of the rows; most are longer than every window
NEW_TOKENS = 3
# A share of a loss, or of the largest logit. Everything is fp32, the merged weights too, as the base's are: over all
# families the largest distances were 7e-7 and 1e-6, the rounding of sums in another order.
NEAR = 1e-5
OWNERS = {
    "causal": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}  # fmt: skip
BESIDE = "changes with the rows beside it"  # of a refusal whose fix is tried
LABELS = ("bad", "fine", "good")
KINDS = {"causal": "Llama", "classification": "Bert", "seq2seq": "T5"}


@dataclass
class Verdict:
    """What became of a family.

    outcome: right | refused | not built | not merged (right, but the certificate is refused) | wrong | crash; notes:
    what whet said of it; distances: how far what was compared was from plain transformers, as a share.
    """

    name: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    distances: dict[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return self.outcome in ("right", "refused", "not built")


class NotMerged(Exception):
    """A merge that whet refuses, of a family that is right so far."""


class Wrong(Exception):
    """Something that whet computed is not what plain transformers computes."""


def judged(entry: Entry, place: Path) -> Verdict:
    """The verdict on one family; `place` is emptied."""
    start = time.perf_counter()
    verdict = _verdict(entry, place)
    shutil.rmtree(place, ignore_errors=True)
    verdict.seconds = time.perf_counter() - start
    return verdict


def _verdict(entry: Entry, place: Path) -> Verdict:
    try:
        config = still(config_of(entry))
        whole = save(entry, config, place / "model")
    except Exception as error:  # noqa: BLE001 - whatever transformers raises for a family that cannot be made small
        return Verdict(entry.name, "not built", f"{type(error).__name__}: {first_line(error)}")
    pairs = entry.task == "classification" and config.is_encoder_decoder  # such heads read the end token
    tokenizer = task_nets.tokenizer("T5" if pairs else KINDS[entry.task])
    if entry.task == "causal":
        tokenizer.pad_token = "[PAD]"
    tokenizer.save_pretrained(str(place / "tokenizer"))
    try:
        return Verdict(entry.name, "right", distances=tried(entry, place, whole))
    except UserError as error:
        verdict = refusal(entry, place, error)
    except Exception as error:  # noqa: BLE001 - what fails is the verdict
        return failure(entry, error)
    if BESIDE not in verdict.reason or not verdict.holds:
        return verdict
    save(entry, config, place / "model")
    try:
        return Verdict(entry.name, "right", notes=[verdict.reason], distances=tried(entry, place, whole, alone=True))
    except Exception as error:  # noqa: BLE001
        return failure(entry, error)


def failure(entry: Entry, error: Exception) -> Verdict:
    """The verdict on what was raised while a family was tried."""
    if isinstance(error, NotMerged | Wrong):
        return Verdict(entry.name, "wrong" if isinstance(error, Wrong) else "not merged", str(error))
    where = traceback.extract_tb(error.__traceback__)
    inside = [
        f"{Path(step.filename).name}:{step.lineno}"
        for step in where
        if "whet" in step.filename or "transformers" in step.filename or "peft" in step.filename
    ]
    return Verdict(
        entry.name, "crash", f"{type(error).__name__}: {first_line(error)} at {' < '.join(inside[-3:][::-1])}"
    )


def refusal(entry: Entry, place: Path, error: UserError) -> Verdict:
    """A refusal is one only if it comes without the weights."""
    for file in (place / "model").glob("*.safetensors*"):
        file.unlink()
    shutil.rmtree(place / "run", ignore_errors=True)
    try:
        train(entry, place)
    except UserError as again:
        if again.problem == error.problem:
            return Verdict(entry.name, "refused", f"{error.problem} ({error.found})" if error.found else error.problem)
    return Verdict(entry.name, "crash", f"refused after loading: {first_line(error)} {error.found}")


def still(config: Any) -> Any:
    """The config without dropout and other chance, its parts included."""
    for name, value in list(vars(config).items()):
        if ("drop" in name or "jitter" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    for name in getattr(config, "sub_configs", None) or {}:
        if getattr(config, name, None) is not None:
            still(getattr(config, name))
    return config


def save(entry: Entry, config: Any, place: Path) -> bool:
    """Write a random checkpoint; False where only the config is written, because the family is too large."""
    import transformers

    owner = getattr(transformers, OWNERS[entry.task])
    place.mkdir(parents=True, exist_ok=True)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 1
    if entry.task == "classification":
        config.num_labels = len(LABELS)
        config.id2label, config.label2id = dict(enumerate(LABELS)), {name: i for i, name in enumerate(LABELS)}
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in owner.from_config(config).parameters())
    config.save_pretrained(str(place))
    if size > LARGEST:
        return False
    torch.manual_seed(0)
    network = owner.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim >= 2 and parameter.std() < 0.06:
                parameter.normal_(0, 0.1)
    network.save_pretrained(str(place))
    return True


def settings(entry: Entry, place: Path, *, alone: bool = False) -> dict[str, Any]:
    """Of the run: two steps over all rows at once, so that the first loss is that of every row. alone: one row in each
    batch of the step."""
    rows = [task_nets.rows(entry.task, len(WORDS))[index] for index in range(len(WORDS))]
    for index, (row, words) in enumerate(zip(rows, WORDS, strict=True)):
        row["prompt" if "prompt" in row else "text"] = task_nets.text(index, words)
        if entry.task == "causal":
            row.update(prompt=task_nets.text(index, words // 2 + 1), completion=task_nets.text(index + 3, words))
    data = task_nets.write(place / "rows.jsonl", rows)
    changes: dict[str, Any] = {"model.chat_template": "alpaca"} if entry.task == "causal" else {}
    if alone:
        changes |= {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": len(rows)}
    return {
        "model.path": str(place / "model"), "model.tokenizer": str(place / "tokenizer"), "model.task": entry.task,
        "data.dataset": str(data), "data.eval_dataset": str(place / "held.jsonl"),
        "output_dir": str(place / "run"), "base.device": "cpu", "base.storage": "fp32", "base.compute": "fp32",
        "method.r": 4, "train.max_steps": 2, "train.per_device_train_batch_size": len(rows),
        "train.learning_rate": 0.01, "eval.max_new_tokens": NEW_TOKENS, "train.load_best_model_at_end": False,
        **changes,
    }  # fmt: skip


def train(entry: Entry, place: Path, *, alone: bool = False, **changes: Any) -> Any:
    """The trained run. changes: of the settings; None takes one away."""
    from whet.recipe import parse
    from whet.training.run import train as run_training

    values = {
        name: value for name, value in (settings(entry, place, alone=alone) | changes).items() if value is not None
    }
    held = [
        row
        | (
            {"text": task_nets.text(9 + i, 8 * i + 5)}
            if "text" in row
            else {"prompt": task_nets.text(9 + i, 8 * i + 5)}
        )
        for i, row in enumerate(task_nets.rows("classification" if entry.task == "classification" else "seq2seq", 3))
    ]
    task_nets.write(place / "held.jsonl", held)
    return run_training(parse(None, tiny.words(values)))


def tried(entry: Entry, place: Path, whole: bool, *, alone: bool = False) -> dict[str, float]:
    """Everything that is asked of a family; returns the distances. Raises Wrong, UserError, or what failed."""
    from whet import runs
    from whet.evaluation.run import evaluate
    from whet.ship.merge import merge

    run = train(entry, place, alone=alone)
    if not whole:
        raise Wrong("too large to be tried, and not refused")
    lines = run.lines("metrics.jsonl")
    prepared = runs.prepared(run.recipe)
    plain = plain_model(entry, place / "model")
    first = next(line["loss"] for line in lines if line["kind"] == "train")
    moved = {"the first loss": check_loss("the first loss", first, loss_of(entry, plain, prepared.train))}
    evaluate(run, max_rows=2)
    moved |= check_answers(entry, run, prepared, plain)
    try:
        merge(run, place / "out")
    except UserError as error:  # after everything else was right
        raise NotMerged(f"{error.problem} ({error.found})") from error
    last = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    what = "the held-out loss of the merged model"
    for attention, opened in (("eager", what), (None, f"{what} as anybody opens it")):
        exact = loss_of(entry, plain_model(entry, place / "out", attention), prepared.evaluation)
        moved[opened] = check_loss(opened, last, exact)
    return moved


def plain_model(entry: Entry, place: Path, attention: str | None = "eager") -> Any:
    """The model in plain transformers, with the attention that its family is written in, or the one that is chosen when
    nothing is said."""
    import transformers

    owner = getattr(transformers, OWNERS[entry.task])
    more = {} if attention is None else {"attn_implementation": attention}
    return owner.from_pretrained(str(place), dtype=torch.float32, **more).eval()


def unpadded(plain: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """One row [T] as `generate` gives it to a model: under a mask of ones, where it takes one."""
    inputs = {"input_ids": tokens[None]}
    if "attention_mask" in signature(plain.forward).parameters:
        inputs["attention_mask"] = torch.ones_like(tokens)[None]
    return inputs


@torch.inference_mode()
def loss_of(entry: Entry, plain: Any, rows: Any) -> float:
    """The mean loss of all targets, each row alone."""
    total, count = 0.0, 0
    for index in range(len(rows)):
        logits, targets = LOGITS[entry.task](plain, rows, index)
        total += float(cross_entropy(logits.double(), targets, reduction="sum"))
        count += len(targets)
    return total / count


def causal_logits(plain: Any, rows: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, learned, *_ = rows.row(index)
    tokens = torch.from_numpy(ids.astype(np.int64))
    chosen = torch.from_numpy(np.flatnonzero(learned[1:]))
    return plain(**unpadded(plain, tokens), use_cache=False).logits[0, :-1][chosen], tokens[1:][chosen]


def label_logits(plain: Any, rows: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.from_numpy(rows.ids[rows.span(index)].astype(np.int64))
    return plain(**unpadded(plain, tokens)).logits, torch.tensor([int(rows.labels[index])])


def answer_logits(plain: Any, rows: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    from whet.engine.answer.encoder_decoder import start_id

    source = torch.from_numpy(rows.row(index)[0].astype(np.int64))
    answer = torch.from_numpy(rows.answers.row(index)[0].astype(np.int64))
    start = torch.tensor([start_id(plain)])
    output = plain(input_ids=source[None], decoder_input_ids=torch.cat([start, answer[:-1]])[None], use_cache=False)
    return output.logits[0], answer


LOGITS: dict[str, Callable[[Any, Any, int], tuple[torch.Tensor, torch.Tensor]]] = {
    "causal": causal_logits, "classification": label_logits, "seq2seq": answer_logits,
}  # fmt: skip


def check_loss(what: str, ours: float, exact: float) -> float:
    """How far apart two losses are, as a share. Raises Wrong for more than NEAR."""
    if not abs(ours - exact) <= NEAR * abs(exact):
        raise Wrong(f"{what} is {ours:.6g}, and {exact:.6g} in plain transformers")
    return abs(ours - exact) / abs(exact)


def check_answers(entry: Entry, run: Any, prepared: Any, plain: Any) -> dict[str, float]:
    """Answers in a batch are those alone, and the base's are plain transformers' own; returns how far logits of labels
    in a batch are from those alone. Raises Wrong."""
    from whet.engine.answer.session import session
    from whet.engine.load.open import open_trained

    recipe = run.recipe
    opened = open_trained(recipe.model, recipe.base, run.trained, recipe.method, run.task)
    rows = prepared.train
    ids = [
        [int(token) for token in (rows.row(index)[0] if entry.task != "classification" else rows.ids[rows.span(index)])]
        for index in range(3)
    ]
    with session(opened) as asked:
        if entry.task == "classification":
            together = asked.logits(ids, batch_size=3)
            alone = np.concatenate([asked.logits([row], batch_size=1) for row in ids])
            apart = float(np.abs(together - alone).max() / np.abs(alone).max())
            if not apart <= NEAR:
                raise Wrong(f"labels in a batch are not those alone: logits {apart:.2g} of the largest apart")
            return {"logits of labels in a batch": apart}
        more: dict[str, Any] = {"max_new_tokens": NEW_TOKENS}
        if entry.task == "causal":
            more["stop_ids"] = []
        together = asked.answer(ids, batch_size=3, **more)
        alone = [asked.answer([row], batch_size=1, **more)[0] for row in ids]
        if together != alone:
            raise Wrong(f"answers in a batch are not those alone: {together} and {alone}")
        if entry.task == "causal":
            with asked.base():
                ours = asked.answer(ids, batch_size=3, **more)
            exact = [greedy(plain, row) for row in ids]
            if ours != exact:
                raise Wrong(f"the base answers {ours}, in plain transformers {exact}")
    return {}


@torch.inference_mode()
def greedy(plain: Any, prompt: list[int]) -> list[int]:
    """The likeliest tokens, with no cache."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(plain(**unpadded(plain, torch.tensor(ids)), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
