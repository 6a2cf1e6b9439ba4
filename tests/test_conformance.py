"""Every method on every task keeps every promise, and each check sees the fault that it is there for."""

from __future__ import annotations

import warnings

import conformance
import pytest
import torch
from conformance import CHECKS, Case, cases

from whet.methods.lora import Lora

ALL = cases()


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
@pytest.mark.parametrize("check", CHECKS)
def test_promise(case: Case, check: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        promised = CHECKS[check][0](case)
    if not promised:
        pytest.skip(f"{case.method.name} does not promise it for {case.task}")


@pytest.mark.parametrize("task", ["causal", "classification", "seq2seq"])
@pytest.mark.parametrize("check", CHECKS)
def test_a_planted_fault_is_seen(check: str, task: str) -> None:
    case, (run, fault) = Case(Lora(), task), CHECKS[check]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if check == "compile" and task != "causal":
            pytest.skip("only decoders are compiled")
        with pytest.raises((AssertionError, torch._dynamo.exc.TorchDynamoException)):
            run(case, fault)


def test_there_is_a_check_for_every_promise() -> None:
    assert set(CHECKS) >= {"freeze", "start", "gradient", "round trip", "merge", "nf4", "compile", "resume", "peft"}
    assert {case.method.name for case in ALL} == set(conformance.METHODS)
