"""Two users who know the README alone: labels from a table of their own, and a chat model from their own conversations.

Every command is one that the README shows, with another file name; in this process, on the built-in model.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from whet import cli

INTENTS = {
    "refund": ["I want my money back for order {}", "please refund order {}", "give me a refund for {}"],
    "track": ["where is my parcel {}", "track order {} please", "has parcel {} been sent"],
    "cancel": ["cancel my order {}", "stop order {} now", "I do not want order {} any more"],
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def whet(capsys: pytest.CaptureFixture[str]) -> Any:
    """`whet WORDS`, as a function that returns what was printed on stdout."""

    def run(line: str, code: int = 0) -> str:
        capsys.readouterr()
        words = line.split()
        try:
            found = cli.run(words)
        except SystemExit as stopped:
            found = stopped.code
        printed = capsys.readouterr()
        assert found == code, printed.err
        return printed.out

    return run


def recipe(whet: Any, name: str, file: str, dataset: str) -> None:
    """`whet init NAME > FILE`, with the user's file put into data.dataset, and little training."""
    lines = whet(f"init {name}").splitlines()
    place = next(number for number, line in enumerate(lines) if line.strip().startswith("dataset:"))
    lines[place] = f"  dataset: {dataset}"
    Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_labels_from_a_table_of_ones_own(whet: Any) -> None:
    with Path("intents.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["question", "intent"])
        for number in range(60):
            for label, texts in INTENTS.items():
                table.writerow([texts[number % 3].format(1000 + 7 * number), label])
    recipe(whet, "classify", "intents.yaml", "intents.csv")
    text = Path("intents.yaml").read_text(encoding="utf-8")
    Path("intents.yaml").write_text(text.replace("columns: {}", "columns: {text: question, label: intent}"))
    checked = json.loads(whet("data check intents.yaml --json"))
    assert checked["labels"].keys() == INTENTS.keys()
    whet("train intents.yaml train.num_train_epochs=3 train.learning_rate=4e-3")
    scores = json.loads(whet("eval runs/intents --json"))
    assert scores["tuned"]["metrics"]["accuracy"] > 0.9
    with Path("new.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["question"], ["where is my parcel 77"], ["please refund order 3"]])
    answers = list(csv.DictReader(whet("predict runs/intents new.csv --top 2 --csv").splitlines()))
    assert [answer["label"] for answer in answers] == ["track", "refund"]
    assert [answer["text"] for answer in answers] == ["where is my parcel 77", "please refund order 3"]
    assert {answer["label_2"] for answer in answers} <= INTENTS.keys()
    before = Path("new.csv").read_bytes()
    whet("predict runs/intents new.csv --out new.csv", code=2)
    assert Path("new.csv").read_bytes() == before


def test_a_chat_model_from_ones_own_conversations(whet: Any) -> None:
    def talk(number: int) -> list[dict[str, str]]:
        question = {"role": "user", "content": f"What is code {number}?"}
        thanks = {"role": "user", "content": "Thank you."}
        return [question, {"role": "assistant", "content": "It is blue."}, thanks,
                {"role": "assistant", "content": "You are welcome."}]  # fmt: skip

    Path("talks.jsonl").write_text(
        "".join(json.dumps({"messages": talk(number)}) + "\n" for number in range(60)), encoding="utf-8"
    )
    recipe(whet, "lora", "talks.yaml", "talks.jsonl")
    assert json.loads(whet("data check talks.yaml --json"))["rows_train"] > 50
    whet("train talks.yaml train.num_train_epochs=4 train.learning_rate=5e-3")
    scores = json.loads(whet("eval runs/talks --json"))
    assert scores["tuned"]["metrics"]["loss"] < scores["base"]["metrics"]["loss"] / 2
    questions = [{"prompt": f"What is code {number}?"} for number in (901, 902)]
    Path("new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    whet("predict runs/talks new.jsonl --out answers.jsonl")
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [answer["text"] for answer in answers] == ["It is blue."] * 2
    assert json.loads(whet("chat runs/talks --message hello --json"))["messages"][-1]["role"] == "assistant"
    whet("merge runs/talks out/")
    assert (Path("out") / "config.json").is_file()
    assert "Not evaluated" not in Path("runs/talks/report.html").read_text(encoding="utf-8")
