"""A session sets a model up once, answers each state of it as that state does, and leaves it as it found it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tasks
import tiny
import torch
from test_generate import FIXED, LENGTHS, LOOSE, build, draw, expected, loop_of

from whet.base.errors import UserError
from whet.engine.answer import decode, generate, state
from whet.engine.answer.encoder_decoder import EncoderDecoderSession
from whet.engine.answer.generate import DecoderSession, DecodingOptions
from whet.engine.answer.logits import LabelSession
from whet.engine.answer.session import session
from whet.engine.answer.state import Session
from whet.engine.compute.cached_attention import CACHED_ATTENTION
from whet.engine.load.open import open_trained
from whet.engine.weights import unpacked
from whet.engine.weights.linear import FrozenLinear, freeze_linears
from whet.methods.layers.lora_layer import LoraLinear

NEW = 12


def ask(asked: DecoderSession, prompts: list[list[int]], new_tokens: int = NEW, **more: Any) -> list[list[int]]:
    return asked.answer(prompts, **{"stop_ids": (), "batch_size": 3, "max_new_tokens": new_tokens} | more)


def adapted(model: Any) -> Any:
    """PEFT's model around `model`, with an adapter that changes its answers."""
    import peft

    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    lora._register_custom_module({torch.nn.Linear: LoraLinear, FrozenLinear: LoraLinear})
    wrapped = peft.PeftModelForCausalLM(model, lora).eval()
    tiny.randomise_adapter(model)
    return wrapped


def frozen(model: Any) -> list[FrozenLinear]:
    return [module for module in model.modules() if isinstance(module, FrozenLinear)]


# what is put back


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(failing: bool) -> None:
    model, prompts = build("llama"), draw(LENGTHS)
    freeze_linears(model, "nf4")
    model.train()
    model.model.layers[1].eval()
    before = dict(model.named_modules())
    modes = {name: module.training for name, module in before.items()}
    inside = None
    with contextlib.suppress(ZeroDivisionError), DecoderSession(model, options=DecodingOptions(dense=True)) as asked:
        ask(asked, prompts)
        inside = model.config._attn_implementation, frozen(model), model.training
        if failing:
            raise ZeroDivisionError
    assert inside == (CACHED_ATTENTION, [], False)
    assert dict(model.named_modules()) == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config._attn_implementation == "sdpa"
    assert (asked._decoder, asked._packed) == (None, []), "their memory is given back"
    with pytest.raises(RuntimeError, match="let go"):
        ask(asked, prompts)


def test_a_model_that_cannot_be_set_up_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").train()

    def broken(*_: Any) -> str:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(generate, "find_fault", broken)
    with DecoderSession(model) as asked:
        with pytest.raises(UserError, match="does not fit"):
            ask(asked, draw(LENGTHS))
        assert model.training, "at once, not only at the end of the session"
        assert model.config._attn_implementation == "sdpa"


# what stays


def test_questions_share_what_was_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, proofs = build("qwen3"), draw(LENGTHS), []
    freeze_linears(model, "int8")
    exact = expected(model, prompts, NEW)
    prove = generate.find_fault
    monkeypatch.setattr(generate, "find_fault", lambda *given: proofs.append(1) or prove(*given))
    with DecoderSession(model, options=DecodingOptions(dense=True)) as asked:
        for _ in range(2):
            assert ask(asked, prompts) == exact
            assert asked.stream(prompts[0], stop_ids=(), max_new_tokens=NEW) == exact[0]
        assert len(proofs) == 1
        model.train()  # somebody changes the model: it is set up again
        assert ask(asked, prompts) == exact
        assert len(proofs) == 2
    assert list(asked.notices) == []


def test_a_loop_of_fixed_shape_serves_as_long_as_it_fits() -> None:
    model, prompts = build("llama"), draw(LENGTHS)
    exact = expected(model, prompts, NEW)
    with DecoderSession(model, options=FIXED) as asked:
        loops = []
        for new_tokens, stop_ids, size in ((NEW, (), 3), (5, (), 3), (NEW, (), 3), (NEW, (7,), 3), (NEW, (7,), 2)):
            found = ask(asked, prompts, new_tokens, stop_ids=stop_ids, batch_size=size)
            assert found == [row[: (row[:new_tokens].index(7) if 7 in row[:new_tokens] and stop_ids else new_tokens)]
                             for row in exact]  # fmt: skip
            assert asked._decoder is not None
            loops.append(asked._decoder.loop)
        assert loops[0] is loops[1] is loops[2]
        assert len({id(loop) for loop in loops[2:]}) == 3
        ask(asked, [[5] * 140], 3, batch_size=3)
        assert asked._decoder.loop is not loops[-1]
    with DecoderSession(model, options=LOOSE) as asked:
        assert ask(asked, prompts) == ask(asked, prompts) == exact
        assert asked._decoder is not None
        assert asked._decoder.loop is None, "a loop that drops rows serves once"


def test_dense_copies_make_way_for_longer_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build("llama"), draw(LENGTHS)
    freeze_linears(model, "nf4")
    exact = expected(model, prompts, NEW)
    free = {"bytes": 1 << 40}
    monkeypatch.setattr(unpacked, "free_bytes", lambda _: free["bytes"])
    monkeypatch.setattr(generate, "free_bytes", lambda _: free["bytes"])
    with DecoderSession(model) as asked:
        assert ask(asked, prompts) == exact
        assert not frozen(model)
        free["bytes"] = 1 << 16  # enough for one short prompt
        assert asked.stream(prompts[0], stop_ids=(), max_new_tokens=2) == exact[0][:2]
        assert not frozen(model)
        assert ask(asked, prompts) == exact
        assert frozen(model)


# states


class StandInGraph:
    """What a captured graph does: it goes on with the model as it was when it was captured."""

    def __init__(self, loop: decode.DecodingLoop) -> None:
        self.loop, self.captured = loop, copy.deepcopy(loop.model)

    def replay(self) -> None:
        live, self.loop.model = self.loop.model, self.captured
        self.loop.step()
        self.loop.model = live


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured on the CPU, too, and kept for the next question."""
    monkeypatch.setattr(decode.DecodingLoop, "can_capture", lambda _: True)
    monkeypatch.setattr(decode.DecodingLoop, "capture", lambda loop: setattr(loop, "graph", StandInGraph(loop)))
    monkeypatch.setattr(decode, "CHECK_EVERY", 1)


def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a switched model is not noticed."""
    monkeypatch.setattr(state, "state_of", lambda _: [])


def not_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: what was set up in one state is still there in the next."""

    @contextlib.contextmanager
    def careless(self: Session, change: Any) -> Iterator[None]:
        with change:
            yield

    monkeypatch.setattr(Session, "state", careless)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_a_graph_of_another_state_never_answers(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build("llama"), draw(LENGTHS)
    if storage != "fp32":
        freeze_linears(model, storage)
    plain = expected(model, prompts, NEW)
    wrapped = adapted(model)
    tuned = expected(model, prompts, NEW)
    assert plain != tuned
    options = DecodingOptions(static=True, graphed=True)

    def answers(behind: bool) -> list[list[list[int]]]:
        """Tuned, base, tuned; behind: the switch is not made through the session."""
        found = []
        with DecoderSession(model, wrapped.disable_adapter, options) as asked:
            found.append(ask(asked, prompts))
            assert asked._decoder is not None
            assert asked._decoder.loop is not None
            assert asked._decoder.loop.graph is not None
            with wrapped.disable_adapter() if behind else asked.base():
                found.append(ask(asked, prompts))
            found.append(ask(asked, prompts))
        return found

    assert answers(behind=False) == answers(behind=True) == [tuned, plain, tuned]
    unguarded(monkeypatch)
    assert answers(behind=False) == [tuned, plain, tuned], "released, so that nothing has to be noticed"
    assert answers(behind=True)[1] != plain, "the planted fault"
    not_released(monkeypatch)
    assert answers(behind=False)[1] != plain, "the planted fault"


@pytest.mark.parametrize("storage", ["nf4", "fp8", "int8"])
def test_a_dense_copy_of_another_state_never_answers(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that writes to the quantised layers themselves."""
    model, prompts = build("llama"), draw(LENGTHS)
    freeze_linears(model, storage)
    layers = frozen(model)

    @contextlib.contextmanager
    def other_weights() -> Iterator[None]:
        held = [{name: p.detach().clone() for name, p in layer.named_parameters()} for layer in layers]
        with torch.no_grad():
            for layer in layers:
                for name, parameter in layer.named_parameters():
                    if name in ("absmax", "scale"):
                        parameter.copy_(parameter.flip(0))
        try:
            yield
        finally:
            with torch.no_grad():
                for layer, values in zip(layers, held, strict=True):
                    for name, parameter in layer.named_parameters():
                        parameter.copy_(values[name])

    first = expected(model, prompts, NEW)
    with other_weights():
        second = expected(model, prompts, NEW)
    assert first != second

    def answers(behind: bool) -> list[list[list[int]]]:
        with DecoderSession(model, options=DecodingOptions(dense=True)) as asked:
            found = [ask(asked, prompts)]
            with other_weights() if behind else asked.state(other_weights()):
                found.append(ask(asked, prompts))
            return [*found, ask(asked, prompts)]

    assert answers(behind=False) == answers(behind=True) == [first, second, first]
    unguarded(monkeypatch)
    assert answers(behind=False) == [first, second, first]
    assert answers(behind=True)[1] == first, "the planted fault"
    not_released(monkeypatch)
    assert answers(behind=False)[1] == first, "the planted fault"


def test_each_state_is_proven_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached decoding that is right without the adapter and wrong with it is trusted without it alone."""
    model, prompts = build("llama"), draw(LENGTHS)
    plain = expected(model, prompts, NEW)
    wrapped = adapted(model)
    tuned = expected(model, prompts, NEW)
    padded = decode.padded

    def blind_with_adapter(*given: Any) -> Any:
        ids, real = padded(*given)
        on = not any(isinstance(module, LoraLinear) and module.disable_adapters for module in model.modules())
        return ids, torch.ones_like(real) if on else real

    monkeypatch.setattr(decode, "padded", blind_with_adapter)
    with DecoderSession(model, wrapped.disable_adapter) as asked:
        with asked.base():
            assert ask(asked, prompts) == plain
            assert asked._decoder is not None
        assert list(asked.notices) == []
        assert ask(asked, prompts) == tuned
        assert asked._decoder is None
        assert [text.partition(":")[0] for text in asked.notices] == ["answers come from transformers' generate"]
        assert len(asked.notices.take()) == 1
        assert asked.notices.take() == [], "each is told once"


def test_a_session_without_a_way_to_the_base_says_so() -> None:
    with DecoderSession(build("llama")) as asked, pytest.raises(RuntimeError, match="nothing can be switched off"):
        asked.base()


# other kinds of models


def test_an_encoder_decoder_and_a_head_for_labels_have_sessions_too(tmp_path: Path) -> None:
    rows = tasks.token_rows(5)
    for kind, task, session_kind in (("t5", "seq2seq", EncoderDecoderSession), ("bert", "regression", LabelSession)):
        (tmp_path / kind).mkdir()
        run = tasks.make_run(kind, task, tasks.save_model(kind, tmp_path / f"{kind}-model"), tmp_path / kind)
        opened = open_trained(run.recipe.model, run.recipe.base, run.trained, run.recipe.method, run.task)
        opened.answering.train()
        with session(opened) as asked:
            assert type(asked) is session_kind
            found = []
            for change in (contextlib.nullcontext, asked.base, contextlib.nullcontext):
                with change():
                    found.append(
                        asked.logits(rows, batch_size=2) if isinstance(asked, LabelSession)
                        else asked.answer(rows, max_new_tokens=6, batch_size=2)  # type: ignore[call-arg]
                    )  # fmt: skip
            assert np.array_equal(found[0], found[2]) if kind == "bert" else found[0] == found[2]
            assert not np.array_equal(found[0], found[1]) if kind == "bert" else found[0] != found[1]
            assert not opened.answering.training
        assert opened.answering.training


# the seam for sampling


def test_another_choice_of_tokens_is_one_function() -> None:
    model, prompts = build("llama"), draw((6, 9))

    def second(logits: torch.Tensor) -> torch.Tensor:
        return logits.topk(2).indices[:, 1]

    with torch.inference_mode(), generate.use_cached_attention(model):
        found = loop_of(model, 2, 64, 4, graphed=False, choose=second).run(prompts, 4)
    for prompt, reply in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2).indices[1]))
        assert reply == ids[len(prompt) :]
