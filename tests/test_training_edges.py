"""The small parts of a run, each by itself: which checkpoint is the newest, what a record holds, how Ctrl-C stops."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nets
import pytest
import torch

from whet.base.errors import UserError
from whet.training import checkpoint
from whet.training.checkpoint import Identity
from whet.training.interrupt import CtrlC
from whet.training.observers import MetricsLog
from whet.training.state import EvaluationReport, State, StepReport

OURS = Identity("recipe", "data")


class Quantised(nets.Sgd):
    """An optimiser whose moments are nested and share one table, as the 8-bit ones of bitsandbytes do."""

    def fill(self, table: torch.Tensor) -> None:
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            self.state[parameter] = {
                "step": number + 3, "state1": torch.full((2,), float(number)), "qmap1": table,
                "nested": {"absmax": torch.arange(2.0) + number, "qmap2": table},
            }  # fmt: skip


def model() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(2, 3)


def saved(directory: Path, step: int, network: Any = None, optimiser: Any = None) -> Path:
    network = network or model()
    optimiser = optimiser or nets.AdamW(network.parameters())
    return checkpoint.save(directory, step, network, optimiser, {"steps": step}, OURS)


def test_the_newest_checkpoint_is_the_one_of_the_highest_number(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        saved(tmp_path, step)
    assert checkpoint.latest(tmp_path, OURS) == (tmp_path / "step-100", [])
    (tmp_path / "step-100" / "state.json").write_text("{}", encoding="utf-8")
    path, complaints = checkpoint.latest(tmp_path, OURS)
    assert path == tmp_path / "step-10"
    assert len(complaints) == 1
    assert "step-100" in complaints[0]


def test_a_checkpoint_of_other_rows_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(UserError, match="rows have changed") as caught:
        checkpoint.latest(tmp_path, Identity("recipe", "other data"))
    assert caught.value.field == "data.dataset"


def test_the_newest_are_kept_by_number(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        saved(tmp_path, step)
    checkpoint.prune(tmp_path, 11, 2, [8])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11", "step-8"]


def test_tables_that_moments_share_come_back_for_each(tmp_path: Path) -> None:
    table = torch.linspace(-1, 1, 5)
    network = model()
    optimiser = Quantised(network.parameters(), lr=0.1)
    optimiser.fill(table)
    path = saved(tmp_path, 1, network, optimiser)
    again = Quantised(network.parameters(), lr=0.1)
    again.fill(torch.zeros(5))
    checkpoint.load(path, network, again)
    for number, parameter in enumerate(network.parameters()):
        state = again.state[parameter]
        assert state["step"] == number + 3
        assert torch.equal(state["state1"], torch.full((2,), float(number)))
        assert torch.equal(state["nested"]["absmax"], torch.arange(2.0) + number)
        assert torch.equal(state["qmap1"], table)
        assert torch.equal(state["nested"]["qmap2"], table)


def test_every_file_of_a_checkpoint_is_in_its_manifest(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text(encoding="utf-8"))
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {checkpoint.MANIFEST}
    for name in manifest["files"]:
        kept = (path / name).read_bytes()
        (path / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert checkpoint.latest(tmp_path, OURS)[0] is None, name
        (path / name).write_bytes(kept)
    assert checkpoint.latest(tmp_path, OURS)[0] == path


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def log_in(folder: Path, state: State | None = None, report_to: Sequence[str] = ()) -> MetricsLog:
    log = MetricsLog(folder / "metrics", folder / "timing", logging_steps=1, report_to=report_to)
    log.begin(state or State(), 100)
    return log


def done(step: int, loss: float = 1.5) -> StepReport:
    return StepReport(step, 0.5, loss, 0.001, 7.0, 30, 20, 10, 0.5, 0.1, 2**20)


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    for step in (1, 2):
        log.step_done(done(step))
        assert [line["step"] for line in lines(tmp_path / "metrics")] == list(range(1, step + 1))
        assert [line["step"] for line in lines(tmp_path / "timing")] == list(range(1, step + 1))
    log.close()


def test_each_file_goes_back_to_its_own_place(tmp_path: Path) -> None:
    log, state = log_in(tmp_path), State(step=1)
    log.step_done(done(1, 1.23456789))
    log.before_save(state)
    kept = [(tmp_path / name).read_bytes() for name in ("metrics", "timing")]
    assert [state.offsets["metrics"], state.offsets["timing"]] == [len(text) for text in kept]
    assert len(kept[0]) > len(kept[1])
    log.step_done(done(2, 2.0))
    log.close()
    again = log_in(tmp_path, state)
    assert [(tmp_path / name).read_bytes() for name in ("metrics", "timing")] == kept
    again.step_done(done(2, 3.0))
    again.close()
    assert [line["loss"] for line in lines(tmp_path / "metrics")] == [1.23456789, 3.0]


def test_tensorboard_gets_every_number_but_the_step(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = log_in(tmp_path, report_to=["tensorboard"])
    log.step_done(done(4, 2.5))
    log.evaluated(EvaluationReport(4, 0.5, 3.5, 20))
    log.close()
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    found = {name: [(one.step, one.value) for one in board.Scalars(name)] for name in board.Tags()["scalars"]}
    assert found["loss"] == [(4, 2.5)]
    assert found["eval_loss"] == [(4, 3.5)]
    assert found["epoch"] == [(4, 0.5), (4, 0.5)]
    assert found["tokens_per_second"] == [(4, 20.0)]
    assert not {"kind", "step"} & found.keys()


@pytest.fixture
def _ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts what runs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_is_heard")
def test_the_first_ctrl_c_asks_and_the_second_stops_at_once() -> None:
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def pressed_twice() -> None:
        with CtrlC(lambda: asked.append(1)):
            signal.raise_signal(signal.SIGINT)
            assert asked == [1]
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pressed_twice()
    assert asked == [1]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("_ctrl_c_is_heard")
def test_ctrl_c_is_pythons_own_again_after_the_block() -> None:
    before = signal.getsignal(signal.SIGINT)
    with CtrlC(lambda: None):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_run_in_another_thread_leaves_ctrl_c_alone() -> None:
    found: list[Any] = []

    def run() -> None:
        try:
            with CtrlC(lambda: None):
                found.append(signal.getsignal(signal.SIGINT))
        except ValueError as error:
            found.append(error)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
