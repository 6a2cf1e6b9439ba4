"""A frozen weight as the tensors it is stored in: one class a storage, with the forms that products ask for.

The classes hold plain tensors for the time of a product. `tensors` takes one apart, so that autograd saves what it
knows, and `of` puts it together again in the backward pass. The modules that own the tensors are in
`engine.weights.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import library

from whet.engine.weights.fp8 import E4M3, FP8_MAX
from whet.engine.weights.nf4 import Packed, rebuild_nf4, rebuild_nf4_as_fp8

INT8_MAX = 127.0


class FrozenWeight:
    """A weight [N, K] that has no gradient."""

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All that it consists of."""
        raise NotImplementedError

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor | None]) -> FrozenWeight:
        """The weight of which `tensors` gave these."""
        return cls(*tensors)

    def again(self) -> FrozenWeight:
        """The same weight for the backward pass, which builds what it multiplies with anew.

        A compiler that sees the forward and the backward pass build the same dense weight builds it once and keeps it
        in between: for all layers that is the whole model in the arithmetic's type. So one small tensor goes through an
        operation that it cannot see into.
        """
        return self

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] in `dtype`."""
        raise NotImplementedError

    def fp8_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """e4m3 codes [N, K] and the scale of each output channel, float32 [N]."""
        raise NotImplementedError

    def fp8_columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same codes turned round [K, N], contiguous, and the scale of each output channel [N]."""
        codes, scale = self.fp8_rows()
        return codes.view(torch.uint8).t().contiguous().view(E4M3), scale


@dataclass(frozen=True)
class DenseWeight(FrozenWeight):
    """weight [N, K] in any floating type; it is not multiplied in FP8."""

    weight: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return (self.weight,)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)


@dataclass(frozen=True)
class Fp8Weight(FrozenWeight):
    """codes uint8 [N, K], the bytes of float8_e4m3fn; scale float32 [N]: weight = code * scale.

    turned: the bytes turned round [K, N], where both orders are kept.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    turned: torch.Tensor | None = None

    def again(self) -> Fp8Weight:
        return replace(self, scale=_unseen(self.scale))

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.codes, self.scale, self.turned

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.codes.view(E4M3).float() * self.scale[:, None]).to(dtype)

    def fp8_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.codes.view(E4M3), self.scale

    def fp8_columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        return super().fp8_columns() if self.turned is None else (self.turned.view(E4M3), self.scale)


@dataclass(frozen=True)
class Int8Weight(FrozenWeight):
    """codes int8 [N, K]; scale float32 [N]: weight = code * scale. As FP8 its codes are rounded a second time; factor:
    between the two ranges, as a tensor []."""

    codes: torch.Tensor
    scale: torch.Tensor
    factor: torch.Tensor | None = None

    def again(self) -> Int8Weight:
        factor = self.scale.new_full((), FP8_MAX / INT8_MAX)
        return replace(self, scale=_unseen(self.scale), factor=_unseen(factor))

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.codes, self.scale

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.codes.float() * self.scale[:, None]).to(dtype)

    def fp8_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        factor = FP8_MAX / INT8_MAX if self.factor is None else self.factor
        return (self.codes.float() * factor).to(E4M3), self.scale * (INT8_MAX / FP8_MAX)


@dataclass(frozen=True)
class Nf4Weight(FrozenWeight):
    """nf4 weights of one width K, one below the other; all of them have an `fp8_scale`, or none."""

    parts: tuple[Packed, ...]

    def again(self) -> Nf4Weight:
        return Nf4Weight(tuple(part._replace(code=_unseen(part.code)) for part in self.parts))

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(tensor for part in self.parts for tensor in part)

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor | None]) -> Nf4Weight:
        each = len(Packed._fields)
        return cls(tuple(Packed._make(tensors[start : start + each]) for start in range(0, len(tensors), each)))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return rebuild_nf4(self.parts, dtype)

    def fp8_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        return rebuild_nf4_as_fp8(self.parts, transposed=False), self._scales()

    def fp8_columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        return rebuild_nf4_as_fp8(self.parts, transposed=True), self._scales()

    def _scales(self) -> torch.Tensor:
        return torch.cat([part.fp8_scale for part in self.parts if part.fp8_scale is not None])


def _unseen(small: torch.Tensor) -> torch.Tensor:
    """`small`, of which a compiler cannot tell that it is the tensor that it was; uncompiled it stays itself."""
    return torch.ops.whet.unseen(small) if torch.compiler.is_compiling() else small


@library.custom_op("whet::unseen", mutates_args=())
def _unseen_copy(small: torch.Tensor) -> torch.Tensor:
    return small.clone()


@_unseen_copy.register_fake
def _(small):
    return torch.empty_like(small)
