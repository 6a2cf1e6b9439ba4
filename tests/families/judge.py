"""One family through whet, judged by plain transformers: eager attention, one row at a time, no padding.

Right means: the loss of the first step, greedy answers, answers in a batch and alone, and the held-out loss of the
merged model are what plain transformers computes. Refused means: a UserError that needs no weights.
"""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
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
NEAR, NEAR_ROUNDED = 2e-4, 2e-2  # of a loss: in fp32, and after rounding the merged weights to bf16
OWNERS = {
    "causal": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}  # fmt: skip
# Of refusals that cannot come before the weights, because a model has to be run to see it.
NEED_WEIGHTS = (
    "sees the tokens that it should predict", "changes with the rows beside it", "cannot be trained on rows of tokens",
)  # fmt: skip
LABELS = ("bad", "fine", "good")
KINDS = {"causal": "Llama", "classification": "Bert", "seq2seq": "T5"}


@dataclass
class Verdict:
    """What became of a family.

    outcome: right | refused | refused late (the reason is found by asking the weights) | not built | not merged (right,
    but the certificate is refused) | wrong | crash; notes: what whet said of it.
    """

    name: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return self.outcome in ("right", "not merged", "refused", "refused late", "not built")


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
        return Verdict(entry.name, "right", notes=tried(entry, place, whole))
    except UserError as error:
        return refusal(entry, place, error)
    except NotMerged as error:
        return Verdict(entry.name, "not merged", str(error))
    except Wrong as error:
        return Verdict(entry.name, "wrong", str(error))
    except Exception as error:  # noqa: BLE001 - what fails is the verdict
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
    for file in (place / "model").glob("*.safetensors"):
        file.unlink()
    shutil.rmtree(place / "run", ignore_errors=True)
    try:
        train(entry, place)
    except UserError as again:
        if again.problem == error.problem:
            return Verdict(entry.name, "refused", f"{error.problem} ({error.found})" if error.found else error.problem)
    if any(problem in error.problem for problem in NEED_WEIGHTS):
        return Verdict(entry.name, "refused late", f"{error.problem} ({error.found})")
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
    place.mkdir(parents=True)
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


def settings(entry: Entry, place: Path) -> dict[str, Any]:
    """Of the run: two steps over all rows at once, so that the first loss is that of every row."""
    rows = [task_nets.rows(entry.task, len(WORDS))[index] for index in range(len(WORDS))]
    for index, (row, words) in enumerate(zip(rows, WORDS, strict=True)):
        row["prompt" if "prompt" in row else "text"] = task_nets.text(index, words)
        if entry.task == "causal":
            row.update(prompt=task_nets.text(index, words // 2 + 1), completion=task_nets.text(index + 3, words))
    data = task_nets.write(place / "rows.jsonl", rows)
    changes = {"model.chat_template": "alpaca"} if entry.task == "causal" else {}
    return {
        "model.path": str(place / "model"), "model.tokenizer": str(place / "tokenizer"), "model.task": entry.task,
        "data.dataset": str(data), "data.eval_dataset": str(place / "held.jsonl"),
        "output_dir": str(place / "run"), "base.device": "cpu", "base.storage": "fp32", "base.compute": "fp32",
        "method.r": 4, "train.max_steps": 2, "train.per_device_train_batch_size": len(rows),
        "train.learning_rate": 0.01, "eval.max_new_tokens": NEW_TOKENS, "train.load_best_model_at_end": False,
        **changes,
    }  # fmt: skip


def train(entry: Entry, place: Path) -> Any:
    """The trained run."""
    from whet.recipe import parse
    from whet.training.run import train as run_training

    values = settings(entry, place)
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


def tried(entry: Entry, place: Path, whole: bool) -> list[str]:
    """Everything that is asked of a family; what whet said. Raises Wrong, UserError, or what failed."""
    from whet import runs
    from whet.evaluation.run import evaluate
    from whet.ship.merge import merge

    run = train(entry, place)
    if not whole:
        raise Wrong("too large to be tried, and not refused")
    lines = run.lines("metrics.jsonl")
    prepared = runs.prepared(run.recipe)
    plain = plain_model(entry, place / "model")
    first = next(line["loss"] for line in lines if line["kind"] == "train")
    check_loss("the first loss", first, loss_of(entry, plain, prepared.train), NEAR)
    evaluate(run, max_rows=2)
    check_answers(entry, run, prepared, plain)
    try:
        certificate = merge(run, place / "out")
    except UserError as error:  # after everything else was right
        raise NotMerged(f"{error.problem} ({error.found})") from error
    last = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    near = NEAR_ROUNDED if certificate["chosen"].endswith("bf16") else NEAR
    check_loss(
        "the held-out loss of the merged model",
        last,
        loss_of(entry, plain_model(entry, place / "out"), prepared.evaluation),
        near,
    )
    return []


def plain_model(entry: Entry, place: Path) -> Any:
    """The model in plain transformers, with the attention that its family is written in."""
    import transformers

    owner = getattr(transformers, OWNERS[entry.task])
    return owner.from_pretrained(str(place), dtype=torch.float32, attn_implementation="eager").eval()


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
    return plain(input_ids=tokens[None], use_cache=False).logits[0, :-1][chosen], tokens[1:][chosen]


def label_logits(plain: Any, rows: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.from_numpy(rows.ids[rows.span(index)].astype(np.int64))
    return plain(input_ids=tokens[None]).logits, torch.tensor([int(rows.labels[index])])


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


def check_loss(what: str, ours: float, exact: float, near: float) -> None:
    if not abs(ours - exact) <= near * abs(exact):
        raise Wrong(f"{what} is {ours:.6g}, and {exact:.6g} in plain transformers")


def check_answers(entry: Entry, run: Any, prepared: Any, plain: Any) -> None:
    """Answers in a batch are those alone, and the base's are plain transformers' own."""
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
            if not np.allclose(together, alone, atol=1e-3 * max(1.0, float(np.abs(alone).max()))):
                raise Wrong(f"labels in a batch are not those alone: logits {np.abs(together - alone).max():.2g} apart")
            return
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


@torch.inference_mode()
def greedy(plain: Any, prompt: list[int]) -> list[int]:
    """The likeliest tokens, with no cache."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
