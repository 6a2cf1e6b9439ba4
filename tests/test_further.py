"""Training that goes on from an adapter: of whet or of others, from exactly its numbers, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import theirs
import tiny
import torch
from safetensors.torch import load_file, save_file

import whet
from whet.adapters.further import START, with_starting_adapter
from whet.base.errors import UserError
from whet.methods.layers.state import trained_state
from whet.recipe import Parsed, parse
from whet.training.run import train

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return theirs.base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", tiny.rows(8))


def lora(**more: Any) -> Any:
    import peft

    given = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**(given | more))


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return theirs.save_adapter(model, tmp_path_factory.mktemp("theirs") / "lora", lora())


def further(adapter: Path, data: Path, out: Path, **changes: Any) -> Parsed:
    """A recipe that names the adapter, the rows and nothing of the method or the model."""
    given = {
        "model.adapter": str(adapter), "data.dataset": str(data), "data.val_size": 0, "base.device": "cpu",
        "base.storage": "fp32", "base.compute": "fp32", "train.max_steps": 1, "train.learning_rate": 0.005,
        "output_dir": str(out),
    }  # fmt: skip
    return parse(None, tiny.words(given | {name.replace("__", "."): value for name, value in changes.items()}))


def plain_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As PEFT writes them: without the adapter's name, and a length of DoRA without the module that holds it."""
    plain = {name.replace(".default", "").replace(".modules_to_save", ""): tensor for name, tensor in state.items()}
    return {name.replace("magnitude_vector.weight", "magnitude_vector"): tensor for name, tensor in plain.items()}


def starts_as(parsed: Parsed, adapter: Path) -> None:
    """At step 0 every trained number is the adapter's, and there is no other."""
    found = plain_names(trained_state(tiny.built(parsed).model))
    wanted = load_file(adapter / WEIGHTS)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name].float()), name


def kinds() -> dict[str, Any]:
    import peft

    return {
        "lora": lora(), "rslora": lora(use_rslora=True, lora_dropout=0.1), "dora": lora(use_dora=True),
        "patterns": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}),
        "one layer": lora(layers_to_transform=[1]), "a head": lora(modules_to_save=["lm_head"]),
        "ia3": peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        "loha": peft.LoHaConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in kinds() if name != "prompt"])
def test_step_0_is_the_adapter_of_others(name: str, model: Path, data: Path, tmp_path: Path) -> None:
    adapter = theirs.save_adapter(model, tmp_path / "theirs", kinds()[name])
    starts_as(further(adapter, data, tmp_path / "run"), adapter)


def test_training_goes_on_and_its_result_opens_in_plain_peft(
    adapter: Path, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(further(adapter, data, tmp_path / "run", train__max_steps=3))
    assert "equal to the bit" in capsys.readouterr().err
    assert (run.recipe.method.r, run.recipe.method.lora_alpha) == (4, 12)  # type: ignore[union-attr]
    assert run.recipe.model.path == str(model)
    assert json.loads((run.path / START).read_text(encoding="utf-8"))["sha256"].keys() == {
        WEIGHTS,
        "adapter_config.json",
    }
    before, after = load_file(adapter / WEIGHTS), load_file(run.adapter / WEIGHTS)
    assert before.keys() == after.keys()
    moved = [float((before[name] - after[name]).abs().max()) for name in before]
    assert 0 < max(moved) < 0.05, "it went on from there"
    assert theirs.opened(model, run.adapter) is not None
    assert whet.evaluate(run.path, data=str(data), max_rows=2)["rows"] > 0


def test_the_first_loss_is_that_of_the_adapter(adapter: Path, model: Path, data: Path, tmp_path: Path) -> None:
    """In plain PEFT, of the same rows: not that of the base."""
    run = train(further(adapter, data, tmp_path / "run", train__per_device_train_batch_size=8))
    found = json.loads((run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["loss"]

    from whet import runs

    rows = runs.prepared(run.recipe).train

    def loss(network: Any) -> float:
        total, count = 0.0, 0
        for index in range(len(rows)):
            ids, learned = (torch.tensor(array.tolist()) for array in rows.row(index))
            labels = ids.masked_fill(~learned, -100)[None]
            with torch.inference_mode():
                total += float(network(input_ids=ids[None], labels=labels).loss) * int(learned.sum())
            count += int(learned.sum())
        return total / count

    assert found == pytest.approx(loss(theirs.opened(model, adapter)), rel=1e-4)
    assert found != pytest.approx(loss(theirs.plain_base(model)), rel=1e-3)


OWN: dict[str, dict[str, Any]] = {
    "lora": {"method__r": 2}, "pissa": {"method__init_lora_weights": "pissa", "method__r": 2},
    "freeze": {"method__name": "freeze", "method__layers": 1}, "bottleneck": {"method__name": "bottleneck"},
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_it_goes_on_from_a_run_of_whet(name: str, model: Path, data: Path, tmp_path: Path) -> None:
    make = tiny.recipe if name in ("lora", "pissa") else further_recipe
    first = train(make(model, data, tmp_path / "first", **OWN[name], train__max_steps=1))
    again = further(first.path, data, tmp_path / "second", train__max_steps=1)
    if (first.adapter / WEIGHTS).is_file():
        starts_as(again, first.adapter)
        shutil.rmtree(tmp_path / "second")
    second = train(again)
    assert second.recipe.method.name == first.recipe.method.name
    file = WEIGHTS if (first.adapter / WEIGHTS).is_file() else "trained.safetensors"
    one, two = load_file(first.adapter / file), load_file(second.adapter / file)
    assert one.keys() == two.keys()
    assert 0 < max(float((one[key] - two[key]).abs().max()) for key in one) < 0.05


def further_recipe(model: Path, data: Path, out: Path, **changes: Any) -> Parsed:
    given = tiny.settings(model, data, out, **({"train__max_steps": 1} | changes))
    given.pop("method.r", None)
    return parse(None, tiny.words(given))


def test_an_adapter_in_fp16_goes_on_in_fp32(adapter: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "short")
    tensors = {name: tensor.half() for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, tmp_path / "short" / WEIGHTS, metadata={"format": "pt"})
    starts_as(further(tmp_path / "short", data, tmp_path / "run"), tmp_path / "short")


def test_names_of_another_class_go_on_too(adapter: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "one")
    renamed = theirs.rename_keys(tmp_path / "one", "model.", "model.language_model.")
    found = plain_names(trained_state(tiny.built(further(renamed, data, tmp_path / "run")).model))
    for name, tensor in load_file(adapter / WEIGHTS).items():
        assert torch.equal(found[name], tensor), name


def test_its_own_template_is_learned_with(model: Path, data: Path, tmp_path: Path) -> None:
    text = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}" \
        "{% if add_generation_prompt %}[assistant] {% endif %}"  # fmt: skip
    adapter = theirs.save_adapter(model, tmp_path / "theirs", lora(), template=text)
    started = with_starting_adapter(further(adapter, data, tmp_path / "run"))
    assert started.recipe.model.tokenizer == str(adapter)
    assert any("chat template" in note for note in started.notes)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"method__name": "ia3"}, "has another setting"),
    "another rank": ({"method__r": 8}, "has another setting"),
    "another scale": ({"method__lora_alpha": 8}, "has another setting"),
    "other layers": ({"method__target_modules": "attention"}, "has another setting"),
    "a start of its own": ({"method__init_lora_weights": "pissa"}, "starts where it is"),
    "random weights": ({"model__from_config": True}, "belongs to the weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_agree_is_refused(name: str, adapter: Path, data: Path, tmp_path: Path) -> None:
    changes, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        train(further(adapter, data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_what_agrees_may_be_said(adapter: Path, data: Path, tmp_path: Path) -> None:
    parsed = further(
        adapter, data, tmp_path / "run", method__name="lora", method__r=4, method__lora_alpha=12,
        method__target_modules=["down_proj", "q_proj"], method__lora_dropout=0.2, method__loraplus_lr_ratio=4.0,
    )  # fmt: skip
    method: Any = with_starting_adapter(parsed).recipe.method
    assert (method.lora_dropout, method.loraplus_lr_ratio, method.r) == (0.2, 4.0, 4)


def test_other_folders_are_named(model: Path, adapter: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter here") as caught:
        train(further(model, data, tmp_path / "run"))
    assert "model.path" in caught.value.fix
    full = train(further_recipe(model, data, tmp_path / "full", method__name="full"))
    with pytest.raises(UserError, match="it is a model"):
        train(further(full.path, data, tmp_path / "run"))
    with pytest.raises(UserError, match="this is an adapter, not a model") as caught:
        train(tiny.recipe(adapter, data, tmp_path / "run"))
    assert f"model.adapter={adapter}" in caught.value.fix


def test_a_start_that_changed_is_refused(adapter: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "theirs")
    parsed = further(tmp_path / "theirs", data, tmp_path / "run", train__max_steps=1)
    run = train(parsed)
    (run.path / "finished.json").unlink()
    raw = bytearray((tmp_path / "theirs" / WEIGHTS).read_bytes())
    raw[-3] ^= 1
    (tmp_path / "theirs" / WEIGHTS).write_bytes(raw)
    with pytest.raises(UserError, match="has changed since"):
        train(parsed)


@pytest.mark.parametrize("name", ["a number", "a tensor"])
def test_a_start_that_is_not_the_adapter_is_seen(
    name: str, adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted faults: PEFT loads other numbers, or leaves a tensor as it was drawn."""
    import peft

    right = peft.PeftModel.load_adapter

    def load_adapter(self: Any, *given: Any, **more: Any) -> Any:
        result = right(self, *given, **more)
        with torch.no_grad():
            first = next(p for key, p in self.named_parameters() if "lora_A" in key)
            first[0, 0] += 1e-3 if name == "a number" else 1.0
        return result

    monkeypatch.setattr(peft.PeftModel, "load_adapter", load_adapter)
    with pytest.raises(UserError, match="not what this recipe would begin with"):
        tiny.built(further(adapter, data, tmp_path / "run"))
