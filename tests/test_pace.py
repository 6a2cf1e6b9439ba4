"""Seconds of a step, foretold, against what an H100 and an H200 measured; and when nothing is said."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from whet.engine.device import Hardware
from whet.planning import pace, plan
from whet.planning.card_table import CARDS
from whet.planning.cards import known_card

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import pace as bench

FEW = ("8B fp8 and head 8x2048", "0.6B bf16 2x512", "8B nf4 bf16 2x2048 checkpointing", "0.6B bf16 4x1024 eager")


@pytest.fixture(autouse=True)
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers keep is counted elsewhere, and moves no time here but that of a layout."""
    monkeypatch.setattr(plan, "count_layers", lambda *given, **more: {})


def error(case: bench.Case) -> float:
    found = bench.planned(case)
    foretold = pace.pace_of(found.facts, found.layout).seconds
    assert foretold is not None
    return foretold / bench.measured(case) - 1


@pytest.mark.parametrize(
    "case",
    [case if case.name in FEW else pytest.param(case, marks=pytest.mark.proof) for case in bench.CASES],
    ids=lambda case: f"{case.card} {case.name}",
)
def test_a_step_is_foretold_within_15_per_cent(case: bench.Case) -> None:
    assert abs(error(case)) < 0.15


@pytest.fixture(scope="module")
def small() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "count_layers", lambda *given, **more: {})
        return bench.planned(next(case for case in bench.CASES if case.name == "8B nf4 bf16 2x2048"))


def on(name: str, found: Any) -> pace.Pace:
    hardware = Hardware(torch.device("cuda"), name, True, True, 80 << 30, 80 << 30)
    return pace.pace_of(replace(found.facts, hardware=hardware), found.layout)


def test_where_no_rate_is_known_there_is_none_and_a_reason(small: Any) -> None:
    for name in ("some other card", "a GPU of 24 GB", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 PCIe"):
        found = on(name, small)
        assert found.seconds is None
        assert found.reason
        assert found.as_dict()["seconds"] is None
    known = on("NVIDIA H100 80GB HBM3", small)
    assert known.rests_on == "steps measured on this kind of card"
    assert known.seconds == pytest.approx(sum(known.parts.values()))
    assert known.as_dict()["seconds"] == pytest.approx((known.seconds or 0) * known.steps)


def test_a_slower_card_takes_longer_and_every_layer_run_again_costs(small: Any) -> None:
    names = ("NVIDIA H200", "NVIDIA A100 80GB", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3090")
    seconds = [on(name, small).seconds or 0 for name in names]
    assert seconds == sorted(seconds)
    again = replace(small.layout, mode=replace(small.layout.mode, checkpointed_layers=31))
    more = pace.pace_of(small.facts, again).seconds or 0
    assert 1.3 < more / (pace.pace_of(small.facts, small.layout).seconds or 1) < 1.6


def test_a_step_that_is_not_captured_waits_for_the_host() -> None:
    case = next(case for case in bench.CASES if case.name == "0.6B bf16 4x1024 eager")
    found = bench.planned(case)
    assert pace.pace_of(found.facts, found.layout).parts["waiting for the host"] > 0
    graphs = replace(found.layout, cuda_graphs=True)
    assert "waiting for the host" not in pace.pace_of(found.facts, graphs).parts


def test_every_card_has_a_source_and_rates_in_order() -> None:
    for card in CARDS:
        assert 1 <= card.source <= 8
        assert (card.bandwidth or 0) > 100
        rates = [rate for rate in (card.fp32, card.bf16, card.fp8) if rate is not None]
        assert rates == sorted(rates)
    assert known_card("NVIDIA H100 80GB HBM3") is known_card("h100")
    assert known_card("nothing") is None


def test_on_a_cpu_a_product_is_measured() -> None:
    from whet.api import plan as planned

    found = planned({"data": {"max_length": 64}, "train": {"per_device_train_batch_size": 1, "max_steps": 10}})
    assert 0 < found["seconds_per_step"] < 600
    assert found["seconds"] == pytest.approx(10 * found["seconds_per_step"])
