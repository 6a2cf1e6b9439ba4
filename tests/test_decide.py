"""The layout is a pure function of settings and facts: every automatic choice, on hardware that is made up here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from whet.base.errors import UserError
from whet.data.batch.batches import Cut, Order
from whet.data.batch.rows import Rows
from whet.data.batch.text_batches import TextBatches
from whet.engine.config import Base
from whet.engine.device import Hardware, resolve_placement
from whet.methods.full import Full
from whet.methods.lora import Lora
from whet.planning import memory
from whet.planning.costs import MemoryMode, activation_bytes
from whet.planning.decide import (
    LEAST_TOKENS,
    MAX_COMPILED_FORMS,
    MAX_FORMS,
    SLACK_BYTES,
    decide,
    free_needed,
    slack_bytes,
)
from whet.planning.facts import Facts, Work, count_model, nf4_bytes
from whet.planning.layout import Layout
from whet.settings import Train

GIB = 1 << 30
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
CPU = Hardware(torch.device("cpu"), "CPU", has_bf16=False, has_fp8=False)


def gpu(free: float, *, fp8: bool = True) -> Hardware:
    """A card with `free` GiB free."""
    return Hardware(torch.device("cuda"), "a card", has_bf16=True, has_fp8=fp8, free_bytes=int(free * GIB))


def facts(
    hardware: Hardware, *, base: Base | None = None, method: Any = None, lengths: tuple[int, ...] = (2048,) * 64,
    cut: Cut | None = None, steps: int = 1000, flat: bool = True, **changes: Any,
) -> Facts:  # fmt: skip
    """Facts of Llama 3 8B with LoRA on all linear layers, unless something else is said."""
    method = method or Lora(r=16)
    placement = resolve_placement(base or Base(), method.can.storages, 4096, hardware=hardware)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_8B), dtype=torch.float32)
        model = method.attach(network)
    parts = ((index, np.full(n, 5, np.int32), np.ones(n, bool)) for index, n in enumerate(lengths))
    batches = TextBatches(Rows.gather(parts), flat=flat, order=Order(0), cut=cut or Cut(8, 1))
    return Facts(
        hardware, placement, count_model(model, network, placement), Work(batches, steps),
        flat=flat, padded_task=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def big() -> Facts:
    """8B in FP8 on a card with 80 GiB free."""
    return facts(gpu(80))


def with_free(known: Facts, free: float) -> Facts:
    return replace(known, hardware=gpu(free))


def needed(known: Facts, train: Train, tokens: int) -> float:
    """GiB free at which everything kept of `tokens` tokens just fits, by this test's own arithmetic."""
    layout = decide(train, known)
    fixed = sum(bytes_ for name, bytes_ in layout.memory.items() if name != "activations")
    shape = known.model.shape
    kept = tokens * (shape.layers * shape.kept_bytes + shape.working_bytes)
    return (1.6 * kept + fixed + SLACK_BYTES) / GIB


def test_the_same_facts_give_the_same_layout(big: Facts) -> None:
    assert decide(Train(), big) == decide(Train(), big)


def test_counts_are_those_of_the_real_modules(big: Facts) -> None:
    linears = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    outputs = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    others = 2 * 128256 * 4096 + 65 * 4096
    lora = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert big.model.trainable == lora
    assert big.model.total == linears + others + lora
    assert big.model.frozen_bytes == linears + 4 * outputs + 2 * others
    assert big.model.fp8_bytes == linears
    nf4 = facts(gpu(80), base=Base(storage="nf4")).model.frozen_bytes
    counts = [4096 * 4096] * 2 + [1024 * 4096] * 2 + [14336 * 4096] * 3
    assert nf4 == 32 * sum(nf4_bytes(count, True) for count in counts) + 2 * others


@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (2, 4), (1, 8)])
def test_forward_passes_are_joined_where_everything_fits(big: Facts, size: int, accumulate: int) -> None:
    batches = big.work.batches.with_cut(Cut(size, accumulate))
    layout = decide(Train(), replace(with_free(big, 200), work=Work(batches, 1000)))
    assert (layout.cut.size, layout.cut.accumulate) == (8, 1)
    assert layout.mode == MemoryMode()
    assert not layout.lean
    assert layout.tokens == 8 * 2048


def test_forward_passes_are_cut_where_memory_is_short(big: Facts) -> None:
    half = needed(big, Train(compile=True), 4 * 2048)
    train = Train(compile=True)
    for free, size in ((half + 0.01, 4), (half - 0.01, 2)):
        layout = decide(train, with_free(big, free))
        assert (layout.cut.size, layout.cut.accumulate) == (size, 8 // size)
        assert layout.mode == MemoryMode()
    kept = decide(Train(compile=True, fit_micro_batches=False), with_free(big, half - 0.01))
    assert (kept.cut.size, kept.cut.accumulate) == (8, 1)


def test_activations_give_way_in_the_order_of_speed() -> None:
    """Fewer and fewer bytes: all kept, lean, more and more checkpointed layers, inputs on the host, tiles, refusal."""
    known = facts(gpu(80), base=Base(keep_transposed=False))  # left open it goes on its own way
    train, seen = Train(fit_micro_batches=False, compile=True), []
    for free in np.arange(120, 12, -0.25):
        try:
            layout = decide(train, with_free(known, float(free)))
        except UserError:
            break
        seen.append(layout)
        assert layout.offload_optimizer or layout.peak_bytes + slack_bytes(int(free * GIB)) <= free * GIB + 4
    ranks = [
        (layout.offload_optimizer, layout.lean, layout.mode.checkpointed_layers, layout.mode.offload,
         layout.mode.tile_tokens) for layout in seen
    ]  # fmt: skip
    assert [rank[1:4] for rank in ranks if not rank[0]] == sorted(rank[1:4] for rank in ranks if not rank[0])
    assert ranks[0] == (False, False, 0, False, 0)
    assert (False, True, 0, False, 0) in ranks
    assert len({rank[2] for rank in ranks}) > 20
    assert any(rank[3] for rank in ranks)


@pytest.mark.parametrize(
    ("changes", "mode"),
    [({"gradient_checkpointing": True}, MemoryMode(31)), ({"activation_offload": True}, MemoryMode(31, True)),
     ({"tile_mlp": 512}, MemoryMode(31, False, 512)),
     ({"gradient_checkpointing": True, "activation_offload": True, "tile_mlp": 512}, MemoryMode(31, True, 512))],
    ids=str,
)  # fmt: skip
def test_what_is_asked_for_is_obeyed_whatever_fits(big: Facts, changes: dict[str, Any], mode: MemoryMode) -> None:
    for known in (with_free(big, 500), facts(CPU)):
        assert decide(Train(**changes), known).mode == mode
    padded = replace(big, padded_task=True, flat=False, work=Work(facts(CPU, flat=False).work.batches, 10))
    assert decide(Train(gradient_checkpointing=True), padded).mode == MemoryMode(32)


def test_checkpointing_that_is_forbidden_stays_off(big: Facts) -> None:
    train = Train(gradient_checkpointing=False, fit_micro_batches=False)
    assert decide(train, with_free(big, 20)).mode == MemoryMode()


def test_layers_are_compiled_where_the_run_is_long(big: Facts) -> None:
    long, short = decide(Train(), big), decide(Train(), replace(big, work=Work(big.work.batches, 2)))
    assert long.compile_layers
    assert not short.compile_layers
    assert decide(Train(compile=True), replace(big, work=Work(big.work.batches, 2))).compile_layers
    assert not decide(Train(compile=False), big).compile_layers
    assert not decide(Train(), facts(CPU)).compile_layers


def test_steps_are_captured_wherever_they_can_be(big: Facts) -> None:
    assert decide(Train(), big).cuda_graphs
    assert not decide(Train(cuda_graphs=False), big).cuda_graphs
    assert not decide(Train(optim="sgd"), big).cuda_graphs
    assert decide(Train(optim="adamw_8bit"), big).cuda_graphs
    assert decide(Train(optim="paged_adamw_8bit"), big).cuda_graphs
    assert decide(Train(gradient_checkpointing=True), big).cuda_graphs
    assert not decide(Train(gradient_checkpointing=True, activation_offload=True), big).cuda_graphs
    assert not decide(Train(tile_mlp=512), big).cuda_graphs
    assert not decide(Train(offload_optimizer=True), big).cuda_graphs
    assert not decide(Train(), facts(CPU)).cuda_graphs
    assert not decide(Train(), facts(gpu(80), base=Base(offload_embedding=True))).cuda_graphs


def test_layers_that_run_again_are_captured_where_their_dropout_is_keyed() -> None:
    """torch's generator cannot be put back in a graph; the masks of grouped LoRA need none."""
    again = Train(gradient_checkpointing=True)
    for method, keyed in (
        (Lora(r=16, lora_dropout=0.1), True), (Lora(r=16, lora_dropout=0.1, use_dora=True), False),
        (Lora(r=16, use_dora=True), True),
    ):  # fmt: skip
        known = facts(gpu(80), method=method)
        assert known.model.draws is not keyed
        assert decide(Train(), known).cuda_graphs
        assert decide(again, known).cuda_graphs is keyed


def test_moments_are_paged_only_when_nothing_else_fits() -> None:
    known = facts(gpu(300), method=Full(), base=Base(compute="bf16"))
    paged = Train(optim="paged_adamw_8bit")
    roomy, tight = decide(paged, known), decide(paged, with_free(known, 76))
    assert not roomy.page_optimizer
    assert roomy.cuda_graphs
    assert roomy.memory["optimiser"] > 2 * known.model.trainable
    assert tight.page_optimizer
    assert not tight.cuda_graphs
    assert tight.memory["optimiser"] == 0
    assert not decide(paged, with_free(known, 100)).page_optimizer


def test_fp8_bytes_are_kept_in_both_orders_where_they_are_small(big: Facts) -> None:
    held = big.model.frozen_bytes / GIB
    assert decide(Train(), with_free(big, 6.1 * held)).keep_transposed
    assert not decide(Train(), with_free(big, 5.9 * held)).keep_transposed
    assert not decide(Train(), facts(CPU)).keep_transposed
    fixed = facts(gpu(80), base=Base(keep_transposed=False))
    assert not decide(Train(), with_free(fixed, 1000)).keep_transposed
    nf4 = facts(gpu(1000), base=Base(storage="nf4", compute="bf16"))
    assert not decide(Train(), nf4).keep_transposed
    least = facts(gpu(1000), base=Base(offload_head=True))
    assert not decide(Train(), least).keep_transposed
    twice = decide(Train(), with_free(big, 6.1 * held)).memory["frozen weights"]
    assert twice == decide(Train(), with_free(big, 5.9 * held)).memory["frozen weights"] + big.model.fp8_bytes


def test_the_optimiser_goes_to_the_host_only_when_nothing_else_fits() -> None:
    """Full training of 8B: 128 GB of weights, gradients and moments in fp32."""
    known = facts(gpu(300), method=Full(), base=Base(compute="bf16"))
    roomy, tight = decide(Train(), known), decide(Train(), with_free(known, 100))
    assert not roomy.offload_optimizer
    assert tight.offload_optimizer
    assert tight.short_weights
    assert tight.memory["optimiser"] == 0
    assert tight.memory["trained weights"] == roomy.memory["trained weights"] - 2 * known.model.short_numbers
    assert tight.memory["gradients"] == 8 * 128256 * 4096
    assert tight.host_bytes >= 16 * known.model.trainable
    with pytest.raises(UserError, match="do not fit"):
        decide(Train(offload_optimizer=False), with_free(known, 100))
    assert not decide(Train(optim="adafactor"), known).offload_optimizer


def test_one_form_where_the_memory_of_two_is_not_there() -> None:
    """Sixteen rows of unequal length are wanted in two forms; what they keep fits once, or twice."""
    known = facts(gpu(80), base=Base(keep_transposed=False), lengths=(256,) * 8 + (2048,) * 8, cut=Cut(1, 1), steps=16)
    train = Train(compile=True, fit_micro_batches=False)
    fixed = sum(v for k, v in decide(train, known).memory.items() if k != "activations") + SLACK_BYTES
    once = 1.15 * 1.6 * activation_bytes(known.model.shape, 2048, MemoryMode())
    counts = [len(decide(train, with_free(known, (fixed + share * once) / GIB)).cut.forms) for share in (1.5, 2.5)]
    assert counts == [1, MAX_COMPILED_FORMS]
    assert len(decide(Train(compile=False), known).cut.forms) <= MAX_FORMS


def test_a_cpu_keeps_everything_and_fills_to_a_multiple() -> None:
    known = facts(CPU, cut=Cut(2, 4))
    layout = decide(Train(), known)
    assert (layout.cut.size, layout.cut.accumulate, layout.cut.forms) == (2, 4, ())
    assert layout.cut.multiple > 1
    assert layout.mode == MemoryMode()
    assert layout.group_lora
    assert not decide(Train(optim="adafactor"), known).group_lora
    padded = decide(Train(), facts(CPU, flat=False))
    assert padded.cut.multiple == 1


def test_a_step_is_never_cut_below_what_a_large_model_needs() -> None:
    batches = facts(CPU, cut=Cut(8, 1)).work.batches
    for room, expected in ((1 << 20, (8, 1)), (8192, (4, 2)), (16384, (8, 1)), (4096, (2, 4)), (2048, (8, 1))):
        cut = batches.fewest(lambda one, room=room: one.largest_tokens(2) <= room, 2, least_tokens=LEAST_TOKENS).cut
        assert (cut.size, cut.accumulate) == expected


def test_memory_is_the_sum_of_what_is_planned(big: Facts) -> None:
    layout: Layout = decide(Train(), big)
    assert layout.peak_bytes == sum(layout.memory.values())
    assert layout.memory["optimiser"] == 8 * big.model.trainable
    assert decide(Train(optim="adamw_8bit"), big).memory["optimiser"] == int(2.04 * big.model.trainable)
    least = memory.activations(big, replace(layout, mode=MemoryMode(31), compile_layers=True, lean=True))
    assert least < layout.memory["activations"]


def test_passes_are_joined_under_checkpointing_up_to_a_few_tokens() -> None:
    """A pass of few tokens leaves the GPU waiting; who asks for checkpointing still gets a small peak."""
    known = facts(gpu(80), lengths=(192,) * 64, cut=Cut(4, 4))
    again = decide(Train(gradient_checkpointing=True), known)
    assert (again.cut.size, again.cut.accumulate) == (16, 1)
    assert again.mode.checkpointed_layers == 31
    long = decide(Train(gradient_checkpointing=True), facts(gpu(80), cut=Cut(4, 4)))
    assert (long.cut.size, long.cut.accumulate, long.tokens) == (4, 4, 8192)
    for more in (Train(gradient_checkpointing=True, activation_offload=True), Train(tile_mlp=64)):
        assert decide(more, known).cut.accumulate == 4
    assert decide(Train(gradient_checkpointing=True, fit_micro_batches=False), known).cut.accumulate == 4


def test_weights_that_are_unpacked_count_where_they_outweigh_the_gradients() -> None:
    """On an H200 the 70B in nf4 took 385 KB a token above what its layers keep with 2,048 tokens, and 73 KB the 8B with
    4,096: the first is the dense weight of gate and up, the second the gradients of both."""
    nf4 = Base(storage="nf4", compute="bf16")
    known = facts(gpu(80), base=nf4)
    shape = replace(known.model.shape, hidden=8192, intermediate=28672, layers=80)
    layout = Layout(flat=True, padded_task=False, cut=Cut(1, 1), tokens=2048, compile_layers=True)
    assert shape.working_bytes == 2 * (2 * 8192 + 2 * 28672)
    weights = 2 * 2 * 28672 * 8192
    packed = replace(known, model=replace(known.model, shape=shape))
    dense = replace(packed, placement=replace(packed.placement, storage="bf16"))
    more = memory.activations(packed, layout) - memory.activations(dense, layout)
    assert more == weights - 2048 * 2 * (28672 + 8192) - 2048 * shape.working_bytes
    many = replace(layout, tokens=16384)
    assert memory.activations(packed, many) == memory.activations(dense, many)
    in_fp8 = replace(packed, placement=replace(packed.placement, storage="fp8", fp8=True))
    assert memory.rebuilt_bytes(in_fp8, layout) == weights // 2
    assert memory.rebuilt_bytes(in_fp8, replace(layout, keep_transposed=True)) == 0


def test_gradients_come_while_activations_go_in_a_model_that_is_trained_whole() -> None:
    """On an H200 the whole 3B with 8-bit moments and 4,096 tokens took 31.7 GiB where all at once would be 38."""
    known = facts(gpu(300), method=Full(), base=Base(compute="bf16"), lengths=(2048,) * 2, cut=Cut(2, 1))
    one, model = decide(Train(), known), known.model
    together = one.memory["activations"] + one.memory["gradients"]
    assert together < memory.activations(known, one) + 4 * model.trainable
    assert one.memory["gradients"] in (4 * model.head_numbers, 4 * model.trainable)
    several = memory.of_passes(known, replace(one, cut=Cut(1, 2)))
    assert several["gradients"] == 4 * model.trainable, "those of the first pass wait while the second one runs"
    many = memory.of_passes(known, replace(one, tokens=200_000))
    assert many["gradients"] == 4 * model.head_numbers
    few = memory.of_passes(known, replace(one, tokens=64))
    assert (few["gradients"], few["logits"]) == (4 * model.trainable, 0)


def test_what_is_left_free_is_a_share_of_a_small_card() -> None:
    assert slack_bytes(8 * GIB) == GIB
    assert slack_bytes(24 * GIB) == slack_bytes(80 * GIB) == SLACK_BYTES
    for peak in (GIB, 7 * GIB, 13 * GIB, 14 * GIB, 40 * GIB):
        needed_bytes = free_needed(peak)
        assert peak + slack_bytes(needed_bytes) <= needed_bytes
        assert peak + slack_bytes(needed_bytes - 64) > needed_bytes - 64
