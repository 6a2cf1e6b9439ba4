"""What is learned, to the token: spans of real templates and tokenizers against a second way of finding them.

The second way renders each conversation turn by turn, as a server would, and knows of every template only its end
token and how it trims; it never sees whet's spans. Each promise has a planted fault that breaks it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import CASES, Chat, chat

from whet.base.errors import UserError
from whet.data.example import Example
from whet.data.template.row_tokenizer import RowTokenizer, Tokens
from whet.data.template.template import use_template

TINY = Path(__file__).parents[1] / "whet" / "builtin" / "tiny"
SHARED = Path(__file__).parents[2] / "shared" / "data"
ADDED = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>",
         "<|assistant|>", "<|system|>", "<|end|>"]  # fmt: skip


@cache
def tokenizer(name: str) -> Any:
    """tiny; tiny+ (the markers and BOS of other families added); qwen and phi-3-mini as they were published."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name.startswith("tiny"):
        found = AutoTokenizer.from_pretrained(str(TINY))
        if name == "tiny+":
            found.add_special_tokens({"additional_special_tokens": ADDED, "bos_token": "<bos>"})
        return found
    end, bos = {"qwen": ("<|im_end|>", None), "phi-3-mini": ("<|endoftext|>", "<s>")}[name]
    path = SHARED / "tokenizers" / name / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=end, bos_token=bos, pad_token="<|endoftext|>")


@dataclass(frozen=True)
class Setup:
    """end: the token that closes an answer. trims: what the template makes of a content (last: of the last answer).

    gap: what it writes between the generation prompt and the last answer, learned with it. refuses: cases it cannot
    render exactly.
    """

    tokenizer: str
    template: str
    end: str
    trims: Callable[[str, bool], str] = lambda content, last: content
    gap: str = ""
    refuses: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.tokenizer}-{self.template}"

    def row_tokenizer(self) -> RowTokenizer:
        found = tokenizer(self.tokenizer)
        own = {"own": TINY / "chat_template.jinja"}.get(
            self.template, SHARED / "chat_templates" / f"{self.template}.jinja"
        )
        if self.template in ("chatml", "alpaca"):
            use_template(found, self.template)
        elif self.template == "spaced":
            found.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|> ' }}{% endfor %}" \
                                  "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # fmt: skip
        else:
            use_template(found, str(own))
        return RowTokenizer(found, chat=True)


def stripped(content: str, last: bool) -> str:
    return content.strip()


def unthought(content: str, last: bool) -> str:
    """Qwen3 keeps the thinking of the last answer only, and takes line feeds off what it writes behind thinking."""
    if last:
        return content.lstrip("\n")
    return content.split("</think>")[-1].lstrip("\n") if "</think>" in content else content


SETUPS = [
    Setup("tiny", "own", "<|im_end|>"),
    Setup("tiny", "chatml", "<|im_end|>"),
    Setup("tiny", "alpaca", "<|im_end|>"),
    Setup("tiny", "spaced", "<|im_end|>"),
    Setup("tiny+", "llama3", "<|eot_id|>", stripped),
    Setup("tiny+", "gemma", "<end_of_turn>", stripped, refuses=("system", "marker_in_system")),
    Setup("tiny+", "phi3", "<|end|>"),
    Setup("qwen", "chatml", "<|im_end|>"),
    Setup("qwen", "alpaca", "<|im_end|>"),
    Setup("qwen", "qwen2_5", "<|im_end|>"),
    Setup("qwen", "qwen3", "<|im_end|>", unthought, gap="<think>\n\n</think>\n\n"),
    Setup("qwen", "llama3", "<|eot_id|>"),
    Setup("qwen", "gemma", "<end_of_turn>"),
    Setup("phi-3-mini", "phi3", "<|end|>"),
    Setup("phi-3-mini", "alpaca", "<|endoftext|>"),
    Setup("phi-3-mini", "llama3", "<|eot_id|>"),
    Setup("phi-3-mini", "gemma", "<end_of_turn>"),
]  # fmt: skip


@pytest.fixture(params=SETUPS, ids=lambda setup: setup.name)
def setup(request: pytest.FixtureRequest) -> Setup:
    found: Setup = request.param
    needs_shared = not found.tokenizer.startswith("tiny") or found.template not in ("own", "chatml", "alpaca", "spaced")
    if needs_shared and not SHARED.is_dir():
        pytest.skip("shared/data with the real tokenizers and templates is not beside this checkout")
    if found.end not in tokenizer(found.tokenizer).get_vocab():
        pytest.skip(f"the vocabulary of {found.tokenizer} has no {found.end}")
    return found


@dataclass(frozen=True)
class Found:
    """What whet made of a conversation, all that is checked of it. eval_ids: ids and first place of the last answer."""

    tokens: Tokens
    prompt: list[int]
    last: Tokens
    last_prompt: list[int]


def made(row_tokenizer: RowTokenizer, messages: Chat) -> Found:
    first = next(index for index, message in enumerate(messages) if message.role == "assistant")
    return Found(
        row_tokenizer.conversations([messages], "assistant")[0],
        row_tokenizer.prompt(messages[:first]),
        row_tokenizer.conversations([messages], "last_assistant")[0],
        row_tokenizer.prompt(messages[:-1]),
    )


def rendered(setup: Setup, messages: Chat, prompt: bool = False) -> str:
    plain = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer(setup.tokenizer).apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)


def second_way(setup: Setup, messages: Chat) -> list[tuple[str, str]]:
    """Of each answer: the prompt for it, and all that has to be learned to follow, up to its end token."""
    whole, found = rendered(setup, messages), []
    for index, message in enumerate(messages):
        if message.role == "assistant":
            last = index == len(messages) - 1
            header = rendered(setup, messages[:index], prompt=True)
            answer = setup.trims(message.content, last) + setup.end
            gap = "" if whole.startswith(header + answer) else setup.gap
            assert whole.startswith(header + gap + answer), "the second way does not know this template"
            found.append((header, gap + answer))
    return found


def same(setup: Setup, one: str, other: str, *, exact: bool = True) -> bool:
    """Equal up to what the tokenizer itself does to text: NFC (Qwen), spaces around special tokens (Phi-3)."""
    one, other = (unicodedata.normalize("NFC", text) for text in (one, other))
    if setup.tokenizer == "phi-3-mini" and not exact:
        one, other = (re.sub(r"\s", "", text) for text in (one, other))
    return one == other


def problems(setup: Setup, messages: Chat, found: Found) -> list[str]:
    tok = tokenizer(setup.tokenizer)
    ids, learned = found.tokens.ids.tolist(), found.tokens.learned
    expected, whole, wrong = second_way(setup, messages), rendered(setup, messages), []
    edges = np.flatnonzero(np.diff(np.r_[0, learned.astype(int), 0]))
    spans = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    if len(spans) != len(expected):
        return [f"{len(spans)} learned spans, {len(expected)} answers"]
    if not same(setup, tok.decode(ids), whole, exact=False):
        wrong.append("the tokens do not spell the rendered text")
    for (start, stop), (before, answer) in zip(spans, expected, strict=True):
        texts = (tok.decode(ids[start:stop]), tok.decode(ids[:stop])[len(tok.decode(ids[:start])) :])
        if not any(same(setup, text, answer, exact="</s>" not in answer) for text in texts):
            wrong.append(f"learned {texts[0]!r}, expected {answer!r}")
        if not same(setup, tok.decode(ids[:start]), before, exact=False):
            wrong.append(f"the answer {answer!r} is learned at another place")
        if ids[stop - 1] != tok.convert_tokens_to_ids(setup.end):
            wrong.append("the end of the turn is not learned")
    wrong += special_problems(setup, messages, ids)
    for tokens, prompt in ((found.tokens, found.prompt), (found.last, found.last_prompt)):
        first = int(np.flatnonzero(tokens.learned)[0])
        if prompt != tokens.ids.tolist()[:first]:
            wrong.append("the prompt is not what stood before the answer in training")
    return wrong if found.tokens.closed else [*wrong, "closed is False"]


def special_problems(setup: Setup, messages: Chat, ids: list[int]) -> list[str]:
    """The special tokens of the row must be those of the same conversation with harmless contents, in order."""
    tok, wrong = tokenizer(setup.tokenizer), []
    special = {number for number, token in tok.added_tokens_decoder.items() if token.special}
    harmless = rendered(setup, [replace(message, content="x") for message in messages])
    own = tok.backend_tokenizer.encode(harmless, add_special_tokens=False).ids
    if [i for i in ids if i in special] != [i for i in own if i in special]:
        wrong.append("a special token stands in a content, or one of the template's is missing")
    if tok.bos_token_id is not None and ids.count(tok.bos_token_id) > 1:
        wrong.append("more than one begin token")
    if setup.template == "spaced":  # the space before an answer is cut from it: it stands in the prompt
        return wrong
    contents = [message.content for message in messages]
    harmless_contents = not any(re.search(r"<\|?\w+\|?>", text) or text != text.strip() for text in contents)
    if (
        harmless_contents
        and ids != tok.backend_tokenizer.encode(rendered(setup, messages), add_special_tokens=False).ids
    ):
        wrong.append("not the ids of the text as a whole")
    return wrong


def test_exactly_the_answers_are_learned(setup: Setup) -> None:
    row_tokenizer, wrong, refused = setup.row_tokenizer(), {}, []
    for name, messages in CASES.items():
        try:
            found = problems(setup, messages, made(row_tokenizer, messages))
        except UserError as error:
            refused.append(name if error.fix else f"{name}, without a fix")
            continue
        if found:
            wrong[name] = found
    assert wrong == {}
    assert refused == list(setup.refuses), "exact, or refused: nothing between"
    print(f"{setup.name}: {len(CASES) - len(refused)}/{len(CASES)} exact, {len(refused)} refused")


def test_the_thinking_block_that_qwen3_lacks_in_its_prompt_is_learned_and_taken_off_a_reply() -> None:
    setup = next(setup for setup in SETUPS if setup.template == "qwen3")
    if not SHARED.is_dir():
        pytest.skip("shared/data with the real tokenizers and templates is not beside this checkout")
    row_tokenizer = setup.row_tokenizer()
    found = made(row_tokenizer, CASES["plain"])
    first = int(np.flatnonzero(found.tokens.learned)[0])
    assert len(found.prompt) == first
    reply = tokenizer("qwen").decode(found.tokens.ids[first:]).partition("<|im_end|>")[0]
    assert reply == "<think>\n\n</think>\n\nHello there"
    question = CASES["plain"][:-1]
    assert row_tokenizer.answered(question, reply) == "Hello there" == row_tokenizer.answered(question, "Hello there")


def moved(by: int) -> Callable[[Found, Any], Found]:
    return lambda found, tok: replace(found, tokens=replace(found.tokens, learned=np.roll(found.tokens.learned, by)))


def with_marks(change: Callable[[np.ndarray, np.ndarray], None]) -> Callable[[Found, Any], Found]:
    def planted(found: Found, tok: Any) -> Found:
        learned = found.tokens.learned.copy()
        change(learned, np.flatnonzero(learned))
        return replace(found, tokens=replace(found.tokens, learned=learned))

    return planted


def naive(found: Found, tok: Any) -> Found:
    """The row as a trainer makes it that tokenises the rendered text and lets it spell special tokens."""
    text = tok.decode(found.tokens.ids)
    ids = tok.backend_tokenizer.encode(text, add_special_tokens=False).ids
    learned = np.r_[found.tokens.learned, np.zeros(len(ids), bool)][: len(ids)]
    return replace(found, tokens=replace(found.tokens, ids=np.array(ids, np.int32), learned=learned))


def extra_bos(found: Found, tok: Any) -> Found:
    ids, learned = np.r_[[tok.bos_token_id] * 2, found.tokens.ids], np.r_[[False] * 2, found.tokens.learned]
    return replace(found, tokens=replace(found.tokens, ids=ids, learned=learned))


FAULTS: dict[str, Callable[[Found, Any], Found]] = {
    "shifted_right": moved(1),
    "shifted_left": moved(-1),
    "end_not_learned": with_marks(lambda learned, at: learned.__setitem__(at[-1], False)),
    "first_not_learned": with_marks(lambda learned, at: learned.__setitem__(at[0], False)),
    "header_learned": with_marks(lambda learned, at: learned.__setitem__(at[0] - 1, True)),
    "all_learned": with_marks(lambda learned, at: learned.fill(True)),
    "nothing_learned": with_marks(lambda learned, at: learned.fill(False)),
    "prompt_too_short": lambda found, tok: replace(found, prompt=found.prompt[:-1]),
    "other_eval_prompt": lambda found, tok: replace(found, last_prompt=found.last_prompt[:-2] + found.last_prompt[-1:]),
    "not_closed": lambda found, tok: replace(found, tokens=replace(found.tokens, closed=False)),
    "two_begins": extra_bos,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_promise_breaks_when_its_fault_is_planted(fault: str) -> None:
    setup = Setup("tiny", "own", "<|im_end|>")
    row_tokenizer = setup.row_tokenizer()
    for name, messages in CASES.items():
        found = made(row_tokenizer, messages)
        assert problems(setup, messages, found) == []
        if fault == "two_begins":
            tokenizer("tiny").bos_token = "<|endoftext|>"
        broken = problems(setup, messages, FAULTS[fault](found, tokenizer("tiny")))
        tokenizer("tiny").bos_token = None
        assert broken, name


def test_content_that_becomes_a_special_token_is_noticed() -> None:
    setup = Setup("tiny", "own", "<|im_end|>")
    for name in ("marker_in_question", "marker_in_answer", "other_special"):
        found = naive(made(setup.row_tokenizer(), CASES[name]), tokenizer("tiny"))
        assert any(
            "special token" in problem for problem in special_problems(setup, CASES[name], found.tokens.ids.tolist())
        )


def test_every_token_of_an_answer_comes_from_one_row_of_text() -> None:
    """Spans of one conversation never overlap and stand in the order of the turns."""
    row_tokenizer = Setup("tiny", "own", "<|im_end|>").row_tokenizer()
    assert row_tokenizer.template is not None
    for row in row_tokenizer.template.render(list(CASES.values())):
        edges = [edge for turn in row.turns for edge in (turn.start, turn.end, turn.stop)]
        assert all(a <= b for a, b in pairwise(edges))
        assert row.text[row.turns[-1].end : row.turns[-1].stop] == "<|im_end|>"


def test_what_is_learned_follows_loss_on() -> None:
    row_tokenizer = Setup("tiny", "own", "<|im_end|>").row_tokenizer()
    messages = chat("u:one", "a:two", "u:three", "a:four")
    rows = {on: row_tokenizer.conversations([messages], on)[0] for on in ("assistant", "last_assistant", "all")}
    texts = {on: tokenizer("tiny").decode(row.ids[row.learned]) for on, row in rows.items()}
    assert texts["assistant"] == "two<|im_end|>four<|im_end|>"
    assert texts["last_assistant"] == "four<|im_end|>"
    assert texts["all"] == tokenizer("tiny").decode(rows["all"].ids)
    tokenizer_of_text = RowTokenizer(tokenizer("tiny"), chat=False)
    row = tokenizer_of_text.texts(["once upon a time"])[0]
    assert row.learned.all()
    assert tokenizer("tiny").decode(row.ids) == "once upon a time<|endoftext|>"
    assert row_tokenizer.stop_ids() == [2] == tokenizer("tiny").convert_tokens_to_ids(["<|im_end|>"])


def test_the_spans_of_prompts_hold_their_contents_and_nothing_of_the_template() -> None:
    """They are what data.over_length=truncate_prompt may cut."""
    for name in ("own", "alpaca", "spaced"):
        row_tokenizer = Setup("tiny", name, "<|im_end|>").row_tokenizer()
        for messages in CASES.values():
            row = row_tokenizer.conversations([messages], "assistant")[0]
            for start, stop in row.prompts:
                assert start < stop
                piece = tokenizer("tiny").decode(row.ids[start:stop]).strip(" \ufffd")  # half a character
                assert any(piece in message.content for message in messages)
                assert not row.learned[start:stop].any()


def test_weights_go_to_the_tokens_of_their_turn_and_zero_is_not_learned() -> None:
    row_tokenizer = Setup("tiny", "own", "<|im_end|>").row_tokenizer()
    plain = chat("u:one", "a:two", "u:three", "a:four")

    def row(first: float | None, second: float | None, on: str = "assistant") -> Tokens:
        messages = [plain[0], replace(plain[1], weight=first), plain[2], replace(plain[3], weight=second)]
        return row_tokenizer.conversations([messages], on)[0]

    def text(tokens: Tokens, weight: float) -> str:
        assert tokens.weights is not None
        return tokenizer("tiny").decode(tokens.ids[tokens.weights == np.float32(weight)])

    assert row(None, None).weights is row(1, None).weights is row(1.0, 1).weights is None
    assert text(row(0.25, None), 0.25) == "two<|im_end|>"
    assert text(row(0.25, None), 1) == "four<|im_end|>"
    for on in ("assistant", "completion"):
        unlearned = row(0, None, on)
        assert unlearned.weights is None, "all that is learned weighs 1"
        assert tokenizer("tiny").decode(unlearned.ids[unlearned.learned]) == "four<|im_end|>"
        assert len(unlearned.prompts) == 3
    whole = row(0, 0.5, "all")
    assert "two" not in tokenizer("tiny").decode(whole.ids[whole.learned])
    assert text(whole, 0.5) == "four<|im_end|>"
    assert np.array_equal(whole.weights > 0, whole.learned), "the two never say different things"  # type: ignore[operator]
    assert not row(0, 0).learned.any()


def test_a_completion_is_what_the_row_says_it_is() -> None:
    row_tokenizer = Setup("tiny", "own", "<|im_end|>").row_tokenizer()
    messages = tuple(chat("u:one", "a:two", "u:three", "a:four"))

    def learned(start: int | None, on: str) -> str:
        row = row_tokenizer.conversations([Example("", messages, None, "", 0, completion_from=start)], on)[0]
        return tokenizer("tiny").decode(row.ids[row.learned])

    assert learned(3, "completion") == "four<|im_end|>"
    assert learned(1, "completion") == learned(None, "completion") == learned(3, "assistant")
    assert learned(3, "assistant") == "two<|im_end|>four<|im_end|>"


def test_a_template_that_writes_the_date_writes_the_same_every_day() -> None:
    found = tokenizer("tiny")
    kept = found.chat_template
    found.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + kept
    template = RowTokenizer(found, chat=True).template
    found.chat_template = kept
    assert template is not None
    assert template.text(chat("u:a")).startswith("2025-01-01")
