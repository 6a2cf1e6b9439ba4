"""New tokens: read and written whole, started from their pieces, trained alone, saved, and opened by everything.

On a model whose head is its embedding and on one with a head of its own. Faults are planted where each would arise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from sampled import sampled
from tiny import plan
from transformers import AutoModelForCausalLM, AutoTokenizer

from whet.adapters.loaded import Adapters, base_of
from whet.base.errors import UserError
from whet.engine.config import Base, Model
from whet.engine.device import Placement
from whet.engine.load import new_tokens
from whet.engine.load.load import load_model, load_tokenizer
from whet.engine.load.open import open_trained
from whet.recipe import Parsed, parse
from whet.runs import Run
from whet.ship.chat import open_chat
from whet.ship.merge import merge
from whet.training.run import train

TOKENS = ["<ticket>", "고객상담센터"]
HOST = Placement(torch.device("cpu"), "fp32", torch.float32, False, {})
IDS = torch.tensor([[3, 9, 40, tiny.VOCABULARY, 7, tiny.VOCABULARY + 1, 12]])


@pytest.fixture(scope="module", params=["tied", "untied", "spare"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """spare: the tables have more rows than the tokenizer has tokens, as many published models have."""
    rows = tiny.VOCABULARY + (64 if request.param == "spare" else 0)
    config = tiny.llama(tie_word_embeddings=request.param == "tied", vocab_size=rows)
    return tiny.save_model(config, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that hold the new tokens in questions and answers."""
    rows = tiny.rows(12)
    for row in rows:
        row["instruction"] = f"<ticket> {row['instruction']}"
        row["output"] = f"{row['output'][:60]} 고객상담센터"
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


def recipe(base: Path, data: Path, out: Path, **changes: Any) -> Parsed:
    values = tiny.settings(base, data, out, model__new_tokens=TOKENS, train__max_steps=6, **changes)
    if values.get("method.name", "lora") != "lora":
        values.pop("method.r", None)
    return parse(None, tiny.words(values))


@pytest.fixture(scope="module")
def run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(recipe(base, data, tmp_path_factory.mktemp("run") / "run"))


def grown(base: Path) -> Any:
    return load_model(Model(path=str(base), new_tokens=TOKENS), HOST)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def check_start(base: Path) -> None:
    """Old rows keep their bytes; a new one is the mean of its pieces; both tables."""
    before, after = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), grown(base)
    plain = AutoTokenizer.from_pretrained(base)
    assert after.config.vocab_size == max(before.config.vocab_size, tiny.VOCABULARY + 2)
    for old, new in ((before.get_input_embeddings(), after.get_input_embeddings()),
                     (before.get_output_embeddings(), after.get_output_embeddings())):  # fmt: skip
        assert torch.equal(new.weight[: tiny.VOCABULARY], old.weight[: tiny.VOCABULARY])
        for place, token in enumerate(TOKENS):
            pieces = plain(token, add_special_tokens=False)["input_ids"]
            assert len(pieces) > 1
            mean = torch.stack([old.weight[piece] for piece in pieces]).mean(0)
            torch.testing.assert_close(new.weight[tiny.VOCABULARY + place], mean, rtol=1e-6, atol=1e-7)


def test_new_rows_start_from_their_pieces_and_old_ones_stay(base: Path) -> None:
    check_start(base)


def test_a_new_token_is_one_token_in_the_middle_of_text(base: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(base), new_tokens=TOKENS))
    ids = tokenizer("call <ticket>고객상담센터 now", add_special_tokens=False)["input_ids"]
    assert [id_ for id_ in ids if id_ >= tiny.VOCABULARY] == [tiny.VOCABULARY, tiny.VOCABULARY + 1]
    assert "<ticket>" in tokenizer.decode(ids, skip_special_tokens=True)
    assert len(tokenizer) == tiny.VOCABULARY + 2


def check_trained(run: Run, base: Path) -> None:
    """The adapter holds the new rows and no others, they moved, and the model that opens it has them and the old."""
    found = load_file(run.adapter / "adapter_model.safetensors")
    rows = {name: value for name, value in found.items() if "lora_" not in name}
    untied = not AutoModelForCausalLM.from_pretrained(base).config.tie_word_embeddings
    assert len(rows) == 1 + untied
    start, opened = grown(base), open_trained(run.recipe.model, Base(device="cpu"), run.trained, run.recipe.method)
    assert all(value.shape == (2, 64) for value in rows.values())
    tables = (opened.network.get_input_embeddings(), opened.network.get_output_embeddings())
    for table, old in zip(tables, (start.get_input_embeddings(), start.get_output_embeddings()), strict=True):
        now = table.weight
        assert torch.equal(now[: tiny.VOCABULARY], old.weight[: tiny.VOCABULARY])
        moved = (now[tiny.VOCABULARY :][:2] - old.weight[tiny.VOCABULARY :][:2]).abs().amax(1)
        assert bool((moved > 1e-3).all()), "new rows are trained"


def test_the_new_rows_are_trained_and_saved_and_nothing_else_of_the_tables(run: Run, base: Path) -> None:
    check_trained(run, base)


def check_plain_peft(run: Run, base: Path) -> None:
    """As a reader of PEFT's documentation opens it: the tokenizer beside the adapter says how many rows there are."""
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    assert len(tokenizer) == tiny.VOCABULARY + 2
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if len(tokenizer) > network.get_input_embeddings().weight.shape[0]:
        network.resize_token_embeddings(len(tokenizer))
    plain = peft.PeftModel.from_pretrained(network, str(run.adapter)).eval()
    ours = open_trained(run.recipe.model, Base(device="cpu"), run.trained, run.recipe.method)
    torch.testing.assert_close(logits(plain), logits(ours.network), rtol=1e-5, atol=1e-5)


def test_it_opens_in_plain_peft(run: Run, base: Path) -> None:
    check_plain_peft(run, base)


def test_it_merges_into_a_plain_model_with_the_grown_vocabulary(run: Run, tmp_path: Path) -> None:
    certificate = merge(run, tmp_path / "merged")
    assert certificate["path"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("<ticket>", add_special_tokens=False)["input_ids"]
    assert ids == [tiny.VOCABULARY]
    assert plain.config.vocab_size == plain.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    ours = open_trained(run.recipe.model, Base(device="cpu"), run.trained, run.recipe.method)
    torch.testing.assert_close(logits(plain), logits(ours.network), rtol=0.05, atol=0.05)


def test_chat_and_adapters_by_name_know_the_tokens(run: Run, base: Path, tmp_path: Path) -> None:
    chat: Any = open_chat(str(run.path), max_new_tokens=3)
    assert isinstance(chat.reply([tiny_message("<ticket> hello")]), str)
    ours = logits(open_trained(run.recipe.model, Base(device="cpu"), run.trained, run.recipe.method).network)
    alone = tmp_path / "alone"  # an adapter that was copied away from its run
    alone.mkdir()
    for file in run.adapter.iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    for place in (run.path, alone):
        model, _ = base_of(place)
        assert model.new_tokens == TOKENS
        adapters = Adapters(load_model(model, HOST))
        adapters.load("one", place)
        adapters.use("one")
        torch.testing.assert_close(logits(adapters.network), ours, rtol=1e-5, atol=1e-5)


def tiny_message(text: str) -> Any:
    from whet.data.example import Message

    return Message("user", text)


def test_full_fine_tuning_trains_them_too(base: Path, data: Path, tmp_path: Path) -> None:
    run = train(recipe(base, data, tmp_path / "full", method__name="full", method__save_dtype="fp32"))
    saved = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    assert saved.config.vocab_size >= tiny.VOCABULARY + 2
    start = grown(base).get_input_embeddings().weight
    assert bool((saved.get_input_embeddings().weight[tiny.VOCABULARY] - start[tiny.VOCABULARY]).abs().max() > 1e-4)


@pytest.mark.parametrize("base", sampled(["tied", "untied", "spare"], ["untied"]), indirect=True)
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_they_are_trained_on_packed_storage(storage: str, base: Path, data: Path, tmp_path: Path) -> None:
    run = train(recipe(base, data, tmp_path / "run", base__storage=storage))
    rows = [v for k, v in load_file(run.adapter / "adapter_model.safetensors").items() if "lora_" not in k]
    assert all(value.shape == (2, 64) for value in rows)


def test_the_plan_counts_their_rows(base: Path, data: Path, tmp_path: Path) -> None:
    both = [plan(parse(None, tiny.words(tiny.settings(base, data, tmp_path, **changes))).recipe)
            for changes in ({}, {"model__new_tokens": TOKENS})]  # fmt: skip
    tables = 1 if AutoModelForCausalLM.from_pretrained(base).config.tie_word_embeddings else 2
    assert both[1]["trainable_params"] - both[0]["trainable_params"] == tables * 2 * 64


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [(["the"], "has this token already"), (["<a>", "<a>"], "twice"), ([" "], "needs a text")],
)
def test_what_cannot_be_added_is_refused(tokens: list[str], problem: str, model_dir: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(Model(path=str(model_dir), new_tokens=tokens))
    assert problem in caught.value.problem
    assert caught.value.field == "model.new_tokens"
    assert caught.value.fix


@pytest.mark.parametrize("name", ["ia3", "bitfit", "head", "prompt", "diff_pruning", "adalora"])
def test_a_method_that_trains_no_rows_is_refused(name: str, model_dir: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(recipe(model_dir, data, tmp_path / "run", method__name=name))
    assert caught.value.field == "model.new_tokens"
    assert "method.name=lora" in caught.value.fix
    assert not (tmp_path / "run").exists()


def check_answers(run: Run, place: Path, right: torch.Tensor) -> None:
    opened = open_trained(run.recipe.model, Base(device="cpu"), place, run.recipe.method)
    torch.testing.assert_close(logits(opened.network), right, rtol=1e-5, atol=1e-5)


def test_planted_faults_are_seen(run: Run, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start = new_tokens._start

    def beside(values: torch.Tensor, ids: Any, pieces: Any) -> None:
        start(values, ids, pieces)
        with torch.no_grad():
            values[17] += 1e-3

    def zero(values: torch.Tensor, ids: Any, pieces: Any) -> None:
        with torch.no_grad():
            values[list(ids)] = 0.0

    for fault in (beside, zero, lambda *_: None):
        with monkeypatch.context() as patch:
            patch.setattr(new_tokens, "_start", fault)
            with pytest.raises(AssertionError):
                check_start(base)

    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in tensors.items() if "lora_" in name}

    def moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value if "lora_" in name else value + 0.3 for name, value in tensors.items()}

    def beside_it(config: dict[str, Any]) -> dict[str, Any]:
        found = config["trainable_token_indices"]
        wrong = {name: [17, 18] for name in found} if isinstance(found, dict) else [17, 18]
        return config | {"trainable_token_indices": wrong}

    def same(value: Any) -> Any:
        return value

    faults: list[tuple[Callable[[Any], Any], Callable[[Any], Any], type[Exception]]] = [
        (cut, same, UserError), (same, beside_it, AssertionError), (moved, same, AssertionError),
    ]  # fmt: skip
    right = logits(open_trained(run.recipe.model, Base(device="cpu"), run.trained, run.recipe.method).network)
    for index, (tensors, config, error) in enumerate(faults):
        place = tmp_path / str(index)
        place.mkdir()
        found = load_file(run.adapter / "adapter_model.safetensors")
        save_file(tensors(found), place / "adapter_model.safetensors")
        settings = config(json.loads((run.adapter / "adapter_config.json").read_text()))
        (place / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(error):
            check_answers(run, place, right)
