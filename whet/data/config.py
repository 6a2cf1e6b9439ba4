"""The data room's own settings: where the rows are, what they mean, and what is learned from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from whet.base.config import config, setting
from whet.data.format.recognise import FormatName


def listed(given: str | Sequence[str] | None) -> list[str]:
    """The entries of a setting that takes one name or a list of them; [] for None."""
    return [given] if isinstance(given, str) else list(given or ())


@config
class Data:
    """Rows, template, mask, lengths, split."""

    dataset: str | list[str] = setting(
        "builtin:support_tickets", "File, directory, glob or hub:owner/name, or a list of them."
    )
    eval_dataset: str | list[str] | None = setting(None, "Held-out rows; auto = `val_size` of `dataset`.")
    test_dataset: str | list[str] | None = setting(None, "Rows for `whet eval --split test` alone.")
    format: FormatName | None = setting(None, "Shape of a row; auto = recognised from the first 100 rows.")
    columns: dict[str, str] = setting({}, "Standard field to yours, e.g. `{prompt: question, completion: answer}`.")
    preference: Literal["error", "chosen", "check"] = setting(
        "error", "Rows that judge answers are refused, their good answers learned, or (to look at) both sides."
    )
    val_size: Annotated[float, Ge(0)] = setting(
        0.05, "Held-out share (below 1) or number of rows (1 or more), chosen by a hash of the row; 0 = none."
    )
    test_size: Annotated[float, Ge(0)] = setting(0.0, "The same for the test rows.")
    stratify: bool = setting(False, "Hold out the same share of every label.")
    group: str | None = setting(
        None, "A column whose rows stay on one side, or `near_duplicates`, so that paraphrases do; auto = none."
    )
    weights: dict[str, Annotated[float, Gt(0)]] = setting(
        {}, "Share of each source of `dataset` in what is learned, by its name; auto = every row once."
    )
    replay_dataset: str | list[str] | None = setting(None, "General data, mixed in against forgetting.")
    replay: Annotated[float, Ge(0), Lt(1)] = setting(0.15, "Its share of the rows to learn from.")
    added_dataset: str | list[str] | None = setting(
        None, "Rows that are only learned from, such as paraphrases; those of a held-out row are left out."
    )
    duplicates: Literal["keep", "drop", "drop_near"] = setting(
        "keep", "Rows to learn from that repeat another one, exactly or nearly, are kept or dropped."
    )
    leakage: Literal["keep", "drop", "drop_near"] = setting(
        "keep", "Rows to learn from whose question is held out as well, exactly or nearly, are kept or dropped."
    )
    benchmarks: str | list[str] | None = setting(
        None,
        "Files of tests; rows to learn from that stand there are counted, or go as `leakage` says (decontamination).",
    )
    personal: Literal["keep", "redact", "drop"] = setting(
        "keep", "Rows with personal data (e-mail, phone, card, keys, …) are kept, get placeholders, or are dropped."
    )
    blocklist: str | list[str] | None = setting(None, "Files of words; rows that hold one are dropped.")
    scores: str | None = setting(None, "File of `whet data judge`; rows below `least_score` are not learned from.")
    least_score: Annotated[int, Ge(2), Le(5)] | None = setting(None, "Lowest score, 2 to 5, that a row needs.")
    order: Literal["random", "short_first"] = setting("random", "Order of the first epoch; later ones are random.")
    max_rows: Annotated[int, Ge(1)] | None = setting(None, "Use only the first so many rows; auto = all.")
    max_length: Annotated[int, Ge(8)] | None = setting(
        None, "Longest row in tokens; auto = the longest row there is, up to what the model can read and 4,096."
    )
    over_length: Literal["error", "drop", "truncate_prompt", "truncate", "split"] | None = setting(
        None, "A longer row is refused, dropped, cut or (text only) split; auto = drop for chats, split for text."
    )
    empty: Literal["error", "drop"] = setting("error", "A row with nothing to learn from is refused or dropped.")
    invalid: Literal["error", "drop"] = setting(
        "error", "A row that does not keep to the format is refused, or dropped and listed."
    )
    loss_on: Literal["assistant", "last_assistant", "completion", "all"] | None = setting(
        None, "Which tokens are learned; auto = assistant for chats, all for text."
    )
    packing: bool | None = setting(None, "Fill rows of `max_length` with several documents; auto = only for text.")
    padding_free: bool | None = setting(
        None, "Lay a batch out as one row without padding; auto = yes where the model passes the isolation check."
    )
    num_proc: Annotated[int, Ge(1)] | None = setting(
        None, "Processes that tokenise; auto = one for every 20,000 rows, up to the processors, where forking is safe."
    )
