"""What is shipped, at its edges: what lies beside a merged model, adapters by name, predictions and conversations.

Updates of adapters are computed from their files, B A times alpha / r; conversations by plain transformers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tasks
import tiny
import torch

import whet
from whet.adapters.loaded import Adapters
from whet.api import compose
from whet.base.errors import UserError
from whet.cli import run as command
from whet.engine.config import Model
from whet.engine.device import Placement
from whet.engine.load.load import load_model
from whet.recipe import Parsed
from whet.ship.label_agreement import LabelAgreement
from whet.training.run import train

IDS = torch.randint(3, tiny.VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))
Updates = dict[str, torch.Tensor]


# beside a merged model


def test_a_merged_model_stops_where_its_turns_end_and_keeps_the_contract(
    recipe: Callable[..., Parsed], tmp_path: Path
) -> None:
    """Its template closes turns with another token than the tokenizer's end."""
    from transformers import AutoTokenizer, GenerationConfig

    own = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}" \
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # fmt: skip
    (tmp_path / "own.jinja").write_text(own, encoding="utf-8")
    run = train(recipe(model__chat_template=str(tmp_path / "own.jinja"), train__max_steps=1, data__val_size=2))
    whet.merge(run.path, tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    closing = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    stops = GenerationConfig.from_pretrained(str(tmp_path / "out")).eos_token_id
    assert closing != tokenizer.eos_token_id
    assert stops == sorted({closing, tokenizer.eos_token_id})
    assert tokenizer.chat_template == own
    contract = json.loads((tmp_path / "out" / "whet_template.json").read_text(encoding="utf-8"))
    assert contract == json.loads((run.adapter / "whet_template.json").read_text(encoding="utf-8"))
    assert len(contract["golden"]) == 5


@pytest.mark.parametrize(
    ("rows", "equal", "change", "near"),
    [(100, 1.0, 0.001, True), (100, 0.99, 0.001, True), (100, 0.95, 0.001, False), (100, 1.0, 0.5, False),
     (12, 11 / 12, 0.001, True), (12, 10 / 12, 0.001, False)],
)  # fmt: skip
def test_a_merged_model_may_label_one_row_or_two_in_a_hundred_otherwise(
    rows: int, equal: float, change: float, near: bool
) -> None:
    assert LabelAgreement("trained", "bf16", rows, 0.1, change, None, equal).near is near


# adapters by name


def write_adapter(place: Path, model: Path, seed: int, rank: int) -> Path:
    """A random LoRA adapter in PEFT's format, by PEFT alone."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    settings = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    made = peft.PeftModelForCausalLM(base, settings)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    made.save_pretrained(str(place))
    return place


def updates(place: Path) -> Updates:
    """What the files of an adapter add to each weight."""
    from safetensors.torch import load_file

    config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(place / "adapter_model.safetensors")
    found = {}
    for name in tensors:
        if ".lora_A." in name:
            module = name.partition(".lora_A.")[0]
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            rank = config["rank_pattern"].get(module, config["r"]) if config.get("rank_pattern") else config["r"]
            alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
            found[module] = (up @ tensors[name]) * (alpha / rank)
    return found


def summed(parts: list[Updates], weights: list[float]) -> Updates:
    return {name: sum(w * part[name] for w, part in zip(weights, parts, strict=True)) for name in parts[0]}  # type: ignore[misc]


def apart(one: Updates, other: Updates) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)


@pytest.fixture
def pair(model_dir: Path, tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / f"part{rank}", model_dir, rank, rank) for rank in (2, 4)]


@pytest.mark.parametrize("weights", [None, [2.0, 0.5]])
def test_a_composition_on_disk_is_the_weighted_sum_of_the_updates(
    weights: list[float] | None, pair: list[Path], tmp_path: Path
) -> None:
    out = compose(tmp_path / "out", pair, weights=weights)
    wanted = summed([updates(place) for place in pair], weights or [1.0, 1.0])
    assert apart(updates(out), wanted) < 1e-5
    assert apart(updates(out), summed([updates(place) for place in pair], [0.5, 0.5])) > 0.1, "no mean"


def test_a_composition_by_svd_has_the_rank_of_the_largest_part(pair: list[Path], tmp_path: Path) -> None:
    out = compose(tmp_path / "out", pair, how="svd")
    found, wanted = updates(out), summed([updates(place) for place in pair], [1.0, 1.0])
    for name, update in found.items():
        assert int(torch.linalg.matrix_rank(update, rtol=1e-4)) == 4
        left, values, right = torch.linalg.svd(wanted[name], full_matrices=False)
        best = left[:, :4] @ torch.diag(values[:4]) @ right[:4]
        torch.testing.assert_close(update, best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_density_is_the_share_of_an_update_that_is_kept(how: Any, pair: list[Path], tmp_path: Path) -> None:
    shares = []
    for density in (0.1, 1.0):
        torch.manual_seed(0)
        made = updates(compose(tmp_path / f"{how}{density}", pair, how=how, density=density, rank=64))
        kept = [(update.abs() > 1e-3 * update.abs().max()).float().mean() for update in made.values()]
        shares.append(float(torch.stack(kept).max()))
    assert shares[0] < 0.25
    assert shares[1] > 0.9


def test_adapters_of_different_models_are_not_composed(model_dir: Path, pair: list[Path], tmp_path: Path) -> None:
    other = tiny.save_model(tiny.llama(), tmp_path / "other", seed=1)
    foreign = write_adapter(tmp_path / "foreign", other, 5, 2)
    with pytest.raises(UserError, match="different models") as caught:
        compose(tmp_path / "out", [pair[0], foreign])
    assert caught.value.file == str(foreign)
    assert not (tmp_path / "out").exists()


def test_a_request_with_another_adapter_and_a_new_one_change_nothing_of_what_is_in_use(
    model_dir: Path, pair: list[Path]
) -> None:
    adapters = Adapters(
        load_model(Model(path=str(model_dir)), Placement(torch.device("cpu"), "fp32", torch.float32, False, {}))
    )

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return adapters.network(input_ids=IDS, use_cache=False).logits.float()

    adapters.load("one", pair[0])
    adapters.use("one")
    first = logits()
    adapters.load("two", pair[1])
    assert adapters.in_use == "one"
    assert torch.equal(logits(), first)
    for name in ("two", None):
        with adapters.using(name):
            assert not torch.allclose(logits(), first, atol=1e-3)
        assert adapters.in_use == "one"
        assert torch.equal(logits(), first)
    with pytest.raises(RuntimeError, match="while it answers"), adapters.using("two"):
        raise RuntimeError("while it answers")
    assert torch.equal(logits(), first)


# predictions and conversations


def test_predictions_read_a_text_as_far_as_training_did(tmp_path: Path) -> None:
    """With data.max_length set, the label of a long text is that of the evaluation, which has the trained rows."""
    model = tasks.save_model("llama", tmp_path / "model")
    changes = {"data__max_length": 12, "data__over_length": "truncate"}
    run = tasks.make_run("llama", "classification", model, tmp_path, **changes)
    whet.evaluate(run.path)
    shown = [json.loads(line) for line in (run.results / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    found = whet.predict(run.path, [row["text"] for row in shown])
    assert max(len(row["text"].split()) for row in shown) > 20
    assert [one["label"] for one in found] == [row["predicted"] for row in shown]
    for row, one in zip(shown, found, strict=True):
        assert one["probability"] == pytest.approx(row["probability"], abs=1e-4)


@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_each_message_of_a_conversation_is_answered_after_all_that_was_said(
    system: str | None, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("where is it?\nand now?\n왜요?\n".encode())))
    more = ["--system", system] if system else []
    assert command(["chat", str(model_dir), "--max-new-tokens", "4", "--json", *more]) == 0
    printed = json.loads(capsys.readouterr().out)
    said = (
        printed if isinstance(printed, list) else next(value for value in printed.values() if isinstance(value, list))
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model_dir))
    model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32).eval()
    assert [turn["role"] for turn in said] == (["system"] if system else []) + ["user", "assistant"] * 3
    for place, turn in enumerate(said):
        if turn["role"] != "assistant":
            continue
        text = tokenizer.apply_chat_template(said[:place], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
                pad_token_id=0, eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")],
            )[0, ids.shape[1] :]  # fmt: skip
        assert turn["content"] == tokenizer.decode(output).removesuffix("<|im_end|>")
