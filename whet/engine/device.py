"""Where the model runs and in which arithmetic: found, never assumed, and said with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from whet.base.errors import UserError
from whet.engine.config import Base

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKED = ("nf4", "fp8", "int8")
FP8_WIDTH = 2048  # below it quantising the activations costs more than the products save


@dataclass(frozen=True)
class Placement:
    """Resolved `base` section. storage: fp32 | bf16 | fp8 | int8 | nf4; compute: dtype of the activations.

    fp8: products with packed weights run in FP8; keep_transposed: None leaves it to free memory; reasons: field to why.
    """

    device: torch.device
    storage: str
    compute: torch.dtype
    double_quant: bool
    reasons: dict[str, str]
    fp8: bool = False
    keep_transposed: bool | None = None
    fp8_head: bool = False
    offload_embedding: bool = False
    offload_head: bool = False

    @property
    def autocast(self) -> bool:
        """Whether fp32 weights are computed with in a shorter type."""
        return self.storage == "fp32" and self.compute != torch.float32

    @property
    def arithmetic(self) -> str:
        """What `base.compute` calls it: fp32 | bf16 | fp8."""
        return "fp8" if self.fp8 else "fp32" if self.compute == torch.float32 else "bf16"


def place(base: Base, storages: tuple[str, ...], width: int | None = None, *, stored: str | None = None) -> Placement:
    """Resolve `base` on this machine for a method that trains on `storages` and a model of hidden size `width`.

    stored: what the checkpoint is quantised as, if it is: kept where the recipe leaves it open.
    Raises UserError for a device that is not there; what cannot take effect together is refused by `planning.rules`.
    """
    reasons: dict[str, str] = {}
    device = torch.device(base.device or _found_device(reasons))
    _check_device(device)
    compute = base.compute or _compute(base, device, storages, width, reasons)
    storage = base.storage
    if storage is None and stored in storages:
        storage = stored
        reasons["base.storage"] = "how the checkpoint is stored"
    if storage is None:
        natural = "fp8" if compute == "fp8" else compute
        storage = natural if natural in storages else storages[0]
        reasons["base.storage"] = "suits the arithmetic" if storage == natural else "what the method trains on"
    inner, _ = _natural_compute(device) if compute == "fp8" else (compute, "")
    return Placement(
        device, storage, DTYPES[inner],
        base.double_quant if base.double_quant is not None else storage == "nf4",
        reasons, compute == "fp8", base.keep_transposed, base.fp8_head, base.offload_embedding,
        base.offload_head,
    )  # fmt: skip


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies FP8 in hardware."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _compute(
    base: Base, device: torch.device, storages: tuple[str, ...], width: int | None, reasons: dict[str, str]
) -> str:
    """The arithmetic when the recipe leaves it open."""
    if base.storage in ("fp32", "bf16"):
        return base.storage
    natural, reason = _natural_compute(device)
    if has_fp8(device) and "fp8" in storages and natural == "bf16" and (width or 0) >= FP8_WIDTH:
        natural, reason = "fp8", f"the GPU multiplies in FP8, and the model is {width} wide"
    reasons["base.compute"] = reason
    return natural


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return str(torch.cpu.get_capabilities().get("cpu_name", "CPU")).strip() or "CPU"
    return device.type


def _found_device(reasons: dict[str, str]) -> str:
    if torch.cuda.is_available():
        reasons["base.device"] = f"{torch.cuda.device_count()} CUDA device(s) found"
        return "cuda"
    if torch.backends.mps.is_available():
        reasons["base.device"] = "Apple GPU found"
        return "mps"
    reasons["base.device"] = "no GPU found"
    return "cpu"


def _check_device(device: torch.device) -> None:
    there = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if not there[device.type]():
        raise UserError(
            "this device is not available on this machine",
            field="base.device",
            found=device.type,
            expected=", ".join(name for name, check in there.items() if check()),
            fix="base.device=auto; `whet doctor` says what is installed",
        )


def _natural_compute(device: torch.device) -> tuple[str, str]:
    """The fastest type in which this hardware computes well, with the reason."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU computes in bf16"
        return "fp32", "the GPU has no bf16"
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        if found.get("amx_bf16") or found.get("avx512_bf16"):
            return "bf16", "the CPU has bf16 instructions"
        return "fp32", "the CPU has no bf16 instructions"
    return "fp32", "the safe choice on this device"
