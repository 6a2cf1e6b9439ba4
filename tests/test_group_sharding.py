"""Groups of LoRA layers under FSDP2 on two ranks: each holds its share of everything, and what is saved was trained.

One pair of processes runs all jobs, one after the other, over gloo on the CPU. What they leave on the disk is compared
with plain PEFT in one process; jobs with a planted fault must fail the same comparison.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import peft
import pytest
import torch
import torch.distributed as dist

from whet.base.errors import UserError
from whet.engine.layers import decoder_layers
from whet.engine.weights.linear import dense_weight, linear_names
from whet.methods.layers import state
from whet.methods.layers.fuse import fuse
from whet.methods.layers.group import Copies, Groups, LoraGroup
from whet.methods.layers.state import load_trained_state, trained_state
from whet.methods.lora import Lora

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)
RANKS, STEPS, RATE = 2, 2, 0.3
OPTIONS = {"r": 4, "lora_alpha": 3}
BYTES_ARE_SHARDED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)  # FSDP2 takes uint8 from there on
STORAGES = ["dense", *(["int8", "fp8", "nf4"] if BYTES_ARE_SHARDED else [])]
ALONE = {0: [0, 1, 2], 1: [3]}  # rows of a step that each rank learns from: not equally many


# --- what the two processes do -------------------------------------------------------------------------------------


def tokens_of(step: int) -> torch.Tensor:
    return nets.ids(4, 12 + 8 * step, seed=20 + step)


def live_bytes() -> int:
    """Of all tensors that Python can reach, each storage once."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    storages = [t.untyped_storage() for t in tensors if not hasattr(t, "full_tensor")]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def shard(model: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))  # a machine with a GPU would take that
    for layer in decoder_layers(model.get_base_model()):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def learn(model: Any, rows: list[int], before_step: Callable[[], None], share: float) -> None:
    """Steps over these rows of each batch, the loss divided by the tokens of all rows. share: of gradients in their sum
    over ranks: FSDP2 averages them."""
    optimiser = torch.optim.SGD(nets.trained(model), lr=RATE)
    for step in range(STEPS):
        before_step()
        tokens = tokens_of(step)
        (nets.loss_of(model, tokens[rows]) / (tokens.numel() * share)).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def whole_weight_beside(model: Any, patch: pytest.MonkeyPatch) -> None:
    """A fault: the joined weight is a tensor that the module holds, but not a parameter of it."""
    for group in nets.groups_of(model):
        for part in group.base.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                delattr(part, name)
                part.__dict__[name] = parameter.detach()


def copies_not_checked(model: Any, patch: pytest.MonkeyPatch) -> None:
    """A fault: the copies are used whatever they were made of."""
    patch.setattr(Copies, "hold", lambda self: True)
    patch.setattr(Groups, "refresh", lambda self: None)
    patch.setattr(LoraGroup, "_copies", lambda self: (self.copy.a, self.copy.b))


def copies_kept(model: Any, patch: pytest.MonkeyPatch) -> None:
    """A fault: copies that are of no use any more stay, and with them the parameters that they were made of."""
    model.held = [group.copy for group in nets.groups_of(model)]


def named_when_fused(model: Any, patch: pytest.MonkeyPatch) -> None:
    """A fault: what is saved are the tensors that had these names before sharding."""
    tensors = dict(trained_state(model))
    patch.setattr(state, "saved_state", lambda model: tensors)


FAULTS = {f.__name__: f for f in (whole_weight_beside, copies_not_checked, copies_kept, named_when_fused)}


def job(rank: int, folder: Path, storage: str, *, fp8: bool = False, fault: str = "") -> None:
    """Fuse, shard, learn, save; what was found goes into `folder`."""
    before, target = live_bytes(), folder / f"rank{rank}"
    target.mkdir(parents=True)
    model = nets.made("Llama", storage, **OPTIONS)
    groups = fuse(model, compute=torch.float32, fp8=fp8, keep_transposed=fp8)
    whole, tables = (sum(tensor.nbytes for tensor in every) for every in (model.parameters(), model.buffers()))
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            FAULTS[fault](model, patch)
        shard(model)
        learn(model, ALONE[rank], groups.refresh, share=1 / RANKS)
        mine = live_bytes() - before - tables  # which FSDP2 leaves whole: 1 KB a layer at most
        Lora(r=OPTIONS["r"]).save(model, target)
    other = {name: tensor + 1 for name, tensor in trained_state(model).items()}
    load_trained_state(model, other)
    loaded = all(torch.equal(tensor, other[name]) for name, tensor in trained_state(model).items())
    facts = {"share": mine / whole, "loaded": loaded}
    (target / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def shard_first(folder: Path) -> None:
    model = nets.made("Llama", **OPTIONS)
    shard(model)
    try:
        fuse(model, compute=torch.float32)
        said = "nothing"
    except UserError as error:
        said = error.problem
    (folder / "refused.txt").write_text(said, encoding="utf-8")


def work(rank: int, folder: str, storages: list[str]) -> None:
    torch.set_num_threads(1)
    place = Path(folder)
    dist.init_process_group("gloo", f"file://{place / 'store'}", rank=rank, world_size=RANKS)
    for storage in storages:
        job(rank, place / storage, storage)
        if storage in ("fp8", "nf4"):
            job(rank, place / f"{storage} in fp8", storage, fp8=True)
    for fault in FAULTS:
        job(rank, place / fault, "dense", fault=fault)
    shard_first(place / f"first{rank}")
    dist.destroy_process_group()


# --- what they have left -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two ranks have filled."""
    import torch.multiprocessing as processes

    folder = tmp_path_factory.mktemp("ranks")
    for rank in range(RANKS):
        (folder / f"first{rank}").mkdir()
    storages = [storage for storage in STORAGES if storage != "nf4" or has_bitsandbytes()]
    processes.spawn(work, (str(folder), storages), nprocs=RANKS)
    return folder


def has_bitsandbytes() -> bool:
    import importlib.util

    return importlib.util.find_spec("bitsandbytes") is not None


def of_storage(storage: str) -> str:
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    return storage


def in_one_process(storage: str, *, fp8: bool = False) -> dict[str, torch.Tensor]:
    """What learning from all rows makes of the adapter in one process: through PEFT's own layers, or, multiplied in
    FP8, which they cannot, in groups that are not sharded."""
    model = nets.made("Llama", storage, plain=not fp8, **OPTIONS)
    groups = fuse(model, compute=torch.float32, fp8=True, keep_transposed=True) if fp8 else None
    learn(model, [0, 1, 2, 3], (lambda: None) if groups is None else groups.refresh, share=1)
    return {name: tensor.clone() for name, tensor in nets.lora_parameters(model).items()}


def saved_by(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter under PEFT's names with `default`, the same from each rank."""
    from safetensors.torch import load_file

    found = [load_file(folder / f"rank{rank}" / "adapter_model.safetensors") for rank in range(RANKS)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    return {name.replace(".weight", ".default.weight"): tensor for name, tensor in found[0].items()}


def distance(storage: str, folder: Path, *, fp8: bool = False) -> float:
    """How far what the ranks have learned is from what one process learns, as a part of what was learned."""
    expected, found, start = (
        in_one_process(storage, fp8=fp8),
        saved_by(folder),
        nets.lora_parameters(nets.made("Llama")),
    )
    assert found.keys() == expected.keys()
    learned = {name: expected[name] - start[name] for name in start}
    assert all(bool(change.any()) for change in learned.values())
    return nets.apart({name: found[name] - start[name] for name in start}, learned)


def facts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}" / "facts.json").read_text(encoding="utf-8")) for rank in range(RANKS)]


@pytest.mark.parametrize("storage", STORAGES)
def test_two_ranks_learn_what_one_process_learns(storage: str, done: Path) -> None:
    folder = done / of_storage(storage)
    assert distance(storage, folder) < 2e-5
    assert all(found["loaded"] for found in facts(folder)), "what is loaded into shards is not what they give back"


@pytest.mark.parametrize("storage", [storage for storage in STORAGES if storage in ("fp8", "nf4")])
def test_two_ranks_multiply_in_fp8_as_one_process_does(storage: str, done: Path) -> None:
    folder = done / f"{of_storage(storage)} in fp8"
    assert distance(storage, folder, fp8=True) < 3e-3  # a code that is rounded the other way
    assert distance(storage, folder) > 0.05, "nothing was rounded"


@pytest.mark.parametrize("storage", STORAGES)
def test_plain_peft_opens_what_they_saved_on_a_plain_model(storage: str, done: Path) -> None:
    folder = done / of_storage(storage)
    twin, frozen = nets.made("Llama", storage, plain=True, **OPTIONS), nets.made("Llama", storage).get_base_model()
    load_trained_state(twin, in_one_process(storage))
    net = nets.network("Llama")
    with torch.no_grad():
        for name in linear_names(net):
            net.get_submodule(name).weight.copy_(
                dense_weight(frozen.get_submodule(f"{name}.base_layer"), torch.float32)
            )
    plain = peft.PeftModel.from_pretrained(net, str(folder / "rank0")).eval()
    assert type(plain.get_base_model().model.layers[0].self_attn.q_proj) is peft.tuners.lora.Linear
    with torch.no_grad():
        found, expected = (model.eval()(input_ids=nets.ids()).logits for model in (plain, twin))
        base = net.eval()
        with plain.disable_adapter():
            untuned = plain(input_ids=nets.ids()).logits
    assert base is plain.get_base_model()
    assert nets.relative(found, expected) < 1e-5
    assert nets.relative(untuned, expected) > 0.01


@pytest.mark.parametrize("name", [*STORAGES, *(f"{s} in fp8" for s in STORAGES if s in ("fp8", "nf4"))])
def test_a_rank_holds_its_share_of_everything(name: str, done: Path) -> None:
    of_storage(name.partition(" ")[0])
    for found in facts(done / name):
        assert 0.49 < found["share"] < 0.51


def test_a_whole_weight_that_is_no_parameter_would_be_seen(done: Path) -> None:
    assert all(found["share"] > 0.7 for found in facts(done / "whole_weight_beside"))


def test_copies_that_are_not_checked_would_be_seen(done: Path) -> None:
    assert distance("dense", done / "copies_not_checked") > 1e-3


def test_copies_that_stay_would_be_seen(done: Path) -> None:
    assert all(found["share"] > 0.55 for found in facts(done / "copies_kept"))


def test_an_adapter_that_was_not_trained_would_be_seen(done: Path) -> None:
    assert distance("dense", done / "named_when_fused") > 0.99


def test_sharding_first_is_refused_with_one_sentence(done: Path) -> None:
    for rank in range(RANKS):
        said = (done / f"first{rank}" / "refused.txt").read_text(encoding="utf-8")
        assert said == "LoRA layers can no longer be put into groups when their weights are sharded"
