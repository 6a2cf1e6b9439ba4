"""A model that is merged or trained whole says in its config what plain transformers would get wrong by itself: the
attention to compute with, and which tables are one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import task_nets
import tiny
import torch
from families.configs import Entry, config_of, entries
from families.judge import KINDS, OWNERS, save, settings, still, train

import whet
from whet.base.errors import UserError
from whet.methods.targets import find_targets, shared_names
from whet.recipe import parse
from whet.training.run import train as run_training

NAME = "attn_implementation"


def saved(name: str, place: Path) -> Entry:
    """The entry, with its tiny model and a tokenizer in `place`."""
    entry = next(one for one in entries() if one.name == name)
    assert save(entry, still(config_of(entry)), place / "model")
    tokenizer = task_nets.tokenizer("T5" if config_of(entry).is_encoder_decoder else KINDS[entry.task])
    tokenizer.pad_token = "[PAD]"
    tokenizer.save_pretrained(str(place / "tokenizer"))
    return entry


def opened(entry: Entry, folder: Path) -> Any:
    import transformers

    return getattr(transformers, OWNERS[entry.task]).from_pretrained(str(folder), dtype=torch.float32).eval()


@pytest.mark.parametrize(("name", "attention"), [("umt5:classification", "eager"), ("bart:classification", None)])
def test_the_config_names_an_attention_where_the_chosen_one_is_another(
    name: str, attention: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = saved(name, tmp_path)
    whet.merge(train(entry, tmp_path).path, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8")).get(NAME) == attention
    assert ("asks for the attention" in capsys.readouterr().err) == (attention is not None)
    ids = torch.arange(5, 30)[None]
    ids[:, -1] = 4
    network = opened(entry, tmp_path / "out")
    by_default = network(input_ids=ids).logits
    network.set_attn_implementation("eager")
    torch.testing.assert_close(by_default, network(input_ids=ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "attention"),
    [("umt5:classification", "eager"), ("doge:causal", "eager"), ("bart:classification", None), ("llama:causal", None)],
)
def test_a_whole_model_names_it_too(
    name: str, attention: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = saved(name, tmp_path)
    run = train(entry, tmp_path, **{"method": "full", "method.save_dtype": "fp32", "method.r": None})
    config = json.loads((run.trained / "config.json").read_text(encoding="utf-8"))
    assert config.get(NAME) == attention
    assert ("asks for the attention" in capsys.readouterr().err) == (attention is not None)
    ids = torch.arange(5, 30)[None]
    ids[:, -1] = 4
    network = opened(entry, run.trained)
    by_default = network(input_ids=ids).logits
    network.set_attn_implementation("eager")
    torch.testing.assert_close(by_default, network(input_ids=ids).logits, rtol=0, atol=1e-4)


def test_a_head_that_is_tied_to_another_table_than_the_first_stays_tied(tmp_path: Path) -> None:
    entry = saved("t5gemma:seq2seq", tmp_path)
    whet.merge(train(entry, tmp_path).path, tmp_path / "out")
    network = opened(entry, tmp_path / "out")
    assert network.lm_head.out_proj.weight is network.model.decoder.embed_tokens.weight


def test_layers_that_share_weights_are_left_alone_or_not_merged(tmp_path: Path) -> None:
    """Zamba2 runs one block in several places; PEFT would learn an update for each."""
    entry = saved("zamba2:causal", tmp_path)
    network = opened(entry, tmp_path / "model")
    assert not shared_names(network) & set(find_targets(network, "all-linear"))
    assert "because layers share their weights" in "".join(network.left_alone.notices)
    (tmp_path / "held.jsonl").write_text('{"prompt": "good", "completion": "bad"}\n', encoding="utf-8")
    changes = {"method.target_modules": ["q_proj", "k_proj"]}
    run = run_training(parse(None, tiny.words(settings(entry, tmp_path) | changes)))
    with pytest.raises(UserError, match="share a weight"):
        whet.merge(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
