"""Small random models of several families with LoRA on them, whole or plain: shared by the tests of the fast engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from whet.data.batch.rows import Rows
from whet.engine.compute.attention import ATTENTION
from whet.engine.weights.linear import FrozenLinear, freeze_linears
from whet.methods.layers.group import LoraGroup
from whet.training.optim import OnDevice

VOCABULARY = 256
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "initializer_range": 0.08,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 1024}


class Sgd(OnDevice, torch.optim.SGD):
    """The plainest optimiser that a step takes: an update is the gradient times the rate."""


class AdamW(OnDevice, torch.optim.AdamW):
    """torch's AdamW with the interface that steps and checkpoints ask for."""


def network(kind: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: Any) -> Any:
    """A random model of transformers' family `kind` ("Llama", "Qwen3", ...), with whet's attention."""
    import transformers

    sizes = GPT2 if kind == "GPT2" else SIZES
    config = getattr(transformers, f"{kind}Config")(**(sizes | changes))
    torch.manual_seed(0)
    with torch.device(device):
        net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=dtype)
    for name, parameter in net.named_parameters():
        if name.endswith(".bias"):  # families start them at 0, where a forgotten one would not be seen
            nn.init.normal_(parameter, std=0.1)
    return net


def adapted(net: Any, *, plain: bool = False, **lora: Any) -> Any:
    """PEFT's model around `net` in training mode, no lora_B zero. plain: PEFT's own LoRA layers, not whet's."""
    import peft
    from peft.tuners.lora.layer import Linear

    from whet.engine.weights.linear import linear_names
    from whet.methods.layers.lora_layer import LoraLinear

    targets = sorted({name.rsplit(".", 1)[-1] for name in linear_names(net)})
    settings = peft.LoraConfig(
        **({"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "target_modules": targets} | lora)  # type: ignore[arg-type]
    )
    kind = Linear if plain else LoraLinear
    settings._register_custom_module({nn.Linear: kind, FrozenLinear: kind})
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModelForCausalLM(net, settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def made(kind: str, storage: str = "dense", *, double_quant: bool = True, plain: bool = False, **lora: Any) -> Any:
    """A model of `kind` in `storage` with adapters, on the CPU in fp32; the same weights however it is made."""
    net = network(kind)
    if storage != "dense":
        freeze_linears(net, storage, double_quant)
    return adapted(net, plain=plain, **lora)


def ids(rows: int = 2, length: int = 24, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def rows_of(lengths: Sequence[int], seed: int = 0) -> Rows:
    """Random rows without the last token of the vocabulary; each learns some of its tokens, and at least its last."""
    draw = np.random.default_rng(seed)
    parts = []
    for index, length in enumerate(lengths):
        learned = draw.random(length) < 0.4
        learned[-1] = True
        parts.append((index, draw.integers(3, VOCABULARY - 1, length), learned))
    return Rows.gather(iter(parts))


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Summed loss of predicting each token from itself: any function of all logits will do."""
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    return cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def groups_of(model: nn.Module) -> list[LoraGroup]:
    return [module for module in model.modules() if isinstance(module, LoraGroup)]


def grouped(model: nn.Module, take: Callable[[nn.Parameter], torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """What `take` gives for A and B of each group, cut up, by PEFT's names; found by where the members stand."""
    places = {module: name for name, module in model.named_modules()}
    found: dict[str, torch.Tensor | None] = {}
    for group in groups_of(model):
        members = [module for module in places if getattr(module, "group", None) is group]
        assert len(members) == len(group.members)
        r = len(group.a) // len(members)
        for matrix, parameter in (("lora_A", group.a), ("lora_B", group.b)):
            value, start = take(parameter), 0
            for member in sorted(members, key=lambda one: one.index):  # type: ignore[arg-type,return-value]
                size = r if matrix == "lora_A" else member.out_features
                part = None if value is None else value[start : start + size]  # type: ignore[operator]
                found[f"{places[member]}.{matrix}.default.weight"] = part
                start += size  # type: ignore[operator]
            assert start == len(parameter)
    return found


def lora_parameters(model: Any) -> dict[str, torch.Tensor]:
    """Every LoRA matrix by PEFT's name, wherever it is kept; those of groups as views."""
    inside = {id(p) for group in groups_of(model) for p in group.parameters()}
    alone = {name: p for name, p in model.named_parameters() if "lora_" in name and id(p) not in inside}
    return alone | {name: view for name, view in grouped(model, lambda p: p.detach()).items() if view is not None}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradient of every LoRA matrix by PEFT's name, wherever it is kept."""
    found = {name: getattr(tensor, "grad", None) for name, tensor in lora_parameters(model).items()}
    found |= grouped(model, lambda p: p.grad)
    assert all(grad is not None for grad in found.values()), [name for name, grad in found.items() if grad is None]
    return {name: grad.detach().clone() for name, grad in found.items() if grad is not None}


def clear(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Distance by the length of `exact`, both as float64; 0 where both are zero."""
    wide, other = exact.detach().double(), ours.detach().double()
    distance, size = float((other - wide).norm()), float(wide.norm())
    return distance / size if size else distance


def apart(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The largest relative distance of two sets of gradients."""
    assert ours.keys() == exact.keys()
    return max(relative(ours[name], exact[name]) for name in ours)
