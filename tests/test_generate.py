"""Our decoding loop gives token for token what transformers' own greedy generation gives, for every kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from whet.base.errors import UserError
from whet.engine.answer import decode
from whet.engine.answer.generate import DecoderSession, DecodingOptions, use_cached_attention
from whet.engine.answer.proof import find_fault
from whet.engine.answer.rows import Rows, StopRule
from whet.engine.answer.static_cache import StaticCache, attention_layout
from whet.engine.compute import cached_attention, proven_attention
from whet.engine.config import Model
from whet.engine.device import Placement
from whet.engine.load.load import load_model
from whet.engine.weights import unpacked
from whet.engine.weights.linear import FrozenLinear, freeze_linears
from whet.methods.layers.lora_layer import LoraLinear

VOCABULARY, NEW = 512, 24
LOOSE, FIXED = DecodingOptions(static=True, graphed=False), DecodingOptions(static=True, graphed=True)
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
    "initializer_range": 0.25, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LENGTHS = (3, 31, 12, 1, 20)
KINDS = ("llama", "qwen3", "gemma2", "gpt2", "mistral")


def config(kind: str) -> Any:
    import transformers as hf

    if kind == "gpt2":
        return hf.GPT2Config(
            vocab_size=VOCABULARY, n_positions=256, n_embd=64, n_layer=3, n_head=4, initializer_range=0.25,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
    if kind == "gemma2":
        own = {"sliding_window": 8, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 32}
        return hf.Gemma2Config(**SIZES, **own, tie_word_embeddings=False)  # tied, it repeats the last token for ever
    if kind == "mistral":
        return hf.MistralConfig(**SIZES, sliding_window=8)
    return hf.Qwen3Config(**SIZES) if kind == "qwen3" else hf.LlamaConfig(**SIZES)


def build(kind: str, seed: int = 0) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(kind), dtype=torch.float32).eval()


def draw(lengths: Sequence[int], vocabulary: int = VOCABULARY) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def expected(model: Any, prompts: list[list[int]], new_tokens: int = NEW, stop_ids: Sequence[int] = ()) -> list[Any]:
    """transformers' own greedy generation of one prompt at a time, so unpadded; eager where sdpa drops scores."""
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if capped else "sdpa")
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
            eos_token_id=list(stop_ids) or None, pad_token_id=0,
        )  # fmt: skip
        row = output[0, len(prompt) :].tolist()
        found.append(row[:-1] if row and row[-1] in stop_ids else row)
    model.set_attn_implementation(before)
    return found


def ours(
    model: Any, prompts: list[list[int]], new_tokens: int = NEW, options: DecodingOptions = LOOSE,
    notices: list[str] | None = None, **more: Any,
) -> list[list[int]]:  # fmt: skip
    """Answers in a session of their own; its notices are added to `notices`."""
    given: dict[str, Any] = {"stop_ids": (), "batch_size": 3}
    with DecoderSession(model, options=options) as session:
        found = session.answer(prompts, max_new_tokens=new_tokens, **(given | more))
    if notices is not None:
        notices += session.notices.take()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_is_transformers_greedy_generation(kind: str) -> None:
    model, prompts = build(kind), draw(LENGTHS)
    exact = expected(model, prompts)
    assert len({token for row in exact for token in row}) > 20, "the reference says nothing"
    with use_cached_attention(model):
        assert find_fault(model, attention_layout(model)) == ""
    for options in (LOOSE, FIXED, DecodingOptions(), DecodingOptions(static=False)):
        assert ours(model, prompts, options=options) == exact, options
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("options", [LOOSE, FIXED])
def test_the_built_in_model(options: DecodingOptions) -> None:
    placement = Placement(torch.device("cpu"), "fp32", torch.float32, False, {})
    model = load_model(Model(path="builtin:tiny"), placement)
    prompts = draw((40, 9, 17), 16384)
    assert ours(model, prompts, 12, options=options, stop_ids=[2]) == expected(model, prompts, 12, stop_ids=[2])


@pytest.mark.parametrize("options", [LOOSE, FIXED])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_rows_stop_at_different_times(kind: str, options: DecodingOptions) -> None:
    model, prompts = build(kind), draw(LENGTHS)
    free = expected(model, prompts)
    stop_ids = [free[0][2], free[1][9], free[2][0], free[3][16]]
    exact = expected(model, prompts, stop_ids=stop_ids)
    assert len({len(row) for row in exact}) >= 4
    assert exact[2] == []
    assert ours(model, prompts, stop_ids=stop_ids, batch_size=5, options=options) == exact


@pytest.mark.parametrize("options", [LOOSE, FIXED, DecodingOptions(static=False)])
@pytest.mark.parametrize("new_tokens", [0, 1, 2, 9])
def test_few_tokens_and_one_prompt(new_tokens: int, options: DecodingOptions) -> None:
    model, prompts = build("qwen3"), draw(LENGTHS)
    exact = [row[:new_tokens] for row in expected(model, prompts, 9)]
    assert ours(model, prompts, new_tokens, options=options) == exact
    assert ours(model, prompts[1:2], new_tokens, options=options) == exact[1:2]
    assert ours(model, [], new_tokens, options=options) == []


@pytest.mark.parametrize("options", [LOOSE, FIXED])
def test_an_answer_may_fill_the_models_last_position(options: DecodingOptions) -> None:
    model = build("gpt2")
    prompts = draw((240, 12))
    stop_ids = [expected(model, prompts, 5)[0][4]]
    assert ours(model, prompts, 16, options=options) == expected(model, prompts, 16)
    longer = ours(
        model, prompts, 60, stop_ids=stop_ids, options=options
    )  # past the last position, had the row not stopped
    assert longer == expected(model, prompts, 60, stop_ids=stop_ids)


def test_order_and_progress() -> None:
    model, prompts, advanced = build("llama"), draw(LENGTHS), []
    assert ours(model, prompts, 4, done=advanced.append) == expected(model, prompts, 4)
    assert advanced == [3, 2]


def test_out_of_memory_halves_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, advanced = build("llama"), draw(LENGTHS), []
    fill = decode.DecodingLoop.fill

    def small_memory(loop: decode.DecodingLoop, group: list[list[int]]) -> torch.Tensor:
        if len(loop.rows) > 2:
            raise torch.OutOfMemoryError
        return fill(loop, group)

    monkeypatch.setattr(decode.DecodingLoop, "fill", small_memory)
    for options in (LOOSE, FIXED):
        notices: list[str] = []
        found = ours(model, prompts, 4, done=advanced.append, batch_size=5, options=options, notices=notices)
        assert found == expected(model, prompts, 4)
        assert notices == [f"out of memory: answering {size} prompts together" for size in (3, 2)]
    assert advanced == [2, 2, 1] * 2
    too_large: Any = SimpleNamespace(rows=range(3))
    monkeypatch.setattr(decode.DecodingLoop, "fill", lambda *_: small_memory(too_large, []))
    with pytest.raises(UserError, match="31 tokens"):
        ours(model, prompts, 4)


@pytest.mark.parametrize("storage", ["fp32", "nf4", "fp8", "int8"])
@pytest.mark.parametrize("dense", [True, False])
def test_with_an_adapter_and_without_it(storage: str, dense: bool) -> None:
    import peft

    model, prompts = build("llama"), draw(LENGTHS)
    plain = expected(model, prompts, 10)
    if storage != "fp32":
        freeze_linears(model, storage)
        plain, before = expected(model, prompts, 10), plain
        assert plain != before, "the storage changes nothing"
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    lora._register_custom_module({torch.nn.Linear: LoraLinear, FrozenLinear: LoraLinear})
    wrapped = peft.PeftModelForCausalLM(model, lora).eval()
    tiny.randomise_adapter(model)
    tuned = expected(model, prompts, 10)
    assert tuned != plain
    for graphed in (False, True):
        options = DecodingOptions(static=True, graphed=graphed, dense=dense)
        assert ours(model, prompts, 10, options=options) == tuned
        with wrapped.disable_adapter():
            assert ours(model, prompts, 10, options=options) == plain


def test_dense_copies_last_as_long_as_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    count = freeze_linears(model, "nf4", double_quant=False)
    before = dict(model.named_modules())

    def packed() -> int:
        return sum(isinstance(module, FrozenLinear) for module in model.modules())

    def fail_inside() -> None:
        with unpacked.unpacked(model, True) as swapped:
            assert swapped
            assert packed() == 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert packed() == count
    assert dict(model.named_modules()) == before
    dense = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, FrozenLinear)) * 4
    for room, wanted in ((1.1, False), (1.3, True)):
        monkeypatch.setattr(unpacked, "free_bytes", lambda _, room=room: int(room * dense))
        with unpacked.unpacked(model) as swapped:
            assert swapped == wanted
        with unpacked.unpacked(model, None, dense) as swapped:
            assert not swapped


def test_streaming_hands_over_each_token() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.got, self.ended = [], False

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.tolist())

        def end(self) -> None:
            self.ended = True

    model, prompts = build("qwen3"), draw((7,))
    free = expected(model, prompts)[0]
    for options in (LOOSE, FIXED, DecodingOptions(), DecodingOptions(static=False)):
        streamer = Streamer()
        with DecoderSession(model, options=options) as session:
            found = session.stream(prompts[0], stop_ids=[free[11]], max_new_tokens=NEW, streamer=streamer)
        assert found == expected(model, prompts, stop_ids=[free[11]])[0]
        assert streamer.got == [prompts, *([token] for token in [*found, free[11]])]
        assert streamer.ended
    with DecoderSession(model) as session:
        assert session.stream(prompts[0], stop_ids=[], max_new_tokens=3) == free[:3]
        assert session.stream(prompts[0], stop_ids=[], max_new_tokens=0) == []


def blind(prompts: Any, rows: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, real = decode_padded(prompts, rows, pad)
    return ids, torch.ones_like(real)


decode_padded = decode.padded


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_mask_that_ignores_the_padding_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, notices = build(kind), draw(LENGTHS), []
    monkeypatch.setattr(decode, "padded", blind)
    assert ours(model, prompts) != expected(model, prompts)
    usual = DecodingOptions()
    assert ours(model, prompts, options=usual, notices=notices) == expected(model, prompts)  # transformers answers
    assert len(notices) == 1
    assert notices[0].startswith("answers come from transformers' generate: cached and uncached logits")


def test_a_soft_cap_that_is_ignored_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build("gemma2"), draw(LENGTHS)
    monkeypatch.setattr(proven_attention, "_difference", lambda *given: "")  # it would not be used otherwise
    capped = cached_attention._softcapped
    monkeypatch.setattr(cached_attention, "_softcapped", lambda *given: capped(*given[:-1], 1e9))
    assert ours(model, prompts) != expected(model, prompts)


def test_a_window_that_is_ignored_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build("mistral"), draw(LENGTHS)
    monkeypatch.setattr(StaticCache, "masks", lambda self: self.readable[..., : self.position.reach])
    assert ours(model, prompts) != expected(model, prompts)


@pytest.mark.parametrize("fault", [{"layer_types": ["linear_attention"]}, {"num_kv_shared_layers": 2}])
def test_other_layers_are_left_to_transformers(fault: dict[str, Any]) -> None:
    text = SimpleNamespace(num_hidden_layers=1, sliding_window=None, **fault)
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: text))
    assert attention_layout(model) is None


def loop_of(model: Any, rows: int, length: int, new_tokens: int, **more: Any) -> decode.DecodingLoop:
    layout = attention_layout(model)
    assert layout is not None
    device = model.device
    cache = StaticCache(layout, rows, length, model.get_input_embeddings().weight)
    return decode.DecodingLoop(model, Rows(rows, StopRule((), new_tokens), device), cache, **more)


@pytest.mark.parametrize("broken", [False, True])
def test_capturing_leaves_no_trace(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins for torch.cuda: what warming up and recording write is put back, also when recording fails."""
    from contextlib import nullcontext

    class Stream:
        def wait_stream(self, other: Any) -> None: ...
        def synchronize(self) -> None: ...

    class Graph:
        def capture_begin(self, **_: Any) -> None: ...
        def capture_end(self) -> None:
            if broken:
                raise RuntimeError("not while capturing\nmore")

    stand_ins = {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "stream": lambda _: nullcontext()}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    model, prompts = build("gemma2"), draw(LENGTHS)
    with torch.inference_mode(), use_cached_attention(model):
        loop = loop_of(model, len(prompts), 64, NEW, graphed=True, forward=decode.last_logits)
        loop.accept(loop.fill(prompts))
        loop.capture()
        assert (loop.graph is None, loop.graphed) == (broken, not broken)
        for _ in range(NEW - 1):
            loop.step()
    assert loop.rows.answers.tolist() == expected(model, prompts)
    failures = [f"decoding without {what}: RuntimeError: not while capturing"
                for what in ("torch.compile", "a CUDA graph")]  # fmt: skip
    assert list(loop.notices) == (failures if broken else [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_the_captured_step_gives_the_same(kind: str, compiled: bool) -> None:
    model, prompts = build(kind).to("cuda"), draw((*LENGTHS, 150))
    free = expected(model, prompts, 40)
    stop_ids = [free[0][2], free[1][9], free[2][0]]
    exact = expected(model, prompts, 40, stop_ids)
    with DecoderSession(model, options=DecodingOptions(static=True, compiled=compiled)) as session:
        for _ in range(2):  # the second time by the graph that is there
            assert session.answer(prompts, stop_ids=(), max_new_tokens=40, batch_size=3) == free
        assert session.answer(prompts, stop_ids=stop_ids, max_new_tokens=40, batch_size=3) == exact
    assert list(session.notices) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("storage", ["nf4", "fp8", "int8"])
def test_on_a_gpu_quantised_layers_may_be_captured(storage: str) -> None:
    model, prompts, notices = build("qwen3").to("cuda"), draw(LENGTHS), []
    freeze_linears(model, storage)
    exact = expected(model, prompts)
    for dense in (True, False):
        assert ours(model, prompts, options=DecodingOptions(dense=dense), notices=notices) == exact
    assert notices == []


def test_an_empty_prompt_is_refused_by_its_number(model_dir: Path) -> None:
    network = load_model(Model(path=str(model_dir)), Placement(torch.device("cpu"), "fp32", torch.float32, False, {}))
    with pytest.raises(UserError, match="prompt 2 of 3 has no tokens"):
        ours(network, [[5, 6], [], [7]], 3, stop_ids=[2], batch_size=2)
