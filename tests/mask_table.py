"""What has to be learned, said a second time: every template at hand, written out by hand as (text, learned) pieces.

whet follows the template's own strings. Here each family of templates is written again in plain Python, turn by turn,
with the learned pieces marked as they are written; that the pieces spell what `apply_chat_template` of transformers
renders is checked for each row, so a piece cannot be wrong without a word. Tokens are laid beside the pieces by
decoding them. The two ways share no code but the messages.

The text before the first question (system prompts, definitions of tools) is not written again: nothing of it is
learned, and it is whatever stands before the pieces.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from chats import CASES, TOOL_CASES, called, calls

from whet.data.example import Example, Message
from whet.data.template.named import NAMED
from whet.data.template.row_tokenizer import RowTokenizer, Tokens

TINY = Path(__file__).parents[1] / "whet" / "builtin" / "tiny"
SHARED = Path(__file__).parents[2] / "shared" / "data"
MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
           "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|start|>", "<|message|>",
           "<|channel|>", "<|return|>", "<|call|>", "<|endoftext|>"]  # fmt: skip
Pieces = list[tuple[str, bool]]
# A template of our own that drops earlier thinking, so that this is tried where no other template is at hand.
THINKER = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content is defined and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{- m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""


def dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def chatml(messages: list[Message], eos: str) -> Pieces:
    found: Pieces = []
    for number, m in enumerate(messages):
        written = [f'<tool_call>{{"name": "{name}", "arguments": {dumped(arguments)}}}</tool_call>'
                   for name, arguments in calls(m)]  # fmt: skip
        text = "\n".join([m.content, *written] if m.content else written)
        found += [("" if number == 0 else f"<|im_start|>{m.role}\n", False), (text + "<|im_end|>", answers(m))]
        found += [("\n", False)]
    return found


def thinker(messages: list[Message], eos: str) -> Pieces:
    found: Pieces = []
    for number, m in enumerate(messages):
        thought = f"<think>{m.reasoning}</think>" if m.reasoning and number == len(messages) - 1 else ""
        found += [
            ("" if number == 0 else f"<|im_start|>{m.role}\n", False),
            (thought + m.content + "<|im_end|>", answers(m)),
        ]
        found += [("\n", False)]
    return found


def qwen(messages: list[Message], eos: str, *, thinks: bool = False) -> Pieces:
    found: Pieces = []
    query = max((n for n, m in enumerate(messages) if m.role == "user"), default=0)
    for number, m in enumerate(messages):
        after = messages[number + 1].role if number + 1 < len(messages) else ""
        if m.role == "tool":
            first = messages[number - 1].role != "tool"
            found.append(
                (("<|im_start|>user" if first else "") + f"\n<tool_response>\n{m.content}\n</tool_response>", False)
            )
            found.append(("" if after == "tool" else "<|im_end|>\n", False))
            continue
        text, thought = m.content, m.reasoning
        if m.role == "assistant" and thinks:
            if thought is None and "</think>" in text:
                thought = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
                text = text.split("</think>")[-1].lstrip("\n")
            if number > query and (number == len(messages) - 1 or thought):
                text = "<think>\n" + (thought or "").strip("\n") + "\n</think>\n\n" + text.lstrip("\n")
                content = text.partition("</think>\n\n")[2]
            else:
                content = text
        else:
            content = text
        written = [f'<tool_call>\n{{"name": "{name}", "arguments": {dumped(arguments)}}}\n</tool_call>'
                   for name, arguments in calls(m)]  # fmt: skip
        if written:
            text += ("\n" if content else "") + "\n".join(written)
        found += [
            ("" if number == 0 else f"<|im_start|>{m.role}\n", False),
            (text + "<|im_end|>", answers(m)),
            ("\n", False),
        ]
    return found


def llama3(messages: list[Message], eos: str) -> Pieces:
    found: Pieces = []
    for number, m in enumerate(messages):
        role = "ipython" if m.role == "tool" else m.role
        text = dumped(m.content) if m.role == "tool" else m.content.strip()
        for name, arguments in calls(m):
            text = f'{{"name": "{name}", "parameters": {dumped(arguments)}}}'
        found.append(("" if number == 0 else f"<|start_header_id|>{role}<|end_header_id|>\n\n", False))
        found.append((text + "<|eot_id|>", answers(m)))
    return found


def gemma(messages: list[Message], eos: str) -> Pieces:
    found: Pieces = []
    for number, m in enumerate(messages):
        role = "model" if m.role == "assistant" else m.role
        found.append(("" if number == 0 else f"<start_of_turn>{role}\n", False))
        found += [(m.content.strip() + "<end_of_turn>", answers(m)), ("\n", False)]
    return found


def phi3(messages: list[Message], eos: str) -> Pieces:
    found: Pieces = []
    for number, m in enumerate(messages):
        found += [("" if number == 0 else f"<|{m.role}|>\n", False), (m.content + "<|end|>", answers(m)), ("\n", False)]
    return [*found, (eos, False)]


def alpaca(messages: list[Message], eos: str) -> Pieces:
    found: Pieces = []
    for number, m in enumerate(messages):
        if answers(m):
            found += [("### Response:\n", False), (m.content + eos, True), ("\n\n", False)]
        else:
            found.append((("" if number == 0 else "### Instruction:\n") + m.content + "\n\n", False))
    return found


def mistral(messages: list[Message], eos: str) -> Pieces:
    found: Pieces = []
    for number, m in enumerate(messages):
        if answers(m):
            found.append((" " + m.content + eos, True))
        else:
            found.append((("" if number == 0 else "[INST] ") + m.content + " [/INST]", False))
    return found


def gptoss(messages: list[Message], eos: str) -> Pieces:
    found: Pieces = []
    called = ""
    for number, m in enumerate(messages):
        if m.role == "user":
            found.append((("" if number == 0 else "<|start|>user<|message|>") + m.content + "<|end|>", False))
        elif m.role == "tool":
            head = f"<|start|>functions.{called} to=assistant<|channel|>commentary<|message|>"
            found.append((head + dumped(m.content) + "<|end|>", False))
        elif m.tool_calls:
            ((called, arguments),) = calls(m)
            final = any(answers(later) and not later.tool_calls for later in messages[number + 1 :])
            thought = m.content or m.reasoning
            text = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought and not final else ""
            text += f" to=functions.{called}<|channel|>commentary json<|message|>{dumped(arguments)}<|call|>"
            found += [("<|start|>assistant", False), (text, True)]
        elif number == len(messages) - 1:
            text = f"<|channel|>analysis<|message|>{m.reasoning}<|end|><|start|>assistant" if m.reasoning else ""
            found += [("<|start|>assistant", False), (f"{text}<|channel|>final<|message|>{m.content}<|return|>", True)]
        else:  # the end that a model writes is <|return|>, and that is not what stands here
            found += [
                ("<|start|>assistant", False),
                ("<|channel|>final<|message|>" + m.content, True),
                ("<|end|>", False),
            ]
    return found


def answers(message: Message) -> bool:
    return message.role == "assistant"


@dataclass(frozen=True)
class Family:
    """pieces: the template by hand. calls: how many tool calls it renders in a turn. system: whether it has one."""

    pieces: Callable[[list[Message], str], Pieces]
    calls: int = 0
    system: bool = True


FAMILIES = {
    "qwen2_5": Family(qwen, 9), "qwen3": Family(lambda m, eos: qwen(m, eos, thinks=True), 9),
    "llama3": Family(llama3), "llama3_1": Family(llama3, 1), "gemma": Family(gemma, system=False),
    "gemma3": Family(gemma), "phi3": Family(phi3), "gptoss": Family(gptoss, 1),
    "named/chatml": Family(chatml, 9), "named/alpaca": Family(alpaca), "named/llama-3": Family(llama3),
    "named/gemma": Family(gemma), "named/phi-3": Family(phi3), "named/mistral": Family(mistral),
    "thinker": Family(thinker),
}  # fmt: skip
TOKENIZERS = ("tiny", "qwen", "gpt2", "phi-3-mini", "mistral-7b-v0.2")
SPACED = ("phi-3-mini", "mistral-7b-v0.2")  # their decoders write and drop spaces around special tokens


@cache
def backend(name: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if name == "tiny":
        return Tokenizer.from_file(str(TINY / "tokenizer.json"))
    folder = SHARED / "tokenizers" / name
    if name != "gpt2":
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return found


@cache
def plain_tokenizer(name: str) -> Any:
    """A tokenizer with the markers of all families and its own end token."""
    from transformers import PreTrainedTokenizerFast

    end = {"phi-3-mini": "<|endoftext|>", "mistral-7b-v0.2": "</s>", "gpt2": "<|endoftext|>"}.get(name, "<|im_end|>")
    found = PreTrainedTokenizerFast(tokenizer_object=backend(name), eos_token=end, bos_token="<s>")
    found.add_special_tokens({"additional_special_tokens": MARKERS})
    return found


@cache
def source_of(template: str) -> str:
    """The text of the template of this name."""
    if template == "thinker":
        return THINKER
    if template.startswith("named/"):
        return NAMED[template.removeprefix("named/")].read_text(encoding="utf-8")
    source = (SHARED / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    return source.replace('strftime_now("%Y-%m-%d")', "'2025-01-01'")  # transformers writes today


def all_cases() -> dict[str, Example]:
    """Every hard conversation: those of plain turns and those with tools and thinking."""
    plain = {name: Example("", tuple(messages), None, "", 0) for name, messages in CASES.items()}
    return plain | TOOL_CASES


def refused(family: Family, example: Example) -> str | None:
    """Why a template of this family cannot render the conversation, None where it can."""
    messages = example.messages or ()
    if not family.system and any(message.role == "system" for message in messages):
        return "no system messages"
    most = max(len(message.tool_calls) for message in messages)
    if most > family.calls:
        return "several calls in a turn" if family.calls else "no tool calls"
    if family.pieces is gptoss and any(m.tool_calls and m.content and m.reasoning for m in messages):
        return "thinking and text beside a call"
    return None


def as_dicts(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    found = []
    for m in messages:
        turn: dict[str, Any] = {"role": m.role, "content": m.content}
        if m.reasoning is not None:
            turn |= {"reasoning_content": m.reasoning, "thinking": m.reasoning}
        if m.tool_calls:
            turn["tool_calls"] = list(m.tool_calls)
        found.append(turn)
    return found


def rendered(tok: Any, template: str, example: Example) -> str:
    """What transformers renders."""
    tools = None if example.tools is None else json.loads(example.tools)
    return tok.apply_chat_template(
        as_dicts(example.messages or ()), tools=tools, tokenize=False, chat_template=source_of(template)
    )


@dataclass(frozen=True)
class Found:
    """What whet made of a conversation. prompt: ids that ask for its last answer."""

    tokens: Tokens
    prompt: list[int]


def made(row_tokenizer: RowTokenizer, example: Example) -> Found:
    question = replace(example, messages=example.question)
    return Found(row_tokenizer.conversations([example], "assistant")[0], row_tokenizer.prompt(question))


class Table:
    """One template with one tokenizer."""

    def __init__(self, tokenizer_name: str, template: str) -> None:
        self.name, self.template = tokenizer_name, template
        self.family = FAMILIES[template]
        self.tok = plain_tokenizer(tokenizer_name)
        self.tok.chat_template = source_of(template)
        self.row_tokenizer = RowTokenizer(self.tok, chat=True)
        self.special = {number for number, token in self.tok.added_tokens_decoder.items() if token.special}

    def pieces(self, example: Example) -> Pieces:
        """The whole text as pieces, those that are learned marked."""
        messages = [message for message in example.messages or () if message.role != "system"]
        pieces, whole = self.family.pieces(messages, self.tok.eos_token), rendered(self.tok, self.template, example)
        written = "".join(text for text, _ in pieces)
        assert whole.endswith(written), f"the second way does not know {self.template}: {whole!r}, {written!r}"
        return [(whole[: len(whole) - len(written)], False), *pieces]

    def same(self, one: str, other: str) -> bool:
        """Equal up to what the tokenizer itself does to text: NFC (Qwen), spaces (Phi-3, Mistral)."""
        one, other = (unicodedata.normalize("NFC", text) for text in (one, other))
        if self.name in SPACED:
            one, other = (re.sub(r"\s", "", text) for text in (one, other))
        return one == other

    def problems(self, example: Example, found: Found) -> list[str]:
        """Every difference between what was made and what has to be."""
        ids, learned, wrong = found.tokens.ids.tolist(), found.tokens.learned, []
        joined: list[list[Any]] = []
        for text, mark in self.pieces(example):
            if joined and joined[-1][1] == mark:
                joined[-1][0] += text
            else:
                joined.append([text, mark])
        expected = [(text, mark) for text, mark in joined if text]
        cuts = [0, *(np.flatnonzero(np.diff(learned.astype(int))) + 1).tolist(), len(ids)]
        if len(cuts) - 1 != len(expected):
            return [f"{len(cuts) - 1} pieces, {len(expected)} expected"]
        for start, stop, (text, mark) in zip(cuts, cuts[1:], expected, strict=False):
            texts = (self.tok.decode(ids[start:stop]), self.tok.decode(ids[:stop])[len(self.tok.decode(ids[:start])) :])
            if bool(learned[start]) != mark or not any(self.same(spelt, text) for spelt in texts):
                wrong.append(
                    f"{'learned' if learned[start] else 'not learned'}: {texts[0]!r}, expected {text!r} {mark}"
                )
        wrong += self.special_problems(example, ids)
        if not found.tokens.closed:
            wrong.append("closed is False")
        left_out = [field for index, field in found.tokens.dropped if index >= 0]
        last = int(np.flatnonzero(np.diff(np.r_[False, learned].astype(int)) > 0)[-1])
        if not left_out and found.prompt != ids[:last]:
            wrong.append("the prompt is not what stood before the answer in training")
        return wrong

    def special_problems(self, example: Example, ids: list[int]) -> list[str]:
        """The special tokens of the row must be those of the same conversation with harmless contents, in order."""
        own = self.encode(rendered(self.tok, self.template, harmless(example)))
        wrong = []
        if [i for i in ids if i in self.special] != [i for i in own if i in self.special]:
            wrong.append("a special token stands in a content, or one of the template's is missing")
        if harmless(example) == example and ids not in (
            self.encode(rendered(self.tok, self.template, example)),
            self.cut(example),
        ):
            wrong.append("not the ids of the text as a whole, nor of the prompts and answers in it")
        return wrong

    def cut(self, example: Example) -> list[int]:
        """The ids of the text cut where answers begin, as it is when a model writes them."""
        parts = [""]
        for text, mark in self.pieces(example):
            parts += [""] if mark else []
            parts[-1] += text
        return [number for part in parts for number in self.encode(part)]

    def encode(self, text: str) -> list[int]:
        return self.tok.backend_tokenizer.encode(text, add_special_tokens=False).ids


def harmless(example: Example) -> Example:
    """The same turns with no word in them that means anything to a template or tokenizer."""

    def clean(text: str | None) -> str | None:
        return text if not text or re.fullmatch(r"[a-z0-9][a-z0-9 .?]*[a-z0-9.?]", text) else "x"

    messages = tuple(
        replace(m, content=clean(m.content), reasoning=clean(m.reasoning), tool_calls=tuple(
            called(name, **{key: clean(str(value)) for key, value in values.items()})
            for name, values in calls(m)))
        for m in example.messages or ()
    )  # fmt: skip
    return replace(example, messages=messages)
