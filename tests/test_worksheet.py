"""The numbers of docs/memory.md are those that `whet plan` reckons now."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
import worksheet  # noqa: E402

FEW = (("7B", "QLoRA"), ("13B", "full"))
ALL = [(size, way) for size in worksheet.SHAPES for way in worksheet.WAYS]


@pytest.mark.parametrize(
    ("size", "way"), [one if one in FEW else pytest.param(*one, marks=pytest.mark.proof) for one in ALL]
)
def test_a_row_of_the_worksheet_is_what_the_plan_says(size: str, way: str) -> None:
    line = worksheet.row(size, way, worksheet.planned(size, way))
    for page in worksheet.PAGES:
        table = worksheet.TABLE.search((DOCS / page).read_text(encoding="utf-8"))
        assert table is not None
        assert line in table[0]


def test_full_training_is_sixteen_bytes_a_parameter_and_qlora_near_half_a_byte() -> None:
    found = worksheet.planned("7B", "full")
    held = sum(found["memory"][name] for name in ("trained weights", "gradients", "optimiser"))
    assert held == 16 * found["all_params"]
    packed = worksheet.planned("7B", "QLoRA")
    tables = 2 * 2 * 32000 * 4096
    assert 0.51 < (packed["memory"]["frozen weights"] - tables) / (packed["all_params"] - 2 * 32000 * 4096) < 0.53
