"""The end of a run: the best weights, the files for others, and as the last thing the mark that it is finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whet.base.console import bytes_text, say
from whet.base.files import read_json, whole_directory, write_json
from whet.data.template.goldens import FILE as CONTRACT
from whet.data.template.goldens import write_contract
from whet.engine.load.identity import seal, seal_digest
from whet.engine.memory.used import peak_bytes
from whet.engine.weights.linear import count_parameters
from whet.runs import IDENTITY, LABELS, Run
from whet.training.apply import Arranged
from whet.training.card import write_card
from whet.training.resume import Checkpoints
from whet.training.saved import check_saved
from whet.training.setup import Ready
from whet.training.state import State
from whet.training.trend import still_falling

WORTH_SAYING_BYTES = 100 << 20


def finish(ready: Ready, arranged: Arranged, checkpoints: Checkpoints, state: State, reason: str) -> None:
    """Keep the best weights if wanted, write them, and mark the run finished. reason: why training ended."""
    run, kept = ready.run, state.step
    if ready.recipe.train.load_best_model_at_end and state.best_step is not None:
        kept = _load_best(run, checkpoints, state)
    checkpoints.optimiser.hand_back()
    method = ready.recipe.method
    method.finalize(arranged.model)  # after the best weights are back: they may be from before it would be decided
    tokenizer, task = ready.prepared.row_tokenizer, ready.plan.task
    with whole_directory(run.trained, replace=True) as directory:
        method.save(arranged.model, directory)  # type: ignore[arg-type]
        if arranged.named_attention:
            _name_attention(directory, arranged.named_attention)
        tokenizer.tokenizer.save_pretrained(str(directory))
        if task.name != "causal":
            write_json(directory / LABELS, {"task": task.name, "labels": list(task.labels)})
        if tokenizer.template is not None:
            write_contract(tokenizer, directory / CONTRACT)
        if not method.can.whole_model:
            write_card(directory, ready.recipe, task, arranged.network, _facts(ready, state, kept))
        seal(directory, run.read(IDENTITY))
        check_saved(ready, arranged.model, directory)
    summary = _summary(arranged, state, reason, kept) | {"trained_sha256": seal_digest(run.trained)}
    finding = still_falling(run.lines("metrics.jsonl")) if reason == "completed" else None
    run.write("finished.json", summary | {"findings": [] if finding is None else [finding]})
    if finding is not None:
        say(finding, style="yellow")
    epochs = state.step / ready.batches.steps_per_epoch
    say(f"trained {state.step} steps ({epochs:.3g} epochs), {state.tokens:,} tokens in {state.seconds:.1f} s "
        f"({state.tokens_per_second:,.0f} tok/s){_best(state, kept)} -> {run.trained}")  # fmt: skip
    left = sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
    if left >= WORTH_SAYING_BYTES:
        say(f"{run.checkpoints} holds {bytes_text(left)}, which only more steps would need", style="dim")


def _name_attention(directory: Path, name: str) -> None:
    """Let the config of a whole model ask for an attention, which every later reader then gets."""
    say("the saved config asks for the attention that the family is written in: with the one that transformers would "
        "choose, its logits are others", style="yellow")  # fmt: skip
    write_json(directory / "config.json", read_json(directory / "config.json") | {"attn_implementation": name})


def _best(state: State, kept: int) -> str:
    """Which step is kept, in words, where held-out rows were measured."""
    if state.best_step is None or state.best_loss is None:
        return ""
    return f"; lowest held-out loss {state.best_loss:.4f} at step {state.best_step}, kept: step {kept}"


def _load_best(run: Run, checkpoints: Checkpoints, state: State) -> int:
    """Load the weights of the lowest held-out loss whose checkpoint is whole; returns their step.

    Where the best one is damaged, the later ones count, as metrics.jsonl has them, and the last step, which is loaded.
    """
    losses = {line["step"]: line["eval_loss"] for line in run.lines("metrics.jsonl") if line.get("kind") == "eval"}
    later = sorted((loss, step) for step, loss in losses.items() if step > (state.best_step or 0))
    for loss, step in [(state.best_loss, state.best_step), *later]:
        if step == state.step:
            return step
        problem = checkpoints.damage(step)
        if problem is None:
            checkpoints.load_weights(step)
            say(f"keeping step {step}, the lowest held-out loss ({loss:.4f})")
            return step
        if step == state.best_step:
            say(f"step {step}, the lowest held-out loss, is not used: {problem}", style="yellow")
    return state.step


def _facts(ready: Ready, state: State, kept: int) -> dict[str, Any]:
    """What the card says of the training."""
    ledger = ready.prepared.ledger
    facts: dict[str, Any] = {"rows learned": ledger.rows_train, "rows held out": ledger.rows_eval, "steps": kept}
    if state.best_loss is not None:
        facts["lowest held-out loss"] = state.best_loss
    train = ready.recipe.train
    return facts | {"learning rate": train.learning_rate, "seed": train.seed}


def _summary(arranged: Arranged, state: State, reason: str, kept_step: int) -> dict[str, Any]:
    trainable, total = count_parameters(arranged.model)
    return {
        "steps": state.step,
        "kept_step": kept_step,
        "best_step": state.best_step,
        "best_eval_loss": state.best_loss,
        "stopped": reason,
        "seconds": round(state.seconds, 3),
        "tokens": state.tokens,
        "supervised_tokens": state.targets,
        "tokens_per_second": round(state.tokens_per_second, 1),
        "trainable_params": trainable,
        "all_params": total,
        "peak_memory_bytes": peak_bytes(arranged.device),
    }
