"""Which of the examples are held out, and which of the others are learned from, how often.

Order of decisions: sides by hash (or label, or group); then repeated rows and rows whose question is held out leave
what is learned, where the settings say so; then the sources are mixed by weight; then general data are added. Nothing
is ever moved into the held-out rows afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from whet.base.errors import UserError, nearest
from whet.data.batch.ledger import Ledger
from whet.data.batch.store import Examples
from whet.data.config import Data
from whet.data.detect.duplicates import SIMILARITY, exact_duplicates, near_duplicates, text_keys
from whet.data.detect.leakage import leaks
from whet.data.detect.wording import Wording
from whet.data.labels import label_text
from whet.data.sides.mix import mixture, replay
from whet.data.sides.split import cluster_places, places_of, split, strata_of


def sides_of(examples: Examples, data: Data, groups: np.ndarray | None) -> np.ndarray:
    """0 to learn from, 1 held out, 2 for the test, int8 [N]. groups: places of the values of data.group, uint64 [N]."""
    val_size = data.val_size if data.eval_dataset is None else 0.0
    test_size = data.test_size if data.test_dataset is None else 0.0
    _check_unused(data)
    if data.group == "near_duplicates":
        groups = cluster_places(examples.ids, near_duplicates(Wording(examples, "asked")).first)
    strata = strata_of(label_text(example.label) for example in examples) if data.stratify else None
    return split(places_of(examples.ids), val_size, test_size, groups=groups, strata=strata)


def _check_unused(data: Data) -> None:
    """Refuse settings of the split that could not take effect."""
    usual = {"val_size": 0.05, "test_size": 0.0}
    for side, size in (("eval_dataset", "val_size"), ("test_dataset", "test_size")):
        if getattr(data, side) is not None and getattr(data, size) not in (usual[size], 0):
            raise UserError(
                f"data.{side} names these rows, so none are taken from data.dataset", field=f"data.{size}",
                found=str(getattr(data, size)), expected="not set", fix="remove the line",
            )  # fmt: skip
    taken = (data.val_size > 0 and data.eval_dataset is None) or (data.test_size > 0 and data.test_dataset is None)
    for name in ("group", "stratify"):
        if getattr(data, name) and not taken:
            raise UserError(
                "no row is held out, so there are no sides to keep rows on", field=f"data.{name}",
                found=str(getattr(data, name)), expected="data.val_size above 0 and no data.eval_dataset",
                fix="remove the line",
            )  # fmt: skip


def learned(
    train: Examples, source: np.ndarray, names: Sequence[str], general: Examples,
    others: tuple[Examples, Examples], data: Data, ledger: Ledger,
) -> Examples:  # fmt: skip
    """What is learned from, in order. source: of each row of `train`, int64 [N]; others: held-out and test examples."""
    keep = np.ones(len(train), bool)
    for name, drop in (("duplicates", _repeated), ("leakage", _leaked)):
        if getattr(data, name) != "keep":
            rows = np.flatnonzero(keep)
            gone, reason = drop(train.take(rows), others, getattr(data, name) == "drop_near")
            for row in rows[gone].tolist():
                example = train[row]
                ledger.drop(example.file, example.row, reason)
            keep[rows[gone]] = False
    train, source = train.take(keep), source[keep]
    if data.weights:
        train = _mixed(train, source, names[: len(_listed(data))], data, ledger)
    return train if not len(general) else _with_general(train, general, others, data, ledger)


def _repeated(train: Examples, _: tuple[Examples, Examples], near: bool) -> tuple[np.ndarray, str]:
    texts = Wording(train, "both")
    if near:
        return near_duplicates(texts).removable, f"repeats an earlier row, at least {SIMILARITY:.0%} alike"
    return exact_duplicates(text_keys(texts)).repeated, "repeats an earlier row"


def _leaked(train: Examples, others: tuple[Examples, Examples], near: bool) -> tuple[np.ndarray, str]:
    gone: list[np.ndarray] = [np.zeros(0, np.int64)]
    for name, side in zip(("held out", "test"), others, strict=True):
        if len(side):
            sides = {"train": Wording(train, "asked"), name: Wording(side, "asked")}
            gone.append(leaks(sides, SIMILARITY if near else None)[0].into_near)
    return np.unique(np.concatenate(gone)), "its question is held out as well" + (
        ", or one much like it" if near else ""
    )


def _listed(data: Data) -> list[str]:
    return [data.dataset] if isinstance(data.dataset, str) else list(data.dataset)


def _mixed(train: Examples, source: np.ndarray, names: Sequence[str], data: Data, ledger: Ledger) -> Examples:
    """Each source in proportion to its weight."""
    for name in data.weights:
        if name not in names:
            raise UserError(
                "there is no such source to weigh", field="data.weights", found=name,
                expected=f"names in data.dataset: {', '.join(names)}", fix=f"write {nearest(name, names) or names[0]}",
            )  # fmt: skip
    missing = next((name for name in names if name not in data.weights), None)
    if missing is not None:
        raise UserError(
            "a source has no weight", field="data.weights", found=f"weights of {', '.join(data.weights)}",
            expected="a weight for each source of data.dataset", fix=f"add {missing}: 1",
        )  # fmt: skip
    rows = [np.flatnonzero(source == index) for index in range(len(names))]
    found = mixture(
        [train.ids[part] for part in rows], [data.weights[name] for name in names], names=names
    )  # fmt: skip
    ledger.mixture = found.as_dict(names)
    where = [rows[index][found.row[found.source == index]] for index in range(len(names))]
    return train.take(np.sort(np.concatenate(where)))


def _with_general(
    train: Examples, general: Examples, others: tuple[Examples, Examples], data: Data, ledger: Ledger
) -> Examples:
    """General rows added, `data.replay` of all; none whose question is held out."""
    keys = text_keys(Wording(general, "asked"))
    kept_apart = np.concatenate([text_keys(Wording(side, "asked")) for side in others])
    found = replay(len(train), general.ids, keys, kept_apart, data.replay)
    ledger.replay = {"rows": len(found.rows), "share": round(found.share, 4), "notes": list(found.notes)}
    return train.joined(general.take(found.rows))
