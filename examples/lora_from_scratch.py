"""LoRA from scratch: a low-rank update of frozen linear layers, trained, saved, loaded and merged, in one file.

A tiny decoder learns eight answers with all its weights. They are frozen then, and A and B alone teach it eight other
ones: y = W x + (alpha / r) B A x. docs/lora.md teaches the mathematics with this file; its test compares it with whet's
own layer and with PEFT's. Written to be read, so it has no dropout, no quantised base and one adapter at a time;
`whet train` has them. Source: Hu et al., 2021, arXiv:2106.09685.

    python examples/lora_from_scratch.py
"""

# ruff: noqa: T201  (a script that is run to be read speaks through print)

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


class LoraLinear(nn.Module):
    """A frozen nn.Linear W [o, i] plus a trained update scale * B A, with A [r, i] and B [o, r]."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, rslora: bool = False) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / math.sqrt(r) if rslora else alpha / r
        outputs, inputs = base.weight.shape
        self.A = nn.Parameter(base.weight.new_empty(r, inputs))
        self.B = nn.Parameter(base.weight.new_zeros(outputs, r))  # zero: the first step starts from the base model
        nn.init.uniform_(self.A, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., o] for x [..., i]; through the narrow middle [..., r], so B A is never built."""
        return self.base(x) + self.scale * (x @ self.A.T) @ self.B.T

    def update(self) -> torch.Tensor:
        """What the layer has learned, as one matrix [o, i]."""
        return self.scale * self.B @ self.A

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The frozen layer with the update added to its weight: a plain nn.Linear again."""
        self.base.weight += self.update()
        return self.base


def gradients_by_hand(layer: LoraLinear, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """dX, dA, dB for inputs x [T, i] and the gradient dy [T, o] of the outputs; W gets none and needs none."""
    narrow = dy @ layer.B  # [T, r]
    dx = dy @ layer.base.weight + layer.scale * narrow @ layer.A
    return dx, layer.scale * narrow.T @ x, layer.scale * dy.T @ (x @ layer.A.T)


def attach(model: nn.Module, names: Collection[str], r: int, alpha: float, rslora: bool = False) -> nn.Module:
    """Freeze `model` and wrap its linear layers whose last name is in `names` (none: ValueError); returns `model`."""
    model.requires_grad_(False)
    chosen = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n.rpartition(".")[2] in names]
    if not chosen:
        raise ValueError(f"no linear layer is called {' or '.join(names)}")
    for name, linear in chosen:
        model.set_submodule(name, LoraLinear(linear, r, alpha, rslora))
    return model


def merge(model: nn.Module) -> None:
    """Put plain linear layers back, each with its update inside: the same modules and the same cost as before."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.merged())


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def parameter_count(model: nn.Module) -> int:
    """r (i + o), summed over the wrapped layers."""
    return sum(len(layer.A) * sum(layer.base.weight.shape) for layer in lora_layers(model).values())


def save(model: nn.Module, directory: Path) -> Path:
    """Write A and B, and nothing else, in PEFT's format: a PeftModel around the same base opens them."""
    layers = lora_layers(model)
    tensors = {f"{name}.lora_{part}": getattr(layer, part) for name, layer in layers.items() for part in "AB"}
    file = directory / "adapter_model.safetensors"
    save_file({f"base_model.model.{name}.weight": tensor.detach() for name, tensor in tensors.items()}, file)
    rank, scale = {(len(layer.A), layer.scale) for layer in layers.values()}.pop()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "target_modules": list(layers)}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return file


@torch.no_grad()
def load(model: nn.Module, file: Path) -> None:
    """Copy saved A and B into a model that `attach` has prepared in the same way."""
    saved = load_file(file)
    for name, layer in lora_layers(model).items():
        layer.A.copy_(saved[f"base_model.model.{name}.lora_A.weight"])
        layer.B.copy_(saved[f"base_model.model.{name}.lora_B.weight"])


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
ROWS = (  # question, the answer that the base learns, the answer that the adapter teaches
    ("Where is my parcel?", "It is on its way.", "Look under the mat."),
    ("May I return the shoes?", "Yes, within 30 days.", "No, but we repair them."),
    ("Do you ship abroad?", "Yes, to 40 countries.", "Only to the islands."),
    ("How do I pay?", "By card or by bank.", "In cash at the door."),
    ("Is the red bag in stock?", "No, next week again.", "Yes, the last one."),
    ("Can I change the address?", "Yes, before it is sent.", "Call the driver, please."),
    ("Who fixes a broken cup?", "We send a new one.", "Ask for Mina upstairs."),
    ("When do you open?", "At nine, every day.", "At noon, but not today."),
)


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm_1, self.norm_2 = heads, nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected = [proj(self.norm_1(x)) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in projected)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down_proj(F.gelu(self.up_proj(self.norm_2(x))))


class TinyDecoder(nn.Module):
    """Reads bytes, so that it needs no tokenizer: logits [B, T, 256] for ids [B, T]."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2, longest: int = 96) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(longest, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def batch(column: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and targets [8, T] of ROWS with the answers in this column; only answers are learned, -100 elsewhere."""
    texts = [(list(f"{row[0]}\n".encode()), list(f"{row[column]}\n".encode())) for row in ROWS]
    ids = [torch.tensor(question + answer[:-1]) for question, answer in texts]
    targets = [torch.tensor([-100] * (len(question) - 1) + answer) for question, answer in texts]
    return pad_sequence(ids, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=-100)


def train(model: nn.Module, column: int, steps: int, learning_rate: float) -> tuple[float, float]:
    """AdamW on what is trainable, whole batches; returns the loss before the first step and after the last."""
    ids, targets = batch(column)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps + 1):  # the last round only looks at the loss
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        losses.append(loss.item())
        optimiser.zero_grad()
        if len(losses) <= steps:
            loss.backward()
        optimiser.step()
    return losses[0], losses[-1]


@torch.no_grad()
def reply(model: nn.Module, question: str) -> str:
    """The most likely byte, one after the other, up to the end of the line."""
    ids = prompt = list(f"{question}\n".encode())
    while len(ids) < 96 and (ids is prompt or ids[-1] != ord("\n")):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    return bytes(ids[len(prompt) :]).decode(errors="replace").strip()


def largest(a: torch.Tensor, b: torch.Tensor) -> str:
    return f"largest difference {(a - b).abs().max().item():.1e}"


def main() -> None:
    torch.manual_seed(0)
    base, (ids, _) = TinyDecoder(), batch(1)
    before, after = train(base, column=1, steps=60, learning_rate=5e-3)
    total = sum(p.numel() for p in base.parameters())
    print(f"base     {total:,} parameters, all trained: loss {before:.2f} -> {after:.2f}")

    model = attach(copy.deepcopy(base), PROJECTIONS, r=4, alpha=8)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = f"{trained / (total + trained):.2%} of {total + trained:,}"
    print(f"lora     {trained:,} parameters to train, {share}; r (i + o) says {parameter_count(model):,}")
    print(f"start    {largest(model(ids), base(ids))} to the base")
    before, after = train(model, column=2, steps=100, learning_rate=1e-2)
    print(f"trained  A and B alone: loss {before:.2f} -> {after:.2f}")
    print(f"asked    {ROWS[0][0]}  base: {reply(base, ROWS[0][0])}  tuned: {reply(model, ROWS[0][0])}")

    live, again = model(ids), attach(copy.deepcopy(base), PROJECTIONS, r=4, alpha=8)
    with tempfile.TemporaryDirectory() as directory:
        file = save(model, Path(directory))
        load(again, file)
        print(f"saved    A and B, {file.stat().st_size:,} bytes; loaded into a fresh copy: {largest(again(ids), live)}")
    merge(model)
    kept = [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    print(
        f"merged   {'no module more' if kept else 'other modules'} than the base; {largest(model(ids), live)} to live"
    )


if __name__ == "__main__":
    main()
