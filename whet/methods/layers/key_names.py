"""Names of an adapter's tensors and of a model's layers, where the two were named by different classes.

The text part of a model that also sees pictures is `model.language_model.layers` in one class of transformers,
`language_model.model.layers` in an older one, and `model.layers` in the class for text alone. An adapter that was
trained on one of them fits the others but for the beginning of its names. Which beginning turns into which is tried
from a short list, and taken only when every tensor then has its layer; otherwise what is left over is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from whet.base.errors import UserError

PREFIX = "base_model.model."
USUAL = ("lora_", "ia3_")  # kinds of which every tensor belongs to a layer
# Beginnings of names: of another class, and of this one. The first list that places every tensor is taken.
_BEGINNINGS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("model.language_model.", "model."),),
    (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")),
    (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head.")),
    (("model.", "model.language_model."),),
    (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
    (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
    (("model.text_model.", "model."),),
    (("language_model.", ""),),
    (("model.", ""),),
    (("", "model."),),
)
_OWN = re.compile(
    r"(base_layer\.)*(lora_|weight$|bias$|original_module|modules_to_save|token_adapter|trainable_tokens)"
)


def renamed_beginnings(network: nn.Module, keys: Iterable[str], prefix: str) -> tuple[tuple[str, str], ...]:
    """How beginnings of an adapter's names turn into those of `network`; () where they fit as they are.

    keys: of the adapter's file; prefix: of its kind's own tensors, such as lora_. Raises UserError where no renaming
    known here places every tensor.
    """
    modules = {name for name, _ in network.named_modules()}
    own = {name for name, _ in network.named_parameters(remove_duplicate=False)}  # of a module that is trained whole
    names = [key.removeprefix(PREFIX) for key in keys if key.startswith(PREFIX)]
    fits = [name in own or _place(name, modules, prefix) is not None for name in names]
    if all(fits):
        return ()
    for beginnings in _BEGINNINGS:
        turned = [turn(name, beginnings) for name in names]
        if all(name in own or _place(name, modules, prefix) is not None for name in turned):
            return beginnings
    if prefix not in USUAL:  # tensors that belong to no layer may be this kind's own
        return ()
    raise _misfit([name for name, one in zip(names, fits, strict=True) if not one], len(names), network)


def turn(name: str, beginnings: Sequence[tuple[str, str]]) -> str:
    """`name` with its beginning replaced, if it has one of these."""
    for old, new in beginnings:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def rename_config(config: Any, network: nn.Module, keys: Iterable[str], beginnings: Any, prefix: str) -> None:
    """Let an adapter's config mean the layers that its renamed tensors belong to, and no others."""
    modules = {name for name, _ in network.named_modules()}
    turned = [turn(key.removeprefix(PREFIX), beginnings) for key in keys]
    targets = {place for name in turned if (place := _place(name, modules, prefix)) and f".{prefix}" in f".{name}"}
    if getattr(config, "target_modules", None) is not None:
        config.target_modules = targets
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    for name in ("rank_pattern", "alpha_pattern"):
        if found := getattr(config, name, None):
            setattr(config, name, {turn(key, beginnings): value for key, value in found.items()})


def _place(name: str, modules: set[str], prefix: str) -> str | None:
    """The module that a tensor of an adapter belongs to, or None where the model has none for it."""
    parts = name.split(".")
    own = next((place for place, part in enumerate(parts) if part.startswith(prefix)), None)
    if own and ".".join(parts[:own]) in modules:
        return ".".join(parts[:own])
    for count in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:count])
        if module in modules:
            rest = ".".join(parts[count:])
            return module if rest.startswith(prefix) or _OWN.match(rest) else None
    return None


def _misfit(names: list[str], count: int, network: nn.Module) -> UserError:
    kind = type(network).__name__
    layers = sorted({".".join(part for part in name.split(".")[:3] if not part.isdigit()) for name in names})
    return UserError(
        f"the adapter was made for another class of model: {len(names)} of its {count} tensors belong to layers that "
        f"{kind} does not have", found=", ".join(layers[:3]),
        expected=f"layers of {kind}, such as {_usual(network)}",
        fix="give the model that it was trained on as base_model_name_or_path; an adapter that also trained a vision "
        "or audio part cannot be used with the text part alone",
    )  # fmt: skip


def _usual(network: nn.Module) -> str:
    return next((name for name, module in network.named_modules() if isinstance(module, nn.Linear)), "none")
