"""Records of any known format -> `Example`s of one shape.

The format is recognised once, from the first rows, and every row must then keep to it: a row that only resembles the
others is an error with its place, never a guess. Fields nobody knows are ignored, but a field that would change what
is learned (tools, reasoning, weights, preferences) is refused until whet can honour it.
A file that mixes formats has to be split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Literal

from whet.base.errors import UserError, nearest
from whet.data.example import Example, Message, Role
from whet.data.label_field import Labelled, read_label
from whet.data.read import TURN_FIELDS, Record, kind_of

FormatName = Literal["alpaca", "messages", "sharegpt", "prompt_completion", "text", "classification"]

# What each format needs, and what it takes besides. Turns may stand in any of TURN_FIELDS.
_FIELDS: dict[FormatName, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "messages": (("messages",), ("system",)),
    "sharegpt": (("conversations",), ("system",)),
    "prompt_completion": (("prompt", "completion"), ("system",)),
    "text": (("text",), ()),
    "classification": (("text", "label"), ("text_pair",)),
}
_EXPECTED = (
    "alpaca (instruction, output), prompt_completion (prompt, completion), text (text), classification (text, label), "
    "messages (messages: a list of {role, content}) or sharegpt (conversations: a list of {from, value})"
)
_PAIRS = (("question", "answer"), ("query", "response"), ("input", "output"))
_LATER = "not supported yet"
_UNSUPPORTED_FIELDS = frozenset(("tools", "functions", "images", "image", "videos", "audios", "audio"))
_UNSUPPORTED_IN_TURN = _UNSUPPORTED_FIELDS | {"tool_calls", "function_call", "reasoning", "reasoning_content"}
_WEIGHTS = frozenset(("loss_weight", "weight", "train", "training"))
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_OPENAI = ("role", "content", _ROLES)
_SHAREGPT: tuple[str, str, dict[str, Role]] = ("from", "value", {**_ROLES, "human": "user", "gpt": "assistant"})
_ABSENT = object()
_TOOL_ROLES = frozenset(("tool", "function", "function_call", "tool_call", "observation", "tool_response", "ipython"))


@dataclass(frozen=True, slots=True)
class Format:
    """name: which format. reason: the fields that say so, for people. needed: the fields that every row must have."""

    name: FormatName
    reason: str
    needed: tuple[str, ...]

    @property
    def known(self) -> set[str]:
        return {*self.needed, *_FIELDS[self.name][1]}


@dataclass(slots=True)
class Dropped:
    """The rows left out under `empty="drop"`, each as (file, row, reason)."""

    rows: list[tuple[str, int, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)


class NothingToLearn(UserError):
    """A row whose answer is blank: an error, or dropped when the user said so."""


def recognise(records: Sequence[Record], columns: Mapping[str, str], name: FormatName | None = None) -> Format:
    """The format of `records` (the first hundred or so), after renaming by `columns` (our name -> the file's name).

    With `name` only that format is considered. `UserError` when none fits or several do, and for preference data.
    """
    if not records:
        raise UserError("there are no rows to recognise a format from", "give at least one row")
    _check_columns(records, columns)
    values = [_rename(record.value, columns) for record in records]
    names = tuple(dict.fromkeys(key for value in values for key in value))
    _refuse_feedback(records, values, names)
    plain: tuple[FormatName, ...] = ("alpaca", "prompt_completion", "text", "classification")
    fits = [Format(format, "", _FIELDS[format][0]) for format in plain if set(_FIELDS[format][0]) <= set(names)]
    fits += [Format(_turn_format(values, key), "", (key,)) for key in TURN_FIELDS if key in names]
    fits = [fit for fit in fits if name in (None, fit.name) and set(columns) <= fit.known]
    if len(fits) > 1:  # `text` beside a conversation is that conversation rendered, as in the original Alpaca file
        fits = [fit for fit in fits if fit.name not in ("text", "classification")] or fits[-1:]
    if len(fits) != 1:
        raise _unsure(records[0], fits, names, columns, name or "any known format")
    used = [f"{key} (from {columns[key]})" if key in columns else key for key in names if key in fits[0].known]
    ignored = [key for key in names if key not in fits[0].known]
    reason = f"fields {', '.join(used)}" + (f"; ignored: {', '.join(ignored)}" if ignored else "")
    return replace(fits[0], reason=reason)


def standardise(
    records: Iterable[Record],
    format: Format,
    columns: Mapping[str, str],
    *,
    empty: Literal["error", "drop"] = "error",
    dropped: Dropped | None = None,
) -> Iterator[Example]:
    """The examples of `records`, in order. With `empty="drop"` blank answers are left out and listed in `dropped`."""
    assert empty == "error" or dropped is not None, "rows are never dropped without being counted"
    convert = _CONVERTERS[format.name]
    nothing = True
    for record in records:
        value = _rename(record.value, columns)
        try:
            if not _UNSUPPORTED_FIELDS.isdisjoint(value):
                _refuse_filled(value, _UNSUPPORTED_FIELDS, "")
            content = convert(value, format.needed[0])
        except UserError as error:
            error.file, error.row, error.field = record.file, record.row, _original(error.field, columns)
            if empty == "drop" and isinstance(error, NothingToLearn) and dropped is not None:
                dropped.rows.append((record.file, record.row, f"field {error.field}: {error.problem}"))
                continue
            raise
        nothing = False
        if isinstance(content, Labelled):
            yield Example(_hash(content.parts()), None, content.text, record.file, record.row, content.label,
                          content.pair)  # fmt: skip
        elif isinstance(content, str):
            yield Example(_hash(["text", content]), None, content, record.file, record.row)
        else:
            parts = [part for message in content for part in (message.role, message.content)]
            yield Example(_hash(parts), tuple(content), None, record.file, record.row)
    if nothing and dropped:
        file, row, reason = dropped.rows[0]
        raise UserError("nothing to learn: every row is blank", "check the field", file, row, found=reason)


def _hash(parts: list[str]) -> str:
    """NUL separates the parts; no content holds one (see `_string`), so different parts never join to one string."""
    return sha256("\0".join(parts).encode()).hexdigest()[:16]


def _rename(value: dict, columns: Mapping[str, str]) -> dict:
    """`value` under our names. Mapped fields are moved; what a mapping replaces is gone, even in a row without it."""
    if not columns:
        return value
    taken = {*columns, *columns.values()}
    renamed = {name: item for name, item in value.items() if name not in taken}
    return renamed | {ours: value[theirs] for ours, theirs in columns.items() if theirs in value}


def _original(path: str | None, columns: Mapping[str, str]) -> str | None:
    """A path such as messages[2].content in the names of the file."""
    head = re.split(r"[.\[]", path or "", maxsplit=1)[0]
    return columns.get(head, head) + path[len(head) :] if path else None


def _check_columns(records: Sequence[Record], columns: Mapping[str, str]) -> None:
    ours = {name for needed, optional in _FIELDS.values() for name in (*needed, *optional, *TURN_FIELDS)}
    theirs = tuple(dict.fromkeys(name for record in records for name in record.value))
    for name, source in columns.items():
        if name not in ours:
            near, expected = nearest(name, ours), f"one of {', '.join(sorted(ours))}"
            fix = f"did you mean data.columns.{near}?" if near else "write data.columns.NAME=FIELD"
            raise UserError("unknown name", fix, field=f"data.columns.{name}", found=name, expected=expected)
        if source not in theirs:
            near = nearest(source, theirs)
            fix = f"did you mean data.columns.{name}={near}?" if near else "name a field of the file"
            problem, expected = f"no row has the field {source}", f"one of {', '.join(theirs)}"
            raise UserError(problem, fix, records[0].file, None, f"data.columns.{name}", source, expected)


def _refuse_feedback(records: Sequence[Record], values: list[dict], names: Sequence[str]) -> None:
    fix = "whet trains on single answers: keep the good ones, under `completion` or as the last of `messages`"
    for refused in ("rejected", "rejected_messages"):
        if refused in names:
            problem, found = f"preference data, which is {_LATER}", f"fields {', '.join(names)}"
            raise UserError(problem, f"{fix}; then remove `{refused}`", records[0].file, records[0].row, refused, found)
    for record, value in zip(records, values, strict=True):
        for name in ("label", "kto_tag"):
            if isinstance(value.get(name), bool) and not {"completion", "output", *TURN_FIELDS}.isdisjoint(value):
                problem, found = f"boolean feedback (preference data), which is {_LATER}", kind_of(value[name])
                raise UserError(problem, f"{fix}; then remove `{name}`", record.file, record.row, name, found)


def _turn_format(values: list[dict], key: str) -> FormatName:
    """Whether the turns under `key` speak of role and content or of from and value; the first turn decides."""
    lists = [value[key] for value in values if isinstance(value.get(key), list)]
    first = next((turn for turns in lists for turn in turns if isinstance(turn, dict)), {})
    return "sharegpt" if "from" in first and "value" in first else "messages"


def _unsure(first: Record, fits: list[Format], names: Sequence[str], columns: Mapping[str, str], ask: str) -> UserError:
    found = kind_of(first.value)
    if fits:
        problem = f"the fields fit several formats: {', '.join(fit.name for fit in fits)}"
        fix = "say which is meant, e.g. " + " ".join(f"data.columns.{n}={columns.get(n, n)}" for n in fits[0].needed)
        return UserError(problem, fix, first.file, first.row, found=found, expected="the fields of one format")
    pair = next((pair for pair in _PAIRS if set(pair) <= set(names)), None)
    known = {name for needed, optional in _FIELDS.values() for name in (*needed, *optional)}
    near = {name: nearest(name, known - set(names)) for name in names if name not in known}
    misspelt = " ".join(f"data.columns.{ours}={theirs}" for theirs, ours in near.items() if ours)
    fix = "say which fields are meant, e.g. data.columns.prompt={} data.columns.completion={}"
    fix = f"did you mean {misspelt}?" if misspelt and not pair else fix.format(*(pair or _PAIRS[0]))
    return UserError(f"the fields do not fit {ask}", fix, first.file, first.row, found=found, expected=_EXPECTED)


def _alpaca(value: dict, _: str) -> list[Message]:
    """instruction and input become one user turn, a blank line between them; history comes before it."""
    messages = _system(value)
    history = value.get("history") or []
    for index, pair in enumerate(history if isinstance(history, list) else [history]):
        where = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise _wrong(where, pair, "a list [user, assistant]", "write history as a list of such pairs")
        messages.append(Message("user", _string(pair[0], f"{where}[0]")))
        messages.append(Message("assistant", _answer(pair[1], f"{where}[1]")))
    prompt = _string(_require(value, "instruction"), "instruction")
    extra = value.get("input")
    if extra is not None and (extra := _string(extra, "input")) and not extra.isspace():
        prompt = f"{prompt}\n\n{extra}" if prompt and not prompt.isspace() else extra
    messages.append(Message("user", prompt))
    messages.append(Message("assistant", _answer(_require(value, "output"), "output")))
    return messages


def _messages(value: dict, key: str) -> list[Message]:
    return _conversation(value, _turns(_require(value, key), key), key)


def _sharegpt(value: dict, key: str) -> list[Message]:
    return _conversation(value, _turns(_require(value, key), key, _SHAREGPT), key)


def _prompt_completion(value: dict, _: str) -> list[Message]:
    """Two strings, or two lists of turns. An answer in the prompt is refused: later it would be learned too."""
    prompt, completion = _require(value, "prompt"), _require(value, "completion")
    if isinstance(prompt, list) and isinstance(completion, list) and prompt and isinstance(prompt[0], dict):
        turns = _turns(prompt, "prompt")
        if any(turn.role == "assistant" for turn in turns):
            fix = "put all turns into one field `messages`; data.loss_on says which answers are learned"
            raise UserError("an answer inside the prompt", fix, field="prompt", found="an assistant turn")
        return _conversation(value, turns + _turns(completion, "completion"), "prompt+completion")
    turns = [Message("user", _string(prompt, "prompt")), Message("assistant", _answer(completion, "completion"))]
    return _system(value) + turns


def _classification(value: dict, _: str) -> Labelled:
    """A text with its label; a pair of texts where there is a second one."""
    text, pair = _answer(_require(value, "text"), "text", "text"), value.get("text_pair")
    if value.get("label") is None:
        fix = "write the label, or leave such rows out with data.empty=drop"
        raise NothingToLearn("the label is missing", fix, field="label", found=kind_of(value), expected="label")
    return Labelled(text, None if pair is None else _string(pair, "text_pair"), read_label(value["label"]))


_CONVERTERS: dict[FormatName, Callable[[dict, str], list[Message] | str | Labelled]] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "text": lambda value, _: _answer(_require(value, "text"), "text", "text"),
    "classification": _classification,
}


def _turns(turns: object, key: str, dialect: tuple[str, str, dict[str, Role]] = _OPENAI) -> list[Message]:
    role_key, content_key, roles = dialect
    if not isinstance(turns, list) or not turns:
        raise _wrong(key, turns, f"a list of {{{role_key}, {content_key}}}", "write a question and its answer")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        where = f"{key}[{index}]"
        if not isinstance(turn, dict) or role_key not in turn:
            raise _wrong(where, turn, f"an object {{{role_key}, {content_key}}}", "write each turn as such an object")
        role = roles.get(name) if isinstance(name := turn[role_key], str) else None
        if role is None:
            raise _unknown_role(name, f"{where}.{role_key}", roles)
        if not _UNSUPPORTED_IN_TURN.isdisjoint(turn):
            _refuse_filled(turn, _UNSUPPORTED_IN_TURN, where + ".")
        if not _WEIGHTS.isdisjoint(turn):
            _check_weights(turn, role, where)
        read = _answer if role == "assistant" else _string
        messages.append(Message(role, read(turn.get(content_key, _ABSENT), f"{where}.{content_key}")))
    return messages


def _conversation(value: dict, turns: list[Message], key: str) -> list[Message]:
    """Refuse turns in an order that a chat template would drop, merge or render as something else."""
    messages = _system(value) + turns
    previous = ""
    for index, message in enumerate(messages):
        if message.role == "system" and index > 0:
            problem = "two system messages" if messages[0].role == "system" else "the system message is not the first"
            fix = "keep one system message, as the first"
        elif message.role == previous:
            problem, fix = f"two {previous} turns in a row", "join them into one turn or split the conversation"
        else:
            previous = message.role
            continue
        place = index - (len(messages) - len(turns))
        raise UserError(problem, fix, None, None, f"{key}[{place}]", message.role, "user and assistant in turn")
    if previous != "assistant":
        answers = any(message.role == "assistant" for message in messages)
        problem = f"the conversation ends with a {previous} turn" if answers else "no assistant turn: nothing to learn"
        fix = "add the answer, or remove the last turn" if answers else "add an assistant turn"
        raise UserError(problem, fix, field=key, found=f"last role {previous}", expected="last role assistant")
    return messages


def _require(value: dict, name: str) -> object:
    if name in value:
        return value[name]
    near = nearest(name, value)
    fix = f"did you mean the field {near}?" if near else "add the field, or remove the row"
    raise UserError(f"the field {name} is missing", fix, field=name, found=kind_of(value), expected=name)


def _system(value: dict) -> list[Message]:
    """The system message of a row that keeps it in a field of its own; exporters write an absent one as null or ""."""
    content = value.get("system")
    return [] if content is None or content == "" else [Message("system", _string(content, "system"))]


def _string(value: object, where: str) -> str:
    text = value if isinstance(value, str) else _join_parts(value, where)
    if "\0" in text:
        fix, found = "remove it: no text holds one", f"\\u0000 at character {text.index(chr(0))}"
        raise UserError("a NUL character", fix, field=where, found=found, expected="text")
    return text


def _answer(value: object, where: str, what: str = "answer") -> str:
    text = _string(value, where)
    if not text or text.isspace():
        fix = f"write the {what}, or leave such rows out with data.empty=drop"
        raise NothingToLearn(f"nothing to learn: the {what} is blank", fix, None, None, where, kind_of(text), "text")
    return text


def _join_parts(value: object, where: str) -> str:
    """Content written as a list of parts, as multimodal data sets do even for plain text."""
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        raise _wrong(where, value, "a string", "write it as a string")
    texts: list[str] = []
    for index, part in enumerate(value):
        here, kind = f"{where}[{index}]", part.get("type")
        if kind != "text":
            problem, fix = f"content parts of this type are {_LATER}", "remove such parts, or the rows that hold them"
            raise UserError(problem, fix, None, None, here, f"type {kind}", "type text")
        text = part.get("text", part.get("value"))
        if not isinstance(text, str):
            raise _wrong(here, text, 'a string under "text" or "value"', "write the text as a string")
        texts.append(text)
    return "".join(texts)


def _check_weights(turn: dict, role: Role, where: str) -> None:
    """A weight that says something else than "learn the answers, all of them" must not be passed over."""
    wanted = 1 if role == "assistant" else 0
    for name in sorted(_WEIGHTS.intersection(turn)):
        if turn[name] not in (None, wanted):
            problem = f"weights other than 1 for answers and 0 for the rest are {_LATER}"
            fix = f"remove `{name}`; data.loss_on says which answers are learned"
            raise UserError(problem, fix, None, None, f"{where}.{name}", kind_of(turn[name]), str(wanted))


def _refuse_filled(value: dict, names: frozenset[str], prefix: str) -> None:
    for name in sorted(names.intersection(value)):
        if value[name] not in (None, "", [], {}, "[]"):
            fix = f"remove `{name}` if the answers do not depend on it, or leave such rows out"
            raise UserError(f"{name}: {_LATER}", fix, None, None, prefix + name, kind_of(value[name]))


def _unknown_role(name: object, where: str, roles: Mapping[str, Role]) -> UserError:
    expected = f"one of {', '.join(roles)}"
    if not isinstance(name, str):
        return _wrong(where, name, expected, "give the turn a role")
    if name in _TOOL_ROLES:
        return UserError(f"tool turns are {_LATER}", "leave out such rows", None, None, where, name, expected)
    near = nearest(name, roles)
    fix = f"did you mean {near}?" if near else "rename it to one of those"
    return UserError("unknown role", fix, None, None, where, name, expected)


def _wrong(where: str, value: object, expected: str, fix: str) -> UserError:
    found = "no such field" if value is _ABSENT else kind_of(value)
    return UserError("wrong kind of value", fix, field=where, found=found, expected=expected)
