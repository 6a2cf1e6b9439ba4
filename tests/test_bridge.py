"""PEFT's methods through the bridge: each row of the table is tried on models of every kind that it names."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from sampled import sampled
from torch import nn
from torch.nn.functional import cross_entropy

from whet.base.errors import UserError
from whet.engine.task import CAUSAL, Task, head_names
from whet.engine.weights.linear import FrozenLinear, freeze_linears
from whet.methods.all import METHODS, capability_rows
from whet.methods.bridge import Bridge
from whet.methods.bridged import BRIDGED, LEFT_OUT
from whet.methods.capability import ANY
from whet.methods.options import REFUSED, known_options
from whet.recipe import parse, to_tree, to_yaml

pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY, ROWS, LENGTH = 96, 4, 10
TASKS = {"causal": CAUSAL, "classification": Task("classification", ("a", "b", "c")), "seq2seq": Task("seq2seq")}
# The paper's own start is not the base model: virtual tokens, or a random update.
NOT_NEUTRAL = {"prefix", "prompt", "p_tuning", "c3a", "unilora", "vblora"}
PAIRS = [(name, task) for name, row in BRIDGED.items() for task in TASKS if task in row.can.tasks]


def network(task: str, kind: str | None = None) -> Any:
    """A small random model without dropout, the same each time."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "initializer_range": 0.15, "pad_token_id": 0,
    }  # fmt: skip
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    torch.default_generator.manual_seed(0)
    if task == "seq2seq":
        made = transformers.T5ForConditionalGeneration(transformers.T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0,
            pad_token_id=0, initializer_factor=2.0, dropout_rate=0.0,
        ))  # fmt: skip
    elif task == "classification":
        if kind == "DistilBert":
            config = transformers.DistilBertConfig(
                dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=VOCABULARY, num_labels=3, dropout=0.0,
                attention_dropout=0.0, seq_classif_dropout=0.0,
            )  # fmt: skip
        else:
            config = getattr(transformers, f"{kind or 'Bert'}Config")(**sizes, **silent)
        made = transformers.AutoModelForSequenceClassification.from_config(config)
    else:
        config = getattr(transformers, f"{kind or 'Llama'}Config")(**sizes, num_key_value_heads=2)
        made = transformers.AutoModelForCausalLM.from_config(config)
    return made.eval()


@cache
def inputs(task: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=draw)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "seq2seq":
        found["decoder_input_ids"] = torch.randint(3, VOCABULARY, (ROWS, 5), generator=draw)
    return found


def logits(model: Any, task: str) -> torch.Tensor:
    """Of the rows themselves: virtual tokens stand in front."""
    found = model(**inputs(task)).logits.float()
    return found[:, -LENGTH:] if task == "causal" else found


@torch.no_grad()
def answer(model: Any, task: str) -> torch.Tensor:
    return logits(model.eval(), task)


def loss(model: Any, task: str) -> torch.Tensor:
    found = logits(model, task)
    if task == "classification":
        return cross_entropy(found, torch.tensor([0, 1, 2, 0]))
    targets = torch.randint(3, VOCABULARY, found.shape[:-1], generator=torch.Generator().manual_seed(8))
    return cross_entropy(found.flatten(0, 1), targets.flatten())


def method(name: str, **options: Any) -> Bridge:
    if name == "trainable_tokens":
        options = {"token_indices": inputs("causal")["input_ids"][0].unique().tolist()} | options
    return Bridge(name=name, options=options)  # type: ignore[arg-type]


def attached(name: str, task: str, **options: Any) -> tuple[Bridge, Any]:
    made = method(name, **options)
    torch.manual_seed(1)
    return made, made.attach(network(task), TASKS[task])


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learn(model: nn.Module, task: str, rate: float, steps: int = 8) -> list[float]:
    """The loss before each step, and after the last."""
    optimiser = torch.optim.AdamW(trained(model).values(), lr=rate, weight_decay=0.0)
    losses = []
    model.train()
    for _ in range(steps):
        torch.manual_seed(3)
        value = loss(model, task)
        value.backward()
        losses.append(float(value.detach()))
        optimiser.step()
        optimiser.zero_grad()
    torch.manual_seed(3)
    return [*losses, float(loss(model, task))]


def near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


def in_turn(pair: tuple[str, str]) -> bool:
    """One task of each method; test_conformance.py has its promises one by one."""
    name, task = pair
    tasks = [other for method, other in PAIRS if method == name]
    return task == tasks[[*BRIDGED].index(name) % len(tasks)]


@pytest.mark.parametrize(("name", "task"), sampled(PAIRS, in_turn))
def test_it_starts_learns_is_saved_opens_in_plain_peft_and_folds(name: str, task: str, tmp_path: Path) -> None:
    import peft

    base = answer(network(task), task)
    made, model = attached(name, task)
    can, before = made.can, {key: p.detach().clone() for key, p in model.named_parameters()}
    start = answer(model, task)
    assert near(start, base) != (name in NOT_NEUTRAL), "the start is the base model's, unless the paper says otherwise"
    heads = head_names(network(task))
    losses = learn(model, task, can.learning_rate)
    assert losses[-1] < losses[0] - 1e-4
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved <= set(trained(model)), "what is frozen stays"
    assert not any(p.requires_grad for key, p in model.named_parameters() if "base_layer" in key or "original" in key)
    for head in heads:
        parts = [key for key in trained(model) if f".{head}." in key and "modules_to_save" in key]
        assert parts, "a new head is trained"
        assert set(parts) <= moved
    live = answer(model, task)
    assert not near(live, start, 1e-6)
    with made.base_only(model):
        assert near(answer(model, task), base, 1e-5)
    assert torch.equal(answer(model, task), live), "the adapter is on again"
    if can.inside:
        assert torch.equal(answer(model.get_base_model(), task), live), "the network alone answers as the wrapper does"

    made.save(model, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}
    assert torch.equal(answer(made.load(network(task), tmp_path, TASKS[task]), task), live)
    assert near(answer(peft.PeftModel.from_pretrained(network(task), str(tmp_path)), task), live, 1e-5)
    if can.mergeable:
        folded = made.fold(network(task), tmp_path, TASKS[task])
        assert near(answer(folded, task), live)
        assert not any("adapter" in key or "base_layer" in key for key, _ in folded.named_parameters())
        assert {key for key, _ in folded.named_parameters()} >= {key for key, _ in network(task).named_parameters()}


@pytest.mark.parametrize("name", BRIDGED)
def test_a_run_continues_from_its_trainable_tensors_alone(name: str) -> None:
    _, model = attached(name, "causal")
    learn(model, "causal", 1e-3, steps=1)
    kept = {key: p.detach().clone() for key, p in trained(model).items()}
    _, again = attached(name, "causal")
    with torch.no_grad():
        for key, p in trained(again).items():
            p.copy_(kept[key])
    assert trained(again).keys() == kept.keys()
    assert torch.equal(answer(again, "causal"), answer(model, "causal"))


@pytest.mark.parametrize("name", BRIDGED)
def test_storages_are_those_of_the_table(name: str) -> None:
    can = BRIDGED[name].can  # type: ignore[index]
    for storage in ("fp8", "int8", "nf4"):
        made, net = method(name), network("causal")
        assert freeze_linears(net, storage)
        before = [p.detach().clone() for m in net.modules() if isinstance(m, FrozenLinear) for p in m.parameters()]
        if storage not in can.storages:
            with pytest.raises((UserError, RuntimeError)):
                loss(made.attach(net), "causal").backward()
            continue
        model = made.attach(net)
        losses = learn(model, "causal", can.learning_rate, steps=4)
        assert losses[-1] < losses[0]
        after = [p for m in net.modules() if isinstance(m, FrozenLinear) for p in m.parameters()]
        assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    made, net = method(name), network("causal").to(torch.bfloat16)
    model = made.attach(net)
    with torch.autocast("cpu", torch.bfloat16):
        loss(model, "causal").backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in trained(model).values())


@pytest.mark.parametrize("name", BRIDGED)
def test_a_plan_counts_what_is_trained_without_weights(name: str) -> None:
    import transformers

    for task in (task for task in TASKS if task in BRIDGED[name].can.tasks):  # type: ignore[index]
        _, real = attached(name, task)
        auto = {"seq2seq": "Seq2SeqLM", "classification": "SequenceClassification"}.get(task, "CausalLM")
        with torch.device("meta"):
            empty = getattr(transformers, f"AutoModelFor{auto}").from_config(network(task).config)
            planned = method(name).attach(empty, TASKS[task])
        assert sum(p.numel() for p in trained(planned).values()) == sum(p.numel() for p in trained(real).values())


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Roberta", "Llama"])
@pytest.mark.parametrize("name", ["ia3", "prompt", "prefix", "ln_tuning", "hra"])
def test_no_new_head_stays_frozen_and_random(name: str, kind: str) -> None:
    net = network("classification", kind)
    heads, made = head_names(net), method(name)
    expected = {"Bert": {"classifier"}, "DistilBert": {"pre_classifier", "classifier"}, "Roberta": {"classifier"}}
    assert set(heads) == expected.get(kind, {"score"})
    new = {f"{head}.{key}" for head in heads for key, _ in net.get_submodule(head).named_parameters()}
    if name == "prefix" and kind in ("DistilBert", "Roberta"):
        with pytest.raises(UserError, match="leaves out parts"):
            made.attach(net, TASKS["classification"])
        return
    model = made.attach(net, TASKS["classification"])
    before = {key: p.detach().clone() for key, p in trained(model).items()}
    learn(model, "classification", 1e-2, steps=2)
    moved = {key for key, p in trained(model).items() if not torch.equal(p, before[key])}
    plain = {key.replace(".modules_to_save.default", "").partition("base_model.")[2].removeprefix("model.")
             for key in moved}  # fmt: skip
    assert new <= plain


@pytest.mark.parametrize("name", ["prompt", "prefix", "p_tuning"])
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Gemma2"])
def test_batched_answers_are_those_of_one_prompt_without_a_cache(kind: str, name: str) -> None:
    import transformers

    from whet.engine.answer.generate import DecoderSession
    from whet.engine.compute.attention import ATTENTION

    def written(model: Any, prompts: list[list[int]]) -> list[list[int]]:
        with DecoderSession(model) as session:
            return session.answer(prompts, stop_ids=[], max_new_tokens=6, batch_size=4)

    torch.default_generator.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
    if kind != "GPT2":
        sizes = {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.15,
        }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, **sizes)
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    made = method(name, num_virtual_tokens=3)
    untrained = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16], [20, 21, 22, 23]]
    plain = written(net, untrained)
    model: Any = made.attach(net).eval()
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(0.3 * torch.randn(p.shape))
    found = written(model, untrained)
    for prompt, reply in zip(untrained, found, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert reply == ids[len(prompt) :]
    assert found != plain
    with made.base_only(model):
        assert written(model, untrained) == plain


def test_a_family_that_peft_has_no_table_for_gets_its_layers_from_the_structure() -> None:
    net = network("causal", "Olmo2")
    config = method("ia3").peft_config(net, CAUSAL)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    assert config.feedforward_modules == {"down_proj"}
    norms = method("ln_tuning").peft_config(net, CAUSAL).target_modules
    assert {"q_norm", "k_norm", "norm"} <= set(norms)
    assert set(method("oft").peft_config(network("classification"), TASKS["classification"]).target_modules) == {
        "query", "key", "value", "dense"
    }  # fmt: skip


def test_text_initialises_the_prompt_with_the_models_own_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = tiny.save_model(tiny.llama(), tmp_path / "model")
    net = AutoModelForCausalLM.from_pretrained(str(place))
    text = "Answer the customer briefly."
    model: Any = method("prompt", prompt_tuning_init_text=text, num_virtual_tokens=6).attach(net)
    ids = AutoTokenizer.from_pretrained(str(place))(text)["input_ids"]
    ids = (ids * 6)[:6]
    rows = model.prompt_encoder["default"].embedding.weight
    assert torch.equal(rows, net.get_input_embeddings().weight[torch.tensor(ids)])


# Recipes.

REFUSALS = [
    ("method={name: ia3, target_modles: [k_proj]}", "method.target_modles", "write target_modules"),
    ("method={name: prompt, num_virtual_token: 8}", "method.num_virtual_token", "write num_virtual_tokens"),
    ("method={name: vera, r: many}", "method.r", "give r"),
    ("method={name: prefix, prefix_projection: 3}", "method.prefix_projection", "give prefix_projection"),
    ("method={name: ia3, task_type: CAUSAL_LM}", "method.task_type", "remove it"),
    ("method={name: oft, options: {inference_mode: true}}", "method.inference_mode", "remove it"),
    ("method={name: poly}", "method.name", "method.name=lora"),
    ("method={name: cpt}", "method.name", "method.name=prompt"),
    ("method={name: adalroa}", "method.name", "write adalora"),
]


@pytest.mark.parametrize(("text", "field", "fix"), REFUSALS)
def test_wrong_options_are_refused_when_the_recipe_is_read(text: str, field: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(None, [text])
    assert caught.value.field == field
    assert fix in caught.value.fix


def test_every_method_of_peft_can_be_chosen_or_is_left_out_with_a_reason() -> None:
    import peft

    reached = {row.peft.lower() for row in BRIDGED.values()} | {"lora", "adalora"}
    assert not reached & set(LEFT_OUT)
    assert {kind.value.lower() for kind in peft.PeftType} == reached | set(LEFT_OUT)
    for name, (reason, instead) in LEFT_OUT.items():
        with pytest.raises(UserError) as caught:
            parse(None, [f"method={{name: {name}}}"])
        assert reason in caught.value.problem
        assert caught.value.fix == f"method.name={instead}"
        assert instead in METHODS


def test_a_trained_cache_is_not_lost_in_layers_that_run_again(model_dir: Path, tmp_path: Path) -> None:
    from tiny import plan

    values = [f"model.path={model_dir}", "base.device=cpu", "train.gradient_checkpointing=true"]
    with pytest.raises(UserError, match="trains a cache"):
        plan(parse(None, [*values, "method=prefix"]).recipe)
    assert plan(parse(None, [*values, "method=prompt"]).recipe)["trainable_params"] == 20 * 64


def test_an_option_stands_beside_the_name_or_under_options(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("method:\n  name: loha\n  alpha: 4\n  options: {r: 2}\n", encoding="utf-8")
    parsed = parse(path, ["method.rank_dropout=0.5"])
    assert parsed.recipe.method == Bridge(name="loha", options={"alpha": 4, "r": 2, "rank_dropout": 0.5})
    assert parsed.origins["method.options.alpha"] == "recipe"
    assert parsed.origins["method.options.rank_dropout"] == "command line"
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(parsed.recipe), encoding="utf-8")
    assert to_tree(parse(again).recipe) == to_tree(parsed.recipe)
    path.write_text("method:\n  name: loha\n  alhpa: 4\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parse(path)
    assert (caught.value.file, caught.value.row, caught.value.field) == (str(path), 3, "method.alhpa")
    assert parse(path, ["method=lora"]).recipe.method.name == "lora"


def test_options_are_those_of_the_installed_peft() -> None:
    for name in BRIDGED:
        known = known_options(name)
        assert not set(known) & set(REFUSED)
        row = BRIDGED[name]
        assert {key for key in row.defaults if key not in REFUSED} | set(row.fits) <= set(known)


def test_the_matrix_names_every_method_and_reading_the_table_needs_no_peft() -> None:
    rows = {str(row["method"]): row for row in capability_rows()}
    assert set(rows) == set(METHODS) >= set(BRIDGED)
    assert all(str(row["what"]).endswith(".") for row in rows.values())
    assert rows["prompt"]["storages"] == list(ANY)
    code = (
        "import sys; from whet.methods.bridge import Bridge; from whet.methods.bridged import BRIDGED\n"
        "sys.exit(any('peft' in sys.modules or not Bridge(name=name).can.tasks for name in BRIDGED))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Whole runs.


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tiny.llama(), tmp_path_factory.mktemp("model"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", ["prompt", "prefix", "ia3", "ln_tuning"])
def test_a_run_trains_resumes_and_answers(name: str, model_dir: Path, tmp_path: Path) -> None:
    import safetensors.torch

    from whet.engine.load.open import open_trained
    from whet.training.run import train

    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(12))

    def recipe(out: str, steps: int) -> Any:
        values = tiny.settings(
            model_dir, data, tmp_path / out, method__name=name, train__per_device_train_batch_size=3,
            train__max_steps=steps, train__save_steps=2, train__learning_rate=None, data__val_size=3,
        )  # fmt: skip
        del values["method.r"]
        return parse(None, tiny.words(values))

    with quiet():
        run = train(recipe("whole", 4))
        whole = safetensors.torch.load_file(run.adapter / "adapter_model.safetensors")
        assert run.recipe.train.learning_rate == BRIDGED[name].can.learning_rate  # type: ignore[index]
        assert run.recipe.data.padding_free is BRIDGED[name].can.inside  # type: ignore[index]
        (run.path / "finished.json").unlink()
        for path in (run.path / "checkpoints").glob("step-4"):
            path.rename(run.path / "checkpoints" / "gone")
        resumed = safetensors.torch.load_file(train(recipe("whole", 4)).adapter / "adapter_model.safetensors")
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
        opened = open_trained(run.recipe.model, run.recipe.base, run.adapter, run.recipe.method)
        assert (opened.answering is opened.network) == BRIDGED[name].can.inside  # type: ignore[index]
