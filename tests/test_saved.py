"""A run is called finished only when what it saved can be opened and is what was trained, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

import whet
from whet.base.errors import UserError
from whet.data.example import Message
from whet.methods.full import Full
from whet.methods.in_place import InPlaceMethod
from whet.methods.lora import Lora
from whet.recipe import Parsed
from whet.ship.chat import open_chat
from whet.training.run import train

Make = Callable[..., Parsed]


def flip_a_bit(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-6] ^= 1
    file.write_bytes(raw)


def drop_a_tensor(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file, metadata={"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


METHODS: dict[str, tuple[type, str, dict[str, Any]]] = {
    "lora": (Lora, "adapter_model.safetensors", {}),
    "freeze": (InPlaceMethod, "trained.safetensors", {"method__name": "freeze", "method__layers": 1}),
    "full": (Full, "model.safetensors", {"method__name": "full"}),
}


@pytest.mark.parametrize("damage", [flip_a_bit, drop_a_tensor, cut], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_a_damaged_file_is_no_finished_run(
    name: str, damage: Callable[[Path], None], recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, file, changes = METHODS[name]
    if (name, damage) == ("full", drop_a_tensor):
        pytest.skip("which tensors a model is saved with is for transformers to say")
    right = owner.save

    def save(self: Any, model: Any, directory: Path) -> None:
        right(self, model, directory)
        damage(directory / file)

    parsed = recipe(train__max_steps=1, **changes)
    with monkeypatch.context() as planted:
        planted.setattr(owner, "save", save)
        with pytest.raises(UserError, match="could not be opened again") as caught:
            train(parsed)
    assert "intact" in caught.value.fix
    place = Path(parsed.recipe.output_dir or "")
    assert not (place / "finished.json").exists()
    assert not (place / "adapter").exists()
    assert not (place / "model").exists()
    run = train(parsed)  # the same command saves it
    assert run.finished is not None
    assert run.trained.is_dir()


def test_names_that_do_not_fit_are_seen(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Lora.save

    def save(self: Any, model: Any, directory: Path) -> None:
        right(self, model, directory)
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        config["target_modules"] = ["q_proj"]
        (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")

    monkeypatch.setattr(Lora, "save", save)
    with pytest.raises(UserError, match="could not be opened again"):
        train(recipe(train__max_steps=1))


def test_a_contract_that_evaluation_would_refuse_is_seen(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from whet.data.template import goldens

    right = goldens.contract

    def contract(tokenizer: Any, found: Any) -> str:
        record = json.loads(right(tokenizer, found))
        record["golden"][0]["ids"][0] += 1
        return json.dumps(record)

    monkeypatch.setattr(goldens, "contract", contract)
    with pytest.raises(UserError, match="could not be opened again"):
        train(recipe(train__max_steps=1))


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A model whose chat_template is a list of named templates, as Command-R and Hermes have it."""
    model = tiny.save_model(tiny.llama(), tmp_path / "several")
    default = (model / "chat_template.jinja").read_text(encoding="utf-8")
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = [
        {"name": "default", "template": default},
        {"name": "tool_use", "template": default.replace("{%- for", "{#- tools -#}{%- for", 1) + "{#- of tools #}"},
    ]
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def test_named_templates_are_each_compared(several: Path, data_file: Path, tmp_path: Path) -> None:
    run = train(tiny.recipe(several, data_file, tmp_path / "run", train__max_steps=1, data__val_size=4))
    other = run.adapter / "additional_chat_templates" / "tool_use.jinja"
    assert other.is_file()
    assert whet.evaluate(run.path, max_rows=1)["rows"] == 1
    whet.merge(run.path, tmp_path / "out")
    with open_chat(str(run.path), max_new_tokens=2) as chat:
        chat.reply([Message("user", "hello")])


def test_a_named_template_that_changed_is_refused(several: Path, data_file: Path, tmp_path: Path) -> None:
    run = train(tiny.recipe(several, data_file, tmp_path / "run", train__max_steps=1, data__val_size=4))
    other = run.adapter / "additional_chat_templates" / "tool_use.jinja"
    other.write_text(other.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(UserError, match="chat template beside the adapter"):
        whet.evaluate(run.path, max_rows=1)
