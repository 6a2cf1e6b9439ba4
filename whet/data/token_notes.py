"""Sentences about the tokens of the rows: words that the tokenizer does not know, and answers taught in two ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from whet.base.errors import shorten
from whet.data.batch.ledger import Ledger
from whet.data.batch.rows import Rows
from whet.data.example import Example
from whet.data.template.row_tokenizer import RowTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEAST_SHARE = 0.01
SAMPLE = 200


def unknown_tokens(rows: Rows, tokenizer: PreTrainedTokenizerFast, ledger: Ledger) -> Iterator[str]:
    """Count the tokens that stand for words that the tokenizer does not know; a sentence where they are many."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return  # byte-level: every text has tokens
    ledger.unknown_tokens = int((rows.ids == unknown).sum())
    share = ledger.unknown_tokens / max(1, len(rows.ids))
    if share >= LEAST_SHARE:
        yield (f"{100 * share:.0f} % of the tokens are unknown to the tokenizer ({tokenizer.unk_token}), so what they "
               "say is lost: take a model that was trained on this language")  # fmt: skip


def two_ways(row_tokenizer: RowTokenizer, examples: Sequence[Example], policy: Mapping[str, object]) -> Iterator[str]:
    """A sentence where the template writes something before the last answer alone (an empty block of thinking), and all
    answers are learned."""
    template = row_tokenizer.template
    if template is None or policy.get("loss_on") != "assistant":
        return
    several = (one for one in examples if sum(message.role == "assistant" for message in one.messages or ()) > 1)
    for example in islice(several, SAMPLE):
        if any(message.reasoning for message in example.messages or ()):
            continue
        rendered = template.render([example])[0]
        leads = [
            rendered.text[before.end : turn.content]
            for before, turn in pairwise(rendered.turns) if turn.role == "assistant"
        ]  # fmt: skip
        if len(set(leads)) > 1:
            last = shorten(repr(leads[-1]), 40)
            yield (f"the template writes {last} before the last answer and not before earlier ones, so one kind of "
                   "question is answered in two ways; data.loss_on=last_assistant learns the last alone "
                   f"({shorten(example.file, 60)} row {example.row} for one)")  # fmt: skip
            return
