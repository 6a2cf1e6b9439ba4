"""Where the model runs and in which arithmetic: found, never assumed, and said with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from whet.base.errors import UserError
from whet.engine.config import Base

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """Resolved `base` section. storage: fp32 | bf16 | nf4; compute: dtype of the arithmetic; reasons: field to why."""

    device: torch.device
    storage: str
    compute: torch.dtype
    double_quant: bool
    reasons: dict[str, str]

    @property
    def autocast(self) -> bool:
        """Whether fp32 weights are computed with in a shorter type."""
        return self.storage == "fp32" and self.compute != torch.float32


def place(base: Base, storages: tuple[str, ...]) -> Placement:
    """Resolve `base` on this machine for a method that trains on `storages`.

    Raises UserError for a device that is not there and for settings that cannot take effect together.
    """
    reasons: dict[str, str] = {}
    device = torch.device(base.device or _found_device(reasons))
    _check_device(device)
    compute = base.compute
    if compute is None and base.storage in ("fp32", "bf16"):
        compute = base.storage
    if compute is None:
        compute, reasons["base.compute"] = _natural_compute(device)
    storage = base.storage
    if storage is None:
        storage = compute if compute in storages else storages[0]
        reasons["base.storage"] = "the compute type" if storage == compute else "what the method trains on"
    if storage not in storages:
        raise UserError(
            "this method cannot train on this storage",
            field="base.storage",
            found=storage,
            expected=" or ".join(storages),
            fix=f"base.storage={storages[0]}, or method=lora",
        )
    if storage == "bf16" and compute == "fp32":
        raise UserError(
            "weights stored as bf16 are computed with in bf16",
            field="base.compute",
            found=compute,
            expected="bf16 or auto",
            fix="base.storage=fp32",
        )
    if base.double_quant is not None and storage != "nf4":
        raise UserError(
            "double quantisation is a property of nf4 storage and would do nothing here",
            field="base.double_quant",
            found=str(base.double_quant).lower(),
            expected="auto",
            fix="base.storage=nf4, or remove the line",
        )
    double_quant = base.double_quant if base.double_quant is not None else storage == "nf4"
    return Placement(device, storage, DTYPES[compute], double_quant, reasons)


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
