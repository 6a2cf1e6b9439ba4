"""Every method on every task keeps every promise, and each check sees the fault that it is there for."""

from __future__ import annotations

import warnings

import conformance
import pytest
import torch
from conformance import CHECKS, Case, cases
from sampled import sampled

from whet.methods.lora import Lora

ALL = cases()
CHEAP = ("freeze", "start", "gradient", "nf4")
WHOLE = ("lora", "full")  # methods whose every promise is tried by `make test`


def often(part: tuple[str, Case]) -> bool:
    """Cheap checks for all; the others for one task of each method, in turn, and compiling for every fourth method."""
    check, case = part
    if check in CHEAP or case.method.name in WHOLE:
        return True
    place = [*conformance.METHODS].index(case.method.name)
    if check == "compile":
        return case.task == "causal" and place % 4 == 0
    tasks = [other.task for other in ALL if other.method.name == case.method.name]
    return case.task == tasks[(place + [*CHECKS].index(check)) % len(tasks)]


@pytest.mark.parametrize(
    ("check", "case"),
    sampled([(check, case) for check in CHECKS for case in ALL], often),
    ids=lambda part: part.name if isinstance(part, Case) else part,
)
def test_promise(check: str, case: Case) -> None:
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
