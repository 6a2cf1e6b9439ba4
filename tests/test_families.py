"""A few of the most different text families through whet, as `make families` judges all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from families.configs import entries
from families.judge import Verdict, judged

# family and task: what becomes of it, and a word of the reason where there is one
SAMPLE = {
    "phimoe:causal": ("right", ""),  # its window stands in the mask alone
    "llama4_text:causal": ("right", ""),  # so do its chunks, and its router is a subclass of nn.Linear
    "gemma4_text:causal": ("right", ""),  # heads of two sizes
    "gpt_oss:causal": ("right", ""),  # sinks, and no attention of torch's
    "falcon_mamba:causal": ("right", ""),  # PEFT refuses its out_proj
    "roberta:causal": ("right", ""),  # positions that begin behind the padding token's number
    "fnet:classification": ("right", ""),  # no attention, and so no mask
    "bart:seq2seq": ("right", ""),
    "xmod:causal": ("refused", "language"),
    "canine:classification": ("refused", "no table of token embeddings"),
    "xlnet:causal": ("refused late", "sees the tokens"),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_is_right_or_refused(name: str, tmp_path: Path) -> None:
    outcome, word = SAMPLE[name]
    verdict = judged(next(entry for entry in entries() if entry.name == name), tmp_path / "family")
    assert (verdict.outcome, verdict.holds) == (outcome, True), verdict.reason
    assert word in verdict.reason


def test_the_families_are_transformers_own() -> None:
    names = [entry.name for entry in entries()]
    assert len(names) == len(set(names)) > 300


@pytest.mark.parametrize("outcome", ["wrong", "crash", "anything else"])
def test_what_is_neither_right_nor_refused_does_not_hold(outcome: str) -> None:
    assert not Verdict("llama:causal", outcome).holds
