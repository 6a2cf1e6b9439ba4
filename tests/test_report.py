"""The report page and the loss plot: what they say of full, partial and hostile run directories."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from whet.report import charts
from whet.report.charts import Curve, chart, plain, smooth, thin, ticks
from whet.report.loss_plot import write_loss_plot
from whet.report.page import safe, write_page

HOSTILE = "<script>alert(1)</script> \"'& \x1b[31mred\x1b[0m \u202eright-to-left \ud800 </style><img src=x onerror=y>"
VOID = {"meta", "link", "img", "br", "hr", "input", "path"}


class Outline(HTMLParser):
    """Collects tags, attributes and text, and fails on a tag that is closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def put(run: Path, name: str, *records: object) -> None:
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def evaluation(
    base: object, tuned: object, low: object = 0.63, high: object = 0.82, name: str = "category_accuracy"
) -> dict:
    return {
        "rows": 100,
        "base": {"metrics": {"exact_match": 0.0, name: base}},
        "tuned": {"metrics": {"exact_match": 0.64, name: tuned}},
        "difference": {name: {"low": low, "high": high, "p_value": 1e-9}},
        "decoding": "greedy, at most 48 new tokens",
        "skipped": ["row 17: empty"],
    }


def put_results(run: Path) -> None:
    put(run, "results/evaluation.json", evaluation(0.18, 0.91))
    rows = [
        {"id": f"r{n}", "prompt": "p", "reference": "a\nb", "base": "", "tuned": "a\nb", "exact": n % 2 == 0}
        for n in range(40)
    ]
    put(run, "results/predictions.jsonl", *rows)
    candidate = {
        "dtype": "bfloat16",
        "mean_kl": 0.00081,
        "max_kl": 0.03,
        "top1_agreement": 0.996,
        "greedy_agreement": 1.0,
    }
    merge = {
        "chosen": "b",
        "candidates": [candidate | {"name": "a"}, candidate | {"name": "b"}],
        "prompts": 16,
        "positions": 1024,
    }
    put(run, "results/merge.json", merge | {"path": "out/"})


@pytest.fixture
def full(tmp_path: Path) -> Path:
    run = tmp_path / "tickets"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: tickets\n", encoding="utf-8")
    origin = {"value": 1e-4, "origin": "command line", "reason": None}
    decided = {"value": True, "origin": "decided", "reason": "rows are short"}
    put(
        run,
        "origins.json",
        {"train.seed": {"value": 42, "origin": "default"}, "train.lr": origin, "train.packing": decided},
    )
    put(run, "environment.json", {"torch": "2.13.0", "device_name": "AMD EPYC", "threads": 2})
    ledger = {
        "rows_read": 12345,
        "tokens": 1000,
        "supervised_tokens": 250,
        "rows_over_length": 3,
        "rows_without_target": 0,
    }
    put(
        run,
        "data.json",
        ledger | {"files": [{"path": "a.jsonl", "sha256": "ab" * 32, "rows": 9}], "policy": {"too_long": "cut"}},
    )
    put(
        run,
        "plan.json",
        {"trainable_params": 5, "all_params": 1000, "memory": {"frozen weights": 2**31}, "peak_bytes": 3 * 2**30},
    )
    train = [
        {"kind": "train", "step": s, "loss": 3 / s, "learning_rate": 1e-4 / s, "grad_norm": 1.0} for s in range(1, 101)
    ]
    put(
        run,
        "metrics.jsonl",
        *train,
        {"kind": "eval", "step": 50, "eval_loss": 1.0},
        {"kind": "eval", "step": 100, "eval_loss": 0.5},
    )
    put(run, "timing.jsonl", *({"step": s, "tokens_per_second": 900.0, "memory_bytes": 2**31} for s in range(1, 101)))
    done = {"steps": 100, "best_step": 100, "stopped": "completed", "seconds": 218.4, "peak_memory_bytes": 5 * 2**29}
    put(run, "finished.json", done | {"tokens": 4000, "supervised_tokens": 1000})
    put_results(run)
    return run


def read(run: Path) -> tuple[str, Outline]:
    path = write_page(run)
    assert path == run / "report.html"
    html = path.read_text(encoding="utf-8")
    return html, Outline(html)


def test_full_run(full: Path) -> None:
    html, page = read(full)
    verdict = "Category accuracy rose from 18 % to 91 % on 100 held-out rows. "
    assert verdict + "The confidence interval of the change is +63 to +82 points." in page.text
    for words in (
        "+73 points", "< 0.001", "3 min 38 s", "2.50 GiB", "3.00 GiB predicted", "12,345", "25 % of the tokens",
        "the plan was 20 % too high", "Compared on 16 prompts, 1,024 positions", "99.6 %", "Defaults (1)",
        "rows are short", "20 of 40 tuned answers match", "Skipped (1)", "AMD EPYC", "best: step 100", "0.5 % of all",
    ):  # fmt: skip
        assert words in page.text, words
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "figure"] == ["chart"] * 5
    assert sum("sample" in (attrs.get("class") or "") for _, attrs in page.tags) == 8
    assert html.count("✓ exact") == html.count("✗ differs") == 4
    assert '<tr class=chosen><td class="key" data-label="Candidate">b</td>' in html
    assert page.text.index("train.packing") < page.text.index("train.seed")
    assert "whet eval" not in page.text
    assert [path.name for path in full.iterdir() if path.name.startswith(".")] == []  # no temporary file is left


def test_page_needs_nothing_from_outside(full: Path) -> None:
    html, page = read(full)
    assert not re.search(r"https?://|@import|url\(", html)
    assert [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "embed", "base", "form")] == []
    for _, attrs in page.tags:
        assert "src" not in attrs
        assert (attrs.get("href") or "#").startswith("#")
        assert not [name for name in attrs if name.startswith("on")]
    script = html.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html  # else the page's own hover script is refused


def test_empty_run_names_every_command(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    _, page = read(run)
    assert "Nothing has been trained yet" in page.text
    for verb, target, rest in (
        ("train", "/recipe.yaml", ""), ("data check", "/recipe.yaml", ""), ("plan", "/recipe.yaml", ""),
        ("eval", "", ""), ("merge", "", " out/"),
    ):  # fmt: skip
        assert f"whet {verb} '{run}{target}'{rest}" in page.text


def test_unfinished_and_unevaluated_runs(full: Path) -> None:
    for name in ("results/evaluation.json", "results/predictions.jsonl", "results/merge.json"):
        (full / name).unlink()
    _, page = read(full)
    assert "Training finished after 100 steps. Evaluation loss went from 1 to 0.5." in page.text
    assert f"whet eval {full}" in page.text
    (full / "finished.json").unlink()
    with (full / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed in the middle of a line
    _, page = read(full)
    assert "Training has not finished; 100 steps are recorded." in page.text
    assert "metrics.jsonl: 1 unreadable line(s) left out" in page.text
    assert "measured 2.00 GiB" in page.text  # the highest so far, from timing.jsonl


@pytest.mark.parametrize(
    ("result", "tone", "words"),
    [
        (evaluation(0.18, 0.2, -0.03, 0.07), "", "−3 to +7 points, includes no change: not proven"),
        (evaluation(0.9, 0.5, -0.5, -0.3), "bad", "fell from 90 % to 50 %"),
        (evaluation(0.1, 0.5, None, None), "", "No confidence interval was computed"),
        (evaluation(None, 0.5), "", "The base model was not measured"),
        (evaluation(0.5, 0.5), "", "is 50 % on 100 held-out rows, before training and after"),
        (evaluation(0.5, 0.6, name="rouge_l"), "", "Exact match rose from 0 % to 64 %"),
        (evaluation(0.1, 0.4, 0.2, 0.4, name="answer_accuracy"), "good", "Answer accuracy rose"),
    ],
)
def test_verdict_claims_no_more_than_was_measured(tmp_path: Path, result: dict, tone: str, words: str) -> None:
    put(tmp_path, "results/evaluation.json", result)
    html, page = read(tmp_path)
    assert words in page.text
    assert f'<p class="verdict {tone}">' in html


def test_hostile_text_is_shown_and_never_obeyed(full: Path) -> None:
    clean = [tag for tag, _ in read(full)[1].tags]
    run = full.rename(full.with_name("<b>x&y"))
    row = {"id": HOSTILE, "prompt": HOSTILE, "reference": HOSTILE, "base": HOSTILE + "z" * 1_000_000, "tuned": HOSTILE}
    put(run, "results/predictions.jsonl", row, {"prompt": None, "tuned": 7, "exact": "yes"}, {})
    put(run, "origins.json", {HOSTILE: {"value": HOSTILE, "origin": HOSTILE, "reason": HOSTILE}})
    put(run, "environment.json", {HOSTILE: HOSTILE})
    put(
        run,
        "data.json",
        {HOSTILE: HOSTILE, "files": [{"path": HOSTILE, "sha256": HOSTILE}], "policy": {HOSTILE: HOSTILE}},
    )
    put(run, "plan.json", {"memory": {HOSTILE: 1}})
    put(run, "results/merge.json", {"chosen": HOSTILE, "candidates": [{"name": HOSTILE}], "path": HOSTILE})
    put(run, "results/evaluation.json", {"tuned": {"metrics": {HOSTILE: 1}}, "decoding": HOSTILE, "skipped": [HOSTILE]})
    (run / "recipe.yaml").write_bytes(HOSTILE.encode("utf-8", errors="surrogatepass"))
    html, page = read(run)
    assert {tag for tag, _ in page.tags} <= set(clean) | {"h3", "pre"}
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    assert "␛[31mred" in page.text
    assert "⟨U+202E⟩" in page.text
    assert "more characters" in page.text
    assert len(html) < 120_000


def test_wrong_shapes_do_not_stop_the_page(tmp_path: Path) -> None:
    for name in ("origins", "environment", "data", "plan", "finished", "results/evaluation", "results/merge"):
        put(tmp_path, f"{name}.json", [1, 2])
    put(
        tmp_path,
        "metrics.jsonl",
        1,
        None,
        {"kind": "train", "step": "one", "loss": 1},
        {"kind": "train", "step": 1, "loss": "x"},
    )
    assert "plan.json is not a JSON object" in read(tmp_path)[1].text
    put(tmp_path, "data.json", {"files": 3, "tokens": 0, "supervised_tokens": "many", "policy": []})
    put(tmp_path, "plan.json", {"memory": None, "peak_bytes": math.nan})
    put(tmp_path, "results/merge.json", {"candidates": {"a": 1}, "chosen": None})
    put(
        tmp_path,
        "results/evaluation.json",
        {"tuned": {"metrics": {"exact_match": math.inf}}, "base": 1, "difference": 2},
    )
    put(tmp_path, "origins.json", {"a": 1})
    read(tmp_path)


def test_thinning_keeps_extremes_ends_and_gaps() -> None:
    points = [(float(s), math.sin(s)) for s in range(100_000)]
    points[51_234] = (51_234.0, 99.0)
    points[77_777] = (77_777.0, -99.0)
    kept = thin([*points])
    assert len(kept) <= 1000
    assert kept == sorted(kept)
    assert {points[0], points[-1], points[51_234], points[77_777]} <= set(kept)
    gap = thin([(step, None if 40_000 <= step < 60_000 else value) for step, value in points])
    assert any(value is None for _, value in gap)
    assert thin(points[:1000]) == points[:1000]


def test_long_and_short_curves_draw() -> None:
    figure = chart("Loss", [Curve("train", [(float(s), 1.0 + s % 7) for s in range(100_000)])])
    line = re.findall(r'data-name="train" d="([^"]*)"', figure)
    assert len(re.findall(r"[ML]", line[0])) <= 1000
    assert 'class="dot train"' in chart("Loss", [Curve("train", [(1.0, 2.0)])])
    assert chart("Loss", [Curve("train", [(1.0, None)])]) == chart("Loss", []) == ""
    broken = chart("Loss", [Curve("train", [(1.0, 2.0), (2.0, None), (3.0, 1.0), (4.0, 3.0)])])
    assert re.findall(r'data-name="train" d="([^"]*)"', broken)[0].count("M") == 2
    assert "1 value missing or not finite, first at step 2" in broken
    flat = chart("Loss", [Curve("train", [(1.0, 0.0), (2.0, 0.0)])], from_zero=True)
    assert "nan" not in flat


def test_axes_are_readable() -> None:
    assert ticks(0.13, 3.1) == [0, 1, 2, 3, 4]
    assert ticks(1, 9, 5, whole=True) == [0, 2, 4, 6, 8, 10]
    assert ticks(1, 2, 5, whole=True) == [1, 2]
    assert charts.axis_for([2**31, 3 * 2**30], "", True, True).unit == "GiB"
    rates = charts.axis_for([0.0, 1.99e-4], "", False, True)
    assert (rates.unit, rates.label(rates.marks[-1])) == ("×10⁻⁴", "2")
    spike = charts.axis_for([1.0] * 50 + [1e6], "", False, True)
    assert spike.log
    assert [spike.label(mark) for mark in spike.marks][-1] == "1,000,000"
    assert [plain(n) for n in (12345.0, 0.123456, 2e-5, -0.5, 0)] == ["12,345", "0.1235", "2×10⁻⁵", "−0.5", "0"]


def test_smoothing_follows_a_line_and_keeps_gaps() -> None:
    line: list[charts.Point] = [(float(s), 2.0 * s) for s in range(200)]
    line[100] = (100.0, None)
    mean, width = smooth(line)
    assert width == 11
    assert mean[0] == line[0]
    assert mean[100] == (100.0, None)
    assert mean[50][1] == pytest.approx(100.0)
    assert smooth(line[:10]) == (line[:10], 1)


def test_resumed_steps_count_once() -> None:
    records: list[charts.JsonObject] = [
        {"step": 1, "loss": 9.0},
        {"step": 2, "loss": 8.0},
        {"step": 2, "loss": 3.0},
        {"step": 1.5},
    ]
    assert charts.points_of(records, "loss") == [(1, 9.0), (1.5, None), (2, 3.0)]
    assert charts.points_of(records, "absent") == []


def test_loss_plot(full: Path, tmp_path: Path) -> None:
    path = write_loss_plot(full)
    assert path == full / "loss.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert write_loss_plot(empty).stat().st_size > 1000


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_axis() -> None:
    falling = [8.0, 4.0, 2.0, 1.0] + [0.05 + 0.001 * (n % 7) for n in range(400)]
    assert charts.is_wide(falling)
    assert not charts.is_wide([2.0, 1.5, 1.2, 1.1, 1.0])
    assert not charts.is_wide([0.0, *falling]), "no logarithm of 0"
    assert not charts.is_wide([])
    records: list[charts.JsonObject] = [{"kind": "train", "step": n, "loss": x} for n, x in enumerate(falling, 1)]
    figure = chart("Loss", charts.loss_curves(records), "per supervised token")
    assert "logarithmic" in figure
    assert "data-log" in figure


def test_the_legend_says_how_often_the_loss_was_written() -> None:
    def names(apart: int) -> list[str]:
        records: list[charts.JsonObject] = [{"kind": "train", "step": apart * n, "loss": 1.0} for n in range(1, 201)]
        return [curve.name for curve in charts.loss_curves(records)]

    assert names(1) == ["train, every step", "train, mean of 11 steps"]
    assert names(10) == ["train, every 10 steps", "train, mean of 11 logged steps"]
    assert charts.loss_curves([]) == []


def test_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_page(tmp_path)
    before = page.read_bytes()
    put(tmp_path, "environment.json", {"torch": "2.13.0"})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_page(tmp_path)
    assert page.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_page_loads_neither_torch_nor_matplotlib() -> None:
    code = "import sys, whet.report.page; sys.exit(bool({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1]).returncode == 0


def test_safe_escapes_once_and_cuts() -> None:
    assert safe("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"
    assert safe(safe("<")) == "&lt;"
    assert safe("x" * 301).endswith("… 1 more characters</span>")
