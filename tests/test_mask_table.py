"""The table of masks: template × tokenizer × hard conversation, each exact or refused for a stated reason.

For most tokenizers a sample of the cases runs; WHET_MASK_TABLE=all runs all (about a minute on one core).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from chats import CASES, TOOL_CASES
from mask_table import FAMILIES, SHARED, TOKENIZERS, Found, Table, all_cases, made, refused, rendered

from whet.base.errors import UserError
from whet.data.example import Example

EVERYTHING = os.environ.get("WHET_MASK_TABLE") == "all"
PAIRS = [(name, template) for name in TOKENIZERS for template in FAMILIES]
COUNTED: Counter[str] = Counter()


@cache
def table(name: str, template: str) -> Table:
    return Table(name, template)


def available(name: str, template: str) -> bool:
    own = template.startswith("named/") or template == "thinker"
    return SHARED.is_dir() or (name == "tiny" and own)


def sampled(name: str, template: str) -> dict[str, Example]:
    """All cases for the built-in tokenizer and Qwen's own pairs; else every fourth, another fourth for each pair."""
    cases = all_cases()
    if EVERYTHING or name == "tiny" or (name, template) in (("qwen", "qwen3"), ("qwen", "qwen2_5")):
        return cases
    first = PAIRS.index((name, template)) % 4
    return {case: cases[case] for case in list(cases)[first::4]}


@pytest.mark.parametrize(("name", "template"), PAIRS, ids=lambda part: part.replace("/", "_"))
def test_every_mask_is_exact_or_refused_for_a_reason(name: str, template: str) -> None:
    if not available(name, template):
        pytest.skip("shared/data with the real tokenizers and templates is not beside this checkout")
    found, wrong, reasons = table(name, template), {}, Counter()
    cases = sampled(name, template)
    for case, example in cases.items():
        reason = refused(found.family, example)
        if reason is not None:
            with pytest.raises(UserError) as caught:
                made(found.row_tokenizer, example)
            assert caught.value.fix
            reasons[reason] += 1
            continue
        problems = found.problems(example, made(found.row_tokenizer, example))
        if problems:
            wrong[case] = problems
    assert wrong == {}
    COUNTED.update({"exact": len(cases) - reasons.total(), **reasons})
    print(f"\n{name} × {template}: {len(cases) - reasons.total()}/{len(cases)} exact, refused: {dict(reasons)}")


def test_the_fast_way_and_the_traced_way_agree() -> None:
    """Plain rows are followed along the template's own words; tracing every character must say the same."""
    agreed = 0
    for name, template in PAIRS:
        if not available(name, template) or name not in ("tiny", "qwen"):
            continue
        inner: Any = table(name, template).row_tokenizer.template
        for messages in CASES.values():
            if inner._skeletons(tuple(m.role for m in messages)) is None:
                continue
            assert inner.render([messages])[0] == inner._exact(messages, None)
            agreed += 1
    assert agreed > 100


def test_the_text_is_that_of_transformers() -> None:
    """A server renders with transformers; a row must be the same text, or training and serving differ."""
    for name, template in PAIRS:
        if not available(name, template) or name not in ("tiny", "phi-3-mini"):
            continue
        found = table(name, template)
        for example in all_cases().values():
            if refused(found.family, example) is None:
                assert found.row_tokenizer.template is not None
                assert found.row_tokenizer.template.render([example])[0].text == rendered(
                    found.tok, found.template, example
                )


# Planted faults: what other trainers do, or have done, to these rows.


def shifted(by: int) -> Callable[[Table, Example, Found], Found]:
    return lambda found, example, row: marked(row, np.roll(row.tokens.learned, by))


def marked(row: Found, learned: np.ndarray) -> Found:
    return replace(row, tokens=replace(row.tokens, learned=learned))


def end_not_learned(found: Table, example: Example, row: Found) -> Found:
    learned = row.tokens.learned.copy()
    learned[np.flatnonzero(learned & ~np.r_[learned[1:], False])] = False
    return marked(row, learned)


def header_learned(found: Table, example: Example, row: Found) -> Found:
    learned = row.tokens.learned.copy()
    learned[np.flatnonzero(learned & ~np.r_[False, learned[:-1]]) - 1] = True
    return marked(row, learned)


def searched(found: Table, example: Example, row: Found) -> Found:
    """The answers found by looking for their words from the front."""
    ids, learned = row.tokens.ids.tolist(), np.zeros(len(row.tokens.ids), bool)
    end = ids[np.flatnonzero(row.tokens.learned)[-1]]
    for message in example.messages or ():
        if message.role == "assistant":
            wanted = found.tok.backend_tokenizer.encode(message.content, add_special_tokens=False).ids
            at = next((n for n in range(len(ids)) if wanted and ids[n : n + len(wanted)] == wanted), None)
            if at is not None:
                learned[at : at + len(wanted) + (ids[at + len(wanted)] == end)] = True
    return marked(row, learned)


def markers_parsed(found: Table, example: Example, row: Found) -> Found:
    """The rendered text tokenised as it is, so that a content can write a special token."""
    ids = np.array(found.encode(rendered(found.tok, found.template, example)), np.int32)
    learned = np.r_[row.tokens.learned, np.zeros(len(ids), bool)][: len(ids)]
    return replace(row, tokens=replace(row.tokens, ids=ids, learned=learned))


def thinking_kept(found: Table, example: Example, row: Found) -> Found:
    """Earlier thinking learned although the template drops it: written into the content."""
    messages = tuple(
        replace(m, content=f"<think>{m.reasoning}</think>{m.content}", reasoning=None) if m.reasoning else m
        for m in example.messages or ()
    )
    return made(found.row_tokenizer, replace(example, messages=messages))


def results_learned(found: Table, example: Example, row: Found) -> Found:
    """All turns learned but the user's."""
    messages = tuple(replace(m, role="assistant") if m.role == "tool" else m for m in example.messages or ())
    return made(found.row_tokenizer, replace(example, messages=messages))


FAULTS: dict[str, tuple[Callable[[Table, Example, Found], Found], tuple[str, ...], str]] = {
    "one_token_later": (shifted(1), ("plain", "korean", "six_turns"), "named/chatml"),
    "one_token_earlier": (shifted(-1), ("plain", "korean", "six_turns"), "named/llama-3"),
    "end_not_learned": (end_not_learned, ("plain", "six_turns", "digits"), "named/gemma"),
    "header_learned": (header_learned, ("plain", "five_turns"), "named/phi-3"),
    "searched_for": (searched, ("answers_repeat", "answer_is_the_question", "six_turns"), "named/chatml"),
    "markers_parsed": (markers_parsed, ("only_a_marker", "marker_in_question", "other_special"), "named/chatml"),
    "earlier_thinking": (thinking_kept, ("thinks_twice", "thought_earlier"), "thinker"),
    "all_but_the_user": (results_learned, ("call_and_answer",), "qwen3"),
    "wrong_prompt": (lambda found, example, row: replace(row, prompt=row.prompt[:-1]), ("plain",), "named/alpaca"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_turns_the_table_red(fault: str) -> None:
    plant, cases, template = FAULTS[fault]
    name = "tiny" if available("tiny", template) and template != "qwen3" else "qwen"
    if not available(name, template):
        pytest.skip("shared/data with the real tokenizers and templates is not beside this checkout")
    found = table(name, template)
    for case in cases:
        example = all_cases()[case]
        row = made(found.row_tokenizer, example)
        assert found.problems(example, row) == []
        try:
            broken = plant(found, example, row)
        except UserError:
            continue  # noticed even before the table
        assert found.problems(example, broken), case


def test_the_table_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs last: N of N, and few refusals."""
    if not COUNTED:
        pytest.skip("the table did not run in this process")
    refusals = {reason: count for reason, count in COUNTED.items() if reason != "exact"}
    with capsys.disabled():
        print(f"\nmask table: {COUNTED['exact']}/{COUNTED['exact']} exact, refused: {refusals}")
    assert len(TOOL_CASES) + len(CASES) >= 60
    assert set(refusals) <= {"no tool calls", "several calls in a turn", "no system messages"}
