"""What the parts of a run's page say: each choice of rows by itself, names as they are, nothing empty, roles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import Outline, evaluation, put

from whet.report.page import write_page


def page_of(run: Path) -> tuple[str, str]:
    html = write_page(run).read_text(encoding="utf-8")
    return html, Outline(html).text


def headings(html: str) -> list[tuple[str, str]]:
    """Each heading with the text up to the next one."""
    body = html.split("<main>")[1].split("<footer>")[0]
    parts = re.split(r"<h[23]>(.*?)</h[23]>", body)
    return [
        (title, re.sub(r"<[^>]+>", "", after).strip()) for title, after in zip(parts[1::2], parts[2::2], strict=True)
    ]


def test_a_test_and_other_files_have_sections_of_their_own(tmp_path: Path) -> None:
    put(tmp_path, "results/evaluation.json", evaluation(0.1, 0.5))
    put(tmp_path, "results/predictions.jsonl", {"id": "held", "tuned": "a", "reference": "a"})
    put(tmp_path, "results/test.json", evaluation(0.2, 0.6) | {"of": "test rows", "split": "test"})
    put(tmp_path, "results/test.predictions.jsonl", {"id": "tested", "tuned": "a", "reference": "b"})
    put(tmp_path, "results/data-new-1.json", evaluation(0.3, 0.7) | {"of": "rows of new.csv", "split": "data"})
    html, text = page_of(tmp_path)
    titles = [title for title, _ in headings(html)]
    assert titles.index("Before and after") < titles.index("Test rows") < titles.index("Rows of new.csv")
    assert "Category accuracy rose from 10 % to 50 % on 100 held-out rows" in text
    assert "rose from 20 % to 60 % on 100 test rows" in text
    assert "rose from 30 % to 70 % on 100 rows of new.csv" in text
    assert html.index("held</b>") > html.index("tested</b>"), "the answers stand with their scores"


def test_a_page_with_a_score_never_says_that_nothing_was_evaluated(tmp_path: Path) -> None:
    put(tmp_path, "results/test.json", evaluation(0.2, 0.6) | {"of": "test rows", "split": "test"})
    _, text = page_of(tmp_path)
    assert "Not evaluated" not in text
    assert "not been measured" not in text
    assert "rose from 20 % to 60 % on 100 test rows" in text


LEDGER: dict[str, Any] = {
    "format": "classification", "rows_read": 9, "rows_train": 6, "rows_eval": 3, "rows_test": 0,
    "task": "classification",
    "labels": {"are_you_a_bot": 4, "Apr": 2}, "labels_held_out": {}, "mixture": {}, "replay": {}, "added": {},
    "scores": {}, "benchmarks": {}, "not_rendered": {}, "dropped": [], "rows_redacted": 0, "format_reason": "",
    "files": [{"path": "a.csv", "bytes": 2048, "sha256": "ab" * 32}],
}  # fmt: skip


def test_what_is_empty_has_no_heading_and_labels_keep_their_names(tmp_path: Path) -> None:
    put(tmp_path, "data.json", LEDGER)
    html, text = page_of(tmp_path)
    assert [title for title, after in headings(html) if not after] == []
    for name in ("Mixture", "Replay", "Added", "Scores", "Benchmarks", "Not rendered", "Labels held out"):
        assert f"<h3>{name}</h3>" not in html
    assert "are_you_a_bot" in text
    assert "Are you a bot" not in text
    assert "2.00 KiB" in text
    assert "Rows redacted" not in text


def test_metrics_have_their_names_and_one_scale(tmp_path: Path) -> None:
    metrics = {"bleu": 0.0001822, "chrf": 0.25, "rouge_l": 0.5, "token_f1": 0.5, "loss": 1.5, "perplexity": 4.48}
    put(tmp_path, "results/evaluation.json", {"rows": 3, "tuned": {"metrics": metrics}, "base": {"metrics": metrics}})
    html, text = page_of(tmp_path)
    for name in ("BLEU", "chrF", "ROUGE-L", "Token F1", "Loss per token", "Perplexity"):
        assert f">{name}<" in html, name
    assert "25 %" in text
    assert "0.0001822" not in text
    assert text.index("Loss per token") < text.index("BLEU")


def test_free_text_is_told_by_loss_and_perplexity(tmp_path: Path) -> None:
    sides = {
        "base": {"loss": 3.0, "perplexity": 20.1, "exact_match": 0.0},
        "tuned": {"loss": 1.0, "perplexity": 2.7, "exact_match": 0.0},
    }
    found = {side: {"metrics": metrics} for side, metrics in sides.items()}
    difference = {"loss": {"low": -2.2, "high": -1.8, "p_value": 0.001}}
    put(tmp_path, "results/evaluation.json", {"rows": 5, "head": "loss", "difference": difference, **found})
    html, text = page_of(tmp_path)
    assert "Loss per token fell from 3 to 1 (perplexity 20.1 to 2.7) on 5 held-out rows" in text
    assert 'class="verdict good"' in html
    assert "Exact match is 0 %" not in text


def test_the_head_says_what_was_trained_how(tmp_path: Path) -> None:
    values = {
        "model.path": "org/model",
        "method.name": "lora",
        "data.dataset": ["a.csv", "<b>"],
        "train.learning_rate": 1e-3,
    }
    put(tmp_path, "origins.json", {name: {"value": value, "origin": "recipe"} for name, value in values.items()})
    html, _ = page_of(tmp_path)
    head = html.split("<main>")[0]
    for shown in ("org/model", "lora", "a.csv, &lt;b&gt;", "0.001"):
        assert shown in head


@pytest.mark.parametrize(("device", "compared"), [("cpu", False), ("cuda", True)])
def test_a_plan_is_compared_with_what_it_planned(device: str, compared: bool, tmp_path: Path) -> None:
    put(tmp_path, "environment.json", {"device": device})
    put(
        tmp_path,
        "plan.json",
        {"memory": {"frozen weights": 2**27}, "peak_bytes": 2**27, "trainable_params": 7, "all_params": 10**7},
    )
    put(tmp_path, "finished.json", {"steps": 1, "peak_memory_bytes": 2**30})
    _, text = page_of(tmp_path)
    assert ("too low" in text) is compared
    assert ("are not compared" in text) is not compared
    assert "0 % of all" not in text


def test_dialogues_keep_their_roles_and_differing_fields_are_marked(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<i>hello"}]
    row = {
        "id": "x",
        "prompt": prompt,
        "reference": "Category: A\nPriority: High",
        "base": "no",
        "tuned": "Category: B\nPriority: High",
    }
    put(tmp_path, "results/predictions.jsonl", row)
    html, _ = page_of(tmp_path)
    assert re.findall(r'<span class="tag">(\w+)</span>', html) == ["system", "user"]
    assert "&lt;i&gt;hello" in html
    assert re.findall(r"<mark>(.*?)</mark>", html) == ["Category: B"]


def test_hostile_results_stay_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    put(
        tmp_path, "results/test.json", evaluation(0.1, 0.2) | {"of": hostile, "head": hostile, "conversations": hostile}
    )
    put(tmp_path, "results/data-x.json", {"tuned": {"metrics": {hostile: 1}}, "of": 3})
    put(tmp_path, "results/test.predictions.jsonl", {"prompt": [{"role": hostile, "content": hostile}, 3], "tuned": 7})
    put(tmp_path, "finished.json", {"findings": [hostile, 3]})
    put(tmp_path, "data.json", LEDGER | {"labels": {hostile: "many"}})
    html, _ = page_of(tmp_path)
    assert "<script>alert" not in html


def test_the_contents_lead_to_every_section(tmp_path: Path) -> None:
    put(tmp_path, "results/test.json", evaluation(0.2, 0.6) | {"of": "test rows"})
    html, _ = page_of(tmp_path)
    linked = re.findall(r'<a href="#([\w-]+)">', html.split("</nav>")[0].split("<nav")[1])
    assert linked == re.findall(r'<section id="([\w-]+)">', html)
    assert json.dumps(linked)
