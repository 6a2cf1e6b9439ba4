"""Select the examples that are held out and, among the others, those that are learned from, and how often.

Order of decisions: sides by hash (or label, or group); then repeated rows, rows whose question is held out or stands in
a benchmark, and rows of a low score are left out, where the settings say so; then the sources are mixed by weight; then
rows that are only learned from are added, under the same rules; then general data. No row is ever moved into the
held-out rows afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from whet.base.errors import UserError, nearest
from whet.data.batch.ledger import Ledger
from whet.data.batch.store import Examples
from whet.data.config import Data, listed
from whet.data.detect.duplicates import SIMILARITY, exact_duplicates, near_duplicates, text_keys
from whet.data.detect.leakage import leaks_of_first
from whet.data.detect.wording import Part, Wording
from whet.data.judge.scores import ScoreFile, below, read_scores, removed_for
from whet.data.labels import label_text
from whet.data.read.read import check_unchanged
from whet.data.sides.added import admitted
from whet.data.sides.mix import mixture, replay
from whet.data.sides.split import cluster_positions, positions_of, split, strata_of


def sides_of(examples: Examples, data: Data, groups: np.ndarray | None) -> np.ndarray:
    """The side of each example, int8 [N]: 0 to learn from, 1 held out, 2 for the test. groups: `positions_of` the
    values of data.group, uint64 [N]."""
    val_size = data.val_size if data.eval_dataset is None else 0.0
    test_size = data.test_size if data.test_dataset is None else 0.0
    _check_unused(data)
    if data.group == "near_duplicates":
        groups = cluster_positions(examples.ids, near_duplicates(Wording(examples, "asked")).first)
    strata = strata_of(label_text(example.label) for example in examples) if data.stratify else None
    return split(positions_of(examples.ids), val_size, test_size, groups=groups, strata=strata)


def check_pairs(data: Data) -> None:
    """Refuse a file of scores without a limit, and a limit without a file: neither takes effect alone."""
    for one, other, fix in (("scores", "least_score", "data.least_score=3"),
                            ("least_score", "scores", "data.scores=FILE, which whet data judge writes")):  # fmt: skip
        if getattr(data, one) is not None and getattr(data, other) is None:
            raise UserError(
                f"data.{one} has no effect without data.{other}", field=f"data.{one}", found=str(getattr(data, one)),
                expected="both or none", fix=fix,
            )  # fmt: skip


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


@dataclass(frozen=True)
class Pool:
    """The examples that rows to learn from are chosen from, all of them in one store.

    own: all rows of data.dataset; side, source: of each, int [N], as `sides_of` and by index into `names`. general,
    added: rows of those settings; origins: ids of the rows that the added ones paraphrase, uint64 [A], where `named`,
    bool [A]. held_out, test: rows of the other sides; benchmarks: rows that are only compared, by name.
    """

    own: Examples
    side: np.ndarray
    source: np.ndarray
    names: Sequence[str]
    general: Examples
    added: Examples
    origins: np.ndarray
    named: np.ndarray
    held_out: Examples
    test: Examples
    benchmarks: Mapping[str, Examples]

    @property
    def kept_apart(self) -> dict[str, Examples]:
        """The held-out sides that have rows."""
        return {name: side for name, side in (("held out", self.held_out), ("test", self.test)) if len(side)}


def learned(pool: Pool, data: Data, ledger: Ledger) -> Examples:
    """The examples that are learned from, in order; those left out are listed in the ledger. Raises UserError."""
    scored = None if data.scores is None else _scored(data.scores, ledger)
    rows = np.flatnonzero(pool.side == 0)
    keep = _allowed(pool.own.take(rows), 0, pool, data, ledger)
    train, source = pool.own.take(rows[keep]), pool.source[rows[keep]]
    own = _high(train, scored, data, ledger)
    train, source = train.take(own), source[own]
    before = train
    if data.weights:
        train = _mixed(train, source, pool.names[: len(listed(data.dataset))], data, ledger)
    if len(pool.added):
        train = train.joined(_added(before, pool, scored, data, ledger))
    if len(pool.general):
        general = pool.general
        if pool.benchmarks and data.leakage != "keep":
            general = general.take(_outside(general, {}, pool.benchmarks, data, ledger))
        train = _with_general(train, general, pool, data, ledger)
    _count_benchmarks(train, pool.benchmarks, ledger)
    return train


def _added(before: Examples, pool: Pool, scored: ScoreFile | None, data: Data, ledger: Ledger) -> Examples:
    """The added rows that are learned from. before: one's own rows to learn from."""
    allowed = admitted(pool.added, pool.origins, pool.named, pool.own, pool.kept_apart, ledger)
    together = before.joined(allowed)
    allowed = together.take(_allowed(together, len(before), pool, data, ledger))
    added = allowed.take(_high(allowed, scored, data, ledger))
    ledger.added["rows"] = len(added)
    assert not np.isin(added.ids, np.concatenate([pool.held_out.ids, pool.test.ids])).any(), "an added row is held out"
    return added


def _allowed(examples: Examples, start: int, pool: Pool, data: Data, ledger: Ledger) -> np.ndarray:
    """Rows from `start` on that data.duplicates and data.leakage leave, as indices; the others are listed."""
    rows = np.arange(len(examples))
    if data.duplicates != "keep":
        texts = Wording(examples, "both")
        near = data.duplicates == "drop_near"
        gone = near_duplicates(texts).removable if near else exact_duplicates(text_keys(texts)).repeated
        reason = "repeats an earlier row" + (f", at least {SIMILARITY:.0%} alike" if near else "")
        gone = gone[gone >= start]
        _list(examples, gone, reason, ledger)
        rows = np.setdiff1d(rows, gone)
    rows = rows[rows >= start]
    if data.leakage != "keep":
        rows = rows[_outside(examples.take(rows), pool.kept_apart, pool.benchmarks, data, ledger)]
    return rows


def _outside(
    examples: Examples, kept_apart: Mapping[str, Examples], benchmarks: Mapping[str, Examples], data: Data,
    ledger: Ledger,
) -> np.ndarray:  # fmt: skip
    """Rows whose question is neither held out nor in a benchmark, as indices; the others are listed."""
    near = data.leakage == "drop_near"
    more = ", or one much like it" if near else ""
    keep = np.ones(len(examples), bool)
    checks: tuple[tuple[Mapping[str, Examples], Part, str], ...] = (
        (kept_apart, "asked", "its question is held out as well"), (benchmarks, "user", "its question stands in {}"),
    )  # fmt: skip
    for sides, part, reason in checks:
        others = {name: Wording(side, part) for name, side in sides.items()}
        rows = np.flatnonzero(keep)
        first = {"": Wording(examples.take(rows), part)}  # no file and no side has such a name
        for leak in leaks_of_first({**first, **others}, SIMILARITY if near else None) if len(rows) else ():
            gone = rows[leak.into_near]
            gone = gone[keep[gone]]
            _list(examples, gone, reason.format(leak.of) + more, ledger)
            keep[gone] = False
            if leak.of in benchmarks:
                ledger.benchmarks[leak.of]["dropped"] += len(gone)
    return np.flatnonzero(keep)


def _list(examples: Examples, rows: np.ndarray, reason: str, ledger: Ledger) -> None:
    for row in rows.tolist():
        example = examples[row]
        ledger.drop(example.file, example.row, reason)


def _scored(path: str, ledger: Ledger) -> ScoreFile:
    """Read the scores and check that their file still has the hash in the ledger, which the cache knows too."""
    scored = read_scores(path)
    known = [entry for entry in ledger.files if entry["path"] == path]
    check_unchanged(known, [{"path": path, "sha256": scored.sha256}])
    ledger.scores = {"rubric": scored.rubric, "model": scored.model, "rows_below": 0, "rows_unjudged": 0}
    return scored


def _high(examples: Examples, scored: ScoreFile | None, data: Data, ledger: Ledger) -> np.ndarray:
    """Rows that reach data.least_score or have no score, bool [N]; the others are listed."""
    keep = np.ones(len(examples), bool)
    if scored is None or not len(examples):
        return keep
    assert data.least_score is not None
    gone, scores, unjudged = below(examples.ids, scored, data.least_score, examples)
    for row in gone.tolist():
        removed = removed_for(examples[row], int(scores[row]), data.least_score, scored)
        ledger.drop(removed.file, removed.row, removed.reason)
    ledger.scores["rows_below"] += len(gone)
    ledger.scores["rows_unjudged"] += unjudged
    keep[gone] = False
    return keep


def _count_benchmarks(train: Examples, benchmarks: Mapping[str, Examples], ledger: Ledger) -> None:
    """Count the rows to learn from whose question stands in a benchmark, by equal texts, which takes no package."""
    others = {name: Wording(side, "user") for name, side in benchmarks.items()}
    for leak in leaks_of_first({"": Wording(train, "user"), **others}, None):
        ledger.benchmarks[leak.of]["rows_learned"] = len(leak.into_same)


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
    mix = mixture(
        [train.ids[part] for part in rows], [data.weights[name] for name in names], names=names
    )  # fmt: skip
    ledger.mixture = mix.as_dict(names)
    where = [rows[index][mix.row[mix.source == index]] for index in range(len(names))]
    return train.take(np.sort(np.concatenate(where)))


def _with_general(train: Examples, general: Examples, pool: Pool, data: Data, ledger: Ledger) -> Examples:
    """General rows added, `data.replay` of all; none whose question is held out."""
    keys = text_keys(Wording(general, "asked"))
    kept_apart = np.concatenate([text_keys(Wording(side, "asked")) for side in (pool.held_out, pool.test)])
    chosen = replay(len(train), general.ids, keys, kept_apart, data.replay)
    ledger.replay = {"rows": len(chosen.rows), "share": round(chosen.share, 4), "notes": list(chosen.notes)}
    return train.joined(general.take(chosen.rows))
