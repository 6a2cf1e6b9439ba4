"""Known GPUs: memory, peak rates of their arithmetic and bandwidth, each line with where it is from.

Memory is what the driver reports (MiB), which is a little other than the name says. Rates are dense ones, with sums in
float32, at the boost clock, in 10^12 operations a second; None: not in hardware. Where a data sheet gives the rate with
sparsity, this is half of it. Bandwidth is in 10^9 bytes a second.

Sources: [1] NVIDIA Ampere GA102 whitepaper, appendix; [2] NVIDIA Ada whitepaper, appendix; [3] from its tensor cores
and boost clock by the operations of a core and clock that the whitepaper of its architecture gives (128 in 16 bits);
[4] NVIDIA RTX Blackwell whitepaper, appendix; [5] the card's data sheet by NVIDIA; [6] NVIDIA A100 data sheet, SXM
form; [7] NVIDIA H100 data sheet, SXM form; [8] NVIDIA H200 data sheet, SXM form.

Gives up: other forms of a name (PCIe, laptops, lowered power), which are slower.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """memory_mib: as its driver reports it; bf16, fp8, fp32: peak rates in TFLOP/s; bandwidth: in GB/s; source: the
    number of a source above."""

    name: str
    memory_mib: int
    bf16: float | None = None
    fp8: float | None = None
    fp32: float | None = None
    bandwidth: float | None = None
    source: int = 0


CARDS = (
    Card("RTX 3060", 12288, 25.5, None, 12.7, 360, 3), Card("RTX 3080", 10240, 59.5, None, 29.8, 760, 1),
    Card("RTX 3090", 24576, 71.0, None, 35.6, 936, 1), Card("RTX 4060 Ti 16GB", 16380, 44.1, 88.3, 22.1, 288, 3),
    Card("RTX 4070", 12282, 58.3, 116.6, 29.1, 504, 3), Card("RTX 4080", 16376, 97.5, 194.9, 48.7, 717, 2),
    Card("RTX 4090", 24564, 165.2, 330.3, 82.6, 1008, 2), Card("RTX 5090", 32607, 209.5, 419.0, 104.8, 1792, 4),
    Card("T4", 15360, None, None, 8.1, 320, 5), Card("V100 16GB", 16384, None, None, 15.7, 900, 5),
    Card("V100 32GB", 32768, None, None, 15.7, 900, 5), Card("A10", 23028, 125.0, None, 31.2, 600, 5),
    Card("A10G", 23028, 70.0, None, 35.0, 600, 5), Card("L4", 23034, 121.0, 242.5, 30.3, 300, 5),
    Card("A40", 46068, 149.7, None, 37.4, 696, 5), Card("RTX A6000", 49140, 154.8, None, 38.7, 768, 5),
    Card("L40S", 46068, 362.0, 733.0, 91.6, 864, 5), Card("RTX 6000 Ada", 49140, 364.2, 728.5, 91.1, 960, 5),
    Card("A100 40GB", 40960, 312.0, None, 19.5, 1555, 6), Card("A100 80GB", 81920, 312.0, None, 19.5, 2039, 6),
    Card("H100 80GB", 81559, 989.4, 1978.9, 66.9, 3352, 7), Card("H200", 143771, 989.4, 1978.9, 66.9, 4800, 8),
)  # fmt: skip
