"""What the documentation shows is true: commands parse and run, links lead somewhere, generated pages are fresh."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from families.judge import Verdict
from families.korean import WORDS, twin
from families.table import SHORT, TASKS, document

import whet
from whet import arguments, cli
from whet.methods.all import METHODS
from whet.recipe import parse

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.ko.md")
PAGES = [*READMES, "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
CHEAP = {"init", "data", "plan", "methods", "schema"}  # seconds; the others train or load models
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str = "") -> list[str]:
    """The fenced blocks of a page that are in this language; the printed quickstart is not one of them."""
    shown = re.sub(r"(?s)<!-- quickstart-output -->.*?<!-- /quickstart-output -->", "", text(page))
    return [body for name, body in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", shown) if name == language]


def shell_lines(page: str) -> list[str]:
    """The command lines of a page, without comments."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    shown = [line for line in lines if line.split(" ")[0] in ("whet", "make", "pip", "python", "source")]
    return [shlex.join(shlex.split(line, comments=True)) for line in shown]


def whet_lines(page: str) -> list[list[str]]:
    """The words after `whet` of each command line, without redirection."""
    lines = [shlex.split(line)[1:] for line in shell_lines(page) if line.startswith("whet ")]
    return [words[: words.index(">")] if ">" in words else words for words in lines]


def check_command(words: list[str]) -> None:
    """The command line parses, and so do its recipe, where it is ours, and its overrides."""
    parsed = arguments.parse_words(words)
    target = getattr(parsed, "target", "")
    parse(ROOT / target if target in RECIPES else None, getattr(parsed, "overrides", []))


COMMANDS = [(page, words) for page in PAGES for words in whet_lines(page)]


def test_there_are_commands_to_check() -> None:
    shown = {words[0] for page, words in COMMANDS if page == "README.md"}
    assert shown >= {"init", "data", "plan", "train", "eval", "chat", "merge"}


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda part: part if isinstance(part, str) else " ".join(part)
)
def test_a_command_line_parses(page: str, words: list[str]) -> None:
    check_command(words)


@pytest.mark.parametrize(
    "fault",
    ["trian tickets.yaml", "train", "merge runs/a", "plan tickets.yaml --fast", "train a.yaml train.learning_rte=1"],
)
def test_a_wrong_command_would_be_seen(fault: str) -> None:
    with pytest.raises((SystemExit, whet.UserError)):
        check_command(fault.split())


@pytest.mark.parametrize("page", PAGES)
def test_verbs_in_the_text_exist(page: str) -> None:
    assert set(re.findall(r"`whet ([a-z]+)", text(page))) <= set(arguments.VERBS)


def test_the_cheap_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the English README in their order; the Korean one shows the same. test_data_verbs.py asks servers."""
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"question": "2 + 2?", "answer": "4"})
    Path("rows.jsonl").write_text(f"{row}\n" * 2, encoding="utf-8")
    for line in shell_lines("README.md"):
        words = shlex.split(line)[1:]
        if not line.startswith("whet ") or words[0] not in CHEAP or "--endpoint" in words:
            continue
        target = words[words.index(">") + 1] if ">" in words else None
        assert cli.run(words[: words.index(">")] if target else words) == 0, line
        out = capsys.readouterr().out
        if target:
            Path(target).write_text(out, encoding="utf-8")
    assert "method:" in Path("tickets.yaml").read_text(encoding="utf-8")


def test_the_other_cheap_verbs_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["methods"]) == 0
    assert "lora" in capsys.readouterr().out
    assert cli.run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"
    for verb in ("train", "eval", "merge", "chat", "doctor", "quickstart"):
        with pytest.raises(SystemExit) as stop:
            cli.run([verb, "--help"])
        assert stop.value.code == 0
        assert "example:" in capsys.readouterr().out


@pytest.mark.parametrize("readme", READMES)
def test_the_python_shown_fits_the_api(readme: str) -> None:
    calls = 0
    for block in blocks(readme, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("whet."):
                named = {word.arg: None for word in node.keywords if word.arg}
                inspect.signature(getattr(whet, node.func.attr)).bind(*node.args, **named)  # type: ignore[union-attr]
                calls += 1
    assert calls >= 4


def test_the_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of docs/python.md as one program, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text("".join(blocks("docs/python.md", "python")), encoding="utf-8")
    held = runpy.run_path(str(tmp_path / "page.py"))
    assert "digits_only" in held["held_out"]["tuned"]["metrics"]
    assert held["own"].finished["steps"] == 2
    assert len(list((tmp_path / "runs").glob("*.rows/*.jsonl"))) >= 2


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page: str) -> None:
    links = [link.partition("#")[0] for link in LINK.findall(text(page)) if not re.match(r"https?:|#", link)]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_place_on_a_machine_is_named(page: str) -> None:
    assert re.findall(r"(?<![\w.])/(?:tmp|work|home|root|mnt)\b", text(page)) == []


def test_the_readmes_show_the_same() -> None:
    """What test_twins.py does not compare: the lines of the commands, and what the quickstart printed."""
    english, korean = READMES
    assert shell_lines(english) == shell_lines(korean)
    assert blocks(english, "python") == blocks(korean, "python")
    for part in (r"(?m)^#+ ", r"(?m)^- ", r"(?m)^\| ", "<!-- /?[a-z-]+ -->"):
        assert len(re.findall(part, text(english))) == len(re.findall(part, text(korean))), part
    printed = re.compile(r"(?s)<!-- quickstart-output -->.*<!-- /quickstart-output -->")
    assert printed.findall(text(english)) == printed.findall(text(korean))


@pytest.mark.parametrize("readme", READMES)
def test_a_readme_is_short_and_names_every_recipe(readme: str) -> None:
    assert len(text(readme).splitlines()) < 200
    assert [path for path in RECIPES if path not in text(readme)] == []


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_and_extras_exist(page: str) -> None:
    targets = re.findall(r"(?m)^([a-z-]+):", text("Makefile"))
    assert {line.split()[1] for line in shell_lines(page) if line.startswith("make ")} <= set(targets)
    extras = [name for group in re.findall(r"pip install \S*\[([\w,]+)\]", text(page)) for name in group.split(",")]
    assert [name for name in extras if not re.search(rf"(?m)^{name} = \[", text("pyproject.toml"))] == []


def generator() -> Any:
    """docs/generate.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    return generate


def test_the_generated_pages_are_fresh() -> None:
    generate = generator()
    written = {path.name: shown for path, shown in generate.pages()}
    assert set(written) == {"recipe.md", "recipe.ko.md", "methods.md", "methods.ko.md"}
    for name, shown in written.items():
        assert shown == text(f"docs/{name}"), "python docs/generate.py writes it again"
    for mark, say in generate.SAY.items():
        methods = text(f"docs/methods{mark}.md")
        assert {f"\n| {name} | " in methods for name in METHODS} == {True}
        stale = methods.replace("\n| lora | ", "\n| lore | ")
        assert generate.methods_page(stale, say) == methods, "a stale matrix would not be seen"


def test_a_setting_of_the_korean_page_reads_korean() -> None:
    """Its meaning holds Hangul; and what has no Korean is an error of the generator, not English on the page."""
    rows = re.findall(r"(?m)^\| `[a-z]\w+` \| .* \| (.*) \|$", text("docs/recipe.ko.md"))
    assert len(rows) > 100
    assert [meaning for meaning in rows if not re.search("[가-힣]", meaning)] == []
    with pytest.raises(LookupError, match="no Korean for"):
        generator().in_korean("A setting that was added today.")


def test_the_page_of_families_and_its_twin_are_of_one_run() -> None:
    page = text("docs/families.md")
    assert twin(page) == text("docs/families.ko.md"), "python tests/families/korean.py writes it again"
    assert twin(page.replace(", zaya", ", zazu")) != text("docs/families.ko.md")
    outcomes = ("right", "not merged", "refused", "refused late", "not built", "wrong", "crash")
    verdicts = [Verdict(f"a{n}:{task}", outcome) for n, task in enumerate(TASKS) for outcome in outcomes]
    assert not re.search(r"(?m)^(?!\|).*\b(Right|Refused|Wrong|Fails)\b", twin(document(verdicts)))
    assert set(SHORT.values()) <= set(WORDS)
    with pytest.raises(LookupError, match="no Korean for"):
        twin(page + "\nA paragraph that was added today.\n")
