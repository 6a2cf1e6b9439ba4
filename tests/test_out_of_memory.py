"""Memory that runs out: the policy in its parts, and a sample of the faults of out_of_memory/proof.py.

`make memory-faults` tries more of them, or all.
"""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from out_of_memory.proof import COMMANDS, STAYS, Failing, Proof, prove
from sampled import sampled
from test_generate import LENGTHS, build, draw, expected

from whet import cli
from whet.base.errors import UserError
from whet.base.out_of_memory import memory_fault, ran_out
from whet.engine.answer import encoder_decoder, losses
from whet.engine.answer.batches import Scarce, in_batches
from whet.engine.answer.generate import DecoderSession
from whet.engine.answer.losses import LossSession, Scored
from whet.engine.memory import scarce
from whet.opening import base_anew
from whet.recipe import Parsed
from whet.runs import Run
from whet.ship import merge as merging
from whet.ship.chat import open_chat
from whet.ship.talk import talk
from whet.training import launch
from whet.training.launch import Launcher
from whet.training.run import train

Make = Callable[..., Parsed]
OFTEN = [("train", "first step"), ("train", "evaluation"), ("train", "save"), ("chat", "generate")]
PHASES = [(name, part) for name, (_, parts) in COMMANDS.items() for part in parts]


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return Proof(tmp_path_factory.mktemp("memory") / "proof")


@pytest.mark.parametrize(("name", "part"), sampled(PHASES, OFTEN))
def test_a_fault_is_recovered_from_or_ends_in_one_clear_error(name: str, part: str, proof: Proof) -> None:
    often = (name, part) in OFTEN
    passed, tried = prove(proof, name, part, 1 if often else 8)
    assert passed == tried > 0


def test_what_a_fault_changes_is_what_a_recipe_can_ask_for(recipe: Make) -> None:
    """A fault in the first step, with dropout: the losses are to the bit those of a run with the final layout."""
    settings: dict[str, Any] = {"train__max_steps": 4, "data__val_size": 0, "method__lora_dropout": 0.1}
    plain = {"train__per_device_train_batch_size": 3, "train__gradient_accumulation_steps": 2}
    expected = train(recipe("plain", **settings, **plain))
    with fails_in_the_first_step(100):
        found = train(recipe("cut", **settings, train__per_device_train_batch_size=6))
    assert (found.read("layout.json") or {})["cut"]["size"] == 3
    assert found.metrics.read_bytes() == expected.metrics.read_bytes()


def test_random_numbers_that_are_not_put_back_would_be_seen(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA's dropout asks torch's generator, which the failed step has moved on; that of plain LoRA is keyed."""
    settings: dict[str, Any] = {
        "train__max_steps": 4, "data__val_size": 0, "method__lora_dropout": 0.1, "method__use_dora": True,
    }  # fmt: skip
    plain = {"train__per_device_train_batch_size": 3, "train__gradient_accumulation_steps": 2}
    expected = train(recipe("plain", **settings, **plain)).metrics.read_bytes()
    for name in ("cut", "careless"):
        with fails_in_the_first_step(200), monkeypatch.context() as patch:
            if name == "careless":
                patch.setattr(launch, "put_back", lambda *_: None)
            found = train(recipe(name, **settings, train__per_device_train_batch_size=6))
        assert (found.read("layout.json") or {})["cut"]["size"] == 3
        assert (found.metrics.read_bytes() == expected) == (name == "cut")


def test_an_unclear_error_would_be_seen(proof: Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.cli.memory_fault", lambda _: None)
    monkeypatch.setattr("whet.engine.answer.state.ran_out", lambda _: False)
    assert "exit status 1" in str(proof.problem("chat", "generate", 900, STAYS))


class fails_in_the_first_step:
    """Inside, allocation `at` of the first step fails, once."""

    def __init__(self, at: int) -> None:
        self.at, self.patch = at, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        right, calls = Launcher.launch, []

        def launched(launcher: Launcher, index: int) -> Any:
            calls.append(index)
            if len(calls) > 1:
                return right(launcher, index)
            with Failing(self.at):
                return right(launcher, index)

        self.patch.setattr(Launcher, "launch", launched)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


# how it is told


@pytest.mark.parametrize(
    ("error", "told"),
    [(torch.OutOfMemoryError("x"), True), (torch.cuda.OutOfMemoryError("x"), True), (MemoryError(), True),
     (RuntimeError("CUDA error: out of memory"), True), (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
     (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
     (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
     (RuntimeError("a tensor of another shape"), False), (ValueError("out of memory"), False),
     (OSError(errno.ENOSPC, "No space left on device"), False)],
    ids=str,
)  # fmt: skip
def test_it_is_told_from_other_errors(error: Exception, told: bool) -> None:
    assert ran_out(error) is told
    assert (memory_fault(error) is not None) is told


def test_a_command_that_has_nothing_better_to_say_ends_with_one_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise RuntimeError("capture failed") from torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore")

    monkeypatch.setattr("whet.api.doctor", full)
    assert cli.run(["doctor"]) == 2
    said = capsys.readouterr().err
    assert "the command ran out of memory" in said
    assert "Tried 2 GiB." in said
    assert "fix:" in said


def test_what_a_failed_call_held_is_let_go() -> None:
    """An exception keeps its frames, and they their tensors: the second try must not find them there."""
    import weakref

    seen: list[Any] = []

    def work() -> None:
        held = torch.zeros(4)
        seen.append(weakref.ref(held))
        raise torch.OutOfMemoryError("full")

    with pytest.raises(UserError), scarce.refusing(lambda: UserError("full", found=str(seen[0]() is None))):
        work()
    kept = None
    try:
        work()
    except torch.OutOfMemoryError as error:
        kept = error
    assert seen[1]() is not None
    scarce.forget_frames(kept)
    assert seen[1]() is None


@pytest.mark.parametrize("call", range(4))
def test_it_is_never_taken_for_a_fault_of_the_model(
    call: int, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is asked about itself with small inputs, and what it cannot do is no error: but this is."""
    from transformers import AutoModelForCausalLM

    from whet.engine.answer.proof import find_fault, find_generation_fault
    from whet.engine.answer.static_cache import attention_layout
    from whet.engine.compute.probe import sees_padding
    from whet.engine.compute.proven_attention import prove_attention

    network = AutoModelForCausalLM.from_pretrained(str(model_dir))
    questions = [
        lambda: prove_attention(network), lambda: sees_padding(network), lambda: find_generation_fault(network),
        lambda: find_fault(network, attention_layout(network)),
    ]  # fmt: skip
    questions[call]()

    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(network.model.layers[1], "forward", full)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        questions[call]()


# training


def test_graphs_that_are_given_up_leave_no_factor_behind(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that fails between them leaves `grad_scale`, by which the fused AdamW divides."""

    class Graphs:
        pass

    monkeypatch.setattr(launch, "GraphSteps", Graphs)
    optimiser = SimpleNamespace(zero_grad=lambda **_: None, grad_scale=torch.ones(()), found_inf=torch.ones(()))
    made: list[str] = []
    launcher: Any = SimpleNamespace(
        steps=Graphs(), optimiser=optimiser, _first_steps=lambda: made.append("captured"),
        _plain_steps=lambda: made.append("plain"),
    )  # fmt: skip
    assert Launcher.release_graphs(launcher, again=False)
    assert (optimiser.grad_scale, optimiser.found_inf, made) == (None, None, ["plain"])
    assert not Launcher.release_graphs(launcher), "there are none any more"


def test_the_trial_of_the_largest_batch_puts_random_numbers_back_when_it_fails(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "TRIED_ON", ("cpu",))
    draws: list[torch.Tensor] = []
    right = Launcher._try_out

    def tried(self: Launcher, batches: Any) -> None:
        before = torch.get_rng_state()
        if not draws:
            with pytest.raises(torch.OutOfMemoryError), Failing(200):
                right(self, batches)
            draws.append(before)
            assert torch.equal(torch.get_rng_state(), before)
        right(self, batches)

    monkeypatch.setattr(Launcher, "_try_out", tried)
    train(recipe(train__max_steps=8, train__per_device_train_batch_size=1, method__lora_dropout=0.1))
    assert draws


def test_bench_speed_goes_on_and_reports_the_final_layout(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "speed", "builtin:tiny", "--rows", "4", "--length", "32", "--warm", "1", "--steps", "2", "--json"]
    assert cli.run(words) == 0
    plain = json.loads(capsys.readouterr().out)
    with fails_in_the_first_step(60):
        assert cli.run(words) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert "out of memory in step 1" in " ".join(shown.err.split())
    assert found["layout"]["out_of_memory"] == [{"step": 1, "micro_batches": 2}]
    assert found["layout"]["cut"]["accumulate"] == 2
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-4)


# answers


def test_items_are_halved_then_leaner_then_refused() -> None:
    seen: list[Any] = []

    def compute(batch: list[int], size: int) -> list[int]:
        seen.append((len(batch), size))
        if size > 1 or "leaner" not in seen:
            raise torch.OutOfMemoryError
        return [10 * index for index in batch]

    def leaner() -> bool:
        seen.append("leaner")
        return seen.count("leaner") == 1

    policy = Scarce(fewer=seen.append, leaner=leaner, refusal=lambda tokens: UserError("no", found=str(tokens)))
    assert in_batches([3, 9, 5], 3, compute, scarce=policy) == [0, 10, 20]
    assert seen == [(3, 3), 2, (2, 2), 1, (1, 1), "leaner", (1, 1), (1, 1), (1, 1)]
    seen.clear()
    with pytest.raises(UserError, match="no") as refused:
        in_batches([3, 9, 5], 1, lambda *_: compute([0], 2), scarce=policy)
    assert refused.value.found == "9"
    assert seen.count("leaner") == 2


def test_one_prompt_is_answered_without_copies_and_graphs() -> None:
    model, prompts = build("llama"), draw(LENGTHS)
    exact = expected(model, prompts, 4)
    with DecoderSession(model) as asked:
        tried: list[bool] = []
        right = asked._continuations

        def first_fails(*args: Any) -> Any:
            tried.append(asked._frugal)
            if not asked._frugal:
                raise torch.OutOfMemoryError
            return right(*args)

        asked._continuations = first_fails  # type: ignore[method-assign]
        assert asked.answer(prompts, stop_ids=(), max_new_tokens=4, batch_size=2) == exact
        assert tried == [False, False, True, True, True, True, True]
        assert asked._decoder is not None
        assert not asked._decoder.graphed
    assert any("without dense copies" in text for text in asked.notices)


def test_a_loss_is_the_same_in_smaller_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    rows = [Scored(np.arange(200) % 90 + 3, np.r_[0.0, np.ones(199)].astype(np.float32))]
    exact = LossSession(model).losses(rows)
    right, seen = losses._summed, []

    def small(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, together: int) -> float:
        seen.append(together)
        if together > 64:
            raise torch.OutOfMemoryError
        return right(logits, targets, weights, together)

    monkeypatch.setattr(losses, "_summed", small)
    assert LossSession(model).losses(rows) == exact
    assert seen == [1024, 512, 256, 128, 64]
    monkeypatch.setattr(losses, "_summed", lambda logits, targets, weights, _: small(logits, targets, weights, 65))
    with pytest.raises(UserError, match="the loss of one row"):
        LossSession(model).losses(rows)


def test_a_turn_that_does_not_fit_ends_alone(
    finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, turns = DecoderSession._continuations, []

    def second_fails(self: DecoderSession, prompts: Any, rows: int, rule: Any, streamer: Any = None) -> Any:
        turns.append(len(prompts[0]))
        if len(turns) == 2:
            streamer.put(torch.tensor([prompts[0]]))
            streamer.put(torch.tensor([5]))
            raise torch.OutOfMemoryError("full")
        return right(self, prompts, rows, rule, streamer)

    monkeypatch.setattr(DecoderSession, "_continuations", second_fails)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\nthree\n"))
    with open_chat(str(finished.path), max_new_tokens=4) as chat:
        said = talk(chat, None, None, quiet=False)
    assert [message["content"] for message in said if message["role"] == "user"] == ["one", "three"]
    shown = capsys.readouterr()
    assert "answering one prompt does not fit in memory" in shown.err
    assert "three" not in shown.out, "the streamer took the next prompt for a part of the answer"


# merging and evaluating


@pytest.fixture(scope="module")
def finished(model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    import tiny

    place = tmp_path_factory.mktemp("finished")
    return train(tiny.recipe(model_dir, data_file, place / "run", train__max_steps=1, data__val_size=3))


def test_a_candidate_that_does_not_fit_is_compared_on_the_cpu(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from whet.ship.merge import merge

    plain = merge(finished, tmp_path / "plain")
    right, devices = merging._plain_network, []

    def full(folder: Path, placement: Any, task: Any) -> Any:
        devices.append(placement.device.type)
        if len(devices) == 1:
            raise torch.OutOfMemoryError
        return right(folder, placement, task)

    monkeypatch.setattr(merging, "_plain_network", full)
    found = merge(finished, tmp_path / "again")
    assert "compared on the CPU" in capsys.readouterr().err
    assert len(devices) == 2
    for name in ("agreement", "kl", "held_out_loss", "files"):
        assert found[name] == plain[name]

    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(merging, "_plain_network", never)
    with pytest.raises(UserError, match="comparing the merged model"):
        merge(finished, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_log_probabilities_that_do_not_fit_are_made_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(70, 50, generator=torch.Generator().manual_seed(0))
    exact, right = encoder_decoder.log_softmax(logits), torch.log_softmax

    def small(values: torch.Tensor, dim: int) -> torch.Tensor:
        if len(values) > encoder_decoder.ROWS_ON_THE_HOST:
            raise torch.OutOfMemoryError
        return right(values, dim)

    monkeypatch.setattr(torch, "log_softmax", small)
    assert torch.equal(encoder_decoder.log_softmax(logits), exact)


def test_what_was_trained_makes_room_for_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Linear(2, 2)
    moved: list[str] = []
    network.to = lambda device: moved.append(str(device)) or network  # type: ignore[method-assign,assignment]
    opened = SimpleNamespace(network=network, placement=SimpleNamespace(device=torch.device("cpu")))
    plain = SimpleNamespace(network=SimpleNamespace(to=lambda device: moved.append(f"base {device}")))
    calls: list[int] = []

    def open_base(_: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise scarce.NoRoom("full")
        return plain

    monkeypatch.setattr("whet.opening.open_base", open_base)
    with base_anew(SimpleNamespace(opened=opened)) as base:  # type: ignore[arg-type]
        assert base is plain
        assert moved == ["cpu"]
    assert moved == ["cpu", "base cpu", "cpu"]
    with base_anew(SimpleNamespace(opened=opened)):  # type: ignore[arg-type]
        pass
    assert len(moved) == 3, "nothing waits where both fit"


def test_an_error_says_what_would_fit_on_a_gpu(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leanest layout's bytes and the longest row, by the plan, with what the process can reach."""
    from whet.planning.plan import plan_recipe
    from whet.training.relief import Relief, no_room_to_train

    parsed = recipe(**{"base.device": None, "base.storage": "bf16", "base.compute": "bf16"})
    plan = plan_recipe(parsed.recipe, "RTX 3060")
    monkeypatch.setattr("whet.training.relief.reachable_bytes", lambda _: 3 << 30)
    monkeypatch.setattr("whet.training.relief.free_text", lambda _: "0.1 GiB free")
    relief = Relief(plan, lambda _: None, lambda rows: "rows.jsonl row 3")
    batch: Any = SimpleNamespace(ids=np.zeros((1, 1000)), sources=(3,))
    refused = relief.refusal([batch])
    # 387.6 MiB, nearly all of them one chunk of logits, and an eighth of what is free beside them
    assert str(refused.expected).startswith("rows of about 500 tokens, or at least 442.9 MiB free"), refused.expected
    assert str(refused.found) == "1,000 tokens; 0.1 GiB free"
    assert "base.storage=nf4" in refused.fix
    assert "at least 442.9 MiB free" in str(no_room_to_train(plan, None).expected)
