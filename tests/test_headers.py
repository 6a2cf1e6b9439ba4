"""Damaged and foreign weights are named from their headers, before a model is built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from whet.base.errors import UserError
from whet.engine.config import Model
from whet.engine.load.headers import check_checkpoint, check_trained_tensors, read_header
from whet.engine.task import Task
from whet.training.run import train

WEIGHTS = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tiny.llama(hidden_size=32, intermediate_size=32), tmp_path_factory.mktemp("sound"))


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Save the tensors again after a change of their dict."""

    def plant(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, model / WEIGHTS)

    return plant


def header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Write the header anew after a change of its text, and its length with it."""

    def plant(model: Path) -> None:
        content = (model / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        text = change(content[8:end])
        (model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return plant


def config(**values: Any) -> Callable[[Path], None]:
    def plant(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return plant


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def plant(model: Path) -> None:
        (model / WEIGHTS).write_bytes(change((model / WEIGHTS).read_bytes()))

    return plant


def pickled(model: Path) -> None:
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()


def sharded(where: Any) -> Callable[[Path], None]:
    def plant(model: Path) -> None:
        (model / WEIGHTS).rename(model / "a.safetensors")
        (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")

    return plant


def doubled(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"model.{name}"] = tensors[name].clone() if name == Q else tensors.pop(name)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (content(lambda data: b""), "the weights are damaged"),
    "three bytes": (content(lambda data: data[:3]), "the weights are damaged"),
    "cut in the header": (content(lambda data: data[:100]), "the weights are damaged"),
    "cut in the tensors": (content(lambda data: data[:-100]), "the weights are damaged"),
    "bytes too many": (content(lambda data: data + b"\0"), "the weights are damaged"),
    "a pointer": (content(lambda data: b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
    "a page": (content(lambda data: b"<!doctype html>" * 40), "the weights are damaged"),
    "a length without end": (content(lambda data: b"\xff" * 8 + data[8:]), "the weights are damaged"),
    "no JSON": (header(lambda text: b"{" + b"x" * (len(text) - 1)), "its header is none"),
    "a list": (header(lambda text: b"[]"), "the weights are damaged"),
    "a key twice": (header(lambda text: text.replace(b"layers.0.self_attn.q", b"layers.1.self_attn.q")), "twice"),
    "spans that overlap": (header(lambda text: text.replace(b'"data_offsets":[0,', b'"data_offsets":[4,')), "damaged"),
    "a shape of another size": (header(lambda text: text.replace(b'"shape":[32]', b'"shape":[31]', 1)), "bytes"),
    "another shape": (rewritten(lambda t: t.update({Q: t[Q][:16]})), "another shape"),
    "one missing": (rewritten(lambda t: t.pop(Q)), "weights are missing"),
    "a prefix twice": (rewritten(doubled), "prefix twice"),
    "a layer too many": (config(num_hidden_layers=1), "layers that the config does not know"),
    "a layer too few": (config(num_hidden_layers=3), "weights are missing"),
    "another width": (config(intermediate_size=64), "another shape"),
    "I8": (rewritten(lambda t: t.update({Q: t[Q].to(torch.int8)})), "no number of arithmetic"),
    "BOOL": (rewritten(lambda t: t.update({Q: t[Q] > 0})), "no number of arithmetic"),
    "F8": (rewritten(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})), "no number of arithmetic"),
    "only a pickle": (pickled, "pickles"),
    "a shard that is not there": (sharded({Q: "b.safetensors"}), "files of weights are missing"),
    "an index of nonsense": (sharded([3]), "index"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_before_a_model_is_built(fault: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, said = FAULTS[fault]
    plant(model)
    with pytest.raises(UserError) as caught:
        check_checkpoint(Model(path=str(model)))
    assert said in str(caught.value)


def test_a_sound_model_is_taken(sound: Path) -> None:
    check_checkpoint(Model(path=str(sound)))
    check_checkpoint(Model(path=str(sound)), Task("classification", ("a", "b", "c")))
    assert read_header(sound / WEIGHTS)[Q] == ("F32", (32, 32))


def test_an_extra_tensor_of_another_kind_is_nothing_to_stop_for(model: Path) -> None:
    """Buffers of older versions, heads of other tasks."""
    rewritten(lambda t: t.update({"model.layers.0.self_attn.bias": torch.ones(3, dtype=torch.bool)}))(model)
    rewritten(lambda t: t.update({"score.weight": torch.ones(3, 32)}))(model)
    check_checkpoint(Model(path=str(model)))


def test_training_names_it_before_a_run_directory_is_made(model: Path, data_file: Path, tmp_path: Path) -> None:
    FAULTS["cut in the tensors"][0](model)
    with pytest.raises(UserError, match="the weights are damaged"):
        train(tiny.recipe(model, data_file, tmp_path / "run", train__max_steps=1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_trained_tensors_are_finite(value: float, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3), "b": torch.tensor([1.0, value]).bfloat16()}, path)
    with pytest.raises(UserError, match="numbers that are none"):
        check_trained_tensors(path)
    save_file({"a": torch.ones(3), "b": torch.ones(3, dtype=torch.int8)}, path)
    check_trained_tensors(path, numbers=False)
    with pytest.raises(UserError, match="damaged"):
        check_trained_tensors(path)
