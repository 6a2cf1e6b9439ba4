"""Korean in the terminal: errors, help, tables and progress read Korean, data stays as it is, English is unchanged."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import pytest
from bad_data import BAD_DATA, BadFile
from bad_recipes import BAD_RECIPES, BadRecipe, recipe_names, workshop
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from whet.adapters.files import Described
from whet.arguments import VERBS
from whet.base import language
from whet.base.catalogue import Catalogue, catalogue
from whet.base.console import Progress, answer, console, say
from whet.base.errors import UserError
from whet.cli import run
from whet.data.format.standardise import recognise, standardise
from whet.data.read.read import read_files
from whet.planning.rules import Asked, check
from whet.recipe import parse
from whet.spelling.aliases import canonical
from whet.spelling.unneeded import REASONS

LABELS = ("  현재 값:   ", "  올바른 값: ", "  해결:      ")
SENTENCE = re.compile(r"(?:\b[a-z]{2,} ){2,}[a-z]{2,}\b")


@pytest.fixture(autouse=True)
def _english_afterwards() -> Iterator[None]:
    yield
    language.use("en")


@pytest.fixture
def korean() -> None:
    language.use("ko")


def english_left(text: str) -> list[str]:
    """Lines with three English words one after the other and no Hangul: all that is no path, value or command."""
    found = []
    for line in text.splitlines():
        label = next((label for label in LABELS if line.startswith(label)), "")
        rest = line.removeprefix(label)
        if label == LABELS[0] or re.search("[가-힣]", rest) or rest.lstrip().startswith(("whet ", "git ")):
            continue
        if SENTENCE.search(rest):
            found.append(line)
    return found


def test_errors_of_recipes_leave_no_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, korean: None) -> None:
    workshop(tmp_path)
    monkeypatch.chdir(tmp_path)
    shown = 0
    for bad in BAD_RECIPES:
        content = bad.text.encode() if isinstance(bad.text, str) else bad.text
        (tmp_path / "bad.yaml").unlink(missing_ok=True) if content is None else (tmp_path / "bad.yaml").write_bytes(
            content
        )
        try:
            check(Asked.of(parse(*_of(bad)).recipe, device="cpu"))
        except UserError as error:
            message = language.error_text(error)
            assert message.startswith("오류: "), bad.name
            assert re.search("[가-힣]", message.splitlines()[0].removeprefix("오류: ")), message
            assert english_left(message) == [], bad.name
            shown += 1
    assert shown >= 75, "most are seen before data are read"


def _of(bad: BadRecipe) -> tuple[str, list[str]]:
    name, *settings = recipe_names(bad)
    return name, settings


def read_all(path: Path) -> None:
    head = list(islice(records := read_files([str(path)]), 100))
    list(standardise(chain(head, records), recognise(head, {}), {}))


@pytest.mark.parametrize("bad", BAD_DATA, ids=lambda bad: bad.name)
def test_errors_of_data_leave_no_english(bad: BadFile, tmp_path: Path, korean: None) -> None:
    path = tmp_path / (bad.name + bad.suffix)
    path.write_bytes(bad.content)
    with pytest.raises(UserError) as caught:
        read_all(path)
    message = language.error_text(caught.value)
    first = message.splitlines()[0]
    assert first.startswith(f"오류: {path}" + (f", {bad.row}행" if bad.row else ""))
    assert re.search("[가-힣]", first.split(": ", 2)[2])
    assert "\n  해결:      " in message
    assert english_left(message) == []


HELP = [[], *([verb] for verb in VERBS), ["data", "check"], ["data", "judge"], ["data", "augment"]]


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_is_korean_and_keeps_to_its_width(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        run([*words, "--lang", "ko", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("사용법: whet")
    assert english_left(text) == []
    head = text.partition("예시:")[0].partition("시작하기:")[0]
    assert all(cell_len(line) <= 80 for line in head.splitlines())
    described = [line for line in head.splitlines() if re.match(r"  +-", line) or re.match("    [a-z]", line)]
    assert sum(bool(re.search("[가-힣]", line)) for line in described) >= len(described) - 3, "those whose text wraps"


def test_english_is_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    from whet.base.korean import KoreanConsole

    error = UserError("there is no such recipe", "remove it", "a.yaml", 3, "train.seed", "x", "a name")
    assert language.error_text(error) == f"error: {error}"
    assert not isinstance(console(), KoreanConsole)
    say("interrupted")
    with Progress("training", 1) as bar:
        bar.advance("loss 1.0")
    said = capsys.readouterr().err
    assert said == "interrupted\ntraining 1/1  loss 1.0  eta 0 s\n"


def test_what_is_said_of_other_tools_settings_is_korean(korean: None) -> None:
    notes = {f"{name}: ignored, {reason}" for name, reason in REASONS.items()}
    for name, value in (("hf_token", None), ("bias", "none"), ("report_to", "wandb"), ("torch_dtype", "auto")):
        said = {note for _, _, note in canonical(name, value, None, None) if note}
        assert said, name
        notes |= said
    for note in notes:
        shown = language.translated(note)
        assert re.fullmatch(r"\w+: 무시합니다\. .*[가-힣].*", shown), shown


@pytest.mark.parametrize(
    ("english", "shown"),
    [
        ("trained 6 steps (1.5 epochs), 9 tokens in 2.4 s (5 tok/s); lowest held-out loss 0.3881 at step 6, "
         "kept: step 6 -> runs/a",
         "6스텝(1.5에폭), 9토큰을 2.4초에 학습 (초당 5토큰); "
         "최저 검증 손실 0.3881 (6스텝), 남긴 것: 6스텝 -> runs/a"),
        ("merged on trained base, bf16; on 8 held-out rows: greedy answers 100.00%, mean KL 1e-05, top-1 100.00%, "
         "held-out loss 0.3895 to 0.3889 -> out",
         "병합: 학습한 기반 (bf16); 검증 행 8개로 비교: greedy 답변 100.00%, 평균 KL 1e-05, top-1 100.00%, "
         "검증 손실 0.3895에서 0.3889 -> out"),
        ("questions that are nearly the same in train and held out: 8 (data.leakage=drop_near)",
         "학습, 검증 양쪽에 거의 같은 질문: 8 (data.leakage=drop_near)"),
        ("head: Feature extraction: train the head alone on what the frozen model computes.", None),
        ("512 tokens a second (1.5 ms a step), peak 1.0 GiB, nf4 weights, bf16 arithmetic on cuda",
         "초당 512토큰 (스텝당 1.5 ms), 최대 1.0 GiB, cuda에서 nf4 가중치와 bf16 연산"),
        ("\nrows.jsonl row 1", "\nrows.jsonl 1행"),
    ],
)  # fmt: skip
def test_lines_of_verbs_are_korean_throughout(english: str, shown: str | None, korean: None) -> None:
    found = language.translated(english)
    assert found == shown if shown else (found != english and re.search("[가-힣]", found))


def test_adapters_are_listed_by_korean_names(
    tmp_path: Path, korean: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        Described(name, tmp_path / name, "lora", None, "held out", 8, 1000, 4096) for name in ("missing", "held out")
    ]
    monkeypatch.setattr("whet.adapters.files.find", lambda _: found)
    assert run(["adapters", "list", str(tmp_path), "--lang", "ko"]) == 0
    names, *rows = capsys.readouterr().out.splitlines()
    assert names.split() == ["어댑터", "종류", "랭크", "파라미터", "크기", "기반", "점수"]
    assert [row.split("  ")[0] for row in rows] == [str(one.path) for one in found], "names are data"
    assert {cell_len(line.partition("lora")[0]) for line in rows} == {cell_len(names.partition("종류")[0])}


def test_json_stays_english(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "none.yaml", "--json", "--lang", "ko"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["problem"] == "there is no such recipe"
    assert shown.err.startswith("오류: none.yaml: 그런 레시피가 없습니다\n")


@pytest.mark.parametrize(
    ("environment", "encoding", "wanted"),
    [
        ({"LANG": "ko_KR.UTF-8"}, "utf-8", "ko"),
        ({"LANG": "ko_KR.UTF-8"}, "ascii", "en"),
        ({"LANG": "ko_KR.eucKR"}, "euc-kr", "ko"),
        ({"LANG": "ko"}, "utf-8", "ko"),
        ({"LANG": "kok_IN.UTF-8"}, "utf-8", "en"),
        ({"LANG": "en_US.UTF-8"}, "utf-8", "en"),
        ({"LANG": "ko_KR.UTF-8", "LC_ALL": "C"}, "utf-8", "en"),
        ({"LANG": "C", "LC_MESSAGES": "ko_KR.UTF-8"}, "utf-8", "ko"),
        ({"LANG": "C", "LC_ALL": ""}, "utf-8", "en"),
        ({"LANG": "ko_KR.UTF-8", "WHET_LANG": "en"}, "utf-8", "en"),
        ({"LANG": "C", "WHET_LANG": "ko"}, "ascii", "ko"),
        ({}, "utf-8", "en"),
    ],
)
def test_the_environment_says_the_language(
    environment: dict[str, str], encoding: str, wanted: str, tmp_path: Path
) -> None:
    with (tmp_path / "stream").open("w", encoding=encoding) as stream:
        assert language.of_environment(environment, (stream, None)) == wanted


def test_an_unknown_language_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "--lang", "fr"]) == 2
    assert "--lang" in capsys.readouterr().err
    monkeypatch.setenv("WHET_LANG", "fr")
    assert run(["methods"]) == 2
    assert "field WHET_LANG" in capsys.readouterr().err
    assert run(["methods", "--lang", "ko"]) == 0, "said on the command line"
    assert "모든 선형 레이어의 저랭크 갱신량" in capsys.readouterr().out


HOSTILE = [
    "there is no such recipe", "{0}", "{0:words} and {1}", "a.*(b|c)[", "held out", "missing", "3 rows left out: x",
    "error: whet itself failed: {0}", "the field {0} is missing", "a recipe holds no secrets", "%s %d", "text", "label",
]  # fmt: skip


@pytest.mark.parametrize("words", HOSTILE)
def test_data_with_words_of_whet_stays_as_it_is(words: str, korean: None, capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError("the column cannot be read", "remove it", words, 1, words, words)
    lines = language.error_text(error).splitlines()
    assert lines[0].startswith(f"오류: {words}, 1행, {words} 필드: ")
    assert lines[1] == f"  현재 값:   {words}"
    table = Table(box=None)
    for name in ("label", "rows"):
        table.add_column(name)
    table.add_row(words, Text(words))
    console().print(table)
    console().print(Text(words))
    say(f"  {words} taken for {words}: 3")
    shown = capsys.readouterr().err
    assert shown.splitlines()[0].split() == ["레이블", "행"]
    assert shown.count(words) >= 3
    assert shown.splitlines()[2] == words
    found = Catalogue({"the row {0} of {1}": "{1}의 {0}행"})
    assert found.translated(f"the row 7 of {words}") == (
        f"{words}의 7행" if " of " not in words else f"the row 7 of {words}"
    )


def test_what_could_be_read_in_two_ways_stays_english() -> None:
    found = Catalogue({"{0} is never {1}": "{1} 아님: {0}", "no such {0}: {1}": "{1} 없음({0})"})
    assert found.translated("a is never b") == "b 아님: a"
    assert found.translated("this is never so is never a number") == "this is never so is never a number"
    assert found.translated("no such file: a: b") == "a: b 없음(file)", "signs are no words"


def test_the_most_specific_template_wins_and_only_marked_values_are_translated() -> None:
    found = Catalogue({
        "{0} cannot be read": "{0}: 읽을 수 없음", "the index {0} cannot be read": "색인 {0}: 읽을 수 없음",
        "the index": "색인",
        "stopped: {0}": "멈춤: {0:words}", "was kept: {0}": "남김: {0}",
    })  # fmt: skip
    assert found.translated("the index 3 cannot be read") == "색인 3: 읽을 수 없음"
    assert found.translated("the index cannot be read") == "the index: 읽을 수 없음"
    assert found.translated("stopped: the index") == "멈춤: 색인"
    assert found.translated("was kept: the index") == "남김: the index"
    assert found.translated("  ! stopped: 3\nunknown words here") == "  ! 멈춤: 3\nunknown words here"


def test_ten_thousand_lines_take_less_than_a_second(korean: None) -> None:
    assert catalogue().translated("there is no such recipe") == "그런 레시피가 없습니다"
    lines = [
        text
        for number in range(2500)
        for text in (
            f"{number:,} rows repeat an earlier one", f"epoch 0.{number}  loss 1.{number}  {number} tok/s  1.0 MiB",
            f"a line that nobody knows, number {number}", f"run-{number}: read as train.seed={number}",
        )
    ]  # fmt: skip
    start = time.process_time()
    shown = [catalogue().translated(line) for line in lines]
    assert time.process_time() - start < 1.0
    assert shown[4] == "앞의 행과 겹치는 행 1개"
    start = time.process_time()
    for piece in (" is ", "{0}", ", ", " and ", "of the rows "):
        catalogue().translated(piece * 20_000)
    assert time.process_time() - start < 2.0, "no text makes it slow"


def test_console_progress_and_tables(korean: None, capsys: pytest.CaptureFixture[str]) -> None:
    say("data: 20 rows to learn from, 4 held out (alpaca)")
    with Progress("training", 1) as bar:
        bar.advance("epoch 1.00  loss 1.2000  1,000 tok/s  1.0 GiB")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("learned tokens", "3 (10 %)")
    console().print(table)
    answer("not computed: bleu (pip install 'whet[eval]')")
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "데이터: 학습 20행, 검증 4행 (alpaca)",
        "학습 1/1  에폭 1.00  손실 1.2000  초당 1,000토큰  1.0 GiB  남은 시간 0초",
        "학습 대상 토큰  3 (10 %)",
    ]
    assert shown.out == "계산하지 않음: bleu (pip install 'whet[eval]')\n"
