"""Several adapters on one base: each answers as it does alone, composing adds up, names and files stay whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from whet.adapters.files import describe, find
from whet.adapters.loaded import Adapters
from whet.base.errors import UserError
from whet.base.files import hidden_beside
from whet.engine.config import Model
from whet.engine.device import Placement
from whet.engine.load.load import load_model
from whet.methods.layers.adapter import attach_adapter
from whet.methods.lora import Lora
from whet.ship.compose import delete_on_disk, rename_on_disk

CPU = Placement(torch.device("cpu"), "fp32", torch.float32, True, {})
IDS = torch.randint(3, tiny.VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))


def fresh(model_dir: Path) -> Any:
    return load_model(Model(path=str(model_dir)), CPU)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits.float()


@pytest.fixture
def pair(model_dir: Path, tmp_path: Path) -> list[Path]:
    """Two adapters of different rank with random weights, as runs leave them."""
    for index, rank in enumerate((2, 3)):
        torch.manual_seed(index)
        method = Lora(r=rank)
        model = method.attach(fresh(model_dir))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
        place = tmp_path / "runs" / f"run{index}" / "adapter"
        place.mkdir(parents=True)
        (place.parent / "recipe.yaml").write_text(f"method: {{name: lora, r: {rank}}}\n", encoding="utf-8")
        method.save(model, place)
    return [tmp_path / "runs" / f"run{index}" for index in range(2)]


def alone(model_dir: Path, run: Path) -> torch.Tensor:
    return logits(attach_adapter(fresh(model_dir), run / "adapter"))


def deltas(adapters: Adapters, name: str) -> list[torch.Tensor]:
    from peft.tuners.lora.layer import LoraLayer

    inside = adapters._known(name)
    return [m.get_delta_weight(inside).detach() for m in adapters.network.modules() if isinstance(m, LoraLayer)]


def both(model_dir: Path, pair: list[Path]) -> Adapters:
    adapters = Adapters(fresh(model_dir))
    adapters.load("one", pair[0])
    adapters.load("two", pair[1])
    return adapters


def test_each_answers_as_alone_and_none_is_the_base(model_dir: Path, pair: list[Path]) -> None:
    adapters = both(model_dir, pair)
    base = logits(fresh(model_dir))
    for name, run in (("one", pair[0]), ("two", pair[1]), ("one", pair[0])):
        with adapters.using(name) as network:
            torch.testing.assert_close(logits(network), alone(model_dir, run), rtol=0, atol=1e-6)
    with adapters.using(None) as network:
        assert torch.equal(logits(network), base)
    assert not torch.allclose(alone(model_dir, pair[0]), alone(model_dir, pair[1]), atol=1e-3)
    assert not torch.allclose(alone(model_dir, pair[0]), base, atol=1e-3)


def test_none_in_use_is_the_base_until_another_is_used(model_dir: Path, pair: list[Path]) -> None:
    adapters, base = both(model_dir, pair), logits(fresh(model_dir))
    assert adapters.in_use is None
    assert torch.equal(logits(adapters.network), base)
    adapters.use("two")
    torch.testing.assert_close(logits(adapters.network), alone(model_dir, pair[1]), rtol=0, atol=1e-6)
    adapters.use(None)
    assert torch.equal(logits(adapters.network), base)
    with adapters.using("one") as network:
        torch.testing.assert_close(logits(network), alone(model_dir, pair[0]), rtol=0, atol=1e-6)
    assert torch.equal(logits(adapters.network), base)
    adapters.compose("sum", ["one", "two"])
    adapters.delete("one")
    assert torch.equal(logits(adapters.network), base)
    with pytest.raises(UserError):
        adapters.load("three", pair[0].parent)
    assert torch.equal(logits(adapters.network), base)


def test_cat_is_the_weighted_sum_and_linear_is_not(model_dir: Path, pair: list[Path]) -> None:
    adapters = both(model_dir, pair)
    adapters.compose("sum", ["one", "two"], [0.5, 2.0])
    wanted = [0.5 * a + 2.0 * b for a, b in zip(deltas(adapters, "one"), deltas(adapters, "two"), strict=True)]
    for found, want in zip(deltas(adapters, "sum"), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    adapters.compose("best", ["one", "two"], [0.5, 2.0], how="svd", rank=5)  # 5 = 2 + 3: nothing is lost
    for found, want in zip(deltas(adapters, "best"), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
    adapters.compose("small", ["one", "two"], [0.5, 2.0], how="svd", rank=1)
    worst = max(float((f - w).norm() / w.norm()) for f, w in zip(deltas(adapters, "small"), wanted, strict=True))
    assert worst > 0.05


def test_linear_mixes_the_factors(model_dir: Path, pair: list[Path], tmp_path: Path) -> None:
    adapters = Adapters(fresh(model_dir))
    adapters.load("one", pair[0])
    adapters.load("same", pair[0])
    adapters.compose("mean", ["one", "same"], [0.5, 0.5], how="linear")  # of equal parts it is that part
    for found, want in zip(deltas(adapters, "mean"), deltas(adapters, "one"), strict=True):
        torch.testing.assert_close(found, 2 * want, rtol=1e-4, atol=1e-5)  # (sqrt .5 + sqrt .5)^2, not .5 + .5


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_thinned_compositions_of_one_dense_adapter_are_it(model_dir: Path, pair: list[Path], how: Any) -> None:
    adapters = both(model_dir, pair)
    adapters.compose("same", ["one"], [1.0], how=how, density=1.0)
    for found, want in zip(deltas(adapters, "same"), deltas(adapters, "one"), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)


def test_a_written_composition_opens_alone(model_dir: Path, pair: list[Path], tmp_path: Path) -> None:
    adapters = both(model_dir, pair)
    adapters.compose("sum", ["one", "two"])
    with adapters.using("sum") as network:
        live = logits(network)
    out = adapters.write("sum", tmp_path / "sum", {"parts": ["one", "two"]})
    torch.testing.assert_close(logits(attach_adapter(fresh(model_dir), out)), live, rtol=0, atol=1e-5)
    assert json.loads((out / "whet_composed.json").read_text())["parts"] == ["one", "two"]
    assert describe(out).rank == 5
    with pytest.raises(UserError, match="in the way"):
        adapters.write("sum", out)


def test_rename_and_delete(model_dir: Path, pair: list[Path]) -> None:
    adapters = both(model_dir, pair)
    adapters.use("one")
    adapters.rename("one", "first")
    assert adapters.in_use == "first"
    torch.testing.assert_close(logits(adapters.network), alone(model_dir, pair[0]), rtol=0, atol=1e-6)
    adapters.delete("first")
    assert adapters.names == ["two"]
    with adapters.using("two") as network:
        torch.testing.assert_close(logits(network), alone(model_dir, pair[1]), rtol=0, atol=1e-6)
    adapters.delete("two")
    assert torch.equal(logits(adapters.network), logits(fresh(model_dir)))
    adapters.load("two", pair[1])
    with adapters.using("two") as network:
        torch.testing.assert_close(logits(network), alone(model_dir, pair[1]), rtol=0, atol=1e-6)


def test_bad_names_and_parts_are_refused(model_dir: Path, pair: list[Path], tmp_path: Path) -> None:
    adapters = both(model_dir, pair)
    for bad, words in (
        (lambda: adapters.load("one", pair[1]), "taken"),
        (lambda: adapters.load("three", tmp_path), "no adapter here"),
        (lambda: adapters.use("onw"), "no such adapter"),
        (lambda: adapters.compose("two", ["one"]), "taken"),
        (lambda: adapters.compose("x", ["one", "two"], [1.0]), "one weight"),
        (lambda: adapters.compose("x", ["one", "tow"]), "no such adapter"),
        (lambda: adapters.compose("x", ["one"], how="tie"), "no such way"),  # type: ignore[arg-type]
        (lambda: adapters.compose("x", ["one"], how="ties", density=0.0), "share"),
        (lambda: adapters.compose("x", ["one", "two"], [1.0, -1.0], how="linear"), "square root"),
        (lambda: adapters.compose("x", ["one", "two"], how="linear"), "composed"),  # ranks differ
    ):
        with pytest.raises(UserError, match=words):
            bad()
    assert adapters.names == ["one", "two"]


@pytest.mark.parametrize(
    "more",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}, {"name": "ia3"}],
    ids=lambda more: next(iter(more)),
)
def test_what_composing_would_lose_is_refused(model_dir: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    from whet.methods.bridge import Bridge

    method: Any = Bridge(**more) if "name" in more else Lora(r=2, **more)
    method.save(method.attach(fresh(model_dir)), _made(tmp_path / "one"))
    adapters = Adapters(fresh(model_dir))
    adapters.load("one", tmp_path / "one")
    with pytest.raises(UserError, match="only plain LoRA"):
        adapters.compose("same", ["one"])


def _made(place: Path) -> Path:
    place.mkdir(parents=True)
    return place


def test_on_disk(model_dir: Path, pair: list[Path], tmp_path: Path) -> None:
    found = find(tmp_path / "runs")
    assert [one.name for one in found] == ["run0", "run1"]
    assert [one.rank for one in found] == [2, 3]
    assert all(one.kind == "lora" and one.parameters > 0 for one in found)
    with pytest.raises(UserError, match="belongs to its run"):
        delete_on_disk(pair[0])
    adapters = both(model_dir, pair)
    adapters.write("one", tmp_path / "copy")
    moved = rename_on_disk(tmp_path / "copy", tmp_path / "kept")
    (moved / "thesis.docx").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="other files"):
        delete_on_disk(moved)
    (moved / "thesis.docx").unlink()
    (tmp_path / "recipe.yaml").write_text("seed: 0\n", encoding="utf-8")  # of somebody, not of a run
    moved = rename_on_disk(moved, tmp_path / "again")
    left = hidden_beside(moved, ".old")  # a call that was killed
    shutil.copytree(moved, left)
    delete_on_disk(moved)
    assert not moved.exists()
    assert not left.exists()
    (pair[0] / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read"):
        describe(pair[0])


def told(*words: str) -> Any:
    """The object that the command prints."""
    import contextlib
    import io

    from whet.cli import run

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run([*words, "--json"])
    return code, json.loads(out.getvalue())


def test_the_command_line(model_dir: Path, recipe: Any, tmp_path: Path) -> None:
    from whet.ship.chat import open_chat
    from whet.training.run import train

    runs = [
        train(recipe(**{"output_dir": str(tmp_path / "runs" / name), "train.seed": seed, "train.max_steps": 2}))
        for seed, name in enumerate(("one", "two"))
    ]
    code, listed = told("adapters", "list", str(tmp_path / "runs"))
    assert code == 0
    assert [row["name"] for row in listed["adapters"]] == ["one", "two"]
    out = tmp_path / "both"
    parts = [str(run.path) for run in runs]
    code, made = told("adapters", "compose", str(out), *parts, "--weights", "0.5,0.5")
    assert (code, made["adapter"]) == (0, str(out))
    assert (out / "whet_template.json").is_file()
    note = json.loads((out / "whet_composed.json").read_text())
    assert note["parts"] == parts
    chat = open_chat(str(out), max_new_tokens=3)
    assert chat.adapters.in_use == "both"  # type: ignore[union-attr]
    code, again = told("adapters", "compose", str(out), *parts)
    assert (code, "in the way" in again["error"]["problem"]) == (2, True)
    code, moved = told("adapters", "rename", str(out), str(tmp_path / "kept"))
    assert (code, Path(moved["adapter"]).is_dir()) == (0, True)
    assert told("adapters", "delete", str(tmp_path / "kept"))[0] == 0
    assert not (tmp_path / "kept").exists()
    assert told("adapters", "delete", parts[0])[0] == 2
    assert told("adapters", "rename", parts[0])[0] == 2
    assert told("adapters", "compose", str(out), *parts, "--weights", "a,b")[0] == 2


def test_a_chat_switches(model_dir: Path, recipe: Any, tmp_path: Path) -> None:
    from whet.data.example import Message
    from whet.ship.chat import open_chat
    from whet.training.run import train

    runs = [
        train(recipe(**{
            "output_dir": str(tmp_path / name), "train.seed": seed, "train.max_steps": 4, "train.learning_rate": 5e-2,
        }))
        for seed, name in enumerate(("one", "two"))
    ]  # fmt: skip
    asked = [Message("user", "the quick brown fox")]
    alone = {run.path.name: open_chat(str(run.path), max_new_tokens=6).reply(asked) for run in runs}
    base = open_chat(runs[0].recipe.model.path, max_new_tokens=6).reply(asked)
    assert len({*alone.values(), base}) == 3, "the answers do not tell the adapters apart"
    both = open_chat(str(runs[0].path), max_new_tokens=6, beside={"other": str(runs[1].path)})
    said = [both.reply(asked)]
    for name in ("other", "base", "one"):
        both.use(name)  # type: ignore[union-attr]
        said.append(both.reply(asked))
    assert said == [alone["one"], alone["two"], base, alone["one"]]
    with pytest.raises(UserError, match="no such adapter"):
        both.use("onee")  # type: ignore[union-attr]


def test_what_was_composed_is_scored_and_merged(model_dir: Path, recipe: Any, data_file: Path, tmp_path: Path) -> None:
    import whet
    from whet.training.run import train

    parts = [
        train(recipe(**{"output_dir": str(tmp_path / name), "train.seed": seed, "train.max_steps": 2})).path
        for seed, name in enumerate(("one", "two"))
    ]
    out = whet.compose(tmp_path / "both", parts, weights=[0.5, 0.5])
    assert "More Information Needed" not in (out / "README.md").read_text(encoding="utf-8")
    found = whet.merge(out, tmp_path / "merged", data=str(data_file))
    assert found["kl"] < 1e-4
    assert whet.evaluate(out, data=str(data_file), max_rows=2)["rows"] > 0
    code, told_of = told("eval", str(out), "--data", str(data_file), "--max-rows", "1")
    assert (code, "tuned" in told_of) == (0, True)
    assert told("merge", str(out), str(tmp_path / "again"), "--data", str(data_file))[0] == 0


def test_the_list_has_every_run_whole_paths_and_scores(
    recipe: Any, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess
    import sys

    import whet
    from whet.cli import run as whet_command
    from whet.recipe import parse
    from whet.training.run import train

    long = tmp_path / ("a-name-that-is-longer-than-any-terminal-" * 3)
    methods: dict[str, dict[str, Any]] = {
        "lora": {}, "freeze": {"method.name": "freeze", "method.layers": 1}, "full": {"method.name": "full"},
        "head": {"method.name": "head"},
    }  # fmt: skip
    base = recipe().recipe.model.path
    for name, changes in methods.items():
        values = tiny.settings(base, data_file, long / name) | {"train.max_steps": 1, "data.val_size": 2} | changes
        if changes:
            del values["method.r"]
        run = train(parse(None, tiny.words(values)))
    whet.evaluate(long / "lora", max_rows=2)
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "40")
    assert whet_command(["adapters", "list", str(long)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(methods)
    for name in methods:
        assert any(str(long / name) in line for line in lines), "a path is whole"
    assert "exact_match" in next(line for line in lines if str(long / "lora") in line)
    code = (
        f"import sys; from whet.cli import run; run(['adapters', 'list', {str(long)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert run.finished is not None


def test_the_card_says_what_the_run_knows(recipe: Any) -> None:
    from whet.training.run import train

    run = train(recipe(**{"train.max_steps": 1, "data.val_size": 2}))
    text = (run.adapter / "README.md").read_text(encoding="utf-8")
    assert "More Information Needed" not in text
    for part in ("lora", "LlamaForCausalLM", "rows learned", "| r | 4 |", "lowest held-out loss"):
        assert part in text, part
