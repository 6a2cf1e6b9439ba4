"""Conversations rendered to text with character spans: what each message wrote, and where its turn ends.

A template is run on strings that remember their source (`template.traced`), so the text itself says which characters
came from which message, whatever the template did with them: strip them, drop earlier thinking, write them as JSON, put
the system message into the user's turn. What an answer is, is what a model writes: from the end of the generation
prompt, which is rendered too, to the token that closes the turn. A template that leaves out a part of a message is
reported; one that leaves out a whole answer or call, or mixes turns, is refused. Nothing is found by searching.

Most rows are plain turns in a usual order. Those that follow the template's own words have their spans without being
traced, and where it is sure that they will, without running the template (`template.skeleton`); any other row is
traced.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from whet.base.errors import UserError
from whet.data.example import Example, Message, PlainTurns, Role, plain_turns_of
from whet.data.template.isolated import SECONDS, IsolatedTemplate, Run, TemplateLimit, TemplateRefusal
from whet.data.template.named import LARGEST, NAMED, use_template
from whet.data.template.render_process import REASONING
from whet.data.template.sandbox import attributes
from whet.data.template.skeleton import Skeleton, SkeletonLookup, filled, follow
from whet.data.template.spans import LastAnswer, Rendered, Turn, dropped, lost_source, turns_of
from whet.data.template.traced import restored, spans_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["LARGEST", "NAMED", "Chat", "Rendered", "Template", "Turn", "contract", "use_template"]

Chat = Example | Sequence[Message]
# Of each message its role, whether it says something, whether it thinks, and how many tools it calls; and of the whole
# whether tools are defined.
Shape = tuple[tuple[tuple[str, bool, bool, int], ...], bool]
_SHORT: tuple[tuple[Role, str], ...] = (("user", "a"), ("assistant", "b"))
_PROBE_TOOLS = (
    '[{"type": "function", "function": {"name": "qztool", "description": "qztool", "parameters": '
    '{"type": "object", "properties": {"qztool": {"type": "string", "description": "qztool"}}, "required": []}}}]'
)


class Template:
    """The tokenizer's chat template, with the spans of what it renders."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, slowest_seconds: float = SECONDS) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "the model has no chat template, so conversations cannot be rendered",
                field="model.chat_template",
                found="none",
                expected=f"{', '.join(NAMED)} or a .jinja file",
                fix="model.chat_template=alpaca (or chatml when the vocabulary has its markers)",
            )
        self.tokenizer = tokenizer
        sources = tokenizer.chat_template
        # A model may have one template for conversations with tools and another for the rest.
        several: dict[str, str] = sources if isinstance(sources, dict) else {"default": str(sources)}
        self._plain_source = several.get("default", next(iter(several.values())))
        self._tool_source = several.get("tool_use", self._plain_source)
        added = tokenizer.added_tokens_decoder.values()
        self.specials = sorted({str(t) for t in added if t.special} | set(tokenizer.all_special_tokens), key=len)[::-1]
        self.special = re.compile("|".join(re.escape(token) for token in self.specials) or r"(?!)")
        self._variables = dict(tokenizer.special_tokens_map)
        self._plain_run = IsolatedTemplate(self._plain_source, self._variables, slowest_seconds)
        self._tool_run = IsolatedTemplate(self._tool_source, self._variables, slowest_seconds)
        self._skeletons = lru_cache(maxsize=4096)(self._learn_skeleton)
        self._lookup = SkeletonLookup(self._plain_run, self._skeletons)
        self._tails = lru_cache(maxsize=4096)(self._try_tail)
        self._last_answers = lru_cache(maxsize=4096)(self._try_last_answer)
        self._check_cost()

    def _check_cost(self) -> None:
        """Refuse a template that is too large, or does not come to an end on two short messages."""
        if max(len(self._plain_source), len(self._tool_source)) > LARGEST:
            raise UserError(
                "the chat template is too large", field="model.chat_template",
                expected=f"at most {LARGEST:,} characters", fix="use model.chat_template=chatml or alpaca",
            )  # fmt: skip
        with contextlib.suppress(TemplateRefusal):  # it will be said of the row that it concerns
            self._plain_run.run(Run("plain", [self._plain(Message(*turn)) for turn in _SHORT], None, False))

    def text(self, chat: Chat, *, prompt: bool = False) -> str:
        """The rendered conversation; with `prompt`, followed by the header of the answer to come."""
        messages, tools = _messages_and_tools(chat)
        plain = [self._plain(message) for message in messages]
        return self._run("plain", plain, tools, prompt)

    def prompt(self, chat: Chat) -> Rendered:
        """The prompt that asks for the next answer, with its turns where the text shows them."""
        messages, tools = _messages_and_tools(chat)
        traced = self._traced(messages, tools, True)
        turns: tuple[Turn, ...] = ()
        try:
            turns = self._turns(traced, messages, tools, ())
        except TemplateLimit:
            raise
        except UserError:
            pass  # what cannot be learned can be asked all the same
        return self._with_data(traced, turns)

    def lead(self, question: Chat) -> str:
        """The text that a tuned model writes before its answer to `question`, as it learned to: mostly ""."""
        messages, tools = _messages_and_tools(question)
        rendered = self._exact([*_probes(_shape(messages, tools)), Message("assistant", "qzlead")], tools)
        turn = rendered.turns[-1]
        return rendered.text[turn.start : turn.content]

    def skeleton(self, turns: PlainTurns | None) -> Skeleton | None:
        """The skeleton of a row, where it is sure without running the template; None for turns that are not plain.

        The lookup counts how often an order of roles comes, so this is to be asked once for each row.
        """
        return None if turns is None else self._lookup.skeleton(turns)

    def render(self, chats: Sequence[Chat], skeletons: Sequence[Skeleton | None] | None = None) -> list[Rendered]:
        """Text and turns of each conversation. Raises UserError for one that the template cannot render exactly.

        skeletons: the answers of `skeleton` for these conversations, if they were asked for already.
        """
        turns = [plain_turns_of(chat) for chat in chats]
        if skeletons is None:
            skeletons = [self.skeleton(one) for one in turns]
        self._ask_ahead(chats, turns, skeletons)
        return [self._of_row(*each) for each in zip(chats, turns, skeletons, strict=True)]

    def _ask_ahead(
        self, chats: Sequence[Chat], turns: Sequence[PlainTurns | None], skeletons: Sequence[Skeleton | None]
    ) -> None:
        """Ask for the runs that these conversations need, many at once."""
        plain: list[Run] = []
        others: list[Run] = []
        for chat, row, skeleton in zip(chats, turns, skeletons, strict=True):
            if skeleton is not None or len(chats) == 1:
                continue
            messages, tools = _messages_and_tools(chat)
            values = [self._plain(message) for message in messages]
            if row is not None and self._skeletons(row.roles) is not None:
                plain.append(Run("plain", values, None, False))
                continue
            runs = plain if tools is None else others
            runs.append(Run("traced", values, tools, False))
            if messages and messages[-1].role == "assistant":
                runs.append(Run("traced", values[:-1], tools, True))
        self._plain_run.ask_ahead(plain)
        self._tool_run.ask_ahead(others)

    def _of_row(self, chat: Chat, turns: PlainTurns | None, skeleton: Skeleton | None) -> Rendered:
        """The result of `_rendered`; an error names the row that the conversation comes from."""
        try:
            return self._rendered(chat, turns, skeleton)
        except UserError as error:
            if isinstance(chat, Example) and chat.file:
                error.file, error.row = error.file or chat.file, error.row or chat.row
            raise

    def _rendered(self, chat: Chat, turns: PlainTurns | None, skeleton: Skeleton | None) -> Rendered:
        if turns is not None and skeleton is not None:
            return filled(skeleton, turns.contents)
        messages, tools = _messages_and_tools(chat)
        skeleton = None if turns is None else self._skeletons(turns.roles)
        if skeleton is not None:
            text = self._run("plain", [{"role": m.role, "content": m.content} for m in messages], None, False)
            rendered = follow(text, messages, skeleton)
            if rendered is not None:
                return rendered
        return self._exact(messages, tools)

    def _plain(self, message: Message) -> dict[str, Any]:
        """The message as templates are given one."""
        values: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning is not None:
            known = attributes(self._plain_source) | attributes(self._tool_source)
            values |= {name: message.reasoning for name in REASONING if name in known}
        if message.tool_calls:
            values["tool_calls"] = list(message.tool_calls)
        if message.name is not None:
            values["name"] = message.name
        if message.tool_call_id is not None:
            values["tool_call_id"] = message.tool_call_id
        return values

    def _traced(self, messages: Sequence[Message], tools: str | None, prompt: bool) -> str:
        """The rendered text, with its sources."""
        return self._run("traced", [self._plain(message) for message in messages], tools, prompt)

    def _run(self, kind: str, messages: list[dict[str, Any]], tools: str | None, prompt: bool) -> str:
        try:
            reply = (self._plain_run if tools is None else self._tool_run).run(Run(kind, messages, tools, prompt))
        except TemplateRefusal as error:
            raise UserError(
                f"the chat template refuses this conversation: {error}",
                field="messages",
                found=" ".join(message["role"] for message in messages) + (", with tools" if tools else ""),
                expected="roles in the order that the model's template accepts",
                fix="remove what it names (a system message, a tool), or use model.chat_template=chatml",
            ) from error
        return restored(reply["text"], reply["spans"])

    def _exact(self, messages: Sequence[Message], tools: str | None) -> Rendered:
        """The conversation with every turn found by tracing. Raises UserError."""
        traced = self._traced(messages, tools, False)
        shape = _shape(messages, tools)
        left_out = dropped(traced, messages, tools)
        if left_out and (name := lost_source(self._traced(_probes(shape), _PROBE_TOOLS if tools else None, False))):
            raise UserError(
                "the chat template builds its text in a way that could not be followed", field="model.chat_template",
                found=f"the source of {name} was lost", expected="contents that are joined, stripped, cut or split",
                fix="use model.chat_template=chatml, or a template that joins text with + or ~",
            )  # fmt: skip
        turns = self._turns(traced, messages, tools, left_out)
        if not left_out and len(turns) > 1 and turns[-1].role == "assistant" and turns[-1].index == len(messages) - 1:
            self._check_prompt(str.__str__(traced), messages, tools)
        return self._with_data(traced, turns, left_out)

    def _turns(
        self, traced: str, messages: Sequence[Message], tools: str | None, left_out: Sequence[tuple[int, str]]
    ) -> tuple[Turn, ...]:
        shape = _shape(messages, tools)

        def actual_tail(index: int) -> tuple[int | None, str]:
            return _tail(self._traced(messages[:index], tools, True))

        return turns_of(
            traced, messages, left_out,
            last_answer=lambda index: self._last_answers(_head(shape, index + 1)),
            tails=lambda index: (self._tails(_head(shape, index)), lambda: actual_tail(index)),
            closing=self._closing,
        )  # fmt: skip

    def _check_prompt(self, text: str, messages: Sequence[Message], tools: str | None) -> None:
        """Refuse a template that writes what is before the last answer otherwise when it asks for that answer."""
        asked = str.__str__(self._traced(messages[:-1], tools, True))
        if not text.startswith(asked):
            same = next((at for at, (a, b) in enumerate(zip(text, asked, strict=False)) if a != b), len(text))
            raise UserError(
                "the chat template rewrites what came before, when it asks for the last answer",
                field="model.chat_template",
                found=f"turn {len(messages)}: …{text[same : same + 20]!r}, in the prompt …{asked[same : same + 20]!r}",
                expected="the text before an answer, as in a whole conversation",
                fix="mend the template, or use model.chat_template=chatml",
            )

    def _with_data(self, traced: str, turns: Sequence[Turn], left_out: Sequence[tuple[int, str]] = ()) -> Rendered:
        """The rendered conversation, with the spans of its data and the count of special tokens in the other text."""
        data: list[tuple[int, int]] = []
        for span in sorted(spans_of(traced)):
            if data and span.start <= data[-1][1]:
                data[-1] = (data[-1][0], max(span.end, data[-1][1]))
            else:
                data.append((span.start, span.end))
        text = str.__str__(traced)
        edges = [0, *(edge for pair in data for edge in pair), len(text)]
        markers = sum(len(self.special.findall(text[a:b])) for a, b in zip(edges[::2], edges[1::2], strict=True))
        return Rendered(text, tuple(turns), tuple(data), markers, tuple(left_out))

    def _closing(self, literal: str) -> int:
        """Characters of `literal` up to the end of the first special token in it, 0 when it has none."""
        token = self.special.search(literal)
        return token.end() if token else 0

    def _try_tail(self, shape: Shape) -> tuple[int | None, str] | None:
        """The last content in a prompt and the text behind it, as `_tail`, in a trial; None if the trial is refused."""
        try:
            return _tail(self._traced(_probes(shape), _PROBE_TOOLS if shape[1] else None, True))
        except TemplateLimit:
            raise
        except UserError:
            return None

    def _try_last_answer(self, shape: Shape) -> LastAnswer | None:
        """The last answer of a trial: its end token, and how often it says each field; None if it is refused."""
        try:
            traced = self._traced(_probes(shape), _PROBE_TOOLS if shape[1] else None, False)
        except TemplateLimit:
            raise
        except UserError:
            return None
        last = len(shape[0]) - 1
        spans = [span for span in spans_of(traced) if span.source.message == last]
        end = max((span.end for span in spans), default=len(traced))
        fields = [span.source.field for span in spans]
        closing = self.special.search(str.__str__(traced), end)
        return LastAnswer(closing.group() if closing else "", {field: fields.count(field) for field in fields})

    def _learn_skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        """The skeleton for an order of roles, from a trial; None if the template does more with plain turns than to
        write them one after the other."""
        shape: Shape = (tuple((role, True, False, 0) for role in roles), False)
        try:
            trial = self._exact(_probes(shape), None)
        except TemplateLimit:
            raise
        except UserError:
            return None
        if [turn.index for turn in trial.turns] != list(range(len(roles))) or trial.dropped:
            return None
        literals, turns, end = [], [], 0
        for turn, probe in zip(trial.turns, _probes(shape), strict=True):
            if trial.text[turn.content : turn.end] != probe.content or turn.content < end:
                return None
            literals.append(trial.text[end : turn.content])
            turns.append((turn.role, turn.content - turn.start, turn.stop - turn.end, turn.closed))
            end = turn.end
        return Skeleton((*literals, trial.text[end:]), tuple(turns), trial.markers)


def _tail(traced: str) -> tuple[int | None, str]:
    """The message of the last content in a rendered text, and the text behind it."""
    last = max(spans_of(traced), key=lambda span: (span.end, span.start), default=None)
    return (None, str.__str__(traced)) if last is None else (last.source.message, str.__str__(traced)[last.end :])


def _messages_and_tools(chat: Chat) -> tuple[Sequence[Message], str | None]:
    return (chat.messages or (), chat.tools) if isinstance(chat, Example) else (chat, None)


def _shape(messages: Sequence[Message], tools: str | None) -> Shape:
    return (
        tuple((m.role, bool(m.content), m.reasoning is not None, len(m.tool_calls)) for m in messages),
        tools is not None,
    )


def _head(shape: Shape, count: int) -> Shape:
    return shape[0][:count], shape[1]


def _probes(shape: Shape) -> list[Message]:
    """A conversation of this shape whose words occur nowhere else."""
    return [
        Message(
            role,  # type: ignore[arg-type]
            f"qzx{index}xzq" if says else "",
            f"qzr{index}rzq" if thinks else None,
            tuple(
                {"type": "function", "function": {"name": f"qzn{index}n{n}zq", "arguments": {"qz": f"qza{index}a{n}"}}}
                for n in range(calls)
            ),
        )
        for index, (role, says, thinks, calls) in enumerate(shape[0])
    ]


def contract(tokenizer: PreTrainedTokenizerFast, goldens: Sequence[tuple[dict[str, Any], list[int], list[int]]]) -> str:
    """JSON saved beside an adapter: the template and conversations with their exact token ids (DESIGN section 4)."""
    record: dict[str, Any] = {
        "chat_template": tokenizer.chat_template,
        "eos_token": tokenizer.eos_token,
        "golden": [{**conversation, "ids": ids, "prompt": prompt} for conversation, ids, prompt in goldens],
    }
    return json.dumps(record, ensure_ascii=False, indent=1)
