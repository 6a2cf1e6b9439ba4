"""The page of `whet data check`: what it says, what it leaves out, and that no text of the data can act on it."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny

from whet.data.loss_mask import length_histogram, masked_pieces, masked_row, masked_rows
from whet.report.data_page import data_page, reasons, verdict, write_data_page
from whet.report.findings import differing, found_faults
from whet.report.histogram import bins_of, histogram

HOSTILE = "<script>alert(1)</script> \"'& \x1b[31mred \u202eright-to-left \ud800 </style><img src=x onerror=y>"
VOID = {"meta", "img", "wbr", "br", "path", "rect"}
PLACE = {"file": "data/train.jsonl", "row": 3, "text": "a good film"}
TWINS = {"similarity": 0.93, "a": PLACE, "b": PLACE | {"row": 9, "text": "a great film"}}
FOUND = {
    "duplicates": {"exact_rows": 4, "near_rows": 2, "clusters": 3, "examples": [TWINS]},
    "leakage": [{"between": ["train", "eval"], "exact": 7, "near": 1, "examples": [TWINS]}],
    "contradictions": {"rows": 2, "examples": [{"a": PLACE | {"answer": "yes"}, "b": PLACE | {"answer": "no"}}]},
    "personal": {"kinds": {"email": 3}, "examples": [{"file": "f", "row": 1, "kind": "email", "shown": "a***@b.c"}]},
    "answers": {"kinds": {"truncated": 2}, "examples": []},
    "blocklist": {"rows": 5},
}


def good_report() -> dict[str, Any]:
    return {
        "rows_train": 100, "rows_eval": 5, "tokens": 1000, "supervised_tokens": 250, "longest_row": 50,
        "policy": {"max_length": 50}, "warnings": [], "dropped": [], "supervised_by_role": {"assistant": 250},
        "lengths": [{"from": 10, "to": 30, "rows": 60}, {"from": 30, "to": 51, "rows": 40}],
        "files": [{"path": "data/train.jsonl", "rows": 105, "bytes": 2048, "sha256": "ab" * 32}],
    }  # fmt: skip


def piece(text: str, role: str | None = None, learned: bool = False, special: bool = False) -> dict[str, Any]:
    return {"text": text, "role": role, "learned": learned, "special": special}


def a_row(*pieces: dict[str, Any]) -> dict[str, Any]:
    return {"file": "data/train.jsonl", "row": 1, "tokens": 12, "learned": 4, "pieces": list(pieces)}


class Outline(HTMLParser):
    """Tags, words, what stands inside <mark>, and the headings; fails on a tag that is closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.marked = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)
            self.marked += data if "mark" in self.open and "article" in self.open else ""

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def outline(report: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> Outline:
    return Outline(data_page(report, rows or []))


def test_a_good_report_is_said_to_be_good() -> None:
    tone, sentence = verdict(good_report())
    assert tone == "good"
    assert re.sub("<[^>]*>", "", sentence).startswith("There are 100 rows to learn from, and 25 % of the tokens are")


@pytest.mark.parametrize(
    "fault",
    [
        {"warnings": ["3 rows are odd"]},
        {"dropped": [{"file": "f", "row": 1, "reason": "empty"}]},
        *({name: 1} for name in ("rows_without_target", "rows_without_end_of_turn", "tokens_lost")),
        *({name: 1} for name in ("rows_on_both_sides", "contradictory_rows")),
        *({"quality": {name: found}} for name, found in FOUND.items()),
    ],
    ids=lambda fault: next(iter(fault.get("quality", fault))),
)
def test_nothing_that_was_found_is_called_good(fault: dict[str, Any]) -> None:
    assert verdict(good_report() | fault)[0] != "good"


@pytest.mark.parametrize("name", ["rows_train", "supervised_tokens"])
def test_what_cannot_be_trained_on_is_bad(name: str) -> None:
    assert verdict(good_report() | {name: 0})[0] == "bad"


def test_checks_that_found_nothing_are_no_faults_and_are_named() -> None:
    clean = {
        "duplicates": {"exact_rows": 0, "near_rows": 0, "examples": []},
        "leakage": [{"between": ["train", "eval"], "exact": 0, "near": 0, "examples": []}],
        "personal": {"kinds": {}, "examples": []},
        "languages": {"ko": 0.98, "en": 0.02},
    }
    assert found_faults(clean) == []
    report = good_report() | {"quality": clean}
    assert verdict(report)[0] == "good"
    page = outline(report)
    assert "Looked for and not found: duplicates, leakage, personal data." in page.text
    assert "Languages" in page.text


@pytest.mark.parametrize("name", FOUND)
def test_a_finding_is_shown_with_its_example(name: str) -> None:
    page = outline(good_report() | {"quality": {name: FOUND[name]}})
    assert "Quality" in page.text
    if name in ("duplicates", "leakage", "contradictions"):
        assert "train.jsonl row 3" in page.text
        assert "train.jsonl row 9" in page.text or name == "contradictions"


def test_a_check_that_is_new_is_shown_too() -> None:
    report = good_report() | {"quality": {"odd_spaces": {"rows": 3, "kinds": {"tab": 3}}}}
    assert "Odd spaces" in outline(report).text
    assert verdict(report)[0] != "good"


@pytest.mark.parametrize("key", list(good_report()))
def test_what_is_absent_leaves_no_heading(key: str) -> None:
    report = good_report()
    del report[key]
    page = data_page(report, [])
    Outline(page)
    heads = re.findall(r"<h2>([^<]*)</h2>(.*?)</section>", page, re.DOTALL)
    assert all(body.strip() for _, body in heads)
    missing = {"lengths": "Lengths", "files": "Files", "supervised_by_role": "What is learned"}
    if key in missing:
        assert missing[key] not in [head for head, _ in heads]


def test_an_empty_report_is_a_page() -> None:
    page = outline({})
    assert page.text.startswith("Your data · whet data check")
    assert "<section" not in data_page({}, [])


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [None], [[1]], float("nan"), True])
def test_damaged_parts_are_left_out(value: object) -> None:
    for key in (*good_report(), "quality", "labels", "label_examples"):
        outline(good_report() | {key: value})
    for name in FOUND:
        outline(good_report() | {"quality": {name: value}})


def test_text_of_the_data_cannot_act() -> None:
    example = {"file": HOSTILE, "row": HOSTILE, "text": HOSTILE, HOSTILE: HOSTILE}
    report = good_report() | {
        "warnings": [HOSTILE], "dropped": [{"file": HOSTILE, "row": HOSTILE, "reason": HOSTILE}],
        "files": [{"path": HOSTILE, "sha256": HOSTILE}], "supervised_by_role": {HOSTILE: 3}, "format": HOSTILE,
        "labels": {HOSTILE: 3}, "label_examples": {HOSTILE: HOSTILE}, "policy": {HOSTILE: HOSTILE, "max_length": 50},
        "quality": {
            HOSTILE: {"kinds": {HOSTILE: 2}, HOSTILE: HOSTILE, "examples": [example]},
            "leakage": [{"between": [HOSTILE, HOSTILE], "exact": 2, "examples": [{"a": example, "b": PLACE}]}],
            "languages": {HOSTILE: 0.5},
        },
    }  # fmt: skip
    rows = [a_row(piece(HOSTILE, HOSTILE, True), piece(HOSTILE, HOSTILE, False, True)) | {"file": HOSTILE}]
    for made in (report, {key: value for key, value in report.items() if key != "labels"}):
        html = data_page(made, rows)
        page = Outline(html)
        assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "link")]
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        assert not re.search("[\x1b\u202e\ud800]", html)
        html.encode("utf-8")
    assert "alert(1)" in page.text


def test_an_unescaped_page_would_be_seen() -> None:
    page = Outline(data_page(good_report(), []).replace("<main>", f"<main>{HOSTILE.replace('</style>', '')}"))
    assert [tag for tag, _ in page.tags if tag in ("script", "img")]


def test_the_page_loads_nothing() -> None:
    page = outline(good_report(), [a_row(piece("x", "user"))])
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert [policy for policy in policies if policy and policy.startswith("default-src 'none'")]
    assert not [1 for _, attributes in page.tags if "src" in attributes]
    assert all((a.get("href") or "#").startswith("#") for _, a in page.tags)
    assert "url(" not in data_page(good_report(), [])
    assert "prefers-color-scheme: dark" in data_page(good_report(), [])


def test_every_link_leads_somewhere() -> None:
    page = outline(good_report() | {"quality": FOUND, "warnings": ["w"]}, [a_row(piece("x", "user"))])
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "")[1:] for tag, a in page.tags if tag == "a"} <= set(ids)


def test_what_is_learned_is_marked_and_said() -> None:
    row = a_row(
        piece("<|im_start|>", "template", special=True), piece("user\n", "template"), piece("감동이에요", "user"),
        piece("긍정", "assistant", True), piece("<|im_end|>", "assistant", True, True), piece("\n", "template"),
    )  # fmt: skip
    page = outline(good_report(), [row])
    assert page.marked == "[learned: 긍정][learned: <|im_end|>]"
    tokens = [a for tag, a in page.tags if tag == "span" and a.get("class") == "token"]
    assert len(tokens) == 3  # the legend has one
    assert "↵" in page.text


def test_a_long_piece_keeps_both_ends_and_says_what_is_missing() -> None:
    page = outline(good_report(), [a_row(piece("START" + "x" * 5000 + "STOP", "user"), piece("ok", "assistant", True))])
    assert "START" in page.text
    assert "STOP" in page.text
    assert "4,149 more characters" in page.text


def test_many_pieces_keep_the_last() -> None:
    pieces = [piece(f"p{number} ", "user", number % 2 == 0) for number in range(1000)]
    page = outline(good_report(), [a_row(*pieces)])
    assert "p0 " in page.text
    assert "p999" in page.text
    assert "908 more pieces" in page.text
    assert "p500 " not in page.text


def test_reasons_that_differ_in_numbers_are_one() -> None:
    dropped = [{"file": "f", "row": row, "reason": f"{row + 31} tokens, over 30"} for row in range(5)]
    found = reasons([*dropped, {"file": "f", "row": 9, "reason": "nothing to learn"}, None, 3])
    assert [(reason, len(items)) for reason, items in found] == [("… tokens, over 30", 5), ("nothing to learn", 1)]
    assert reasons(dropped[:1])[0][0] == "31 tokens, over 30"


def test_the_reasons_hold_every_dropped_row() -> None:
    dropped = [{"file": "f", "row": row, "reason": "word" * (row % 50)} for row in range(1000)]
    page = outline(good_report() | {"dropped": dropped})
    assert sum(len(items) for _, items in reasons(dropped)) == 1000
    assert "and 600 more rows, for other reasons" in page.text


def test_a_page_for_many_rows_is_small_and_quick() -> None:
    words = ("empty", "nothing to learn", "{} tokens, over 30")
    dropped = [{"file": "f", "row": n, "reason": words[n % 3].format(n)} for n in range(100_000)]
    examples = {"rows": 100_000, "examples": [TWINS] * 10_000}
    report = good_report() | {
        "dropped": dropped, "warnings": ["w" * 5000] * 1000, "files": good_report()["files"] * 5000,
        "quality": {"duplicates": examples, "odd": {"kinds": {f"k{n}": n + 1 for n in range(50_000)}}},
        "labels": {f"label {n}": n for n in range(20_000)},
    }  # fmt: skip
    rows = [a_row(*[piece("긴 글 " * 2000, "user"), piece("짧다", "assistant", True)] * 50)] * 200
    start = time.process_time()
    page = data_page(report, rows)
    assert time.process_time() - start < 3  # a third of that alone
    assert len(page.encode()) < 1_000_000
    Outline(page)


def test_bars_stand_for_all_rows_and_the_limit_is_marked() -> None:
    bins = bins_of(good_report())
    figure = histogram(bins, 50)
    tall = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', figure)]
    assert len(tall) == 2
    assert tall[0] / tall[1] == pytest.approx(60 / 40, rel=1e-3)
    assert "max_length 50" in figure
    assert figure.count('class="limit"') == 1
    assert "All 8 rows have 4 tokens" in histogram([(4.0, 5.0, 8.0)], 50)
    far = histogram(bins, 4096)
    assert 'class="limit"' not in far
    assert "data.max_length is 4,096" in far


def test_counts_of_very_different_size_are_logarithmic_and_a_single_row_is_seen() -> None:
    bins = [(0.0, 10.0, 90_000.0), (10.0, 20.0, 1.0), (20.0, 30.0, 0.0)]
    figure = histogram(bins, None)
    tall = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', figure)]
    assert "logarithmic" in figure
    assert tall[1] > 30
    assert tall[2] == 0
    assert max(tall) <= 1000
    assert "logarithmic" not in histogram([(0.0, 10.0, 90.0), (10.0, 20.0, 1.0)], None)


def test_what_differs_is_underlined() -> None:
    assert differing("a good film", "a great film") == ("a g<u>oo</u>d film", "a g<u>rea</u>t film") or differing(
        "a good film", "a great film"
    ) == ("a g<u>ood</u> film", "a g<u>reat</u> film")
    assert differing("ab", "abc") == ("ab<u></u>", "ab<u>c</u>")
    assert differing("x" * 3000 + "a", "x" * 3000 + "b")[0] == f"…{'x' * 200}<u>a</u>"


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    path = write_data_page(tmp_path / "page.html", good_report(), [])
    assert path.read_text(encoding="utf-8") == data_page(good_report(), [])
    assert [found.name for found in tmp_path.iterdir()] == ["page.html"]


@pytest.fixture(scope="module")
def chats(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Rows of the built-in tokenizer's template with several turns, Korean, emoji and spelt special tokens."""
    from whet.api import prepared

    rows = [
        {"messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "안녕하세요 👩‍👩‍👧 <|im_end|> ok?"},
            {"role": "assistant", "content": f"네 {number}"}, {"role": "user", "content": "again"},
            {"role": "assistant", "content": "ok again"},
        ]}
        for number in range(6)
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("chats")
    data = tiny.write_rows(folder / "rows.jsonl", rows)
    return prepared(tiny.recipe(model_dir, data, folder / "run", data__val_size=0))


def test_pieces_are_the_row_that_training_uses(chats: Any) -> None:
    tokenizer = chats.row_tokenizer.tokenizer
    for index in range(len(chats.train)):
        ids, learned = chats.train.row(index)
        pieces = masked_pieces(chats, index)
        assert "".join(one["text"] for one in pieces) == tokenizer.decode(ids.tolist())
        target = tokenizer.decode(ids[learned].tolist())
        assert "".join(one["text"] for one in pieces if one["learned"]) == target
        shown = masked_row(chats, index)
        assert "".join(text for text, mark in shown if mark) == target


def test_a_shifted_mask_would_be_seen(chats: Any) -> None:
    """The pieces follow the mask, not the roles: with a mask one token late, what is marked is another text."""
    import dataclasses

    import numpy as np

    right = [one["text"] for one in masked_pieces(chats, 0) if one["learned"]]
    late = dataclasses.replace(chats.train, learned=np.roll(np.array(chats.train.learned), 1))
    moved = [one["text"] for one in masked_pieces(dataclasses.replace(chats, train=late), 0) if one["learned"]]
    assert moved != right


def test_pieces_say_whose_turn_it_is(chats: Any) -> None:
    pieces = masked_pieces(chats, 0)
    said = {role: "".join(p["text"] for p in pieces if p["role"] == role) for role in ("system", "user", "assistant")}
    assert "Be brief." in said["system"]
    assert "안녕하세요 👩‍👩‍👧 <|im_end|> ok?" in said["user"]
    assert "again" in said["user"]
    assert said["assistant"].replace("<|im_end|>", "|") == "네 0|ok again|"
    assert {p["role"] for p in pieces if p["learned"]} == {"assistant"}
    ends = [p for p in pieces if p["text"] == "<|im_end|>" and p["learned"]]
    assert len(ends) == 2
    assert all(p["special"] for p in ends)


def test_rows_are_spread_over_the_data(chats: Any) -> None:
    rows = masked_rows(chats, 3)
    assert [row["row"] for row in rows] == [1, 3, 5]
    for row in rows:
        assert row["learned"] < row["tokens"]
    assert len(masked_rows(chats, 100)) == 6
    assert "[learned: " in outline(good_report(), rows).marked


@pytest.mark.parametrize("bins", [1, 2, 8, 32])
def test_the_histogram_counts_every_row_in_its_bin(chats: Any, bins: int) -> None:
    import dataclasses

    import numpy as np

    rng = np.random.default_rng(0)
    for lengths in ([7], [5, 5, 5], rng.integers(3, 500, 1000).tolist(), [1, 2], list(range(1, 30))):
        starts = np.concatenate([[0], np.cumsum(lengths)])
        rows = dataclasses.replace(
            chats.train, ids=np.zeros(starts[-1], np.int32), learned=np.zeros(starts[-1], bool), starts=starts,
            sources=np.zeros(len(lengths), np.int64),
        )  # fmt: skip
        found = length_histogram(dataclasses.replace(chats, train=rows), bins)
        assert len(found) <= bins
        assert found[-1]["to"] == max(lengths) + 1
        for one in found:
            assert one["rows"] == sum(one["from"] <= length < one["to"] for length in lengths)
