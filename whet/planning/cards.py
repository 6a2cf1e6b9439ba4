"""GPUs that a plan can be made for without having one: their memory and arithmetic, from the vendor's data sheets.

Memory is what the driver reports (MiB), which is a little other than the name says. What a process cannot have for its
tensors, torch's context and kernels, is taken off as it was measured (docs/log.md); a desktop on the same card takes
more. Nothing of this is used on a card that is there: its free memory is asked.
"""

from __future__ import annotations

import re

import torch

from whet.base.errors import UserError
from whet.engine.device import Hardware
from whet.planning.card_table import CARDS, Card

MIB, GIB = 1 << 20, 1 << 30
CONTEXT_BYTES = int(0.82 * GIB)


def usable_bytes(card: Card) -> int:
    """What tensors can take of an idle card."""
    return card.memory_mib * MIB - CONTEXT_BYTES


def known_card(name: str, total_bytes: int | None = None) -> Card | None:
    """The card that a name means ("NVIDIA H100 80GB HBM3" too), None where it is not known. total_bytes: its memory,
    for a name that several of unlike memory have."""
    wanted = _plain(name)
    found = [card for card in CARDS if wanted in _spellings(card.name)]
    if not found:  # what a driver adds behind the name: the kind of memory
        found = [card for card in CARDS if any(re.fullmatch(re.escape(one) + "(hbm.*|[0-9]+gb)", wanted)
                                               for one in _spellings(card.name))]  # fmt: skip
    nearest = (lambda card: abs(card.memory_mib * MIB - total_bytes)) if total_bytes else (lambda card: card.memory_mib)
    return min(found, key=nearest, default=None)


def hardware_of(wanted: str) -> Hardware:
    """The card of this name, or one of this much memory ("24", "24GB", "24 GiB"), with all of it free.

    Of a size alone nothing but bf16 arithmetic is assumed. Raises UserError for a name that is not known.
    """
    card = known_card(wanted)
    size = re.fullmatch(r"\s*(\d{1,3}(?:\.\d+)?)\s*(?:g|gb|gib)?\s*", wanted, re.IGNORECASE)
    if card is None and size is not None and float(size[1]) > 0:
        return _hardware(Card(f"a GPU of {size[1]} GB", int(float(size[1]) * GIB / MIB)), has_bf16=True)
    if card is None:
        raise UserError(
            "this GPU is not known", field="--gpu", found=wanted, expected=", ".join(card.name for card in CARDS),
            fix="give its memory instead: --gpu 24GB",
        )  # fmt: skip
    return _hardware(card, has_bf16=card.bf16 is not None)


def _hardware(card: Card, *, has_bf16: bool) -> Hardware:
    return Hardware(
        torch.device("cuda"), card.name, has_bf16, card.fp8 is not None, usable_bytes(card), card.memory_mib * MIB,
        "--gpu",
    )  # fmt: skip


def smallest_card(needed_bytes: int) -> str | None:
    """The known card with the least memory that still has `needed_bytes` for tensors; None: there is none."""
    fitting = [card for card in CARDS if usable_bytes(card) >= needed_bytes]
    return min(fitting, key=lambda card: card.memory_mib).name if fitting else None


def _plain(name: str) -> str:
    """A name without vendor, line and spelling: "NVIDIA GeForce RTX 4090" and "rtx4090" are one."""
    short = re.sub(r"nvidia|geforce|tesla|pcie|sxm\d?|laptop|gpu|tensor core", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", short)


def _spellings(name: str) -> set[str]:
    """The ways to name a card: whole, without RTX, without its memory (then the least memory is meant)."""
    whole = {name, name.replace("RTX ", "")}
    return {_plain(one) for one in whole | {re.sub(r" \d+GB$", "", one) for one in whole}}
