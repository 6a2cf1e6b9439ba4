"""Templates and tokenizers at the edges of what is usual, each written out here: none needs a file from elsewhere.

What is learned is read off the tokens: the text of the learned ones, and the ids that a prompt must share with the row
that taught the answer. The rendered text is that of transformers' own `apply_chat_template`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from chats import chat

from whet.base.errors import UserError
from whet.data.example import Message
from whet.data.template.named import use_template
from whet.data.template.row_tokenizer import RowTokenizer, Tokens
from whet.engine.config import Model
from whet.engine.load.load import load_tokenizer

START = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = START + "{{ m.content }}" + END


def row_tokenizer(template: str, specials: Sequence[str] = ()) -> RowTokenizer:
    """The built-in tokenizer with more special tokens and this template."""
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(Model(path="builtin:tiny"))
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in specials])  # type: ignore[arg-type]
    tokenizer.chat_template = template
    return RowTokenizer(tokenizer, chat=True)


def row(made: RowTokenizer, messages: list[Message], loss_on: str = "assistant") -> Tokens:
    return made.conversations([messages], loss_on)[0]


def learned(made: RowTokenizer, found: Tokens) -> list[str]:
    """The text of each run of learned tokens."""
    edges = np.flatnonzero(np.diff([0, *found.learned.astype(int), 0]))
    return [made.tokenizer.decode(found.ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def text_of(made: RowTokenizer, found: Tokens) -> str:
    return made.tokenizer.decode(found.ids.tolist())


def plain_text(made: RowTokenizer, messages: list[Message]) -> str:
    given = [{"role": m.role, "content": m.content} for m in messages]
    return made.tokenizer.apply_chat_template(given, tokenize=False)  # type: ignore[return-value]


# what closes a turn


def test_an_answer_that_was_closed_otherwise_does_not_teach_that_token() -> None:
    """As gpt-oss does: an earlier answer ends with another token than the one that a model has to write."""
    closing = "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}"
    made = row_tokenizer(PLAIN.replace("<|im_end|>", closing), ["<|end|>", "<|return|>"])
    found = row(made, chat("u:q", "a:one", "u:r", "a:two"))
    assert learned(made, found) == ["one", "two<|return|>"]
    assert made.tokenizer.convert_tokens_to_ids("<|return|>") in made.stop_ids()
    assert made.tokenizer.convert_tokens_to_ids("<|end|>") not in made.stop_ids()


def test_of_two_markers_that_begin_alike_the_longer_closes_a_turn() -> None:
    made = row_tokenizer(PLAIN.replace("<|im_end|>", "<turn>|"), ["<turn>", "<turn>|"])
    found = row(made, chat("u:q", "a:one"))
    assert learned(made, found) == ["one<turn>|"]
    assert found.ids[np.flatnonzero(found.learned)[-1]] == made.tokenizer.convert_tokens_to_ids("<turn>|")


def test_a_row_whose_first_answer_has_no_end_is_not_closed() -> None:
    made = row_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{{ '<|im_end|>' if loop.last and m.role == 'assistant' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert not row(made, chat("u:q", "a:one", "u:r", "a:two")).closed
    assert row(made, chat("u:q", "a:one", "u:r", "a:two"), "last_assistant").closed
    assert row(row_tokenizer(PLAIN), chat("u:q", "a:one", "u:r", "a:two")).closed


def test_a_closing_token_that_takes_a_line_feed_along_is_learned() -> None:
    from tokenizers import AddedToken

    made = row_tokenizer(PLAIN.replace("<|im_end|>", "<|eot|>"))
    made.tokenizer.add_tokens([AddedToken("<|eot|>", special=True, normalized=False, rstrip=True)])  # type: ignore[arg-type]
    made = RowTokenizer(made.tokenizer, chat=True)
    found = row(made, chat("u:q", "a:one"))
    end = made.tokenizer.convert_tokens_to_ids("<|eot|>")
    assert found.ids[np.flatnonzero(found.learned)].tolist()[-1] == end
    assert found.closed
    assert end in made.stop_ids()


def test_generation_stops_at_ends_alone() -> None:
    made = row_tokenizer(PLAIN)
    ends = {made.tokenizer.eos_token_id, made.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert made.stop_ids() == sorted(ends)


def test_a_raw_document_ends_with_the_token_that_generation_stops_at() -> None:
    made = RowTokenizer(load_tokenizer(Model(path="builtin:tiny")), chat=False)
    for found in made.texts(["some text", "더 많은 글", ""]):
        assert found.ids[-1] == made.document_end
        assert found.learned[-1]
        assert (found.ids[:-1] != made.document_end).all()


# what a template leaves out, adds and repeats


def test_white_space_that_is_stripped_is_not_said_to_be_lost() -> None:
    made = row_tokenizer(PLAIN.replace("{{ m.content }}", "{{ m.content | trim }}"))
    assert row(made, chat("u: \n ", "a:one")).dropped == ()
    assert row(made, chat("u:q", "a: one ")).dropped == ()
    cut = row_tokenizer(PLAIN.replace("{{ m.content }}", "{{ m.content if m.role != 'user' }}"))
    assert row(cut, chat("u:q", "a:one")).dropped == ((0, "content"),)


@pytest.mark.parametrize("cut", ["m.content[:0]", "m.content.split('</think>')[-1]"])
def test_an_answer_of_which_nothing_is_left_is_refused(cut: str) -> None:
    made = row_tokenizer(PLAIN.replace("{{ m.content }}", f"{{{{ {cut} if m.role == 'assistant' else m.content }}}}"))
    with pytest.raises(UserError, match="rewrites the conversation"):
        row(made, chat("u:q", "a:<think>one</think>"))


def test_the_end_of_an_answer_that_is_cut_off_is_said() -> None:
    made = row_tokenizer(PLAIN.replace("{{ m.content }}", "{{ m.content[:4] }}"))
    assert row(made, chat("u:q", "a:one two")).dropped == ((1, "content"),)
    assert row(made, chat("u:q", "a:one")).dropped == ()
    front = row_tokenizer(PLAIN.replace("{{ m.content }}", "{{ m.content[2:] }}"))
    assert row(front, chat("u:q q q", "a:one two")).dropped == ((0, "content"), (1, "content"))


@pytest.mark.parametrize(
    "asked",
    ["messages[0].content == 'b'", "'b' in messages[0].content", "messages[0].content.startswith('b')",
     "('b' in messages[0].content or 'j' in messages[0].content)"],
)  # fmt: skip
def test_what_is_written_for_some_rows_alone_is_in_those_rows(asked: str) -> None:
    """However often rows of the other kind came before, and in whatever order."""
    behind = "{% endfor %}{% if not add_generation_prompt and " + asked + " %}!{% endif %}"
    inside = "{{ m.content }}{% if " + asked + " %}!{% endif %}"
    for template in (PLAIN.replace("{% endfor %}", behind, 1), PLAIN.replace("{{ m.content }}", inside)):
        for order in ("cab", "acbc", "bca", "ccbbaa"):
            made = row_tokenizer(template)
            for word in order * 2:
                messages = chat(f"u:{word}", "a:answer")
                assert text_of(made, row(made, messages)) == plain_text(made, messages), (template, order, word)


def test_a_content_that_a_template_strips_is_stripped_however_known_its_kind_of_row_is() -> None:
    made = row_tokenizer(PLAIN.replace("{{ m.content }}", "{{ m.content | trim }}"))
    for words in (("q", "one"), ("q", "one"), ("r", "two"), (" q", "one"), ("q", "one "), ("\nq ", "two"), ("q", "x")):
        messages = [Message("user", words[0]), Message("assistant", words[1])]
        assert text_of(made, row(made, messages)) == plain_text(made, messages), words


def test_lines_that_are_written_one_by_one_keep_their_answer() -> None:
    body = "{% for line in m.content.splitlines() %}{{ line }}{{ '\n' if not loop.last }}{% endfor %}"
    made = row_tokenizer(PLAIN.replace("{{ m.content }}", body))
    found = row(made, chat("u:a\r\nb\r\nc", "a:one\r\ntwo\r\nthree"))
    assert learned(made, found) == ["one\ntwo\nthree<|im_end|>"]
    assert found.dropped == ()
    cut = row_tokenizer(PLAIN.replace("{{ m.content }}", "{{ m.content.splitlines()[1:] | join('\n') }}"))
    assert row(cut, chat("u:a\r\nb\r\nc", "a:one\r\ntwo\r\nthree")).dropped == ((0, "content"), (1, "content"))


def test_a_called_tool_that_is_named_again_does_not_move_its_call() -> None:
    """Some templates write the name of the tool in front of what it answered."""
    call = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}"
    again = "{% if m.role == 'tool' %}{{ messages[loop.index0 - 1].tool_calls[0].function.name }}: {% endif %}"
    made = row_tokenizer(START + again + "{{ m.content }}" + call + END)
    calls = ({"type": "function", "function": {"name": "weather", "arguments": {}}},)
    messages = [Message("user", "q"), Message("assistant", "", None, calls), Message("tool", "sunny"),
                Message("assistant", "It is sunny.")]  # fmt: skip
    assert learned(made, row(made, messages)) == ["<call>weather</call><|im_end|>", "It is sunny.<|im_end|>"]


def test_a_system_message_behind_the_answer_is_refused_and_an_echo_is_not() -> None:
    """What stands behind an answer may not be what the model should have read before it."""
    said = "{% if not add_generation_prompt %}{{ messages[0].content }}{% endif %}"
    behind = PLAIN.replace("messages %}", "messages if m.role != 'system' %}").replace(
        "{% endfor %}", "{% endfor %}" + said
    )
    with pytest.raises(UserError, match="rewrites the conversation"):
        row(row_tokenizer(behind), chat("s:be kind", "u:q", "a:one"))
    echoing = row_tokenizer(PLAIN.replace("{% endfor %}", "{% endfor %}" + said))
    assert learned(echoing, row(echoing, chat("s:be kind", "u:q", "a:one"))) == ["one<|im_end|>"]


def test_a_template_in_many_indented_lines_writes_what_transformers_writes() -> None:
    template = (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        "    {% else %}\n<|im_start|>assistant\n{{ m.content }}<|im_end|>\n    {% endif %}\n{% endfor %}\n"
        "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
    )
    made, messages = row_tokenizer(template), chat("u:q", "a:one", "u:r", "a:two")
    found = row(made, messages)
    assert text_of(made, found) == plain_text(made, messages)
    assert learned(made, found) == ["one<|im_end|>", "two<|im_end|>"]


# tokens


def test_a_prompt_begins_as_the_row_that_taught_its_answer() -> None:
    """With a tokenizer that starts texts with a token of its own, which the template writes already."""
    from tokenizers import processors

    made = row_tokenizer("<|im_start|>" + PLAIN)
    begin = made.tokenizer.convert_tokens_to_ids("<|im_start|>")
    made.backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", begin)]
    )
    messages = chat("u:where?", "a:here")
    found, prompt = row(made, messages), made.prompt(messages[:1])
    assert found.ids[: len(prompt)].tolist() == prompt
    assert prompt[:3].count(begin) == 2, "one of the template's start, one of the first turn"
    assert found.ids[len(prompt) :].tolist() == made.backend.encode("here<|im_end|>\n", add_special_tokens=False).ids


def test_a_marker_inside_a_content_is_no_marker() -> None:
    made = row_tokenizer(PLAIN)
    end = made.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for _ in range(4):  # known rows as well
        found = row(made, chat("u:why?", "a:write <|im_end|> there"))
        assert found.ids.tolist().count(end) == 2
        assert row(made, chat("u:why?", "a:so")).ids.tolist().count(end) == 2
        assert learned(made, found)[0].endswith("there<|im_end|>")


def test_a_content_that_would_become_a_marker_all_the_same_is_refused() -> None:
    """The tokenizer makes the marker out of letters, so that it cannot be written as plain text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(letters | {"ZQ": len(letters)}, [("Z", "Q")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="ZQ")
    tokenizer.add_tokens([AddedToken("ZQ", special=True, normalized=False)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}ZQ{% endfor %}"
    made = RowTokenizer(tokenizer, chat=True)
    assert row(made, chat("u:why", "a:so")).closed
    with pytest.raises(UserError, match="cannot write it as plain text"):
        row(made, chat("u:say ZQ now", "a:so"))


@pytest.mark.parametrize("missing", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
def test_llama_3_needs_each_of_its_markers(missing: str) -> None:
    markers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    whole = row_tokenizer(PLAIN, markers).tokenizer
    use_template(whole, "llama-3")
    lacking = row_tokenizer(PLAIN, [marker for marker in markers if marker != missing]).tokenizer
    with pytest.raises(UserError) as caught:
        use_template(lacking, "llama-3")
    assert missing in caught.value.problem


def test_a_tokenizer_that_puts_a_space_before_texts_reads_a_marked_row_whole() -> None:
    """As Llama 2's: a piece behind a marker begins with that space, any other piece does not."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(code): code for code in range(32, 127)}
    vocabulary = {"<unk>": 0, "\n": 1, "▁": 2} | {letter: code for letter, code in letters.items() if code > 2}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("[U]", "[A]", "</s>")])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[U]' if m.role == 'user' else '[A]' }}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[A]{% endif %}"
    )
    made = RowTokenizer(tokenizer, chat=True)
    usual = row(made, chat("u:why", "a:so"))
    assert usual.ids.tolist() == tokenizer("[U]why</s>[A]so</s>", add_special_tokens=False).input_ids
    spelled = row(made, chat("u:say </s> now", "a:so"))
    ends = tokenizer.convert_tokens_to_ids("</s>")
    assert spelled.ids.tolist().count(ends) == 2
    assert spelled.ids[:2].tolist() == usual.ids[:2].tolist(), "behind a marker stands the space of every text"
    answer = usual.ids[usual.learned].tolist()
    assert spelled.ids[spelled.learned].tolist() == answer, "the answer has the ids that it has elsewhere"
    prompt = made.prompt(chat("u:say </s> now"))
    assert spelled.ids[: len(prompt)].tolist() == prompt
