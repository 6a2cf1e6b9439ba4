"""What a terminal or a page would obey is made visible by everything that prints, and a printer of its own is found."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path

import pytest

from whet.base import console
from whet.base.console import say, write_answer, write_error, write_json
from whet.base.errors import UserError, shorten
from whet.base.secrets import hide, holds_secret
from whet.base.visible import visible, visible_json
from whet.cli import run

ROOT = Path(__file__).parents[2] / "whet"
HOSTILE = {
    "clears_the_screen": "a\x1b[2Jb", "moves_up": "a\x1b[1Ab", "title": "a\x1b]0;x\x07b", "link": "a\x1b]8;;http://x\x1b\\b",
    "one_byte": "a\x9b2Jb", "returns": "a\rb", "erases": "a\b\bb", "rings": "a\x07b", "form_feed": "a\x0cb", "null": "a\0b",
    "deletes": "a\x7fb", "turned": "a\u202eb", "isolated": "a\u2067b", "marked": "a\u200fb", "arabic_mark": "a\u061cb",
    "hidden": "a\u200bb", "joined": "a\u2060b", "byte_order": "a\ufeffb", "half": "a\ud800b", "tags": "a\U000e0041b",
    "next_line": "a\x85b", "separator": "a\u2028b", "annotation": "a\ufff9b",
}  # fmt: skip
PLAIN = (
    "plain",
    "한국어 텍스트",
    "a\u00a0b",
    "é",
    "👩\u200d👩\u200d👧",
    "می\u200cخواهم",
    "a\tb\nc",
    "日本\u3000語",
    "½ ⟨x⟩",
)
OBEYED = "\x1b\x9b\r\b\x07\x0c\0\x7f\u202e\u2067\u200f\u061c\u200b\u2060\ufeff\ud800\x85\u2028\ufff9\U000e0041"


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_that_is_obeyed_gets_through(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    text = HOSTILE[name]
    error = UserError(f"a problem {text}", text, text, 1, text, text, text)
    shown = [visible(text), shorten(text), str(error)]
    say(text)
    write_error(text)
    write_answer(text)
    console.console().print({"a": text}, [text])
    out, err = capfd.readouterr()
    for one in (*shown, out, err):
        assert not any(character in one for character in OBEYED), ascii(one)
        one.encode()
    write_json({text: [text]})
    out = capfd.readouterr().out
    assert not any(character in out for character in OBEYED)
    assert json.loads(out) == {text: [text]}, "it says the same"


@pytest.mark.parametrize("text", PLAIN)
def test_writing_of_all_scripts_stays(text: str) -> None:
    assert visible(text) == text
    assert json.loads(visible_json(json.dumps(text, ensure_ascii=False))) == text


def test_rows_labels_and_names_are_shown_safely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [text for text in HOSTILE.values() if not {"\0", "\ud800"} & {*text}]  # neither may stand in a row
    rows = [{"text": f"{text} {n}", "label": text} for text in texts for n in range(2)]
    file = "rows \x1b[2J\u202e\r.jsonl"
    (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run(["data", "check", file, "--fast", "--show", "20"]) == 0
    out, err = capfd.readouterr()
    assert "␛[2J" in out + err
    assert not any(character in out + err for character in OBEYED), ascii(err)


@pytest.mark.parametrize("missing", ["stdout", "stderr"])
def test_a_program_without_a_terminal_works(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.setattr(console, "_consoles", {})
    monkeypatch.setattr(sys, missing, None)
    assert run(["data", "check", str(tmp_path / "a.jsonl"), "--fast"]) == 0
    assert run(["data", "check", str(tmp_path / "a.jsonl"), "--fast", "--json"]) == (2 if missing == "stdout" else 0)
    assert run(["data", "check", str(tmp_path / "b.jsonl")]) == 2


def test_a_terminal_of_ascii_shows_other_scripts_in_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    write_answer("한 é\n")
    write_json({"a": "한"})
    assert raw.getvalue() == b"\\ud55c \\xe9\n" + b'{"a": "\\ud55c"}\n'


def writers(source: str) -> list[str]:
    """Everything in a source that writes to a terminal by itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            imported = name.rpartition(".")[2] == "Console"
            if (
                name in ("print", "input")
                or imported
                or name.endswith((".stdout.write", ".stderr.write", "stdout.buffer.write"))
            ):
                found.append(name)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.__stdout__", "sys.__stderr__"):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_whatever_prints_does_it_through_the_console(path: Path) -> None:
    if path.name != "console.py":
        assert writers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "fault",
    [
        "print(1)",
        "import sys\nsys.stdout.write('a')",
        "import sys\nsys.stderr.write('a')",
        "from rich.console import Console\nConsole().print(1)",
        "import sys\nsys.__stderr__",
    ],
)
def test_a_printer_of_its_own_would_be_found(fault: str) -> None:
    assert writers(fault)


SECRETS = ("hf_" + "a1" * 16, "sk-" + "a1" * 16, "ghp_" + "A1" * 18, "github_pat_" + "A1" * 20, "glpat-" + "a1" * 10,
           "xoxb-1234567890-abcdef", "AKIA" + "A1" * 8, "AIza" + "a1" * 18, "eyJhbGciOi.eyJzdWIiOi.abcdefghij",
           "https://me:hunter22@host/x", "https://hunter22@host/x", "https://h/x?token=hunter22",
           "https://h/x?a=1&api_key=hunter22")  # fmt: skip


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_hidden_wherever_an_error_shows_it(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    core = "hunter22" if "hunter22" in text else text
    assert holds_secret(text)
    assert core not in hide(f"before {text} behind")
    assert core not in str(UserError("a problem", found=text, file=text))
    assert run(["plan", text, "--offline", "--json"]) == 2
    assert core not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "text", ["hf_small", "sk-learn", "meta-llama/Llama-3", "https://host/a@b", "task-12345", "a?b=token"]
)
def test_a_name_is_no_secret(text: str) -> None:
    assert not holds_secret(text)
    assert hide(text) == text
