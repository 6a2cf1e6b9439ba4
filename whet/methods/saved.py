"""What was saved, compared with what was trained, before anybody relies on it: tensor by tensor, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from whet.base.errors import UserError


def compare_tensors(
    file: Path, wanted: Mapping[str, torch.Tensor], *, cast: torch.dtype | None = None, all_of_them: bool = True
) -> None:
    """Raise UserError unless the tensors of `file` are those of `wanted`, one at a time.

    cast: the type that they were written in; all_of_them: each of `wanted` is in this file. A tensor may be larger than
    the wanted one, which then stands at its beginning: an adapter that takes weights out of its base is saved with
    where it started (`methods.initial.rewrite`).
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as saved:
            names = set(saved.keys())
            if absent := sorted(wanted.keys() - names) if all_of_them else []:
                raise _unlike(file, absent[0], "is not in the file")
            for name in sorted(names & wanted.keys()):
                if not _begins_with(saved.get_tensor(name), wanted[name], cast):
                    raise _unlike(file, name, "has other numbers in the file")
    except (OSError, SafetensorError) as error:
        raise _unlike(file, file.name, f"cannot be read: {error}") from error


def _begins_with(found: torch.Tensor, wanted: torch.Tensor, cast: torch.dtype | None) -> bool:
    """Whether `found` has the numbers of `wanted` in its first rows and columns, bit for bit."""
    now = wanted.detach().to("cpu", cast or wanted.dtype if wanted.is_floating_point() else wanted.dtype)
    sizes = list(zip(found.shape, now.shape, strict=False))
    if found.ndim != now.ndim or found.dtype != now.dtype or any(more < size for more, size in sizes):
        return False
    part = found[tuple(slice(0, size) for _, size in sizes)].contiguous()
    return torch.equal(part.view(torch.uint8), now.contiguous().view(torch.uint8)) if now.ndim else bool(part == now)


def _unlike(file: Path, name: str, problem: str) -> UserError:
    return UserError(
        "what was saved is not what was trained", file=str(file), found=f"{name} {problem}",
        expected="every trained tensor, bit for bit",
        fix="look at the disk; the checkpoints are intact, and the same command writes it again",
    )  # fmt: skip
