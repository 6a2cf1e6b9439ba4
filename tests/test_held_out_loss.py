"""The held-out loss is the model's own: without dropout, over all held-out tokens alike, and it leaves training alone.

The judge is plain transformers with PEFT's adapter, as the run wrote it, on the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tasks
import tiny
import torch
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook

import whet
from whet import runs
from whet.runs import Run

DROPOUT = 0.3
TASKS = {"causal": "GPT2", "classification": "Bert", "seq2seq": "T5"}
STILL: dict[str, Any] = {"train.learning_rate": 1e-12, "train.load_best_model_at_end": False}


def config(kind: str) -> Any:
    """A model of two layers with dropout wherever the family has some."""
    import transformers

    usual = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "eos_token_id": 2}
    if kind == "GPT2":
        return transformers.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, n_positions=1024, bos_token_id=2, attn_pdrop=DROPOUT, embd_pdrop=DROPOUT,
            resid_pdrop=DROPOUT, **usual,
        )  # fmt: skip
    if kind == "T5":
        return transformers.T5Config(
            d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=DROPOUT,
            **usual,
        )  # fmt: skip
    return transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_position_embeddings=256,
        hidden_dropout_prob=DROPOUT, attention_probs_dropout_prob=DROPOUT, initializer_range=0.2, **usual,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers

    owners = {"GPT2": "AutoModelForCausalLM", "T5": "AutoModelForSeq2SeqLM", "Bert": "AutoModelForPreTraining"}
    found = {}
    for task, kind in TASKS.items():
        place = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        getattr(transformers, owners[kind]).from_config(config(kind)).save_pretrained(str(place))
        found[task] = tiny.copy_tokenizer(place, files=3)
    return found


def trained(task: str, models: dict[str, Path], place: Path, **changes: Any) -> Run:
    place.mkdir(exist_ok=True)
    records = tiny.rows() if task == "causal" else tasks.rows(task, 24)
    data = tiny.write_rows(place / "rows.jsonl", records)
    more = {
        "method.lora_dropout": DROPOUT, "data.val_size": 5, "train.max_steps": 2, "train.eval_steps": 1,
        "train.per_device_train_batch_size": 4,
    }  # fmt: skip
    return whet.train(None, **(tiny.settings(models[task], data, place / "run") | more | STILL | changes))


@torch.inference_mode()
def plain_loss(run: Run, task: str) -> float:
    """Sum of the losses of all held-out tokens (or rows) through their number, one row at a time."""
    import peft
    import transformers

    names = {"causal": "CausalLM", "classification": "SequenceClassification", "seq2seq": "Seq2SeqLM"}
    options = {"num_labels": len(tasks.NAMES)} if task == "classification" else {}
    owner = getattr(transformers, f"AutoModelFor{names[task]}")
    base = owner.from_pretrained(run.recipe.model.path, dtype=torch.float32, **options)
    model = peft.PeftModel.from_pretrained(base, str(run.adapter)).eval()
    held = runs.prepared(run.recipe).evaluation
    total, count = 0.0, 0
    for index in range(len(held)):
        ids, learned, *_ = held.row(index)
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        if task == "causal":
            chosen = torch.from_numpy(np.flatnonzero(learned[1:]))
            logits, targets = model(input_ids=tokens).logits[0, :-1][chosen], tokens[0, 1:][chosen]
        elif task == "classification":
            assert held.labels is not None
            logits, targets = model(input_ids=tokens).logits, torch.tensor([int(held.labels[index])])
        else:
            assert held.answers is not None
            targets = torch.from_numpy(np.asarray(held.answers.ids[held.answers.span(index)], np.int64))
            shifted = torch.cat([torch.zeros(1, dtype=torch.int64), targets[:-1]])[None]
            logits = model(input_ids=tokens, decoder_input_ids=shifted).logits[0]
        total += float(cross_entropy(logits.double(), targets, reduction="sum"))
        count += len(targets)
    return total / count


def looks(run: Run) -> list[float]:
    return [line["eval_loss"] for line in run.lines("metrics.jsonl") if line["kind"] == "eval"]


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.lines("metrics.jsonl") if line["kind"] == "train"]


def held_out_loss_holds(task: str, models: dict[str, Path], place: Path) -> None:
    """Measured twice on weights that stand still, it is twice the plain loss."""
    run = trained(task, models, place)
    assert looks(run) == pytest.approx([plain_loss(run, task)] * 2, rel=1e-5)


@pytest.fixture
def after_a_step() -> Iterator[list[int]]:
    """Not empty once an optimiser has made a step."""
    steps: list[int] = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    yield steps
    hook.remove()


@pytest.mark.parametrize("task", TASKS)
def test_the_held_out_loss_is_that_of_plain_transformers_without_dropout(
    task: str, models: dict[str, Path], tmp_path: Path
) -> None:
    held_out_loss_holds(task, models, tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_dropout_that_is_left_on_is_seen(
    task: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_a_step: list[int]
) -> None:
    """The planted fault: once the run has begun, nothing puts the model into evaluation mode."""
    right = torch.nn.Module.eval
    monkeypatch.setattr(torch.nn.Module, "eval", lambda self: self if after_a_step else right(self))
    with pytest.raises(AssertionError):
        held_out_loss_holds(task, models, tmp_path)


def looking_changes_nothing(task: str, models: dict[str, Path], place: Path) -> None:
    """The losses of a run that looks after every step are those of one that looks once, dropout and all."""
    often = trained(task, models, place / "often", **{"train.max_steps": 3})
    once = trained(task, models, place / "once", **{"train.max_steps": 3, "train.eval_steps": 3})
    assert (len(looks(often)), len(looks(once))) == (3, 1)
    assert losses(often) == losses(once)


@pytest.mark.parametrize("task", TASKS)
def test_a_look_at_the_held_out_rows_leaves_training_as_it_was(
    task: str, models: dict[str, Path], tmp_path: Path
) -> None:
    looking_changes_nothing(task, models, tmp_path)


def test_a_model_that_stays_in_evaluation_mode_is_seen(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_a_step: list[int]
) -> None:
    """The planted fault: after the first look, training goes on without dropout."""
    once = trained("causal", models, tmp_path / "once", **{"train.max_steps": 3, "train.eval_steps": 3})
    after_a_step.clear()
    right = torch.nn.Module.train

    def train(self: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
        return right(self, mode and not after_a_step)

    monkeypatch.setattr(torch.nn.Module, "train", train)
    often = trained("causal", models, tmp_path / "often", **{"train.max_steps": 3})
    assert losses(often)[0] == losses(once)[0]
    assert losses(often)[1:] != losses(once)[1:]
