"""However a batch is cut, laid out or recomputed, the loss and every gradient of an optimiser step stay the same.

The reference shares no code with whet: plain transformers and plain PEFT in float64, one document at a time, sum of
the negative log-likelihoods over the number of targets. Each claim has a planted fault that must break it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from whet.data.batch.text_batches import TextBatch, TextBatches
from whet.engine.compute.attention import ATTENTION
from whet.engine.compute.isolation import check_causality, check_isolation, flat_inputs
from whet.methods.layers.state import trained_state
from whet.recipe import Parsed
from whet.training.apply import Arranged
from whet.training.objective.text import TextObjective, TextOnDevice
from whet.training.optim import OnDevice
from whet.training.run import build
from whet.training.setup import Ready, get_ready
from whet.training.step import train_step

Gradients = dict[str, torch.Tensor]
TOLERANCE = 1e-5


class Capture(OnDevice, torch.optim.SGD):
    """An optimiser that keeps the gradients instead of using them."""

    def __init__(self, model: torch.nn.Module, trained: list[torch.nn.Parameter]) -> None:
        super().__init__(trained, lr=0.1)
        self.model = model
        self.seen: Gradients = {}

    def step(self, closure: Any = None) -> None:
        self.seen = {name: found.double() for name, found in tiny.gradients(self.model).items()}


@dataclasses.dataclass
class Made:
    """A recipe made ready, its model with a non-zero adapter."""

    ready: Ready
    model: torch.nn.Module
    arranged: Arranged

    @property
    def objective(self) -> TextObjective:
        assert isinstance(self.arranged.objective, TextObjective)
        return self.arranged.objective

    @property
    def batches(self) -> TextBatches:
        assert isinstance(self.arranged.batches, TextBatches)
        return self.arranged.batches

    def measure(self, batches: Sequence[TextBatch], objective: Any = None) -> tuple[float, Gradients]:
        """Loss and gradients of one optimiser step over the micro-batches."""
        capture = Capture(self.model, self.arranged.trained)
        done = train_step(self.model, capture, batches, objective or self.objective, max_grad_norm=0.0, step=1)
        return done.loss, capture.seen


def make(parsed: Parsed) -> Made:
    arranged, ready = build(get_ready(parsed))
    model = arranged.model
    tiny.randomise_adapter(model)
    return Made(ready, model, arranged)


_known: dict[tuple[Any, ...], tuple[float, Gradients]] = {}


def reference(model_dir: Path, made: Made, rows: Sequence[int]) -> tuple[float, Gradients]:
    """Loss and gradients in float64, document by document, by plain transformers and plain PEFT."""
    adapter = trained_state(made.model)
    key = (model_dir, tuple(rows), *(float(tensor.double().sum()) for tensor in adapter.values()))
    if key not in _known:
        _known[key] = _reference(model_dir, made, rows, adapter)
    return _known[key]


def _reference(model_dir: Path, made: Made, rows: Sequence[int], adapter: Gradients) -> tuple[float, Gradients]:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float64, attn_implementation="eager")
    method, given = made.ready.recipe.method, made.model.peft_config["default"]
    settings = peft.LoraConfig(r=method.r, lora_alpha=method.lora_alpha, target_modules=given.target_modules)
    plain = peft.get_peft_model(base, settings).double()
    named = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert named.keys() == adapter.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(adapter[name])
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids, learned = made.ready.prepared.train.row(row)
        labels = torch.tensor(np.where(learned, ids, -100), dtype=torch.long)
        logits = plain(input_ids=torch.tensor(ids, dtype=torch.long)[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        targets += int((labels[1:] != -100).sum())
    (total / targets).backward()
    return total.item() / targets, {name: p.grad for name, p in named.items()}


def distance(one: tuple[float, Gradients], other: tuple[float, Gradients]) -> float:
    """Largest difference of the loss, or of a gradient relative to the largest entry of that gradient."""
    assert one[1].keys() == other[1].keys()
    assert all(float(gradient.abs().max()) > 0 for gradient in other[1].values())
    apart = [float((one[1][name] - g).abs().max() / g.abs().max()) for name, g in other[1].items()]
    return max(abs(one[0] - other[0]) / other[0], *apart)


def all_rows(batches: Sequence[TextBatch]) -> list[int]:
    return sorted(row for batch in batches for row in batch.sources)


LAYOUTS: dict[str, dict[str, Any]] = {
    "8x1": {"train__per_device_train_batch_size": 8},
    "4x2": {"train__per_device_train_batch_size": 4, "train__gradient_accumulation_steps": 2},
    "2x4": {"train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 4},
    "1x8": {"train__per_device_train_batch_size": 1, "train__gradient_accumulation_steps": 8},
    "8x1 padded": {"train__per_device_train_batch_size": 8, "data__padding_free": False},
    "2x4 padded": {"train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 4,
                   "data__padding_free": False},
    "packed": {"data__packing": True, "data__max_length": 290, "train__per_device_train_batch_size": 8},
    "packed one by one": {"data__packing": True, "data__max_length": 290, "train__per_device_train_batch_size": 1,
                          "train__gradient_accumulation_steps": 8},
    "recomputed": {"train__gradient_checkpointing": True, "train__per_device_train_batch_size": 4,
                   "train__gradient_accumulation_steps": 2},
    "offloaded": {"train__activation_offload": True, "train__per_device_train_batch_size": 4,
                  "train__gradient_accumulation_steps": 2},
    "tiled": {"train__tile_mlp": 48, "train__per_device_train_batch_size": 8},
    "recomputed padded": {"train__gradient_checkpointing": True, "data__padding_free": False,
                          "train__per_device_train_batch_size": 8},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_does_not_depend_on_how_its_rows_are_laid_out(
    layout: str, model_dir: Path, recipe: Callable[..., Parsed]
) -> None:
    made = make(recipe(data__max_rows=8, **LAYOUTS[layout]))
    batches = made.batches.step(0)
    assert all_rows(batches) == list(range(8))
    assert made.batches.flat == ("padded" not in layout)
    assert made.arranged.batches.cut == made.arranged.layout.cut
    assert made.arranged.groups == 8, "query, key and value; output; gate and up; down: of two layers"
    assert distance(made.measure(batches), reference(model_dir, made, range(8))) < TOLERANCE


@pytest.mark.parametrize("flat", [True, False])
def test_a_ragged_last_window_weighs_its_tokens_like_any_other(
    flat: bool, model_dir: Path, recipe: Callable[..., Parsed]
) -> None:
    made = make(recipe(data__max_rows=13, data__padding_free=flat, train__per_device_train_batch_size=3,
                       train__gradient_accumulation_steps=3))  # fmt: skip
    first, last = made.batches.step(0), made.batches.step(1)
    assert [len(batch.sources) for batch in last] == [3, 1]
    assert sorted(all_rows(first) + all_rows(last)) == list(range(13))
    assert distance(made.measure(last), reference(model_dir, made, all_rows(last))) < TOLERANCE


def test_fused_head_and_plain_logits_agree(model_dir: Path, recipe: Callable[..., Parsed]) -> None:
    made = make(recipe(data__max_rows=8))
    assert made.objective.head is not None
    batches = made.batches.step(0)
    plain = made.measure(batches, dataclasses.replace(made.objective, head=None))
    assert distance(made.measure(batches), plain) < TOLERANCE
    assert distance(plain, reference(model_dir, made, range(8))) < TOLERANCE


def test_the_reference_is_what_transformers_calls_the_loss(model_dir: Path, recipe: Callable[..., Parsed]) -> None:
    from transformers import AutoModelForCausalLM

    made = make(recipe(data__max_rows=8))
    for name, tensor in trained_state(made.model).items():
        if "lora_B" in name:
            tensor.zero_()
    plain = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float64)
    ids, learned = made.ready.prepared.train.row(1)
    labels = torch.tensor(np.where(learned, ids, -100), dtype=torch.long)[None]
    theirs = plain(input_ids=torch.tensor(ids, dtype=torch.long)[None], labels=labels).loss.item()
    alone = [made.batches.batch([1])]
    assert abs(made.measure(alone)[0] - theirs) < TOLERANCE * theirs


class MeanOfMeans(TextObjective):
    """Divides each micro-batch by its own targets: the fault of transformers #34191. The worth of the step is one."""

    parts = 4

    def worth(self, batch: TextBatch) -> float:
        return 1 / self.parts

    def losses(self, model: torch.nn.Module, on_device: TextOnDevice) -> torch.Tensor:
        return super().losses(model, on_device) / len(on_device.targets) / self.parts


def replaced(batches: Sequence[TextBatch], **changes: Callable[[TextBatch], Any]) -> list[TextBatch]:
    return [dataclasses.replace(batch, **{name: make(batch) for name, make in changes.items()}) for batch in batches]


def with_filler(batch: TextBatch) -> TextBatch:
    """The filler document learns one token."""
    assert batch.bounds is not None
    assert batch.tokens + 2 <= batch.ids.shape[1], "no filler to plant the fault in"
    extended = {
        "rows": np.append(batch.rows, 0),
        "columns": np.append(batch.columns, batch.ids.shape[1] - 2),
        "targets": np.append(batch.targets, 0),
    }
    return dataclasses.replace(batch, **extended)


def test_mean_of_micro_batch_means_is_caught(model_dir: Path, recipe: Callable[..., Parsed]) -> None:
    made = make(recipe(data__max_rows=8, **LAYOUTS["2x4"]))
    batches = made.batches.step(0)
    assert len(batches) == MeanOfMeans.parts
    fault = made.measure(batches, MeanOfMeans(**vars(made.objective)))
    assert distance(fault, reference(model_dir, made, range(8))) > 1000 * TOLERANCE


def test_a_dropped_target_is_caught(model_dir: Path, recipe: Callable[..., Parsed]) -> None:
    made = make(recipe(data__max_rows=8, **LAYOUTS["4x2"]))
    first, second = made.batches.step(0)
    names = ("rows", "columns", "targets")
    short = replaced([first], **{name: lambda batch, name=name: getattr(batch, name)[1:] for name in names})
    assert distance(made.measure([*short, second]), reference(model_dir, made, range(8))) > 100 * TOLERANCE


def test_a_supervised_filler_document_is_caught(model_dir: Path, recipe: Callable[..., Parsed]) -> None:
    made = make(recipe(data__max_rows=7, **LAYOUTS["8x1"]))
    fault = [with_filler(batch) for batch in made.batches.step(0)]
    assert distance(made.measure(fault), reference(model_dir, made, range(7))) > 100 * TOLERANCE


def test_attention_across_documents_is_caught(
    model_dir: Path, recipe: Callable[..., Parsed], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(recipe(data__max_rows=8, **LAYOUTS["packed"]))
    right = TextObjective.to_device

    def together(self: TextObjective, batch: TextBatch) -> TextOnDevice:
        return dataclasses.replace(right(self, batch), documents=None)

    monkeypatch.setattr(TextObjective, "to_device", together)
    fault = made.measure(made.batches.step(0))
    assert distance(fault, reference(model_dir, made, range(8))) > 1000 * TOLERANCE


def test_positions_that_do_not_restart_are_caught(tmp_path: Path, data_file: Path) -> None:
    """With rotary positions a shift of a whole document changes nothing; GPT-2's learned ones tell."""
    config = MODELS["gpt2"]()
    directory = tiny.save_model(config, tmp_path)
    made = make(tiny.recipe(directory, data_file, tmp_path / "run", data__max_rows=8, **LAYOUTS["8x1"]))
    batches, expected = made.batches.step(0), reference(directory, made, range(8))
    assert distance(made.measure(batches), expected) < TOLERANCE
    going_on = replaced(batches, positions=lambda batch: np.arange(batch.ids.shape[1])[None])
    assert distance(made.measure(going_on), expected) > 1000 * TOLERANCE


def _named(name: str, **sizes: Any) -> Callable[[], Any]:
    import transformers

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY, "eos_token_id": 2, "pad_token_id": 0,
             "bos_token_id": None, "initializer_range": 0.1, "max_position_embeddings": 512}  # fmt: skip
    return lambda: getattr(transformers, name)(**(shape | sizes))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": _named("LlamaConfig"),
    "qwen3": _named("Qwen3Config", head_dim=16),
    "gemma2": _named("Gemma2Config", head_dim=16, sliding_window=6, attn_logit_softcapping=2.0,
                     final_logit_softcapping=3.0, query_pre_attn_scalar=16),
    "mistral": _named("MistralConfig", head_dim=16, sliding_window=5),
    "phi3": _named("Phi3Config"),
    "gpt2": lambda: _gpt2(),
}  # fmt: skip


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=tiny.VOCABULARY, n_positions=1024, bos_token_id=0, eos_token_id=2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, initializer_range=0.1,
    )  # fmt: skip


def _models(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same random model with whet's attention, and in float64 with transformers' own eager one."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)  # a configuration each: a model notes its attention there
    make_model = AutoModelForCausalLM.from_config
    ours = make_model(MODELS[name](), dtype=torch.float32, attn_implementation=ATTENTION).eval()
    plain = make_model(MODELS[name](), dtype=torch.float64, attn_implementation="eager").eval()
    plain.load_state_dict({key: value.double() for key, value in ours.state_dict().items()})
    return ours, plain


@pytest.mark.parametrize("name", MODELS)
def test_a_document_in_a_flat_row_is_as_if_alone(name: str) -> None:
    ours, plain = _models(name)
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(0, tiny.VOCABULARY, (length,), generator=generator) for length in (17, 1, 40, 5, 23)]
    with torch.inference_mode():
        flat = ours(**flat_inputs(documents), use_cache=False).logits[0].double()
        alone = torch.cat([plain(input_ids=document[None]).logits[0] for document in documents])
        together = ours(**(flat_inputs(documents) | {"documents": None}), use_cache=False).logits[0].double()
    scale = float(alone.abs().max())
    assert float((flat - alone).abs().max()) < TOLERANCE * scale
    assert float((together - alone).abs().max()) > 100 * TOLERANCE * scale
    assert check_isolation(ours, tiny.VOCABULARY).holds


@pytest.mark.parametrize("name", MODELS)
def test_padding_on_the_right_changes_no_real_token(name: str) -> None:
    ours, plain = _models(name)
    document = torch.randint(0, tiny.VOCABULARY, (19,), generator=torch.Generator().manual_seed(4))
    padded = torch.zeros(2, 30, dtype=torch.long)
    padded[0, :19] = document
    with torch.inference_mode():
        logits = ours(input_ids=padded, use_cache=False).logits[0, :19].double()
        alone = plain(input_ids=document[None]).logits[0]
    assert float((logits - alone).abs().max()) < TOLERANCE * float(alone.abs().max())


class Deaf(torch.nn.Module):
    """A model that does not pass the documents on to its layers."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, documents: Any = None, **inputs: Any) -> Any:
        return self.model(**inputs)


def test_the_isolation_check_sees_a_model_that_ignores_documents() -> None:
    ours, _ = _models("llama")
    assert check_isolation(ours, tiny.VOCABULARY).holds
    assert not check_isolation(Deaf(ours), tiny.VOCABULARY).holds


def leak(module: Any, inputs: Any, output: Any) -> Any:
    """Let every token see the mean of all."""
    return (output[0] + output[0].mean(1, keepdim=True), *output[1:])


@pytest.mark.parametrize("flat", [True, False])
def test_a_model_that_sees_ahead_is_found(flat: bool) -> None:
    ours, _ = _models("llama")
    assert check_causality(ours, tiny.VOCABULARY, flat=flat) == 0.0
    ours.model.layers[0].self_attn.register_forward_hook(leak)
    assert check_causality(ours, tiny.VOCABULARY, flat=flat) > 0.01


def test_a_run_of_a_model_that_sees_ahead_is_refused(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from whet.base.errors import UserError
    from whet.training import load as loading

    load = loading.load_model

    def leaky(*args: Any) -> Any:
        network = load(*args)
        network.model.layers[0].self_attn.register_forward_hook(leak)
        return network

    monkeypatch.setattr(loading, "load_model", leaky)
    with pytest.raises(UserError, match="no causal mask"):
        tiny.built(recipe())
