"""What all tests share: a random tiny model and a small data set, made once, and quiet libraries."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch

from whet.base.console import quiet_libraries
from whet.recipe import Parsed

os.environ["WHET_LANG"] = "en"  # whatever language the machine speaks
torch.set_num_threads(1)  # the matrices are tiny, and waiting threads fight over two shared cores


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than cores: tests that wait for processes of their own leave theirs idle."""
    return 1 + len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


@pytest.fixture(scope="session", autouse=True)
def _no_cache() -> Iterator[None]:
    """Rows are made anew in every test, or a planted fault could go unseen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHET_CACHE", "off")
        yield


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    import transformers  # noqa: F401

    quiet_libraries()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in fp32 with the built-in tokenizer."""
    return tiny.save_model(tiny.llama(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 alpaca rows of very unequal length, some Korean."""
    return tiny.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", tiny.rows())


@pytest.fixture
def recipe(model_dir: Path, data_file: Path, tmp_path: Path) -> Callable[..., Parsed]:
    """Makes a recipe on the tiny model: `recipe(train__max_steps=3)`; out= names the directory under tmp_path."""

    def make(out: str = "run", **changes: object) -> Parsed:
        return tiny.recipe(model_dir, data_file, tmp_path / out, **changes)

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The conformance table in one line: promises kept of those made."""
    promise = "test_conformance.py::test_promise"
    found = {
        outcome: sum(promise in report.nodeid for report in terminalreporter.stats.get(outcome, ()))
        for outcome in ("passed", "failed")
    }
    if any(found.values()):
        made = found["passed"] + found["failed"]
        terminalreporter.write_line(f"conformance of methods: {found['passed']}/{made} promises kept")
