"""AdaLoRA: ranks go where the loss moves most, the file has no more of them than asked for, and a cut is no difference.

PEFT's own loop, written out by hand, is what the run is compared with. One thing at a time is broken on purpose to show
that a comparison would see it.
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
from test_resume import killed_before
from torch.nn.functional import cross_entropy

from whet.base.errors import UserError
from whet.methods import adalora
from whet.methods.adalora import AdaLora, allocate, numbers
from whet.recipe import Parsed, parse
from whet.training.run import train

IDS = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(5))
STEPS = 20
METHOD = AdaLora(init_r=4, target_r=2, tinit=3, tfinal=6, target_modules="attention")


def network() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        num_key_value_heads=2, initializer_range=0.15,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def loss(model: Any) -> torch.Tensor:
    found = model(input_ids=IDS).logits[:, :-1]
    return cross_entropy(found.flatten(0, 1), IDS[:, 1:].flatten())


def attached() -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = METHOD.attach(network()).train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def by_seam() -> Any:
    """As the loop of whet calls it."""
    model, optimiser = attached()
    done = 0
    METHOD.begin(model, optimiser, STEPS, lambda: done)
    for done in range(STEPS):
        assert METHOD.before_step(model, done / STEPS) == (done == STEPS - 7), "the ranks that stay make another model"
        loss(model).backward()
        METHOD.penalty(model).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    METHOD.finalize(model)
    return model.eval()


def by_hand() -> Any:
    """As PEFT's documentation calls it: its own penalty comes with labels, its own call stands behind the update."""
    model, optimiser = attached()
    made = model.peft_config["default"]
    made.total_step, made.tinit, made.tfinal = STEPS, 3, 6
    for step in range(1, STEPS + 1):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)
        optimiser.zero_grad(set_to_none=True)
    return model.eval()


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def check_the_same() -> None:
    ours, theirs = values(by_seam()), values(by_hand())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_it_trains_as_peft_alone_does() -> None:
    check_the_same()


def check_the_ranks(folder: Path) -> None:
    model = by_seam()
    kept = {name: int((number != 0).sum()) for name, number in numbers(model).items()}
    assert sum(kept.values()) == METHOD.target_r * len(kept), kept
    assert len(set(kept.values())) > 1, "ranks move between layers"
    METHOD.save(model, folder)
    plain = peft.PeftModel.from_pretrained(network(), str(folder)).eval()
    assert sum(len(number) for name, number in plain.named_parameters() if "lora_E" in name) == sum(kept.values())
    opened = METHOD.load(network(), folder)
    folded = METHOD.fold(network(), folder).eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        for other in (plain, opened, folded):
            torch.testing.assert_close(other(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)


def test_the_file_has_as_many_ranks_as_asked_for_and_opens_in_plain_peft(tmp_path: Path) -> None:
    check_the_ranks(tmp_path)


def made(model: Path, data: Path, out: Path, **changes: Any) -> Parsed:
    values = tiny.settings(
        model, data, out, method__name="adalora", method__init_r=4, method__target_r=2, train__max_steps=12,
        train__save_steps=1, train__eval_steps=3, data__val_size=4, **changes,
    )  # fmt: skip
    values.pop("method.r")
    return parse(None, tiny.words(values))


def check_the_cut(step: int, model_dir: Path, data_file: Path, out: Path) -> None:
    whole = train(made(model_dir, data_file, out / "whole"))
    killed_before(made(model_dir, data_file, out / "cut"), step)
    again = train(made(model_dir, data_file, out / "cut"))
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl", "checkpoints/step-12/model.safetensors",
                 "checkpoints/step-12/optimizer.safetensors"):  # fmt: skip
        assert (whole.path / name).read_bytes() == (again.path / name).read_bytes(), name
    about = json.loads((whole.path / "adapter" / "adapter_config.json").read_text())
    kept = [sum(pattern) for pattern in about["rank_pattern"].values()]
    assert sum(kept) == 2 * len(kept)


@pytest.mark.parametrize("step", [5, 9, 11])
def test_a_run_cut_off_ends_with_the_same_bytes(step: int, model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    check_the_cut(step, model_dir, data_file, tmp_path)


def test_settings_that_leave_nothing_to_give_away_are_refused(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse(None, ["method={name: adalora, target_r: 12}"])
    assert caught.value.fix == "method.target_r=11, or method.name=lora"
    with pytest.raises(UserError) as caught:
        train(made(model_dir, data_file, tmp_path / "a", method__tinit=6, method__tfinal=6))
    assert "method.tinit" in str(caught.value.field)


def test_planted_faults_are_seen(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    whole = AdaLora.finalize

    def forgets(model: Any, optimiser: torch.optim.Optimizer, step: int) -> None:
        allocate(model, optimiser, step)
        for state in optimiser.state.values():  # what a checkpoint would then not have
            state.pop(adalora.SENSITIVITY, None)

    def late(model: Any, optimiser: torch.optim.Optimizer, step: int) -> None:
        allocate(model, optimiser, step - 1)

    def finalize(self: AdaLora, model: Any) -> None:
        whole(self, model)
        pattern = model.peft_config["default"].rank_pattern
        for kept in pattern.values():
            kept.reverse()

    faults: list[tuple[Any, str, Any, Callable[[Path], None]]] = [
        (adalora, "allocate", lambda *_: None, check_the_ranks),
        (adalora, "allocate", late, lambda out: check_the_same()),
        (adalora, "allocate", forgets, lambda out: check_the_cut(5, model_dir, data_file, out)),
        (AdaLora, "penalty", lambda self, model: 0.9 * penalty(self, model), lambda out: check_the_same()),
        (AdaLora, "finalize", finalize, check_the_ranks),
        (AdaLora, "before_step", lambda self, model, done: False, lambda out: check_the_same()),
    ]  # fmt: skip
    penalty = AdaLora.penalty
    for index, (owner, name, fault, check) in enumerate(faults):
        out = tmp_path / str(index)
        out.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fault)
            with pytest.raises((AssertionError, KeyError)):
                check(out)
