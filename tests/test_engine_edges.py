"""The engine at the edges of what a usual model asks of it: each function by its public face, against plain torch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from whet.base.errors import UserError
from whet.engine.compute.attention import Documents, attend
from whet.engine.compute.cached_attention import attend_cached
from whet.engine.compute.isolation import Isolation, check_causality, check_isolation
from whet.engine.config import Base, Model
from whet.engine.device import Placement
from whet.engine.load.load import load_model, load_tokenizer, longest_input
from whet.engine.load.open import answering_placement
from whet.engine.memory.host_adam import shorten_weights
from whet.engine.memory.tiles import tile_mlp


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# attention


@pytest.mark.parametrize("window", [None, 1, 3, 5, 6])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_in_documents_of_one_length_is_that_of_any_documents(
    window: int | None, softcap: float | None
) -> None:
    """Documents that fill the row are computed as dense rows: another way to the same result."""
    length, count = 5, 4
    query, key, value = draw(1, 4, 20, 8), draw(1, 2, 20, 8, seed=1), draw(1, 2, 20, 8, seed=2)
    bounds = tuple(range(0, length * count + 1, length))
    cu = torch.tensor(bounds, dtype=torch.int32)
    options: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    dense, _ = attend(nn.Module(), query, key, value, None, documents=Documents(cu, length, row=length), **options)
    any_length = Documents(cu, length, bounds=bounds)
    plain, _ = attend(nn.Module(), query, key, value, None, documents=any_length, **options)
    torch.testing.assert_close(dense, plain)


def test_attention_takes_the_mask_of_a_caller_and_adds_no_window() -> None:
    query, key, value = (draw(1, 2, 6, 8, seed=seed) for seed in range(3))
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    allowed[..., 3:, 0] = False
    found, _ = attend(nn.Module(), query, key, value, allowed, sliding_window=2)
    torch.testing.assert_close(found, scaled_dot_product_attention(query, key, value, allowed).transpose(1, 2))


@pytest.mark.parametrize("documents", [None, (0, 4, 9)])
def test_attention_drops_what_it_is_told_to_drop(documents: tuple[int, ...] | None) -> None:
    query, key, value = (draw(1, 2, 9, 8, seed=seed) for seed in range(3))
    given = None if documents is None else Documents(torch.tensor(documents, dtype=torch.int32), 5, bounds=documents)

    def output(dropout: float) -> torch.Tensor:
        torch.manual_seed(0)
        return attend(nn.Module(), query, key, value, None, dropout=dropout, documents=given)[0]

    assert torch.equal(output(0.0), output(0.0))
    kept = output(0.0)
    many = torch.stack([attend(nn.Module(), query, key, value, None, dropout=0.5, documents=given)[0]
                        for _ in range(2000)])  # fmt: skip
    assert float((many[0] - kept).abs().max()) > 0.1
    torch.testing.assert_close(many.mean(0), kept, atol=0.15, rtol=0)


@pytest.mark.parametrize("seen", [0, 1, 7])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_cached_attention_of_several_new_tokens_sees_the_cache_and_nothing_later(
    seen: int, softcap: float | None, scaling: float | None
) -> None:
    """Without a mask the new tokens are the last ones: each sees all that is cached and the new ones up to itself."""
    new, width = 3, 8
    query, key, value = (
        draw(2, 4, new, width),
        draw(2, 2, seen + new, width, seed=1),
        draw(2, 2, seen + new, width, seed=2),
    )
    mask = torch.ones(new, seen + new, dtype=torch.bool).tril(seen)
    given = None if softcap is not None else mask[None, None].expand(2, 1, new, seen + new)
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    found, _ = attend_cached(module, query, key, value, given, scaling=scaling, softcap=softcap)
    wide_key, wide_value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    scores = query @ wide_key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    expected = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ wide_value
    torch.testing.assert_close(found, expected.transpose(1, 2))
    if softcap is None:
        exact = scaled_dot_product_attention(query, wide_key, wide_value, mask, scale=scaling)
        torch.testing.assert_close(found, exact.transpose(1, 2))


# the checks at the start


def test_isolation_needs_both_that_nothing_moves_and_that_positions_restart() -> None:
    assert Isolation(moved=0.0, alone=0.0, scale=1.0).holds
    assert not Isolation(moved=1e-6, alone=0.0, scale=1.0).holds, "a neighbour is seen, however little"
    assert not Isolation(moved=0.0, alone=0.5, scale=1.0).holds, "the second document has other positions than alone"
    assert Isolation(moved=0.0, alone=0.01, scale=1.0).holds, "which is rounding"


class Reader(nn.Module):
    """Logits that are a row of a table, with a part of the next token's and of the mean of all tokens."""

    def __init__(self, *, ahead: float = 0.0, around: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 50)
        self.ahead, self.around = ahead, around

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        rows = self.table(input_ids)
        later = torch.cat([rows[:, 1:], torch.zeros_like(rows[:, :1])], dim=1)
        logits = rows + self.ahead * later + self.around * rows.mean(1, keepdim=True)
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("training", [True, False])
def test_the_isolation_check_leaves_the_mode_of_the_model(training: bool) -> None:
    model = Reader().train(training)
    check_isolation(model, 50)
    assert model.training is training
    check_causality(model, 50, flat=True)
    assert model.training is training


def test_a_model_that_sees_one_token_ahead_is_found() -> None:
    for flat in (True, False):
        assert check_causality(Reader(), 50, flat=flat) == 0.0
        assert check_causality(Reader(ahead=1.0), 50, flat=flat) > 0.1


def test_a_model_that_lets_a_neighbour_through_a_little_is_found() -> None:
    """Far below what rounding may do to a document that is alone: only that it moves at all gives it away."""
    assert check_isolation(Reader(), 50).holds
    leaking = check_isolation(Reader(around=0.001), 50)
    assert 0 < leaking.moved < 0.05 * leaking.scale
    assert not leaking.holds


# memory


class Block(nn.Module):
    """A layer whose only part with linear layers may be given a mask."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.mixer = (Masked if masked else Plain)()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mixer(hidden)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(hidden))


class Masked(Plain):
    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        mixed = hidden.mean(1, keepdim=True) if attention_mask is None else attention_mask @ hidden
        return self.two(self.one(mixed.expand_as(hidden)))


def test_attention_is_not_taken_for_an_mlp() -> None:
    """Computed in pieces, its tokens would no longer see each other."""
    net = nn.Module()
    net.layers = nn.ModuleList([Block(masked=False), Block(masked=False)])
    assert tile_mlp(net, 3) == 2
    net.layers = nn.ModuleList([Block(masked=True), Block(masked=True)])
    with pytest.raises(UserError, match="no MLP that can be computed in pieces"):
        tile_mlp(net, 3)


def test_a_weight_with_two_owners_is_not_shortened() -> None:
    from transformers import LlamaForCausalLM

    net = LlamaForCausalLM(tiny.llama())
    first, second = (layer.self_attn for layer in net.model.layers)
    second.q_proj.weight = first.q_proj.weight
    masters = shorten_weights(net, torch.device("cpu"), torch.bfloat16)
    assert first.q_proj.weight.dtype == torch.float32
    assert first.o_proj.weight.dtype == second.k_proj.weight.dtype == torch.bfloat16
    assert first.q_proj.weight not in masters
    assert len(masters) == 2 * 7 - 2, "all but the one that two share"


# loading


@pytest.mark.parametrize(("given", "expected"), [(None, True), (True, True), (False, False)])
def test_a_run_in_nf4_answers_with_the_blocks_it_was_trained_with(given: bool | None, expected: bool) -> None:
    base = Base(device="cpu", storage="nf4", compute="fp32", double_quant=given)
    assert answering_placement(Model(path="builtin:tiny"), base).double_quant is expected


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_a_weight_that_is_turned_round_does_not_fit(storage: str, model_dir: Path, tmp_path: Path) -> None:
    """It has as many numbers as it should have."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model_dir / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].t().contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    placement = Placement(torch.device("cpu"), storage, torch.float32, False, {})
    with pytest.raises(UserError, match="another shape") as caught:
        load_model(Model(path=str(tmp_path)), placement)
    assert name in str(caught.value.found)


def test_the_first_token_behind_the_table_has_a_row(model_dir: Path) -> None:
    """The tokenizer has as many tokens as the table has rows, so one more is just outside."""
    plain, model = Model(path=str(model_dir)), Model(path=str(model_dir), new_tokens=["<order>"])
    placement = Placement(torch.device("cpu"), "fp32", torch.float32, False, {})
    tokenizer, before = load_tokenizer(model), load_tokenizer(plain)
    (new,) = tokenizer("<order>", add_special_tokens=False).input_ids
    assert new == tiny.VOCABULARY
    network: Any = load_model(model, placement)
    pieces = before("<order>", add_special_tokens=False).input_ids
    table = network.get_input_embeddings().weight
    assert len(table) == tiny.VOCABULARY + 1
    torch.testing.assert_close(table[new], table[torch.tensor(pieces)].mean(0))
    assert bool(network(input_ids=torch.tensor([[3, new]])).logits.isfinite().all())


@pytest.mark.parametrize("pad", [0, 1])
def test_the_longest_row_of_a_roberta_can_be_read_and_no_longer_one(pad: int) -> None:
    import transformers

    config = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99,
        max_position_embeddings=20, pad_token_id=pad,
    )  # fmt: skip
    longest = longest_input(config)
    assert longest is not None
    model = transformers.RobertaModel(config).eval()
    model(input_ids=torch.full((1, longest), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 7))


def test_documents_may_be_empty() -> None:
    bounds = (0, 3, 3, 7, 7)
    documents = Documents(torch.tensor(bounds, dtype=torch.int32), 4, bounds=bounds)
    assert documents.lengths() == [3, 4]
    query, key, value = (draw(1, 2, 7, 8, seed=seed) for seed in range(3))
    found, _ = attend(nn.Module(), query, key, value, None, documents=documents)
    for start, end in itertools.pairwise((0, 3, 7)):
        part = scaled_dot_product_attention(*(t[:, :, start:end] for t in (query, key, value)), is_causal=True)
        torch.testing.assert_close(found[:, start:end], part.transpose(1, 2))
