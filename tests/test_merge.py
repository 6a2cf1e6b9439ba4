"""The merged model answers as the live adapter does, its certificate says how nearly, and a bad merge is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from whet.base.errors import UserError
from whet.engine.device import PACKED
from whet.engine.load.open import open_trained
from whet.methods.layers.lora_layer import LoraLinear
from whet.recipe import Parsed
from whet.runs import Run
from whet.ship.merge import CERTIFICATE, MEAN_KL_LIMIT, merge
from whet.training.run import train

Make = Callable[..., Parsed]
IDS = torch.randint(3, tiny.VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(5))
LEARNING: dict[str, Any] = {
    "train__max_steps": 12, "train__learning_rate": 0.02, "data__val_size": 4, "train__load_best_model_at_end": False,
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits.float()


def live_logits(run: Run) -> torch.Tensor:
    return logits(open_trained(run.recipe.model, run.recipe.base, run.adapter, run.recipe.method).network)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One finished run on each kind of storage; nobody may change them."""
    runs = {}
    for storage in ("fp32", "bf16", *PACKED):
        compute = "bf16" if storage == "bf16" else "fp32"
        changes = LEARNING | {"base__storage": storage, "base__compute": compute}
        runs[storage] = train(tiny.recipe(model_dir, data_file, tmp_path_factory.mktemp(storage) / "run", **changes))
    return runs


FIELDS = {"chosen", "agreement", "top1_agreement", "kl", "max_kl", "prompts", "positions", "candidates", "path"}


@pytest.mark.parametrize("storage", ["fp32", "bf16", *PACKED])
def test_the_merged_model_in_plain_transformers_is_the_live_adapter(
    storage: str, trained: dict[str, Run], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, out = trained[storage], tmp_path / "out"
    certificate = merge(run, out)
    assert certificate.keys() >= FIELDS
    assert read(out / CERTIFICATE) == read(run.path / "results/merge.json") == json.loads(json.dumps(certificate))
    assert certificate["prompts"] == 4
    assert 0 <= certificate["kl"] <= MEAN_KL_LIMIT
    assert certificate["kl"] <= certificate["max_kl"]
    plain = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.float32)
    live = live_logits(run)
    rounding = 1e-4 if certificate["chosen"].endswith("fp32") else 2e-2
    assert float((logits(plain) - live).abs().max()) <= rounding * max(1.0, float(live.abs().max()))
    assert AutoTokenizer.from_pretrained(str(out)).chat_template
    assert not list(out.glob("adapter*"))


def test_merged_in_fp32_the_logits_agree_to_rounding(trained: dict[str, Run], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert merge(trained["fp32"], tmp_path / "out")["chosen"] == "trained base, fp32"
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert plain.dtype == torch.float32
    assert float((logits(plain) - live_logits(trained["fp32"])).abs().max()) <= 1e-4


@pytest.mark.parametrize("storage", PACKED)
def test_a_quantised_run_tries_the_base_it_was_trained_on_and_the_original(
    storage: str, trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whet.ship.merge.Agreement.perfect", property(lambda self: False))
    certificate = merge(trained[storage], tmp_path / "out")
    tried = {(one["name"], one["dtype"]): one["mean_kl"] for one in certificate["candidates"]}
    assert tried.keys() == {(base, "fp32") for base in ("dequantised", "16-bit")}
    assert tried["dequantised", "fp32"] < tried["16-bit", "fp32"]
    assert certificate["chosen"].startswith("dequantised")


def test_tied_embeddings_stay_tied(trained: dict[str, Run], tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    merge(trained["fp32"], tmp_path / "out")
    assert read(tmp_path / "out/config.json")["tie_word_embeddings"] is True
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a mapping
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()


def test_the_files_of_the_base_and_the_run_are_left_alone(
    trained: dict[str, Run], model_dir: Path, tmp_path: Path
) -> None:
    places = [path for path in [*model_dir.rglob("*"), *trained["fp32"].adapter.rglob("*")] if path.is_file()]
    before = {path: path.read_bytes() for path in places}
    merge(trained["fp32"], tmp_path / "out")
    assert {path: path.read_bytes() for path in places} == before


def test_merging_again_replaces_the_merged_model_with_the_same(trained: dict[str, Run], tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        merge(trained["fp32"], tmp_path / "out")
        found.append((tmp_path / "out/model.safetensors").read_bytes())
    assert found[0] == found[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_a_wrong_merge_is_refused_and_nothing_is_written(
    storage: str, trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: the update is added ten times over."""
    right = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda self, name: 10 * right(self, name))
    with pytest.raises(UserError, match="near enough") as caught:
        merge(trained[storage], tmp_path / "out")
    assert float(str(caught.value.found).split(",")[0].split()[-1]) > MEAN_KL_LIMIT
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []
    assert read(trained[storage].path / "results/merge.json")["path"] is None


def test_a_doubled_scale_is_seen_by_the_certificate(
    trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = merge(trained["fp32"], tmp_path / "sound")["kl"]
    right = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda self, name: 2 * right(self, name))
    with pytest.raises(UserError, match="near enough"):
        merge(trained["fp32"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert min(one["mean_kl"] for one in read(trained["fp32"].path / "results/merge.json")["candidates"]) > 100 * sound


def test_a_forgotten_update_is_refused(
    trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda self, name: 0 * right(self, name))
    with pytest.raises(UserError, match="near enough"):
        merge(trained["fp32"], tmp_path / "out")


def test_a_full_run_has_nothing_to_merge(recipe: Make, tmp_path: Path) -> None:
    run = train(recipe(train__max_steps=1, method__name="full"))
    with pytest.raises(UserError, match="no adapter to merge"):
        merge(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_of_somebody_else_is_refused(trained: dict[str, Run], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="in the way"):
        merge(trained["fp32"], out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_place_of_the_output_is_refused(trained: dict[str, Run], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="in the way"):
        merge(trained["fp32"], tmp_path / "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def test_the_same_merge_is_not_made_again(
    trained: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    certificate = merge(trained["fp32"], out)
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr("whet.ship.merge._best_candidate", None)
    assert merge(trained["fp32"], out) == json.loads(json.dumps(certificate))
    assert "holds this merge already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_merge_of_another_run_or_one_that_was_changed_is_never_replaced(
    trained: dict[str, Run], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    merge(trained["fp32"], out)
    with pytest.raises(UserError, match="in the way"):
        merge(trained["bf16"], out)
    (out / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="in the way") as caught:
        merge(trained["fp32"], out)
    assert caught.value.found == "config.json has 2 bytes instead of " + str(
        read(out / CERTIFICATE)["files"]["config.json"]["bytes"]
    )
    assert (out / "config.json").read_text(encoding="utf-8") == "{}"


def test_a_merged_model_has_the_permissions_of_the_umask(trained: dict[str, Run], tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        merge(trained["fp32"], tmp_path / "out")
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_empty_directory_is_taken(trained: dict[str, Run], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(trained["fp32"], tmp_path / "out")
    assert (tmp_path / "out" / CERTIFICATE).is_file()


def test_an_unfinished_run_is_refused(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.training.run.finish", lambda *_: None)
    with pytest.raises(UserError, match="not been trained"):
        merge(train(recipe(train__max_steps=1)), tmp_path / "out")


def _own_copy(model_dir: Path, data_file: Path, tmp_path: Path) -> Run:
    """A run on a copy of the model, so that its files may be changed."""
    import shutil

    shutil.copytree(model_dir, tmp_path / "model")
    return train(tiny.recipe(tmp_path / "model", data_file, tmp_path / "run", train__max_steps=1, data__val_size=4))


def test_a_template_that_changed_since_training_is_refused(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    run = _own_copy(model_dir, data_file, tmp_path)
    merge(run, tmp_path / "sound")
    template = tmp_path / "model/chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("'\\n' +", "'\\n ' +"), encoding="utf-8")
    with pytest.raises(UserError, match="not the one that the adapter was trained with"):
        merge(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_contract_that_was_changed_beside_the_adapter_is_refused(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    run = _own_copy(model_dir, data_file, tmp_path)
    contract = run.adapter / "whet_template.json"
    record = read(contract)
    assert len(record["golden"]) == 5
    record["golden"][3]["ids"][2] += 1
    contract.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        merge(run, tmp_path / "out")
    assert caught.value.field == "golden.3"


def test_a_template_that_was_changed_beside_the_adapter_is_refused(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    run = _own_copy(model_dir, data_file, tmp_path)
    template = run.adapter / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text.replace("<|im_start|>", "<|im_end|>", 1), encoding="utf-8")
    with pytest.raises(UserError, match="chat template beside the adapter"):
        merge(run, tmp_path / "out")
    template.write_text(text, encoding="utf-8")
    merge(run, tmp_path / "out")
