"""Rows whose template is not run, and whose words are not tokenised again: the same to the token as any other row.

The other way is whet's own for rows that nothing is known of: the template run, every character traced, the text
tokenised as a whole. Rows that may not be known take it by themselves; each rule that keeps them apart is left out
once, and the comparison has to notice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from chats import CASES, TOOL_CASES, chat
from mask_table import FAMILIES, SHARED, Table

from whet.base.errors import UserError
from whet.data.batch.lay import Layer, Laying
from whet.data.example import Example, Message, plain_turns, to_json
from whet.data.template import between, plan, watched
from whet.data.template.template import Template
from whet.data.template.tokenise import Tokeniser, Tokens, _marked, marked

CONTENTS = (
    "hi", "정말 재미있다", "별로.", "so-so 👍", "a  b", "a\n\nb", "x.\n\ny", "a\r\nb", "1234", "1", "!", "...", "'s",
    "/x", "\u0301a", "\u1161\u11a8", "e\u0301", "\u200bq", "\ufeffb", "\u180ec", "a\u00a0b", "\u00a0a", "a\u0085",
    "\x1ca", "a\u2003", " a", "a ", "\na", "a\n", "a<b", "<", "<|im_", "end|>", "<|im_end|>", "</s>", "<think>",
    "</think>", "x</think>y", "<think>\nw\n</think>\n\nz", "<tool_response>\nz\n</tool_response>", "<tool_response>z",
    "user", "user\nx", "<|channel|>final<|message|>x", "### Response:\nx", "[INST] x [/INST]", "한", "가나é",
    "👩‍👩‍👧", "नमस्ते", "\u0323\u0301x",
)  # fmt: skip
PAIRS = [
    (name, template) for name in ("tiny", "qwen", "gpt2", "mistral-7b-v0.2")
    for template in FAMILIES if SHARED.is_dir() or (name == "tiny" and (template == "thinker" or "/" in template))
]  # fmt: skip


def hard_rows() -> Iterator[list[Message]]:
    count = len(CONTENTS)
    for at, content in enumerate(CONTENTS):
        for step in (0, 7, 20):
            yield chat("u:" + content, "a:" + CONTENTS[(at + step) % count])
        others = [CONTENTS[(at + step) % count] for step in (3, 11, 29)]
        yield chat("u:" + others[0], "a:" + content, "u:" + others[1], "a:" + others[2])
    yield from CASES.values()
    for content in CONTENTS[:8]:
        yield chat("s:Be terse.", "u:" + content, "a:yes")


def same(one: Tokens, other: Tokens) -> bool:
    weights = [np.zeros(0) if row.weights is None else row.weights for row in (one, other)]
    return (
        np.array_equal(one.ids, other.ids) and np.array_equal(one.learned, other.learned)
        and (one.prompts, one.closed, one.dropped) == (other.prompts, other.closed, other.dropped)
        and np.array_equal(weights[0], weights[1])
    )  # fmt: skip


class Compared:
    """One tokenizer with one template, both ways. known: rows that were known; different: those that were wrong."""

    def __init__(self, tokeniser: Tokeniser, rows: Iterator[list[Message]]) -> None:
        self.known, self.different = 0, list[str]()
        for row in rows:
            try:
                text = self.whole(tokeniser, row)
            except UserError:
                continue
            roles, contents = tuple(m.role for m in row), [m.content for m in row]
            if not all(contents):
                continue
            for _ in range(3):  # recorded at the second sight
                tokeniser.known([(roles, contents)])
                if text[0] != inner(tokeniser).render([row])[0]:
                    self.different.append(f"text of {contents}")
            self.known += self.compare(tokeniser, row, text[1])

    def whole(self, tokeniser: Tokeniser, row: list[Message]) -> tuple[Any, Any]:
        found = inner(tokeniser)._exact(row, None)
        return found, tokeniser._placed(found, tokeniser.backend.encode(found.text, add_special_tokens=False))

    def compare(self, tokeniser: Tokeniser, row: list[Message], placed: Any) -> int:
        (known,) = tokeniser.known([(tuple(m.role for m in row), [m.content for m in row])])
        if known is not None and known.placed() != placed:
            self.different.append(f"tokens of {[m.content for m in row]}")
        return known is not None


def inner(tokeniser: Tokeniser) -> Template:
    assert tokeniser.template is not None
    return tokeniser.template


def table(name: str, template: str) -> Tokeniser:
    """Anew: what was recorded under a planted fault must not stay."""
    return Table(name, template).tokeniser


@pytest.mark.parametrize(("name", "template"), PAIRS, ids=lambda part: part.replace("/", "_"))
def test_a_known_row_is_the_row_that_the_template_makes(name: str, template: str) -> None:
    found = Compared(table(name, template), hard_rows())
    assert found.different == []
    # alpaca and mistral write no special token behind a question; GPT-2 has two line feeds otherwise before a letter.
    apart = template in ("named/alpaca", "named/mistral") or name == "mistral-7b-v0.2"
    apart = apart or (name == "gpt2" and "llama" in template)
    assert (found.known <= 20) == apart, found.known


def faults() -> dict[str, tuple[str, str, Any, Any, Any]]:
    return {
        "guards left out": ("qwen", "qwen3", plan, "_alike", lambda *_: True),
        "white space not looked at": ("tiny", "named/gemma", plan, "stands_alone", bool),
        "markers not looked at": ("tiny", "named/chatml", between.Cuts, "harmless", lambda *_: True),
        "cut anywhere": ("tiny", "named/alpaca", between.Cuts, "_cut_apart", lambda *_: True),
        "edges not kept": ("tiny", "named/chatml", between.Between, "placed", unedged),
    }


def unedged(self: between.Between, contents: Any) -> Any:
    found = PLACED(self, contents)
    return found._replace(turns=found.contents)


PLACED = between.Between.placed


@pytest.mark.parametrize("fault", faults())
def test_every_rule_is_needed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, template, owner, attribute, broken = faults()[fault]
    if (name, template) not in PAIRS:
        pytest.skip("shared/data with the real tokenizers and templates is not beside this checkout")
    monkeypatch.setattr(owner, attribute, broken)
    monkeypatch.setattr(between, "_PROBES", ("a",))
    assert Compared(table(name, template), hard_rows()).different


def test_a_pattern_that_is_not_known_is_not_cut() -> None:
    """The words of a template are joined to contents by other tokenizers: those are tokenised as a whole."""
    from tokenizers import pre_tokenizers

    tokeniser = table("tiny", "named/chatml")
    assert tokeniser._cuts._at_lines
    for split in (
        pre_tokenizers.Metaspace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    ):
        tokeniser.backend.pre_tokenizer, before = split, tokeniser.backend.pre_tokenizer
        assert between._cuts_at(tokeniser.backend) == (False, False)
        tokeniser.backend.pre_tokenizer = before
    assert between._cuts_at(tokeniser.backend) == (True, True)


# What a template may do with a content; in each the text of some contents differs by more than the content.
SNIPPETS = (
    "{{ m.content[:1] }}", "{{ m.content[0] }}", "{{ m.content|length }}", "{{ m.content|upper }}",
    "{{ m.content.lower() }}", "{{ 'yes' if m.content in 'xab' else 'no' }}",
    "{{ 'yes' if 'a' in m.content else 'no' }}", "{{ 'yes' if 'a' not in m.content else 'no' }}",
    "{{ m.content == 'a' }}", "{{ m.content != 'a' }}", "{{ 'a' == m.content }}", "{{ m.content > 'a' }}",
    "{{ m.content|lower == 'a' }}", "{{ m.content.split('x')|length }}", "{{ m.content in ['a', 'b'] }}",
    "{{ {'a': 1}[m.content] }}", "{{ {'a': 1}.get(m.content) }}", "{{ m.content|replace('a', 'z') }}",
    "{{ m.content.replace('a', 'z') }}", "{{ m.content is lower }}", "{{ m.content.isdigit() }}",
    "{% for c in m.content %}{{ c }},{% endfor %}", "{{ '%s|' % m.content }}", "{{ '%s|'|format(m.content) }}",
    "{{ m|tojson }}", "{{ m.content|tojson }}", "{{ (m.content ~ 'x') == 'ax' }}",
    "{% if loop.changed(m.content) %}new{% endif %}", "{{ messages|map(attribute='content')|join('+') }}",
    "{{ messages|selectattr('content', 'equalto', 'a')|list|length }}", "{{ m.content is string }}",
    "{{ m.content is iterable }}", "{{ m.content is mapping }}", "{{ m.content is sequence }}",
    "{{ m.content is number }}", "{{ m.content._parts is defined }}", "{{ m.content.record is defined }}",
    "{{ m.content|default('x') }}", "{{ not m.content }}", "{{ m.content or 'none' }}", "{{ m.content|trim('a') }}",
    "{{ m.content.strip('a') }}", "{{ m.content.lstrip() }}", "{{ m.content|int }}",
    "{{ m.content is in ['a', 'b'] }}", "{{ dict(a=m.content).a }}", "{{ m.content * 2 }}",
    "{{ [m.content]|string }}", "{{ messages[0].content == m.content }}", "{{ m.content.startswith(('a', 'b')) }}",
    "{{ m.content.endswith('a') }}", "{{ m.content.startswith('a', 1) }}", "{{ m.content|first }}",
    "{{ m.content|e }}", "{{ m.content|urlencode }}",
    "{% macro w(c) %}[{{ c }}{{ c == 'a' }}]{% endmacro %}{{ w(m.content) }}",
    "{{ (m.content + 'b').endswith('ab') }}", "{% set x %}{{ m.content }}{% endset %}{{ x == 'a' }}",
    "{% filter upper %}{{ m.content }}{% endfilter %}", "{{ [m.content, 'b']|sort|first }}",
    "{{ [m.content, 'a']|unique|list|length }}", "{{ messages|groupby('content')|length }}", "{{ m.content|count }}",
    "{{ m.content.find('a') }}", "{{ m.content|string == 'a' }}", "{{ m.content is eq 'a' }}",
    "{{ m.content is sameas m.content }}", "{{ ['a', 'b'].index('a') if m.content == 'a' else 7 }}",
    "{{ m.content|reverse }}", "{{ 'a'.startswith(m.content) }}", "{{ ','.join([m.content, 'q']) }}",
    "{{ m.content|wordcount }}", "{{ m.content|list|length }}", "{% if m.content %}some{% else %}none{% endif %}",
    "{{ m.content|last }}", "{{ [m.content]|map('upper')|first }}",
    "{{ [m.content]|select('equalto', 'a')|list|length }}", "{{ m == {'role': 'user', 'content': 'a'} }}",
    "{{ m.content.parts is defined }}", "{{ m.content.content is defined }}", "{{ m.items()|list|string }}",
    "{{ m.content is in 'xab' }}", "{{ m.content and 'a' in m.content }}", "{{ m.content|title }}",
)  # fmt: skip
SHORT = ("a", "b", "ab", "ax", "Ab", "1", "x a", "aa", "<a>", "b\na")


def different_texts(snippet: str) -> tuple[list[str], int]:
    """Rows that a template with this snippet writes otherwise when it is not run, and how many were not run."""
    tokenizer = Table("tiny", "named/chatml").tok
    start, end = "{% for m in messages %}<|im_start|>{{ m.role }}\n", "{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer.chat_template = start + snippet + end + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    template, different, repeated = Template(tokenizer), [], 0
    for first in SHORT:
        for second in SHORT:
            row = chat("u:" + first, "a:" + second)
            template.repeated(("user", "assistant"), [first, second])  # recorded at the second sight
            found = template.repeated(("user", "assistant"), [first, second])
            if found is not None:
                repeated += 1
                if plan.filled(found, [first, second]).text != template.text(row):
                    different.append(f"{first!r}, {second!r}")
    return different, repeated


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_whatever_a_template_asks_of_a_content_is_seen(snippet: str) -> None:
    try:
        assert different_texts(snippet)[0] == []
    except UserError:
        pytest.fail("the snippet is no template")


def test_most_that_is_asked_can_be_repeated() -> None:
    """Or the test above would say nothing."""
    for snippet in (
        "{{ '' if 'a' in m.content else '' }}", "{% if m.content == 'a' %}{% endif %}",
        "{% if m.content is string %}{% endif %}", "{% set x = m.content|trim %}",
    ):  # fmt: skip
        assert different_texts(snippet)[1] > 50


@pytest.mark.parametrize(("snippet", "owner", "attribute", "broken"), [
    ("{{ '!' if 'a' in m.content else '' }}", watched.Watched, "__contains__", lambda *_: False),
    ("{{ m.content[:1] ~ '' if m.content[:1] == 'a' else '' }}", watched.Watched, "__getitem__", lambda *_: "q"),
    ("{{ '!' if m.content == 'a' else '' }}", watched.Watched, "__eq__", lambda *_: False),
])  # fmt: skip
def test_an_answer_that_is_not_noted_shows(
    snippet: str, owner: Any, attribute: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, attribute, broken)
    assert different_texts(snippet)[0]


@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant", "completion", "all"])
@pytest.mark.parametrize(("policy", "limit"), [("drop", 4096), ("drop", 24), ("truncate", 24), ("truncate_prompt", 24)])
def test_a_chunk_is_the_same_with_rows_known_or_not(
    loss_on: str, policy: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marks, weights, owners, counts and drops, with rows of all kinds between each other."""
    rows = [Example("0" * 16, tuple(row), None, "f", at) for at, row in enumerate(hard_rows())]
    rows = [row for row in rows if all(m.content for m in row.messages or ())]
    weighed = (
        Message("user", "q"),
        Message("assistant", "a", weight=0.5),
        Message("user", "q"),
        Message("assistant", "b"),
    )
    rows[5:5] = [
        Example("0" * 16, weighed, None, "f", 0),
        *(r for r in TOOL_CASES.values() if "reasoning" not in to_json(r)),
    ]
    rows += [Example("0" * 16, tuple(chat("u:x", "a:y", "u:z", "a:w")), None, "f", 1, completion_from=3)]
    lines = [to_json(row) for row in rows]
    tokenizer = Table("tiny", "named/chatml").tok
    fast = Layer(tokenizer, Laying(True, loss_on, policy, limit))
    before = sum(found is not None for found in fast.tokeniser.known([plain_turns(json.loads(line)) for line in lines]))
    assert before > 80
    found = fast.lay(lines)
    monkeypatch.setattr(between.Cuts, "possible", property(lambda _: False, lambda *_: None), raising=False)
    monkeypatch.setattr(plan.Repeats, "plan", lambda *_: None)
    slow = Layer(tokenizer, Laying(True, loss_on, policy, limit)).lay(lines)
    assert found.problem is None
    for name in ("ids", "learned", "sizes", "owners", "weights"):
        one, other = getattr(found, name), getattr(slow, name)
        assert (one is None) == (other is None), name
        assert one is None or (np.array_equal(one, other) and one.dtype == other.dtype), name
    for name in ("open_turns", "over_length", "lost", "without_target", "longest", "drops", "not_rendered"):
        assert getattr(found, name) == getattr(slow, name), name


def test_the_marks_of_a_known_row_are_those_of_any_other() -> None:
    tokeniser = table("tiny", "named/chatml")
    row = chat("u:q", "a:b", "u:c", "a:d")
    for loss_on in ("assistant", "last_assistant", "all"):
        known = tokeniser.known([(tuple(m.role for m in row), [m.content for m in row])] * 3)[-1]
        assert known is not None
        rendered = inner(tokeniser)._exact(row, None)
        placed = tokeniser._placed(rendered, tokeniser.backend.encode(rendered.text, add_special_tokens=False))
        assert same(marked(known, row, loss_on), _marked(rendered.turns, placed, row, loss_on))
