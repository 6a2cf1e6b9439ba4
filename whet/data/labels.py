"""Label tasks: names of the classes from the data, and texts as token ids with the tokenizer's special tokens.

The labels decide the task where the recipe does not: names and whole numbers are classes, floats are values, lists are
several labels at once. Classes are sorted (as numbers where all are), so equal data give equal indices whatever the
order of the rows. A label that stands in the held-out rows alone, a set with one class, and rows that mix kinds of
labels are refused: each would train something else than the user means, without a word.

Texts are tokenised as transformers' own pipelines do it: the post-processor's special tokens ([CLS] ... [SEP]), pairs
as pairs, and special tokens that a text spells are special tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from whet.base.errors import UserError, nearest
from whet.data.example import Example
from whet.engine.task import Task, TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 1000
MOST_CLASSES = 10_000
_KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}
_FITS: dict[TaskName, tuple[str, ...]] = {
    "classification": ("a name", "a whole number", "true or false"), "regression": ("a number", "a whole number"),
    "multi_label": ("a list of names", "a list of 0 and 1"),
}  # fmt: skip


def encode_texts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], pairs: Sequence[str] | None = None,
    max_length: int | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """Token ids int32 [T] of each text (with its pair) and the tokenizer's special tokens, cut to `max_length`."""
    return [ids for ids, _ in encode_typed(tokenizer, texts, pairs, max_length)]


def encode_typed(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], pairs: Sequence[str] | None = None,
    max_length: int | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """(token ids int32 [T], token types int8 [T]) of each text; types: 0 for the text, 1 for the tokens of its pair."""
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(texts), CHUNK):
        part = slice(start, start + CHUNK)
        encoded = tokenizer(
            list(texts[part]), None if pairs is None else list(pairs[part]), truncation=max_length is not None,
            max_length=max_length, padding=False, return_token_type_ids=True, return_attention_mask=False,
            verbose=False,
        )  # fmt: skip
        rows += [
            (np.asarray(ids, np.int32), np.asarray(types, np.int8))
            for ids, types in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)  # type: ignore[arg-type]
        ]
    return rows


def task_of(train: Sequence[Example], held_out: Sequence[Example], wanted: TaskName | None) -> tuple[Task, str]:
    """The labelled task of these rows with the names of its classes, and why it is that one.

    wanted: the task in the recipe, if any. Raises UserError for labels that do not fit it or each other.
    """
    kind = _kind([*train, *held_out], wanted)
    name: TaskName = wanted or ("multi_label" if kind.startswith("a list") else
                                "regression" if kind == "a number" else "classification")  # fmt: skip
    if kind not in _FITS[name]:
        example = train[0] if train else held_out[0]
        raise UserError(
            f"the labels do not fit the task {name}", file=example.file, row=example.row, field="label",
            found=_kind_of(example.label), expected=" or ".join(_FITS[name]), fix="model.task=auto takes what fits",
        )  # fmt: skip
    if name == "regression":
        return Task("regression"), f"the labels are {_plural(kind)}"
    learned = {one for example in train for one in _names(example)}
    _check_vectors([*train, *held_out])
    for example in held_out:
        for one in _names(example):
            if one not in learned:
                raise UserError(
                    "the label stands in the held-out rows alone, so it could not be learned", file=example.file,
                    row=example.row, field="label", found=str(one), expected="a label of the rows to learn from",
                    fix="add such rows to learn from, leave this one out, or hold out fewer: data.val_size",
                )  # fmt: skip
    names = _sorted(learned)
    if kind == "a list of 0 and 1":
        names = [str(index) for index in range(len(train[0].label))] if train else []  # type: ignore[arg-type]
    _check_classes(name, names, train)
    return Task(name, tuple(names)), f"the labels are {_plural(kind)}"


def indices(task: Task, examples: Sequence[Example]) -> np.ndarray:
    """The labels of `examples` as training sees them: int64 [R], for values float32 [R], for several float32 [R, C]."""
    if task.name == "regression":
        return np.asarray([example.label for example in examples], dtype=np.float32)
    index_of = {name: index for index, name in enumerate(task.labels)}
    if task.name == "classification":
        return np.asarray([index_of[_text(example.label)] for example in examples], dtype=np.int64)
    matrix = np.zeros((len(examples), len(task.labels)), dtype=np.float32)
    for row, example in enumerate(examples):
        matrix[row, [index_of[name] for name in _names(example)]] = 1
    return matrix


def check_known(task: Task, examples: Sequence[Example]) -> None:
    """Raises UserError for the first label that a trained `task` does not have."""
    for example in examples:
        if task.name == "regression":
            wrong = not isinstance(example.label, int | float) or isinstance(example.label, bool)
            unknown = [label_text(example.label)] if wrong else []
        else:
            unknown = [name for name in map(str, _names(example)) if name not in task.labels]
        if unknown:
            near = nearest(unknown[0], task.labels)
            raise UserError(
                "the run was not trained on this label", file=example.file, row=example.row, field="label",
                found=unknown[0], expected=", ".join(task.labels[:20]) or "a number",
                fix=f"did you mean {near}?" if near else "correct it, or leave the row out",
            )  # fmt: skip


def label_counts(task: Task, labels: np.ndarray) -> dict[str, Any]:
    """Rows of each class, or mean, spread and range of the values."""
    if task.name == "regression":
        wide = labels.astype(np.float64)
        facts = {"mean": wide.mean(), "std": wide.std(), "min": wide.min(), "max": wide.max()} if len(wide) else {}
        return {name: float(value) for name, value in facts.items()}
    counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=len(task.labels))
    return {name: int(count) for name, count in zip(task.labels, counts, strict=True)}


def contradictions(examples: Sequence[Example]) -> int:
    """Count the rows whose text stands in another row with another label."""
    labels: dict[tuple[str | None, str | None], set[Any]] = {}
    for example in examples:
        labels.setdefault((example.text, example.text_pair), set()).add(example.label)
    return sum(len(labels[example.text, example.text_pair]) > 1 for example in examples)


def _kind(examples: Sequence[Example], wanted: TaskName | None) -> str:
    """The kind of all labels; whole numbers among floats are floats, and floats without a fraction may be classes."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(_kind_of(example.label), example)
    kinds = set(first)
    if wanted == "classification" and "a number" in kinds:
        wrong = next((e for e in examples if isinstance(e.label, float) and not e.label.is_integer()), None)
        if wrong is None:
            kinds = kinds - {"a number"} | {"a whole number"}
    if kinds == {"a number", "a whole number"}:
        kinds = {"a number"}
    if kinds == {"a list of names", "an empty list"} or kinds == {"an empty list"}:
        kinds = {"a list of names"}
    if len(kinds) > 1:
        (one, _), (other, example) = list(first.items())[:2]
        raise UserError(
            "the rows have labels of several kinds", file=example.file, row=example.row, field="label",
            found=f"{other}, where the rows before have {one}", expected="one kind of label in all rows",
            fix="write all of them as names, as whole numbers, as numbers with a point, or as lists",
        )  # fmt: skip
    return kinds.pop()


def _kind_of(label: object) -> str:
    if isinstance(label, tuple):
        if not label:
            return "an empty list"
        return "a list of names" if isinstance(label[0], str) else "a list of 0 and 1"
    return _KINDS[type(label)]


def _plural(kind: str) -> str:
    return {
        "a name": "names", "a whole number": "whole numbers", "true or false": "true and false", "a number": "numbers",
        "a list of names": "lists of names", "a list of 0 and 1": "lists of 0 and 1",
    }[kind]  # fmt: skip


def _text(label: Any) -> str:
    """The name of a class."""
    if isinstance(label, bool):
        return "true" if label else "false"
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def label_text(label: Any) -> str:
    """A label as people write it."""
    return ", ".join(map(str, label)) if isinstance(label, tuple) else _text(label) if label is not None else ""


def _names(example: Example) -> Iterator[str]:
    """The names of the classes that a row has."""
    label = example.label
    if not isinstance(label, tuple):
        yield _text(label)
    elif label and isinstance(label[0], str):
        yield from label  # type: ignore[misc]
    else:
        yield from (str(index) for index, value in enumerate(label) if value)


def _sorted(names: set[str]) -> list[str]:
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def _check_vectors(examples: Sequence[Example]) -> None:
    """Refuse lists of 0 and 1 that differ in length."""
    vectors = [e for e in examples if isinstance(e.label, tuple) and e.label and not isinstance(e.label[0], str)]
    for example in vectors:
        if len(example.label) != len(vectors[0].label):  # type: ignore[arg-type]
            raise UserError(
                "the lists of 0 and 1 differ in length", file=example.file, row=example.row, field="label",
                found=f"{len(example.label)} places", expected=f"{len(vectors[0].label)}, as in the first row",  # type: ignore[arg-type]
                fix="write one 0 or 1 for each label, or the names of those that apply",
            )  # fmt: skip


def _check_classes(name: TaskName, names: Sequence[str], train: Sequence[Example]) -> None:
    """Refuse a single class, labels that no row has, and more labels than classes may be."""
    if name == "classification" and len(names) == 1:
        raise UserError(
            "all rows have the same label, so there is nothing to learn", file=train[0].file, field="label",
            found=names[0], expected="two labels or more", fix="add rows of another label",
        )  # fmt: skip
    if name == "multi_label" and not names and train:
        raise UserError(
            "no row has any label", file=train[0].file, field="label", found="empty lists", expected="names of labels",
            fix="add rows that have one",
        )  # fmt: skip
    if len(names) > MOST_CLASSES:
        raise UserError(
            "too many different labels to be classes", file=train[0].file, field="label", found=f"{len(names):,}",
            expected=f"at most {MOST_CLASSES:,}", fix="model.task=regression for values, or data.format for texts",
        )  # fmt: skip


def labels_text(task: str, counts: dict[str, Any]) -> str:
    """One line that describes the labels."""
    if task == "regression":
        return "values of mean {mean:.4g} and spread {std:.4g}, from {min:.4g} to {max:.4g}".format(**counts)
    ranked = sorted(counts.items(), key=lambda pair: -pair[1])
    shown = ", ".join(f"{name}: {count:,}" for name, count in (ranked if len(ranked) <= 8 else ranked[:3]))
    if len(ranked) <= 8:
        return f"{len(ranked)} labels ({shown})"
    return f"{len(ranked)} labels (most rows: {shown}; fewest: {ranked[-1][0]}: {ranked[-1][1]:,})"


def imbalance(counts: dict[str, int]) -> float | None:
    """The ratio of the rows of the largest class to those of the smallest, or None if a class has none."""
    present = list(counts.values())
    return max(present) / min(present) if present and min(present) else None
