"""GPUs that a plan can be made for without having one: their memory and arithmetic, from the vendor's data sheets.

Memory is what the driver reports (MiB), which is a little other than the name says. What a process cannot have for its
tensors, torch's context and kernels, is taken off as it was measured (docs/log.md); a desktop on the same card takes
more. Nothing of this is used on a card that is there: its free memory is asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from whet.base.errors import UserError
from whet.engine.device import Hardware

MIB, GIB = 1 << 20, 1 << 30
CONTEXT_BYTES = int(0.82 * GIB)


@dataclass(frozen=True)
class Card:
    """memory_mib: as its driver reports it; bf16, fp8: computed in hardware."""

    name: str
    memory_mib: int
    bf16: bool = True
    fp8: bool = False

    @property
    def usable_bytes(self) -> int:
        """What tensors can take of an idle card."""
        return self.memory_mib * MIB - CONTEXT_BYTES


CARDS = (
    Card("RTX 3060", 12288), Card("RTX 3080", 10240), Card("RTX 3090", 24576),
    Card("RTX 4060 Ti 16GB", 16380, fp8=True), Card("RTX 4070", 12282, fp8=True),
    Card("RTX 4080", 16376, fp8=True), Card("RTX 4090", 24564, fp8=True),
    Card("RTX 5090", 32607, fp8=True), Card("T4", 15360, bf16=False), Card("V100 16GB", 16384, bf16=False),
    Card("V100 32GB", 32768, bf16=False), Card("A10", 23028), Card("A10G", 23028), Card("L4", 23034, fp8=True),
    Card("A40", 46068), Card("RTX A6000", 49140), Card("L40S", 46068, fp8=True), Card("RTX 6000 Ada", 49140, fp8=True),
    Card("A100 40GB", 40960), Card("A100 80GB", 81920), Card("H100 80GB", 81559, fp8=True),
    Card("H200", 143771, fp8=True),
)  # fmt: skip


def hardware_of(wanted: str) -> Hardware:
    """The card of this name, or one of this much memory ("24", "24GB", "24 GiB"), with all of it free.

    Of a size alone nothing but bf16 arithmetic is assumed. Raises UserError for a name that is not known.
    """
    known = [card for card in CARDS if _plain(wanted) in _spellings(card.name)]
    size = re.fullmatch(r"\s*(\d{1,3}(?:\.\d+)?)\s*(?:g|gb|gib)?\s*", wanted, re.IGNORECASE)
    if not known and size is not None and float(size[1]) > 0:
        return _hardware(Card(f"a GPU of {size[1]} GB", int(float(size[1]) * GIB / MIB)))
    if not known:
        raise UserError(
            "this GPU is not known", field="--gpu", found=wanted, expected=", ".join(card.name for card in CARDS),
            fix="give its memory instead: --gpu 24GB",
        )  # fmt: skip
    return _hardware(min(known, key=lambda card: card.memory_mib))


def _hardware(card: Card) -> Hardware:
    return Hardware(
        torch.device("cuda"), card.name, card.bf16, card.fp8, card.usable_bytes, card.memory_mib * MIB, "--gpu"
    )  # fmt: skip


def smallest_card(needed_bytes: int) -> str | None:
    """The known card with the least memory that still has `needed_bytes` for tensors; None: there is none."""
    fitting = [card for card in CARDS if card.usable_bytes >= needed_bytes]
    return min(fitting, key=lambda card: card.memory_mib).name if fitting else None


def _plain(name: str) -> str:
    """A name without vendor, line and spelling: "NVIDIA GeForce RTX 4090" and "rtx4090" are one."""
    short = re.sub(r"nvidia|geforce|tesla|pcie|sxm\d?|laptop|gpu|tensor core", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", short)


def _spellings(name: str) -> set[str]:
    """The ways to name a card: whole, without RTX, without its memory (then the least memory is meant)."""
    whole = {name, name.replace("RTX ", "")}
    return {_plain(one) for one in whole | {re.sub(r" \d+GB$", "", one) for one in whole}}
