"""Write augmented rows to a file for `data.added_dataset`, and read their origin back.

Each line is a row in a usual format (messages, prompt and completion, text with label), and beside it `origin`: the
source row, model, endpoint, date and prompt. The file is read back before it takes its name, and every row must have
the id that it was written with; so nothing that a row holds can be lost on the way.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any

from whet.base.console import Progress, say
from whet.base.errors import UserError, shorten
from whet.data.detect.duplicates import near_duplicates
from whet.data.example import Example, Message
from whet.data.format.recognise import recognise
from whet.data.format.standardise import standardise
from whet.data.judge.augment import Origin, paraphrased, text_to_paraphrase
from whet.data.judge.endpoint import Endpoint
from whet.data.judge.output import json_lines, replies_beside
from whet.data.read.read import Record
from whet.data.removed import Removed

ORIGIN = "origin"
UNUSABLE = "no usable reply"
SAMPLE = 100


def refused_beside(out: Path) -> Path:
    """The path of the list of paraphrases that are left out: added.jsonl -> added-refused.jsonl."""
    return out.with_name(f"{out.stem}-refused.jsonl")


def augment_rows(
    examples: Sequence[Example], held_out: Container[str], endpoint: Endpoint, out: Path, copies: int = 2
) -> dict[str, Any]:
    """Ask for paraphrases of each example and write the new rows to `out`; returns the summary for `--json`.

    examples: rows to learn from, none of them held out; held_out: ids of the rows of the other sides. Refused
    paraphrases are listed in the file beside `out`. Raises UserError as `ask_all` does.
    """
    total = sum(bool(text_to_paraphrase(example).strip()) for example in examples)
    if not total:
        raise UserError("there is no row to paraphrase", "name data with questions or texts", field="data.dataset")
    near_duplicates([])  # a missing package is said before anything is paid for
    split = all(example.completion_from is not None for example in examples)
    reasons: Counter[str] = Counter()
    written = 0

    def counted(bar: Progress) -> Iterator[Example]:
        for example in examples:
            if text_to_paraphrase(example).strip():
                bar.advance("rows")
                yield example

    with json_lines((out, _is_ours), (refused_beside(out), _is_refusal)) as (rows, refused):

        def note(removed: Removed) -> None:
            reasons[_kind(removed.reason)] += 1
            refused.write(removed.to_json() + "\n")

        with Progress("paraphrasing rows", total) as bar:
            source = counted(bar)
            for example, origin in paraphrased(source, endpoint, replies_beside(out), copies, held_out, note):
                rows.write(json.dumps(row_of(example, origin, split=split), ensure_ascii=False) + "\n")
                written += 1
        if reasons[UNUSABLE] == total:
            raise UserError(
                "no reply holds paraphrases", "choose a model that keeps to a JSON form", field="model",
                found=endpoint.model,
            )  # fmt: skip
        rows.flush()
        _check_read_back(Path(rows.name))
    return {
        "out": str(out), "refused_file": str(refused_beside(out)), "sources": total, "rows": written,
        "refused": sum(reasons.values()), "reasons": dict(reasons.most_common()), "model": endpoint.model,
        "copies": copies,
    }  # fmt: skip


def print_augmented(summary: dict[str, Any]) -> None:
    """Print the summary for people."""
    say(f"{summary['sources']:,} rows, {summary['rows']:,} paraphrases by {summary['model']} -> {summary['out']}")
    for reason, count in summary["reasons"].items():
        say(f"! {count:,} left out: {reason}", style="yellow")
    if summary["reasons"]:
        say(f"  each is listed in {summary['refused_file']}", style="dim")
    say(f"data.added_dataset={summary['out']} learns from them too; read some of them before")


def row_of(example: Example, origin: Origin, *, split: bool) -> dict[str, Any]:
    """The row as it is written to the file. split: write prompt and completion, for a row that tells them apart."""
    row: dict[str, Any] = {} if example.tools is None else {"tools": json.loads(example.tools)}
    if example.messages is None:
        label = list(example.label) if isinstance(example.label, tuple) else example.label
        given = {"text": example.text, "text_pair": example.text_pair, "label": label}
        row |= {name: value for name, value in given.items() if value is not None}
    elif split:
        turns = [_turn(message) for message in example.messages]
        at = example.completion_from
        row |= {"prompt": [_without_weight(turn) for turn in turns[:at]], "completion": turns[at:]}
    else:
        row["messages"] = [_turn(message) for message in example.messages]
    return row | {ORIGIN: asdict(origin)}


def _turn(message: Message) -> dict[str, Any]:
    given = {
        "role": message.role, "content": message.content, "reasoning_content": message.reasoning,
        "tool_calls": list(message.tool_calls) or None, "name": message.name, "tool_call_id": message.tool_call_id,
        "weight": message.weight,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


def _without_weight(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of a prompt, which is never learned and needs no weight to say so."""
    return {name: value for name, value in turn.items() if name != "weight"}


def source_id(record: Record) -> int | None:
    """The id of the row that this one paraphrases, None for a row that does not say. Raises UserError."""
    given = record.value.get(ORIGIN)
    if isinstance(given, str) and given.lstrip().startswith("{"):
        given = _json_or_none(given)
    if not isinstance(given, dict):
        return None
    name = given.get("group")
    if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{16}", name):
        raise UserError(
            "the origin of an added row does not name its source row", "write it as whet data augment did",
            record.file, record.row, f"{ORIGIN}.group", shorten(str(name), 40), "16 hex digits",
        )  # fmt: skip
    return int(name, 16)


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_ours(line: dict[str, Any]) -> bool:
    origin = line.get(ORIGIN)
    return isinstance(origin, dict) and {"group", "prompt_sha256"} <= set(origin)


def _is_refusal(line: dict[str, Any]) -> bool:
    return line.get("kind") == "paraphrase"


def _kind(reason: str) -> str:
    """The kind of a refusal: reasons that differ only in the text that they quote are one kind."""
    head, _, rest = reason.partition(": ")
    if head == "no paraphrase":
        return UNUSABLE
    for end in ("missing", "new"):
        if rest.endswith(f" is {end}"):
            return f"a number, an address, code or a placeholder is {end}"
    return rest


def _check_read_back(path: Path) -> None:
    """Assert that reading the file gives every row the id that it was written with."""
    with path.open("rb") as file:
        records = (Record(json.loads(line), str(path), row) for row, line in enumerate(file, 1))
        if not (sample := list(islice(records, SAMPLE))):
            return
        read, written = tee(chain(sample, records))
        for example, record in zip(standardise(read, recognise(sample, {}), {}), written, strict=True):
            assert example.id == record.value[ORIGIN]["id"], f"row {example.row} would be read as another one"
