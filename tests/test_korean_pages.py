"""Pages, plots and recipes in Korean: no English is left, no data are translated, English stays as it was."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from korean_pages import QUALITY, ROWS, cut_all, cut_end, cut_results, keep_all, put_finished, put_others, report
from rich.cells import cell_len
from test_data_page import a_row, good_report, piece
from test_report import Outline, full, put  # noqa: F401  (full is a fixture)

from whet import api
from whet.base import language
from whet.cli import run
from whet.data.batch.ledger import Ledger
from whet.data.detect.personal_patterns import Kind
from whet.recipe import parse
from whet.report import loss_plot
from whet.report.charts import own_label
from whet.report.data_page import data_page
from whet.report.page import write_page

# What stands in a Korean page as it is: tools, measures, units, commands, settings, files.
NAMES = {
    "whet", "JSON", "SHA", "CPU", "GPU", "Python", "BLEU",
    "ROUGE", "MCC", "MAE", "MSE", "chrF", "KL", "nat", "greedy", "GiB", "MiB", "KiB", "cpu", "cuda", "true", "drop",
    "max_length", "data.max_length", "data.over_length", "data.loss_on", "data.packing", "data.personal", "redact",
    "assistant", "replay", "regression", "train.num_train_epochs", "train.learning_rate", "metrics.jsonl", "plan.json",
}  # fmt: skip
HANGUL = re.compile("[가-힣]")


@pytest.fixture(autouse=True)
def _english_afterwards() -> Iterator[None]:
    yield
    language.use("en")


@pytest.fixture
def korean() -> None:
    language.use("ko")


def in_language(name: str, make: Callable[[], str]) -> str:
    language.use(name)
    try:
        return make()
    finally:
        language.use("en")


def shown(html: str) -> list[str]:
    """All that a person can see or hear of a page: texts and the attributes that are read out."""
    page = Outline(html)
    heard = [
        value for _, attributes in page.tags for name, value in attributes.items()
        if value and name in ("aria-label", "title", "data-label", "data-name")
    ]  # fmt: skip
    return [*page.words, *heard]


def english_in(html: str) -> set[str]:
    """English words of a page that are no names; the data of these tests are all of the form Q1."""
    text = re.sub(r"'?/\S*/Q0\S*", "", " ".join(shown(html)))  # paths
    text = re.sub(r"whet (data check|train|eval|merge +out/|plan)", "", text)
    return set(re.findall(r"[A-Za-z_]{2,}[\w.]*\w", text, re.ASCII)) - NAMES


def page_of(path: Path) -> str:
    return write_page(path).read_text(encoding="utf-8")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return put_finished(tmp_path)


@pytest.mark.parametrize("change", [keep_all, put_others, cut_results, cut_end, cut_all])
def test_a_page_of_a_run_leaves_no_english(change: Callable[[Path], None], finished: Path) -> None:
    change(finished)
    english, korean = (in_language(name, lambda: page_of(finished)) for name in ("en", "ko"))
    assert '<html lang="en">' in english
    assert '<html lang="ko">' in korean
    assert english_in(korean) == set()
    counts = [Counter(tag for tag, _ in Outline(html).tags) for html in (english, korean)]
    assert counts[0] == counts[1], "no row, tile or column was lost"
    assert in_language("en", lambda: page_of(finished)) == english
    script = korean.split("<script>")[1].split("</script>")[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in korean, "or the script is refused"


@pytest.mark.parametrize(
    "change",
    [{}, {"warnings": []}, {"warnings": [], "dropped": [], "tokens_lost": 0, "quality": {}}, {"rows_train": 0},
     {"supervised_tokens": 0}, {"rows_train": 1, "warnings": ["462 tokens are lost to data.max_length=200"]},
     {"labels": {f"Q{n}": n for n in range(90)}, "label_examples": {"Q1": "Q2"}},
     {"labels": {"mean": 1.0, "std": 2.0, "min": 0.0, "max": 3.0}, "task": "regression"},
     {"files": [], "rows_train": None},
     {"lengths": [{"from": 1, "to": 2, "rows": 9000}, {"from": 30, "to": 51, "rows": 1}]},
     {"lengths": [{"from": 1, "to": 2, "rows": 9}]},
     {"quality": {name: {"rows": 0} for name in QUALITY if name != "languages"}, "warnings": [], "max_length": 900}],
)  # fmt: skip
def test_a_page_of_a_check_leaves_no_english(change: dict[str, Any]) -> None:
    given = report() | change
    english, korean = (in_language(name, lambda: data_page(given, ROWS)) for name in ("en", "ko"))
    assert '<html lang="ko">' in korean
    assert english_in(korean) == set()
    assert Counter(tag for tag, _ in Outline(english).tags) == Counter(tag for tag, _ in Outline(korean).tags)


def test_english_that_is_left_would_be_seen(finished: Path) -> None:
    assert english_in(data_page(report(), ROWS)) > {"Dropped", "rows", "Lengths", "learned"}
    assert english_in(page_of(finished)) > {"Loss", "optimiser", "step", "Exact", "match", "Contents"}


TEXTS = ["Rows held out", "learned", "Training", "held out", "default", "yes", "{0} rows", "{0}", "refusal", "row 3"]


@pytest.mark.parametrize("text", TEXTS)
def test_data_with_the_words_of_a_page_stay_as_they_are(text: str, full: Path) -> None:  # noqa: F811
    """A Korean page has none of these words of its own, so each stands as often as a name that means nothing."""
    often = [page.count(name) for name in (text, "Q1") for page in pages_with(name, full)]
    assert min(often) >= 7
    assert often[:2] == often[2:]


def pages_with(text: str, path: Path) -> list[str]:
    """What is shown of both Korean pages, where everything that a person named or wrote is this text."""
    put(path, "data.json", {"labels": {text: 5}, "files": [{"path": text, "bytes": 1}], "format": text})
    put(path, "results/predictions.jsonl", {"id": text, "prompt": text, "reference": text, "base": text, "tuned": text})
    put(path, "origins.json", {"data.dataset": {"value": text, "origin": "recipe", "reason": None}})
    per_class = [{"class": text, "support": 1, "f1": 1}]
    labels = {"names": [text, "b"], "confusion": [[1, 0], [0, 1]], "per_class": per_class}
    scores = [{"metrics": {"rows": value}} for value in (0.1, 0.2)]
    found = {"labels": labels, "of": f"rows of {text}", "base": scores[0], "tuned": scores[1], "skipped": [text]}
    put(path, "results/evaluation.json", {"labels": labels, "rows": 3, "base": scores[0], "tuned": scores[1]})
    put(path, "results/data-1.json", found)
    checked = good_report() | {
        "labels": {text: 3}, "label_examples": {text: text},
        "quality": {"duplicates": {"rows": 1, "examples": [{"file": text, "row": 1, "text": text, "shown": text}]}},
    }  # fmt: skip
    rows: list[dict[str, Any]] = [a_row(piece(text, "user"), piece(text, "judge")) | {"file": text}]
    made = (lambda: page_of(path), lambda: data_page(checked, rows))
    return [" ".join(shown(in_language("ko", make))) for make in made]


def test_damaged_roles_do_not_stop_a_page(finished: Path) -> None:
    odd = [[], {}, None, 3, "judge"]
    put(finished, "results/predictions.jsonl", {"prompt": [{"role": role, "content": "Q1"} for role in odd]})
    rows: list[dict[str, Any]] = [a_row(*({"text": "Q1", "role": role} for role in odd))]
    for name in ("en", "ko"):
        assert "judge" in in_language(name, lambda: page_of(finished) + data_page({}, rows))


def test_every_key_that_a_page_shows_has_its_korean(korean: None) -> None:
    lists = {"labels", "labels_held_out", "files", "notes", "dropped"}  # of which each is shown in a way of its own
    for name in {field.name for field in fields(Ledger)} - lists:
        assert HANGUL.search(own_label(name)), name
    for name in ("device", "device_name", "platform", "compute", "storage", "threads", "frozen weights", "activations"):
        assert HANGUL.search(own_label(name)), name
    for kind in get_args(Kind):
        assert HANGUL.search(language.named(kind)), kind
    for key in ("__class__", "{0.__class__}", "{missing}", "a_key_of_nobody"):
        assert own_label(key) == in_language("en", lambda key=key: own_label(key)), "no key is a template"
        language.use("ko")


def test_a_plot_has_no_boxes_for_hangul(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    english = loss_plot.write_loss_plot(full).read_bytes()
    language.use("ko")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a letter that no font has
        drawn = loss_plot.write_loss_plot(full).read_bytes()
    assert (drawn == english) is (loss_plot.hangul_font() is None)
    monkeypatch.setattr(loss_plot, "hangul_font", lambda: None)
    assert loss_plot.write_loss_plot(full).read_bytes() == english


@pytest.mark.parametrize("name", sorted(api.recipes()))
def test_a_recipe_has_korean_comments_and_the_same_settings(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["init", name, "--lang", "ko"]) == 0
    korean = capsys.readouterr().out
    assert run(["init", name, "--lang", "en"]) == 0
    english = capsys.readouterr().out
    assert english == api.recipes()[name].read_text(encoding="utf-8")
    comments = [line.partition("# ")[2] for line in korean.splitlines() if "# " in line]
    assert len(comments) > 3
    assert all(HANGUL.search(comment) for comment in comments if not comment.startswith(".jsonl")), comments
    assert all(cell_len(line) <= 120 for line in korean.splitlines())
    for text, file in ((korean, "ko.yaml"), (english, "en.yaml")):
        (tmp_path / file).write_text(text, encoding="utf-8")
    ours, theirs = (parse(tmp_path / file, ["output_dir=x"]) for file in ("ko.yaml", "en.yaml"))
    assert ours.recipe == theirs.recipe
    assert run(["init", name, "--lang", "ko", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == english, "programs read English"
