"""A few of the most different text families through whet, as `make families` judges all of them, and the judge itself:
faults planted in whet must turn a family red."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families.configs import entries
from families.judge import Verdict, judged

# family and task: what becomes of it, and a word of the reason where there is one
SAMPLE = {
    "phimoe:causal": ("right", ""),  # its window stands in the mask alone
    "llama4_text:causal": ("right", ""),  # so do its chunks, and its router is a subclass of nn.Linear
    "gemma4_text:causal": ("right", ""),  # heads of two sizes
    "gpt_oss:causal": ("right", ""),  # sinks, and no attention of torch's
    "xlstm:causal": ("right", ""),  # a cap of its logits, by a name of its own
    "falcon_mamba:causal": ("right", ""),  # PEFT refuses its out_proj
    "zamba2:causal": ("right", ""),  # runs one block again in other places
    "moshi:causal": ("right", ""),  # makes no causal mask where it is given none
    "roberta:causal": ("right", ""),  # positions that begin behind the padding token's number
    "fnet:classification": ("right", ""),  # no attention, and so no mask
    "modernvbert:classification": ("right", ""),  # another part of it has a module of its head's name
    "umt5:classification": ("right", ""),  # torch's attention loses its positions
    "bart:seq2seq": ("right", ""),
    "t5gemma:seq2seq": ("right", ""),  # its head is tied to the decoder's table, not to the first
    "prophetnet:seq2seq": ("right", ""),  # refused for several rows in a batch, and right with one
    "xmod:causal": ("refused", "language"),
    "canine:classification": ("refused", "no table of token embeddings"),
    "xlnet:causal": ("refused", "sees the tokens"),
    "cpmant:causal": ("refused", "sees the tokens"),
    "reformer:classification": ("refused", "multiple"),
}


def verdict_on(name: str, place: Path) -> Verdict:
    return judged(next(entry for entry in entries() if entry.name == name), place / "family")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_is_right_or_refused(name: str, tmp_path: Path) -> None:
    outcome, word = SAMPLE[name]
    verdict = verdict_on(name, tmp_path)
    assert (verdict.outcome, verdict.holds) == (outcome, True), verdict.reason
    assert word in verdict.reason


def test_the_families_are_transformers_own() -> None:
    names = [entry.name for entry in entries()]
    assert len(names) == len(set(names)) > 300


@pytest.mark.parametrize("outcome", ["wrong", "crash", "not merged", "anything else"])
def test_what_is_neither_right_nor_refused_does_not_hold(outcome: str) -> None:
    assert not Verdict("llama:causal", outcome).holds


def losses_are_one_percent_off(patch: pytest.MonkeyPatch) -> None:
    from whet.training.objective.text import TextObjective

    right = TextObjective.losses
    patch.setattr(TextObjective, "losses", lambda *given: 1.01 * right(*given))


def padding_is_read(patch: pytest.MonkeyPatch) -> None:
    from whet.engine.answer import logits

    right = logits.filled_up
    patch.setattr(logits, "filled_up", lambda rows, value=0: right(rows, 1))


def the_base_is_asked_with_its_adapter(patch: pytest.MonkeyPatch) -> None:
    import contextlib

    from whet.methods.method import PeftMethod

    patch.setattr(PeftMethod, "base_only", lambda *given: contextlib.nullcontext())


def the_update_is_subtracted(patch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import Linear

    right = Linear.get_delta_weight
    patch.setattr(Linear, "get_delta_weight", lambda *given: -right(*given))


def any_merge_is_near(patch: pytest.MonkeyPatch) -> None:
    from whet.ship.agreement import Agreement

    the_update_is_subtracted(patch)
    patch.setattr(Agreement, "near", True)


# what is planted: family, what must become of it, and a word of the reason
FAULTS: dict[Any, tuple[str, str, str]] = {
    losses_are_one_percent_off: ("llama:causal", "wrong", "the first loss"),
    padding_is_read: ("bert:classification", "wrong", "labels in a batch are not those alone"),
    the_base_is_asked_with_its_adapter: ("llama:causal", "wrong", "the base answers"),
    the_update_is_subtracted: ("llama:causal", "not merged", "near enough"),
    any_merge_is_near: ("llama:causal", "wrong", "held-out loss of the merged model"),
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_turns_a_family_red(plant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, outcome, word = FAULTS[plant]
    plant(monkeypatch)
    verdict = verdict_on(family, tmp_path)
    assert (verdict.outcome, verdict.holds) == (outcome, False), verdict.reason
    assert word in verdict.reason
