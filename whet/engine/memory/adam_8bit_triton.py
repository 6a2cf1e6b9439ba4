"""AdamW with moments of 8 bits in one launch: a program for each 256 numbers of any tensor, which finds its tensor in a
table of addresses. Its plain form stands in `engine.memory.adam_8bit`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

from whet.engine.memory.adam_8bit import BLOCK, Sizes, Verdict, dynamic_codes

NAMES = ("state1", "state2", "absmax1", "absmax2")
COLUMNS = 7  # of the table: weights, both moments, the scales of both, numbers, first program


@triton.jit
def _nearest(x, middles):
    """How many of the 255 middles lie below x: the index of the nearest code."""
    code = tl.zeros(x.shape, tl.int32)
    for shift in tl.static_range(8):
        step = 128 >> shift
        middle = tl.load(middles + code + (step - 1))
        code = tl.where(x > middle, code + step, code)
    return code


@triton.jit
def _update_kernel(
    table, owner, gradients, steps, epsilons, shrinks, grad_scale, skip, values1, middles1, values2, middles2,
    beta1, rest1, beta2, rest2,
    SCALED: tl.constexpr, MAY_SKIP: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of the tensor `owner[program]`."""
    index = tl.load(owner + tl.program_id(0))
    row = table + index * COLUMNS
    address = tl.load(gradients + index)
    if MAY_SKIP:
        address = tl.where(tl.load(skip) == 0.0, address, 0)
    if address != 0:
        block = tl.program_id(0) - tl.load(row + 6)
        place = block * BLOCK + tl.arange(0, BLOCK)
        inside = place < tl.load(row + 5)
        g = tl.load(address.to(tl.pointer_type(tl.float32)) + place, mask=inside, other=0.0)
        if SCALED:
            g = g / tl.load(grad_scale)
        weights = tl.load(row).to(tl.pointer_type(tl.float32)) + place
        first, second, scales = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        step, epsilon, shrink = tl.load(steps + index), tl.load(epsilons + index), tl.load(shrinks + index)
        p = tl.load(weights, mask=inside, other=0.0)
        if scales == 0:
            wide1, wide2 = first.to(tl.pointer_type(tl.float32)) + place, second.to(tl.pointer_type(tl.float32)) + place
            m = tl.load(wide1, mask=inside, other=0.0) * beta1 + rest1 * g
            v = tl.load(wide2, mask=inside, other=0.0) * beta2 + rest2 * g * g
            tl.store(wide1, m, mask=inside)
            tl.store(wide2, v, mask=inside)
            tl.store(weights, (p - step * (m / (tl.sqrt(v) + epsilon))) * shrink, mask=inside)
        else:
            codes1, codes2 = first.to(tl.pointer_type(tl.uint8)) + place, second.to(tl.pointer_type(tl.uint8)) + place
            scale1 = scales.to(tl.pointer_type(tl.float32)) + block
            scale2 = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + block
            code1 = tl.load(codes1, mask=inside, other=0).to(tl.int32)
            code2 = tl.load(codes2, mask=inside, other=0).to(tl.int32)
            m = tl.load(values1 + code1) * tl.load(scale1) * beta1 + rest1 * g
            v = tl.load(values2 + code2) * tl.load(scale2) * beta2 + rest2 * g * g
            m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)
            tl.store(weights, (p - step * (m / (tl.sqrt(v) + epsilon))) * shrink, mask=inside)
            largest1, largest2 = tl.max(tl.abs(m), axis=0), tl.max(v, axis=0)
            tl.store(scale1, largest1)
            tl.store(scale2, largest2)
            code1 = _nearest(m / tl.where(largest1 > 0, largest1, 1.0), middles1)
            positive = tl.load(values1 + code1) >= 0
            up, down = (m > 0) & (positive == 0), (m < 0) & positive  # a moment keeps its sign
            code1 = code1 + up.to(tl.int32) - down.to(tl.int32)
            code2 = _nearest(v / tl.where(largest2 > 0, largest2, 1.0), middles2)
            tl.store(codes1, code1.to(tl.uint8), mask=inside)
            tl.store(codes2, code2.to(tl.uint8), mask=inside)


class Launch:
    """All updates of `parameters` in one launch; their weights and states may not move."""

    def __init__(self, parameters: Sequence[torch.Tensor], states: Sequence[Mapping[str, torch.Tensor]]) -> None:
        device, first, rows, owner = parameters[0].device, 0, [], []
        for index, (parameter, state) in enumerate(zip(parameters, states, strict=True)):
            assert parameter.dtype == torch.float32, "trained weights are float32"
            assert parameter.is_contiguous(), "the kernel reads numbers in their order"
            places = [state[name].data_ptr() if name in state else 0 for name in NAMES]
            rows.append([parameter.data_ptr(), *places, parameter.numel(), first])
            blocks = -(-parameter.numel() // BLOCK)
            owner.append(torch.full((blocks,), index, dtype=torch.int32))
            first += blocks
        self.programs = first
        self.table, self.owner = torch.tensor(rows, device=device), torch.cat(owner).to(device)
        self.codes = [dynamic_codes(device, signed=signed) for signed in (True, False)]

    def run(self, gradients: torch.Tensor, sizes: Sizes, betas: tuple[float, float], verdict: Verdict) -> None:
        """gradients: their addresses, int64 [P], 0 where there is none."""
        signed, unsigned = self.codes
        scale, skip = verdict.grad_scale, verdict.skip
        kernel: Any = _update_kernel
        kernel[(self.programs,)](
            self.table, self.owner, gradients, sizes.step, sizes.epsilon, sizes.shrink,
            sizes.step if scale is None else scale, sizes.step if skip is None else skip,
            signed.values, signed.middles, unsigned.values, unsigned.middles,
            betas[0], 1 - betas[0], betas[1], 1 - betas[1],
            SCALED=scale is not None, MAY_SKIP=skip is not None, COLUMNS=COLUMNS, BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
