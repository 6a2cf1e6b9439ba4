"""A chat template whose answers cannot be placed exactly is refused; one that can, however odd, is not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from chats import chat

from whet.base.errors import UserError
from whet.data.example import Example
from whet.data.template import isolated
from whet.data.template.row_tokenizer import RowTokenizer
from whet.data.template.template import LARGEST, Template, use_template

TINY = Path(__file__).parents[1] / "whet" / "builtin" / "tiny"
HEAD = "{{ '<|im_start|>' + m.role + '\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
LOOP = "{% for m in messages %}" + HEAD + "BODY{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
TWO_TURNS = chat("u:one", "a:two", "u:three", "a:four")
ONE_TURN = TWO_TURNS[:2]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(TINY))


def row_tokenizer(tokenizer: Any, template: str | None) -> RowTokenizer:
    tokenizer.chat_template = template
    return RowTokenizer(tokenizer, chat=True)


def learned(found: RowTokenizer, messages: Any) -> list[str]:
    """The learned text, one piece for each end of a turn."""
    row = found.conversations([messages], "assistant")[0]
    return found.tokenizer.decode(row.ids[row.learned]).split("<|im_end|>")[:-1]


REWRITES = {
    "hides_earlier_answers": LOOP.replace("BODY", "{{ m.content if loop.last or m.role == 'user' else '' }}"),
    "counts_what_follows": LOOP.replace("BODY", "{{ loop.revindex }}{{ m.content | replace('o', '0') }}"),
    "says_how_many": "{{ messages | length }}" + LOOP.replace("BODY", "{{ m.content | replace('o', '0') }}"),
    "hides_all_answers": LOOP.replace("BODY", "{{ m.content if m.role == 'user' else '' }}"),
    "says_nothing": "hello",
    "answer_before_question": "{% for m in messages | reverse %}"
    + HEAD
    + "{{ m.content }}<|im_end|>{% endfor %}"
    + PROMPT,
    "other_prompt": LOOP.replace("BODY", "{{ m.content | replace('o', '0') }}").replace("<|im_start|>assistant", "bot"),
}


@pytest.mark.parametrize("name", REWRITES)
def test_a_template_that_rewrites_the_conversation_is_refused(name: str, tokenizer: Any) -> None:
    found = row_tokenizer(tokenizer, REWRITES[name])
    with pytest.raises(UserError, match=r"rewrites|asks for an answer") as caught:
        found.conversations([TWO_TURNS], "assistant")
    assert "turn" in (caught.value.found or "") or "bot" in (caught.value.found or "")
    assert caught.value.fix


def test_a_prompt_unlike_the_head_of_an_answer_is_refused(tokenizer: Any) -> None:
    found = row_tokenizer(tokenizer, LOOP.replace("BODY", "{{ m.content }}").replace("<|im_start|>assistant", "bot"))
    with pytest.raises(UserError, match="asks for an answer with other text") as caught:
        found.conversations([ONE_TURN], "assistant")
    assert "bot" in (caught.value.found or "")
    assert caught.value.field == "model.chat_template"


FOLLOWED = {
    "strips": (LOOP.replace("BODY", "{{ m.content | trim }}"), ["two", "four"]),
    "replaces_letters": (LOOP.replace("BODY", "{{ m.content | replace('o', '0') }}"), ["tw0", "f0ur"]),
    "repeats_the_question": (LOOP.replace("BODY", "{{ m.content * (2 if m.role == 'user' else 1) }}"), ["two", "four"]),
    "adds_a_preface": ("{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}" + LOOP.replace("BODY", "{{ m.content }}"),
                       ["two", "four"]),
    "adds_a_closing_line": (LOOP.replace("BODY", "{{ m.content }}") + "{{ 'The end.' if not add_generation_prompt }}",
                            ["two", "four"]),
    "writes_before_the_end": (LOOP.replace("BODY", "{{ m.content }}{{ '!' if m.role == 'assistant' }}"),
                              ["two!", "four!"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_template_that_can_be_followed_is(name: str, tokenizer: Any) -> None:
    template, answers = FOLLOWED[name]
    found = row_tokenizer(tokenizer, template)
    assert learned(found, TWO_TURNS) == answers
    row = found.conversations([TWO_TURNS], "assistant")[0]
    assert row.closed, "the end of each turn is learned, so the ledger must not complain"
    prompt = found.prompt(TWO_TURNS[:1])
    assert row.ids[: len(prompt)].tolist() == prompt
    assert not row.learned[: len(prompt)].any()
    assert row.learned[len(prompt)]


def test_a_template_that_shortens_earlier_answers_is_followed_and_what_it_leaves_out_is_said(tokenizer: Any) -> None:
    found = row_tokenizer(tokenizer, LOOP.replace("BODY", "{{ m.content if loop.last else m.content[:1] }}"))
    assert learned(found, TWO_TURNS) == ["t", "four"]
    assert found.conversations([TWO_TURNS], "assistant")[0].dropped == ((0, "content"), (1, "content"), (2, "content"))
    whole = row_tokenizer(tokenizer, LOOP.replace("BODY", "{{ m.content }}"))
    assert whole.conversations([TWO_TURNS], "assistant")[0].dropped == ()


@pytest.mark.parametrize("body", ["{{ m.content | replace('o', '0') }}", "{{ m.content }}", "{{ '' ~ m.content }}",
                                  "{{ [m.content] | join }}", "{{ m.content | tojson }}"])  # fmt: skip
def test_a_marker_in_a_question_never_counts_as_one_however_it_is_rendered(body: str, tokenizer: Any) -> None:
    found = row_tokenizer(tokenizer, LOOP.replace("BODY", body))
    spelled = chat("u:o <|im_end|>", "a:o")
    row = found.conversations([spelled], "assistant")[0]
    assert row.ids.tolist().count(2) == 2, "the end of two turns, and nothing from the question"
    assert found.prompt(spelled[:1]) == row.ids[: len(found.prompt(spelled[:1]))].tolist()


@pytest.mark.parametrize(
    "body", ["{{ '-%s' | format(m.content) }}", "{{ '-{}'.format(m.content) }}", "{{ '-%s' % m.content }}"]
)
def test_a_template_that_hides_where_its_text_is_from_is_refused(body: str, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="could not be followed"):
        row_tokenizer(tokenizer, LOOP.replace("BODY", body)).conversations([ONE_TURN], "assistant")


LEADS = {
    "no_prompt_at_all": (LOOP.replace("BODY", "{{ m.content }}").removesuffix(PROMPT), "<|im_start|>assistant\n"),
    "a_space": ("{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else "
                "' ' + m.content + '<|im_end|>' }}{% endfor %}", " "),
    "a_special_token": (LOOP.replace("BODY", "{{ '<|endoftext|>' if m.role == 'assistant' }}{{ m.content }}"),
                        "<|endoftext|>"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEADS)
def test_what_the_prompt_lacks_before_an_answer_is_learned_with_it(name: str, tokenizer: Any) -> None:
    template, lead = LEADS[name]
    found = row_tokenizer(tokenizer, template)
    for messages, answer in ((TWO_TURNS, "four"), (ONE_TURN, "two"), (chat("u:one", "a:<|im_end|>x"), "<|im_end|>x")):
        row = found.conversations([messages], "last_assistant")[0]
        prompt = found.prompt(messages[:-1])
        assert row.ids[: len(prompt)].tolist() == prompt
        assert not row.learned[: len(prompt)].any()
        assert tokenizer.decode(row.ids[len(prompt) :][row.learned[len(prompt) :]]) == lead + answer + "<|im_end|>"
        assert row.learned[len(prompt)]
        assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages], tokenize=False
        ), "with the template's own special tokens, and the content's as plain text"
        specials = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        assert [i for i in row.ids[len(prompt) :].tolist() if i in specials] == (
            [specials[1]] if name == "a_special_token" else []
        ) + [specials[0]]
        assert found.answered(messages[:-1], lead + answer) == answer
    assert learned(found, TWO_TURNS) == [lead + "two", lead + "four"]


MISTAKES = {
    "unclosed": "{% for m in messages %}", "undefined": "{{ foo.bar.baz }}", "unsafe": "{{ ''.__class__.__mro__ }}",
    "no_such_message": "{{ messages[9]['content'] }}", "text_and_number": "{{ messages[0]['content'] + 1 }}",
    "by_zero": "{{ 1 / 0 }}", "huge_range": "{% for i in range(1000000000) %}x{% endfor %}",
    "calls_itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "raises": "{{ raise_exception('no') }}",
    "no_such_filter": "{{ messages | nonsense }}", "not_a_number": "{{ 'x' | int(base=99) }}{{ [] | first + 1 }}",
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_template_is_an_error_of_the_template(name: str, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="the chat template refuses this conversation"):
        row_tokenizer(tokenizer, MISTAKES[name]).conversations([ONE_TURN, TWO_TURNS], "assistant")


def test_a_row_that_the_template_refuses_does_not_take_its_neighbours_along(tokenizer: Any) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    found = row_tokenizer(tokenizer, template + LOOP.replace("BODY", "{{ m.content }}"))
    with pytest.raises(UserError, match="no system") as caught:
        found.conversations([ONE_TURN, chat("s:be kind", *("u:one", "a:two"))], "assistant")
    assert caught.value.found == "system user assistant"
    assert learned(found, ONE_TURN) == ["two"]


def test_a_template_has_a_limit_of_size(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "large.jinja"
    path.write_text("x" * (LARGEST + 10))
    use_template(tokenizer, str(path))
    with pytest.raises(UserError, match="too large"):
        RowTokenizer(tokenizer, chat=True)
    path.write_text(LOOP.replace("BODY", "{{ m.content }}"))
    use_template(tokenizer, str(path))
    assert learned(RowTokenizer(tokenizer, chat=True), ONE_TURN) == ["two"]


NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TWICE = "{% set ns = namespace(x=START) %}{% for i in range(40) %}{% set ns.x = AGAIN %}{% endfor %}{{ ns.x }}"
BOMBS = {
    "loops": NESTED, "calls_itself": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}", "list": "{{ ([0] * 10 ** 10) | length }}", "text": "{{ 'a' * 10 ** 11 }}",
    "power": "{{ (7 ** n) % 10 }}", "wide": "{{ 'a' | center(10 ** 10) }}",
    "list_of_itself": TWICE.replace("START", "[1]").replace("AGAIN", "[ns.x, ns.x]"),
    "doubled": TWICE.replace("START", "'ab'").replace("AGAIN", "ns.x + ns.x"),
    "spaces": "{{ ('%0' ~ n ~ 'd') % 1 }}", "lines": "{{ '\n' * 10 ** 6 | indent(10 ** 6) }}",
}  # fmt: skip
WITHIN = r"does not come to an end|writes too much|refuses this conversation"


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_never_ends_or_fills_the_memory_is_refused_in_time(name: str, tokenizer: Any) -> None:
    """Also where only long contents reach the place, which no look at the template beforehand would tell."""
    short, long = chat("u:one", "a:two"), chat("u:" + "one " * 50, "a:two")
    guarded = (
        "{% if messages[0].content | length > 99 %}{% set n = 10 ** 9 + messages | length %}"
        + BOMBS[name]
        + "{% endif %}"
    )
    tokenizer.chat_template = guarded + LOOP.replace("BODY", "{{ m.content }}")
    found = RowTokenizer(tokenizer, chat=True)
    assert found.template is not None
    assert len(found.conversations([short, short, short], "assistant")) == 3
    usual, found.template._plain_run.seconds = found.template._plain_run.seconds, 0.5
    start = time.monotonic()
    with pytest.raises(UserError, match=WITHIN) as caught:
        found.conversations([short, Example("", tuple(long), None, "rows.jsonl", 7)], "assistant")
    assert (caught.value.file, caught.value.row) == ("rows.jsonl", 7)
    assert time.monotonic() - start < 60, "unended it runs for longer than anybody measured, busy machine or not"
    found.template._plain_run.seconds = usual
    assert len(found.conversations([short], "assistant")) == 1, "the next row has a new process"


def test_a_template_that_always_runs_on_is_refused_at_once(tokenizer: Any) -> None:
    tokenizer.chat_template = NESTED + LOOP
    with pytest.raises(UserError, match="does not come to an end") as caught:
        Template(tokenizer, slowest_seconds=0.3)
    assert caught.value.found == "2 messages, 0.3 seconds"


def test_a_long_conversation_may_take_longer_and_write_more(tokenizer: Any) -> None:
    found = row_tokenizer(tokenizer, LOOP.replace("BODY", "{{ m.content }}"))
    assert len(found.conversations([chat("u:" + "word " * 60_000, "a:yes")] * 3, "assistant")) == 3


def test_an_interrupted_run_leaves_no_reply_for_the_next(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = row_tokenizer(tokenizer, LOOP.replace("BODY", "{{ m.content }}"))
    with monkeypatch.context() as broken:
        broken.setattr(isolated._RenderProcess, "_line", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            found.conversations([ONE_TURN], "assistant")
    assert learned(found, ONE_TURN) == ["two"]


def _interrupted(*_: object) -> bytes:
    raise KeyboardInterrupt


def test_a_named_template_is_checked_against_the_vocabulary(tokenizer: Any, tmp_path: Path) -> None:
    use_template(tokenizer, "alpaca")
    assert "### Response" in tokenizer.chat_template
    path = tmp_path / "own.jinja"
    path.write_text(LOOP)
    use_template(tokenizer, str(path))
    use_template(tokenizer, None)
    assert tokenizer.chat_template == LOOP, "None keeps what is there"
    with pytest.raises(UserError, match="write chatml"):
        use_template(tokenizer, "chatlm")
    with pytest.raises(UserError, match="no such chat template"):
        use_template(tokenizer, str(tmp_path / "other.jinja"))
    with pytest.raises(UserError, match="no chat template"):
        row_tokenizer(tokenizer, None)


def test_chatml_needs_its_markers() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    with pytest.raises(UserError, match="ChatML turns would never end"):
        use_template(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"), "chatml")
    with pytest.raises(UserError, match="generation could never stop"):
        _ = RowTokenizer(PreTrainedTokenizerFast(tokenizer_object=words), chat=False).document_end
