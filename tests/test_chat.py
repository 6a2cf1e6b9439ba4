"""A conversation: what the template writes before an answer is no part of it, and the next turn sees it once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from whet import api
from whet.base.errors import UserError
from whet.data.example import Message
from whet.data.template.row_tokenizer import RowTokenizer
from whet.data.template.template import use_template
from whet.engine.answer.notices import Notices
from whet.engine.config import Model
from whet.engine.load import open as opening
from whet.engine.load.load import load_tokenizer
from whet.engine.load.open import Opened
from whet.opening import Answerer
from whet.ship.chat import Chat, open_chat
from whet.ship.commands import COMMANDS
from whet.ship.talk import talk

THOUGHT = "<think>\n\n</think>\n\n"
THINKING = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""


def test_a_learned_thinking_block_is_not_carried_into_the_history(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thinking.jinja").write_text(THINKING, encoding="utf-8")
    tokenizer = load_tokenizer(Model(path=str(model_dir)))
    use_template(tokenizer, str(tmp_path / "thinking.jinja"))
    asked: list[list[int]] = []

    class Thinks:
        notices = Notices()

        def stream(self, prompt: list[int], **_: Any) -> list[int]:
            asked.append(prompt)
            return tokenizer(f"{THOUGHT}answer {len(asked)}", add_special_tokens=False).input_ids

    nobody: Any = Opened(None, None, None)  # type: ignore[arg-type]
    thinks: Any = Thinks()
    monkeypatch.setattr("whet.ship.talk._lines", lambda: iter(["one", "two"]))
    found = talk(Chat(Answerer(nobody, RowTokenizer(tokenizer, chat=True)), thinks), None, None, quiet=True)
    assert [turn["content"] for turn in found] == ["one", "answer 1", "two", "answer 2"]
    assert [str(tokenizer.decode(prompt)).count("<think>") for prompt in asked] == [0, 1]


def test_a_model_directory_can_be_talked_to(model_dir: Path) -> None:
    with open_chat(str(model_dir), max_new_tokens=3) as chat:
        found = talk(chat, "Hi", "Be brief.", quiet=True)
        assert [turn["role"] for turn in found] == ["system", "user", "assistant"]
        assert chat.answerer.opened.network.config.vocab_size == tiny.VOCABULARY


def test_a_chat_loads_its_model_once_for_all_messages(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, load = [], opening.load_model
    monkeypatch.setattr(opening, "load_model", lambda *given: loads.append(given) or load(*given))
    messages = ("the quick brown fox", "one", "two")
    alone = [api.chat(str(model_dir), message, max_new_tokens=5) for message in messages]
    assert len(set(alone)) > 1, "the answers do not tell the messages apart"
    assert len(loads) == len(messages)
    loads.clear()
    with open_chat(str(model_dir), max_new_tokens=5) as chat:
        assert [api.chat(chat, message) for message in messages] == alone
    assert len(loads) == 1
    with pytest.raises(RuntimeError, match="let go"):
        api.chat(chat, "three")


def test_the_folder_of_an_adapter_is_opened_with_the_template_of_its_run(recipe: Any) -> None:
    from whet.training.run import train

    run = train(recipe(model__chat_template="alpaca", train__max_steps=2))
    asked = [Message("user", "the quick brown fox")]
    with open_chat(str(run.path), max_new_tokens=5) as chat:
        said = chat.reply(asked)
    with open_chat(str(run.adapter), max_new_tokens=5) as chat:
        assert chat.adapters is not None
        assert chat.adapters.in_use == "adapter"
        assert chat.reply(asked) == said


class Echo:
    """A chat that answers with what it was asked, or fails."""

    max_new_tokens = 4
    adapters = None

    def __init__(self) -> None:
        self.asked: list[list[Message]] = []
        self.answerer = Answerer(Opened(None, None, None), SimpleNamespace(tokenizer=None))  # type: ignore[arg-type]

    def reply(self, messages: list[Message], streamer: Any = None) -> str:
        if messages[-1].content == "fail":
            raise UserError("the model answers with NaN", "train again")
        self.asked.append(messages)
        return f"answer to {messages[-1].content}"

    use = Chat.use


def said_to(lines: list[str], monkeypatch: pytest.MonkeyPatch, system: str | None = None) -> tuple[Any, Any]:
    monkeypatch.setattr("whet.ship.talk._lines", lambda: iter(lines))
    chat: Any = Echo()
    return talk(chat, None, system, quiet=True), chat


def test_a_typo_or_a_failed_answer_does_not_end_a_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["one", "/rest", "/use two", "/max many", "fail", "//not a command", "two"]
    found, chat = said_to(lines, monkeypatch)
    assert [turn["content"] for turn in found if turn["role"] == "user"] == ["one", "/not a command", "two"]
    assert len(chat.asked[-1]) == 5, "nothing was forgotten"
    said = capsys.readouterr().err
    assert said.count("error: ") == 4
    assert "fix:      /reset" in said


def test_commands_do_what_help_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found, chat = said_to(["one", "two", "/undo", "three"], monkeypatch, "be brief")
    assert [m.content for m in chat.asked[-1]] == ["be brief", "one", "answer to one", "three"]
    found, chat = said_to(["one", "/reset", "two"], monkeypatch, "be brief")
    assert [m.content for m in chat.asked[-1]] == ["be brief", "two"]
    found, chat = said_to(["one", "/system be long", "two", "/quit", "three"], monkeypatch)
    assert [(turn["role"], turn["content"]) for turn in found][:2] == [("system", "be long"), ("user", "two")]
    assert len(found) == 3, "nothing after /quit"
    found, chat = said_to(["/system be long", "/system", "two"], monkeypatch)
    assert [m.role for m in chat.asked[-1]] == ["user"]
    capsys.readouterr()
    said_to(["/help"], monkeypatch)
    help_text = capsys.readouterr().err
    assert all(f"/{name}" in help_text for name in COMMANDS)


def test_the_longest_answer_can_be_changed(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.ship.talk._lines", lambda: iter(["the fox", "/reset", "/max 9", "the fox"]))
    with open_chat(str(model_dir), max_new_tokens=2) as chat:
        found = talk(chat, None, None, quiet=True)
    with open_chat(str(model_dir), max_new_tokens=9) as chat:
        assert found[-1]["content"] == chat.reply([Message("user", "the fox")])
