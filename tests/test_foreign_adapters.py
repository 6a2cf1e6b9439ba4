"""Adapters of others: opened, asked with their own template and tokens, scored, merged, and named when they do not fit.

The judge is plain PEFT on plain transformers, with the tokenizer that lies in the adapter's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import theirs
import tiny
import torch

import whet
from whet.base.errors import UserError
from whet.data.example import Message
from whet.ship.chat import open_chat

ASKED = ["hello", "where is my parcel"]
ANOTHER = "{% for m in messages %}[{{ m.role }}] {{ m.content }} <|im_end|>{% endfor %}" \
    "{% if add_generation_prompt %}[assistant] {% endif %}"  # fmt: skip


def lora(**more: Any) -> Any:
    import peft

    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**(given | more))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return theirs.base_model(tmp_path_factory.mktemp("base"))


def kinds() -> dict[str, dict[str, Any]]:
    import peft

    return {
        "lora": {"config": lora()},
        "rslora with biases of no use": {"config": lora(use_rslora=True, target_modules="all-linear")},
        "dora": {"config": lora(use_dora=True)},
        "its own template": {"config": lora(), "template": ANOTHER},
        "a head": {"config": lora(modules_to_save=["lm_head"])},
        "an embedding": {"config": lora(modules_to_save=["embed_tokens"])},
        "new tokens": {"config": lora(), "tokens": ("<red>", "<blue>")},
        "new tokens that are trained": {"config": lora(modules_to_save=["embed_tokens"]), "tokens": ("<red>",)},
        "ia3": {"config": peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        )},
        "loha": {"config": peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")},
        "prompt": {"config": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")},
    }  # fmt: skip


NAMES = [*kinds()]


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("theirs")
    return {
        name: theirs.save_adapter(model, place / name.replace(" ", "-").replace("'", ""), **given)
        for name, given in kinds().items()
    }


def expected(model: Path, adapter: Path, name: str) -> list[str]:
    tokenizer = theirs.tokenizer_of(adapter)
    plain = theirs.opened(model, adapter, len(tokenizer) if "new tokens" in name else None)
    return [theirs.answer(plain, tokenizer, text) for text in ASKED]


@pytest.mark.parametrize("name", NAMES)
def test_it_answers_as_in_plain_peft(name: str, model: Path, adapters: dict[str, Path]) -> None:
    with open_chat(str(adapters[name]), max_new_tokens=theirs.NEW_TOKENS) as chat:
        found = [chat.reply([Message("user", text)]) for text in ASKED]
    assert found == expected(model, adapters[name], name)


def test_its_own_template_gives_another_answer_and_is_said(
    model: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name = "its own template"
    base_template = [
        theirs.answer(theirs.opened(model, adapters[name]), theirs.tokenizer_of(model), text) for text in ASKED
    ]
    assert base_template != expected(model, adapters[name], name), "else the template does not show"
    with open_chat(str(adapters[name]), max_new_tokens=2):
        pass
    assert "the chat template of" in capsys.readouterr().err.replace("\n", " ")


def test_a_template_alone_is_used_too(model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter = theirs.save_adapter(model, tmp_path / "alone", lora(), keep_tokenizer=False)
    (adapter / "chat_template.jinja").write_text(ANOTHER, encoding="utf-8")
    with open_chat(str(adapter), max_new_tokens=theirs.NEW_TOKENS) as chat:
        found = [chat.reply([Message("user", text)]) for text in ASKED]
    plain, tokenizer = theirs.opened(model, adapter), theirs.tokenizer_of(adapters["its own template"])
    assert found == [theirs.answer(plain, tokenizer, text) for text in ASKED]


def rows(place: Path) -> Path:
    records = [{"prompt": f"{text} {index}", "completion": "yes, tomorrow"} for index in range(3) for text in ASKED]
    return tiny.write_rows(place, records)


MERGED = ["lora", "dora", "its own template", "a head", "new tokens", "new tokens that are trained", "ia3"]


@pytest.mark.parametrize("name", MERGED)
def test_it_is_merged_to_what_plain_peft_answers(
    name: str, model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    before = sorted(path.name for path in adapters[name].iterdir())
    found = whet.merge(adapters[name], tmp_path / "out", data=str(rows(tmp_path / "rows.jsonl")))
    assert found["prompts"] == 6
    assert sorted(path.name for path in adapters[name].iterdir()) == before, "somebody's folder is left as it is"
    merged, tokenizer = theirs.plain_base(tmp_path / "out"), theirs.tokenizer_of(tmp_path / "out")
    assert [theirs.answer(merged, tokenizer, text) for text in ASKED] == expected(model, adapters[name], name)


def test_it_is_merged_without_rows_of_its_own(adapters: dict[str, Path], tmp_path: Path) -> None:
    assert whet.merge(adapters["lora"], tmp_path / "out")["prompts"] > 20


def test_it_is_scored_on_a_file(model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    result = whet.evaluate(adapters["its own template"], data=str(rows(tmp_path / "rows.jsonl")))
    assert result["rows"] == 6


def test_without_a_file_it_has_nothing_to_be_scored_on(adapters: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="no rows") as caught:
        whet.evaluate(adapters["lora"])
    assert "--data" in caught.value.fix


def test_a_run_is_not_compared_on_other_rows(recipe: Any, tmp_path: Path) -> None:
    from whet.training.run import train

    run = train(recipe(train__max_steps=1))
    with pytest.raises(UserError, match="its own held-out rows"):
        whet.merge(run.path, tmp_path / "out", data=str(tmp_path / "rows.jsonl"))


# names of another class of the model


def expected_of(model: Path, adapter: Path) -> torch.Tensor:
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        return theirs.opened(model, adapter)(input_ids=ids).logits


def logits_of(model: Path, adapter: Path) -> torch.Tensor:
    from whet.engine.config import Model
    from whet.engine.load.load import load_model
    from whet.methods.layers.adapter import attach_adapter

    network = load_model(Model(path=str(model)), tiny_placement())
    with torch.inference_mode():
        return attach_adapter(network, adapter)(input_ids=torch.arange(5, 25)[None]).logits


def tiny_placement() -> Any:
    from whet.engine.device import Placement

    return Placement(torch.device("cpu"), "fp32", torch.float32, False, {})


@pytest.mark.parametrize("renamed", ["model.language_model.", "language_model.model.", "model.text_model."])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_names_of_another_class_are_turned_into_those_of_this_one(
    renamed: str, name: str, model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(adapters[name], tmp_path / "one")
    adapter = theirs.rename_keys(tmp_path / "one", "model.", renamed)
    torch.testing.assert_close(logits_of(model, adapter), expected_of(model, adapters[name]), rtol=1e-4, atol=1e-4)


def test_layers_named_in_the_config_are_renamed_too(model: Path, tmp_path: Path) -> None:
    whole = [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]
    config = lora(target_modules=whole, rank_pattern={whole[0]: 2})
    plain = theirs.save_adapter(model, tmp_path / "one", config)
    adapter = theirs.rename_keys(plain, "model.", "model.language_model.")
    saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    saved["target_modules"] = [name.replace("model.", "model.language_model.", 1) for name in whole]
    saved["rank_pattern"] = {"model.language_model.layers.0.self_attn.q_proj": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(saved), encoding="utf-8")
    torch.testing.assert_close(logits_of(model, adapter), expected_of(model, plain), rtol=1e-4, atol=1e-4)


def test_a_trained_vision_part_is_named(model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(adapters["lora"], tmp_path / "one")
    adapter = theirs.rename_keys(tmp_path / "one", "model.layers.0", "model.vision_tower.layers.0")
    with pytest.raises(UserError, match=r"6 of its 12 tensors belong to layers that LlamaForCausalLM") as caught:
        logits_of(model, adapter)
    assert caught.value.found is not None
    assert "model.vision_tower" in caught.value.found


def test_a_pickle_and_a_changed_base_are_refused(model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(adapters["lora"], tmp_path / "pickled")
    (tmp_path / "pickled/adapter_model.safetensors").rename(tmp_path / "pickled/adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        open_chat(str(tmp_path / "pickled"))
    pissa = theirs.save_adapter(model, tmp_path / "pissa", lora(init_lora_weights="pissa"))
    with pytest.raises(UserError, match="start has changed"):
        open_chat(str(pissa))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("peft_type", "XLORA", "cannot be used"), ("peft_type", "WHAT", "cannot be used"),
        ("peft_type", None, "no config"),
        ("task_type", "TOKEN_CLS", "task that whet does not have"),
        ("base_model_name_or_path", None, "does not say which model"),
        ("base_model_name_or_path", "/nowhere/at/all", "no model directory"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_used_is_named(
    field: str, value: Any, words: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(adapters["lora"], tmp_path / "one")
    config = json.loads((tmp_path / "one/adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "one/adapter_config.json").write_text(json.dumps(config | {field: value}), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        whet.merge(tmp_path / "one", tmp_path / "out")


# heads


@pytest.fixture(scope="module")
def labelled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import peft
    import transformers

    out = tmp_path_factory.mktemp("labelled") / "theirs"
    torch.manual_seed(5)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(model), num_labels=3, dtype=torch.float32
    )
    adapted = peft.get_peft_model(base, lora(task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    adapted.save_pretrained(str(out))
    return out


def test_an_adapter_with_a_head_labels_as_in_plain_peft(labelled: Path, model: Path) -> None:
    import peft
    import transformers

    texts = ["the refund did not come", "hello", "cancel it"]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(model), num_labels=3, dtype=torch.float32
    )
    plain, tokenizer = peft.PeftModel.from_pretrained(base, str(labelled)).eval(), theirs.tokenizer_of(model)
    with torch.inference_mode():
        wanted = [
            f"LABEL_{int(plain(input_ids=tokenizer(text, return_tensors='pt').input_ids).logits.argmax())}"
            for text in texts
        ]
    assert [row["label"] for row in whet.predict(labelled, texts)] == wanted
