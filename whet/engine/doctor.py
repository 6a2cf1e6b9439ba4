"""What is installed, what is missing and what that costs, and a two-second test that the arithmetic is right."""

from __future__ import annotations

import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from whet.engine.compute.head import HeadLoss
from whet.engine.config import Base
from whet.engine.device import device_name, resolve_placement

NEEDED = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pydantic", "ruamel.yaml")
OPTIONAL = {
    "bitsandbytes": ("gpu", "no nf4 storage (QLoRA), no 8-bit optimisers"),
    "pyarrow": ("data", "no Parquet and Arrow files"),
    "sacrebleu": ("eval", "no BLEU and chrF"),
    "rouge-score": ("eval", "no ROUGE-L"),
    "tensorboard": ("trackers", "no TensorBoard logs"),
} | ({"backports.zstd": ("data", "no .zst files")} if sys.version_info < (3, 14) else {})


def examine() -> dict[str, Any]:
    """Packages, devices and the self-test, as `whet doctor --json` prints them."""
    placement = resolve_placement(Base(), ("fp32", "bf16", "nf4"))
    began = time.perf_counter()
    checks = self_test(placement.device)
    return {
        "packages": {name: _version(name) for name in NEEDED},
        "optional": {
            name: {"version": _version(name), "extra": f"whet[{extra}]", "without": cost}
            for name, (extra, cost) in OPTIONAL.items()
        },
        "device": placement.device.type,
        "device_name": device_name(placement.device),
        "compute": "fp32" if placement.compute == torch.float32 else "bf16",
        "memory_bytes": _device_memory(placement.device),
        "reasons": placement.reasons,
        "self_test": checks,
        "self_test_seconds": round(time.perf_counter() - began, 2),
    }


def self_test(device: torch.device) -> list[dict[str, Any]]:
    """Checks with their error and limit: products, the fused loss against float64, LoRA, nf4 where it is installed."""
    torch.manual_seed(0)
    results = [_check("matrix product, fp32", *_product(device), 1e-4)]
    results.append(_check("fused loss against float64", *_loss(device), 1e-4))
    results.append(_check("gradient of the fused loss against float64", *_loss_gradient(device), 1e-4))
    if _version("bitsandbytes") is not None:
        results.append(_check("nf4 round trip (relative error)", *_nf4(device), 0.12))
    return results


def _check(name: str, found: torch.Tensor, wanted: torch.Tensor, limit: float) -> dict[str, Any]:
    exact = wanted.detach().double().cpu()
    error = float((found.detach().double().cpu() - exact).norm() / exact.norm())
    return {"check": name, "error": error, "limit": limit, "ok": error <= limit}


def _product(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(256, 512, dtype=torch.float64), torch.randn(512, 128, dtype=torch.float64)
    return a.float().to(device) @ b.float().to(device), a @ b


def _head(device: torch.device) -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(40, 64, device=device).requires_grad_()
    weight = torch.randn(1000, 64, device=device)
    targets = torch.randint(0, 1000, (40,), device=device)
    return hidden, weight, targets


def _loss(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight, targets = _head(device)
    logits = hidden.detach().cpu().double() @ weight.cpu().double().t()
    wanted = torch.nn.functional.cross_entropy(logits, targets.cpu(), reduction="sum")
    return HeadLoss.apply(hidden, weight, None, targets, None).sum(), wanted  # type: ignore[union-attr]


def _loss_gradient(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight, targets = _head(device)
    HeadLoss.apply(hidden, weight, None, targets, None).sum().backward()  # type: ignore[union-attr]
    exact = hidden.detach().cpu().double().requires_grad_()
    logits = exact @ weight.cpu().double().t()
    torch.nn.functional.cross_entropy(logits, targets.cpu(), reduction="sum").backward()
    assert hidden.grad is not None
    assert exact.grad is not None
    return hidden.grad, exact.grad


def _nf4(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    from whet.engine.weights.linear import freeze

    linear = torch.nn.Linear(256, 256, device=device)
    frozen = freeze(linear, "nf4")
    assert frozen is not None
    return frozen.dense(torch.float32), linear.weight.detach()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
