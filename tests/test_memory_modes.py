"""Recompute, offload, tiled MLP and the embedding on the host: the same gradients, and less kept."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config

from whet.base.errors import UserError
from whet.engine.compute import attention
from whet.engine.compute.attention import Documents
from whet.engine.layers import decoder_layers
from whet.engine.memory import checkpointing as modes
from whet.engine.memory import host_tables, stash, tiles

LAYERS, HIDDEN, TOKENS = 4, 32, 11
WIDTHS = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: LlamaConfig(**(WIDTHS | more)),
    "qwen3": lambda **more: Qwen3Config(**(WIDTHS | more)),
    "gemma2": lambda **more: Gemma2Config(**(WIDTHS | {"sliding_window": 4} | more)),
    "gpt2": lambda **more: GPT2Config(
        **({"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "vocab_size": 97, "n_positions": 64} | NO_DROPOUT | more)
    ),
}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
CHUNK = 256  # several chunks for each input
MODES: dict[str, Callable[[nn.Module], Any]] = {
    "all but the last": lambda model: modes.checkpoint_layers(model),
    "every layer": lambda model: modes.checkpoint_layers(model, range(LAYERS)),
    "some layers": lambda model: modes.checkpoint_layers(model, [0, 2]),
    "offload": lambda model: modes.checkpoint_layers(model, offload=True),
    "tiles": lambda model: tiles.tile_mlp(model, 4),
    "all together": lambda model: (modes.checkpoint_layers(model, offload=True), tiles.tile_mlp(model, 3)),
}


def build(name: str, lora_dropout: float = 0.0, **changes: Any) -> nn.Module:
    """A tiny model with LoRA on every linear layer; the same weights for the same arguments."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(CONFIGS[name](**changes), attn_implementation=attention.ATTENTION)
    targets = ["c_attn", "c_proj", "c_fc"] if name == "gpt2" else "all-linear"
    model = peft.get_peft_model(network, peft.LoraConfig(r=4, target_modules=targets, lora_dropout=lora_dropout))
    tiny.randomise_adapter(model)
    return model.train()


def inputs(rows: int = 2, seed: int = 0) -> dict[str, Any]:
    ids = torch.randint(0, 97, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "use_cache": False}


def flat() -> dict[str, Any]:
    bounds = (0, 3, 8, TOKENS)
    positions = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(bounds)])[None]
    return inputs(1) | {
        "position_ids": positions,
        "documents": Documents(torch.tensor(bounds, dtype=torch.int32), 5, bounds=bounds),
    }


def gradients(model: nn.Module, *batches: dict[str, Any], autocast: bool = False) -> dict[str, torch.Tensor]:
    """The gradients of the adapter, accumulated over `batches`, with the losses beside them."""
    model.zero_grad()
    found = {}
    for place, batch in enumerate(batches):
        torch.manual_seed(5 + place)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).logits.float().logsumexp(-1).mean()
        loss.backward()
        found[f"loss {place}"] = loss.detach()
        found[f"next number {place}"] = torch.rand(())  # the stream of random numbers goes on as without the mode
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) > 2 * LAYERS
    return found


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference, by the largest entry of each tensor."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name] - theirs[name]).abs().max()) / max(1e-12, float(theirs[name].abs().max())) for name in ours
    )


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "Stash", lambda: stash.Stash(CHUNK))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_plain_model(name: str, mode: str) -> None:
    batches = (inputs(), inputs(3, seed=1))
    plain = gradients(build(name), *batches)
    model = build(name)
    MODES[mode](model)
    ours = gradients(model, *batches)
    tolerance = 1e-5 if mode in ("tiles", "all together") else 0  # sums over pieces are added in another order
    assert apart(ours, plain) <= tolerance
    assert apart(gradients(model, *batches), plain) <= tolerance  # and in the next step


@pytest.mark.parametrize("mode", MODES)
def test_documents_pass_through(mode: str) -> None:
    plain = gradients(build("llama"), flat())
    model = build("llama")
    MODES[mode](model)
    assert apart(gradients(model, flat()), plain) <= 1e-5
    assert apart(gradients(model, inputs(1)), plain) > 1e-3  # they do matter


@pytest.mark.parametrize("mode", MODES)
def test_autocast_holds_in_the_second_run(mode: str) -> None:
    plain = gradients(build("llama"), inputs(), autocast=True)
    model = build("llama")
    MODES[mode](model)
    assert apart(gradients(model, inputs(), autocast=True), plain) <= (0.02 if "ti" in mode or "tog" in mode else 0)


DROPOUTS = {"llama": {"attention_dropout": 0.2, "lora_dropout": 0.3}, "gpt2": {"attn_pdrop": 0.2, "resid_pdrop": 0.2}}


@pytest.mark.parametrize("mode", ["every layer", "offload"])
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_masks_are_the_same_in_the_second_run(name: str, mode: str) -> None:
    plain = gradients(build(name, **DROPOUTS[name]), inputs(), inputs(seed=1))
    model = build(name, **DROPOUTS[name])
    MODES[mode](model)
    assert apart(gradients(model, inputs(), inputs(seed=1)), plain) == 0


@pytest.mark.parametrize("fault", [False, True])
def test_tiles_draw_their_masks_again(fault: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault:
        monkeypatch.setattr(tiles, "drawn_again", lambda *_: contextlib.nullcontext())
    torch.manual_seed(0)
    model = build("gpt2", resid_pdrop=0.4)
    tiles.tile_mlp(model, 4)
    mlp = decoder_layers(model)[0].mlp  # type: ignore[union-attr]
    hidden = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    torch.manual_seed(1)
    mlp(hidden).square().sum().backward()
    ours = hidden.grad
    assert ours is not None
    torch.manual_seed(1)
    kind = tiles._untiled(type(mlp))
    pieces = [kind.forward(mlp, piece) for piece in hidden.split(4, dim=1)]
    exact = torch.autograd.grad(torch.cat(pieces, 1).square().sum(), hidden)[0]
    assert torch.allclose(ours, exact, atol=1e-6) is not fault


def test_the_state_of_the_generators_is_kept_only_for_layers_that_draw() -> None:
    for rate, draws in ((0.0, False), (0.3, True)):
        model = build("llama", lora_dropout=rate)
        modes.checkpoint_layers(model)
        gradients(model, inputs())
        assert decoder_layers(model)[0]._gradient_checkpointing_func.random is draws  # type: ignore[union-attr]


def take_and_give(pool: stash.Chunks, nbytes: int, take: Any = stash.Chunks.take) -> list[torch.Tensor]:
    chunks = take(pool, nbytes)
    pool._free = chunks + pool._free
    return chunks


FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "random numbers are not drawn again": (
        "every layer",
        lambda patch: patch.setattr(modes, "has_moved", lambda *_: False),
    ),
    "the copy to the host is forgotten": (
        "offload",
        lambda patch: patch.setattr(stash, "_copy_out", lambda *_: None),
    ),
    "the copy back is forgotten": ("offload", lambda patch: patch.setattr(stash, "_copy_back", lambda *_: None)),
    "chunks are given away too early": (
        "offload",
        lambda patch: patch.setattr(stash.Chunks, "take", take_and_give),
    ),
    "autocast is forgotten": (
        "every layer",
        lambda patch: patch.setattr(modes, "autocast_now", lambda _: lambda: torch.autocast("cpu", enabled=False)),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, plant = FAULTS[fault]
    autocast = fault.startswith("autocast")
    plain = gradients(build("llama", lora_dropout=0.3), inputs(), autocast=autocast)
    model = build("llama", lora_dropout=0.3)
    MODES[mode](model)
    assert apart(gradients(model, inputs(), autocast=autocast), plain) == 0
    for layer in decoder_layers(model):
        layer._gradient_checkpointing_func.random = None  # type: ignore[union-attr]
    plant(monkeypatch)
    broken = gradients(model, inputs(), autocast=autocast)
    assert not apart(broken, plain) <= 1e-4


def kept(model: nn.Module) -> int:
    """Bytes that autograd keeps for backward, beside weights; each storage once."""
    weights = {p.data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs()).logits.float().sum()
    del loss
    return sum(seen.values())


def test_recompute_keeps_the_inputs_alone() -> None:
    one_input = 2 * TOKENS * HIDDEN * 4
    model = build("llama")
    everything = kept(model)
    modes.checkpoint_layers(model, range(LAYERS))
    inputs_kept = kept(model)
    modes.checkpoint_layers(model, range(LAYERS), offload=True)
    offloaded = kept(model)
    assert inputs_kept - offloaded == (LAYERS - 1) * one_input
    modes.checkpoint_layers(model, range(LAYERS - 1))
    per_layer = kept(model) - inputs_kept + one_input  # what the last layer keeps beside what it would as recomputed
    assert everything - inputs_kept == pytest.approx(LAYERS * (per_layer - one_input), rel=0.05)
    assert per_layer > 8 * one_input
    modes.checkpoint_layers(model, ())
    assert kept(model) == everything


def test_tiles_keep_the_input_of_the_mlp_alone() -> None:
    model = build("llama")
    mlp = decoder_layers(model)[0].mlp  # type: ignore[union-attr]
    hidden = torch.randn(2, TOKENS, HIDDEN)
    for tiled in (False, True):
        if tiled:
            tiles.tile_mlp(model, 4)
        shapes = []
        pack = lambda tensor, shapes=shapes: shapes.append(tensor.shape) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = mlp(hidden)
        wide = [shape for shape in shapes if shape[-1] == 48 and shape[:-1].numel() == 2 * TOKENS]
        assert bool(wide) is not tiled
        assert output.shape == hidden.shape


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_run_again_without_gradients(mode: str) -> None:
    model = build("llama")
    expected = model(**inputs()).logits
    MODES[mode](model)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.allclose(model(**inputs()).logits, expected, atol=1e-6)
    calls = count_calls(model)
    with torch.no_grad():
        model(**inputs())
    assert len(calls) == LAYERS
    model.eval()
    model.get_base_model().set_attn_implementation("sdpa")  # type: ignore[operator,union-attr]
    ids = inputs()["input_ids"]
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (2, TOKENS + 3)  # type: ignore[operator]


def count_calls(model: nn.Module) -> list[int]:
    """Grows by the layer's index whenever a decoder layer runs."""
    seen: list[int] = []
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, index=index: seen.append(index))
    return seen


def test_a_recomputed_layer_runs_twice_and_frozen_layers_once() -> None:
    model = build("llama")
    modes.checkpoint_layers(model, [0, 1])
    runs = count_calls(model)
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            parameter.requires_grad_(False)  # nothing at or below the first layer asks for a gradient
    model(**inputs()).logits.sum().backward()
    assert sorted(runs) == [0, 1, 1, 2, 3]


def test_compiled_layers_are_run_through_their_compiled_call() -> None:
    plain = gradients(build("llama", lora_dropout=0.3), inputs())
    model = build("llama", lora_dropout=0.3)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    for layer in decoder_layers(model):
        layer.compile(backend=backend, dynamic=False)
    modes.checkpoint_layers(model, range(LAYERS), offload=True)
    for _ in range(2):
        assert apart(gradients(model, inputs()), plain) <= 1e-6
    assert len(graphs) == 2  # both runs of a layer are one graph, so they draw the same masks; the first layer is apart


def test_the_mlp_of_a_tile_may_be_compiled() -> None:
    plain = gradients(build("llama"), inputs())
    model = build("llama")
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    tiles.tile_mlp(model, 4, compiled=lambda forward: torch.compile(forward, backend=backend, dynamic=True))
    assert apart(gradients(model, inputs()), plain) <= 1e-5
    assert graphs


def test_the_pool_does_not_grow_from_step_to_step() -> None:
    model = build("llama")
    modes.checkpoint_layers(model, offload=True)
    stash = decoder_layers(model)[0]._gradient_checkpointing_func.stash  # type: ignore[union-attr]
    gradients(model, inputs(2), inputs(2))
    per_input = -(-2 * TOKENS * HIDDEN * 4 // CHUNK)
    assert stash.pool.made == (LAYERS - 2) * per_input
    for rows in (1, 2, 1, 2):
        gradients(model, inputs(rows), inputs(2))
        model(**inputs(2))  # a graph that is dropped
    assert stash.pool.made == (LAYERS - 2) * per_input
    assert len(stash._order) <= LAYERS


def test_graphs_may_be_open_at_the_same_time() -> None:
    model = build("llama")
    plain = gradients(model, inputs(), inputs(seed=1))
    modes.checkpoint_layers(model, offload=True)
    model.zero_grad()
    losses = [model(**batch).logits.logsumexp(-1).mean() for batch in (inputs(), inputs(seed=1))]
    losses[0].backward()
    losses[1].backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert apart(ours, {name: plain[name] for name in ours}) <= 1e-6


def test_a_second_backward_is_refused() -> None:
    model = build("llama")
    modes.checkpoint_layers(model, offload=True)
    loss = model(**inputs()).logits.mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given back once"):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_names_and_adapters_stay(mode: str) -> None:
    plain, model = build("llama"), build("llama")
    MODES[mode](model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(peft.get_peft_model_state_dict(model)) == list(peft.get_peft_model_state_dict(plain))
    merged = model.merge_and_unload()  # type: ignore[operator]
    assert [type(layer).__name__ for layer in decoder_layers(merged)] == ["LlamaDecoderLayer"] * LAYERS
    tiles.tile_mlp(model, 0)
    assert type(decoder_layers(model)[0].mlp).__name__ == "LlamaMLP"


class Plain(nn.Module):
    """A model of nobody's, whose layers take a second tensor that asks for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.side = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids: torch.Tensor, shared: bool = False) -> torch.Tensor:
        hidden = self.embed(ids)
        more = {"side": self.side(hidden), "store": {} if shared else None}
        for block in self.blocks:
            hidden = block(hidden, **more)
        return hidden


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, hidden: torch.Tensor, side: torch.Tensor, store: dict[int, Any] | None) -> torch.Tensor:
        if store is not None:
            store[len(store)] = hidden
        return hidden + sum(torch.tanh(expert(hidden) + side) for expert in self.experts)


def test_layers_of_any_class_and_arguments_with_gradients() -> None:
    torch.manual_seed(0)
    model, ids = Plain(), torch.arange(9)[None]
    assert len(decoder_layers(model)) == 3
    names = list(model.state_dict())
    found = []
    for layers in ((), (0, 1, 2)):
        modes.checkpoint_layers(model, layers, offload=True)
        model.zero_grad()
        model(ids).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert apart(found[1], found[0]) <= 1e-6
    assert list(model.state_dict()) == names
    with pytest.raises(UserError, match="hand each other tensors"):
        model(ids, shared=True)
    with pytest.raises(UserError, match="no such layer"):
        modes.checkpoint_layers(model, [3])
    with pytest.raises(UserError, match="no MLP"):
        tiles.tile_mlp(model, 4)
    with pytest.raises(UserError, match="no list of like layers"):
        decoder_layers(nn.Linear(2, 2))


class Held(nn.Module):
    """An MLP whose trained tensor no module knows of, as one that holds the masters of several layers."""

    def __init__(self, leaf: torch.Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.held = [leaf]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(hidden) * self.held[0]))


class Outer(nn.Module):
    def __init__(self, leaf: torch.Tensor) -> None:
        super().__init__()
        self.mlp = Held(leaf)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.mlp(hidden)


def test_leaves_that_no_module_knows_of_get_their_gradients() -> None:
    found = []
    for change in (lambda _: None, lambda model: (modes.checkpoint_layers(model, (0, 1)), tiles.tile_mlp(model, 2))):
        torch.manual_seed(0)
        leaf = torch.rand(12, requires_grad=True)
        model = nn.Sequential(nn.Linear(8, 8), nn.ModuleList([Outer(leaf), Outer(leaf)]))
        change(model)
        hidden = model[0](torch.randn(2, 5, 8))
        for layer in decoder_layers(model):
            hidden = layer(hidden)
        hidden.square().sum().backward()
        assert leaf.grad is not None
        found.append({"leaf": leaf.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert apart(found[1], found[0]) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_embedding_on_the_host_is_bit_equal(name: str) -> None:
    plain, model = build(name), build(name)
    names = list(model.state_dict())
    freed = host_tables.offload_embedding(model)
    assert freed == 97 * HIDDEN * 4
    assert host_tables.offload_embedding(model) == 0
    assert sorted(model.state_dict()) == sorted(names)
    assert all(p.shape != (97, HIDDEN) or "embed" not in n for n, p in model.named_parameters())
    assert torch.equal(model(**inputs()).logits, plain(**inputs()).logits)
    assert apart(gradients(model, inputs()), gradients(plain, inputs())) == 0


def test_a_trained_or_tied_embedding_stays() -> None:
    for model in (build("llama", tie_word_embeddings=True), AutoModelForCausalLM.from_config(CONFIGS["llama"]())):
        with pytest.raises(ValueError, match="cannot be kept on the host"):
            host_tables.offload_embedding(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_on_a_gpu_frees_its_memory_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "Stash", stash.Stash)
    ours = stash.Stash()
    torch.manual_seed(0)
    tensors = [torch.randn(5 << 20, device="cuda") for _ in range(6)]
    expected = [tensor.clone() for tensor in tensors]
    for _ in range(3):
        kept = []
        base = torch.cuda.memory_allocated()
        for tensor in tensors:
            torch.cuda._sleep(1_000_000)
            kept.append(ours.put(tensor.clone()))
        assert torch.cuda.memory_allocated() - base <= stash.LEAVING * tensors[0].nbytes
        for place in reversed(range(6)):
            assert torch.equal(ours.get(kept[place]), expected[place])
    assert ours.pool is not None
    assert ours.pool.made == 6 * 5
    plain = build("llama", lora_dropout=0.3).cuda()
    batch = inputs(64) | {"input_ids": inputs(64)["input_ids"].cuda()}
    exact = gradients(plain, batch)
    modes.checkpoint_layers(plain, offload=True)
    assert apart(gradients(plain, batch), exact) <= 1e-5
