"""Labels and answers: the data, the batches, the losses against transformers' own, and whole runs that learn them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_nets
import tiny
import torch
from task_nets import DECODERS, ENCODERS
from test_resume import killed_before
from tiny import plan

from whet.base.errors import UserError
from whet.data.batch.batches import Cut, Order
from whet.data.batch.padded_batches import PaddedBatches
from whet.data.check import report_of, warnings
from whet.data.config import Data
from whet.data.labels import encode_texts, encode_typed
from whet.data.loss_mask import masked_row
from whet.data.prepare import Prepared, prepare
from whet.engine.config import Model
from whet.engine.device import Placement
from whet.engine.load.load import load_config, load_model, longest_input
from whet.engine.task import Task, fits_task, kind_of
from whet.recipe import parse
from whet.training import load as loading
from whet.training.objective.choose import objective_for
from whet.training.objective.labels import by_length
from whet.training.objective.padded_rows import PaddedObjective
from whet.training.run import train

CPU = Placement(torch.device("cpu"), "fp32", torch.float32, False, {})
LABELLED = ("classification", "multi_label", "regression")
Nets = Callable[[str], Path]


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    """The directory of a tiny model of a family, without dropout, made when first asked for."""
    root = tmp_path_factory.mktemp("nets")
    still = {
        "Bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"), "T5": ("dropout_rate",),
        "DistilBert": ("dropout", "attention_dropout", "seq_classif_dropout"),
        "GPT2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    }  # fmt: skip
    still["Roberta"] = still["Bert"]

    def make(kind: str) -> Path:
        if not (root / kind).is_dir():
            spread = {"initializer_range": 0.2} if kind in ("Bert", "DistilBert", "Roberta") else {}
            task_nets.save(kind, root / kind, **dict.fromkeys(still.get(kind, ()), 0.0), **spread)
        return root / kind

    return make


def prepared(place: Path, records: list[dict[str, Any]], kind: str = "Bert", task: Any = None, **data: Any) -> Prepared:
    path = task_nets.write(place / "rows.jsonl", records)
    usual: dict[str, Any] = {"val_size": 0}
    settings = Data(dataset=str(path), **(usual | data))
    return prepare(settings, task_nets.tokenizer(kind), 64, task, "seq2seq" if kind == "T5" else "causal")


def opened(directory: Path, task: Task) -> tuple[Any, PaddedObjective[Any, Any]]:
    network = load_model(Model(path=str(directory)), CPU, task)
    objective = objective_for(network, CPU, task, padded=True, virtual=False)
    assert isinstance(objective, PaddedObjective)
    return network, objective


# Rows and their labels.


@pytest.mark.parametrize(
    ("labels", "task", "names"),
    [
        (["b", "a", "b"], "classification", ("a", "b")),
        ([10, 9, 10], "classification", ("9", "10")),
        (["10", "9", "10"], "classification", ("9", "10")),
        ([True, False, True], "classification", ("false", "true")),
        ([0.5, 1.0, -2.0], "regression", ()),
        ([1, 2.5, 3], "regression", ()),
        ([["x"], [], ["y", "x"]], "multi_label", ("x", "y")),
        ([[1, 0, 0], [0, 0, 1], [0, 0, 0]], "multi_label", ("0", "1", "2")),
    ],
)
def test_labels_decide_the_task_and_are_sorted(labels: list, task: str, names: tuple[str, ...], tmp_path: Path) -> None:
    records = [{"text": task_nets.text(index, 3), "label": label} for index, label in enumerate(labels)]
    found = prepared(tmp_path, records)
    assert (found.task.name, found.task.labels) == (task, names)
    assert found.decided["model.task"][0] == task
    assert found.ledger.format == "classification"
    again = prepared(tmp_path, records, task=task)
    assert "model.task" not in again.decided
    assert again.train.sha256() == found.train.sha256()


def test_labels_become_indices_values_and_flags(tmp_path: Path) -> None:
    def labels(values: list[Any], task: Any = None) -> Any:
        rows = [{"text": "good film", "label": value, "n": index} for index, value in enumerate(values)]
        found = prepared(tmp_path, rows, task=task).train.labels
        assert found is not None
        return found.dtype.name, found.tolist()

    assert labels(["b", "a", "c"]) == ("int64", [1, 0, 2])
    assert labels([1.5, -1.0]) == ("float32", [1.5, -1.0])
    assert labels([3, 1], "regression") == ("float32", [3.0, 1.0])
    assert labels([3.0, 1.0], "classification") == ("int64", [1, 0])
    assert labels([["b", "a"], [], ["b"]]) == ("float32", [[1, 1], [0, 0], [0, 1]])
    assert labels([[0, 1], [1, 0]]) == ("float32", [[0, 1], [1, 0]])


BAD: dict[str, tuple[list[Any], dict[str, Any], tuple[str, ...], int | None]] = {
    "missing": (["a", None, "b"], {}, ("the label is missing",), 2),
    "mixed": (["a", 2], {}, ("several kinds", "a whole number"), 2),
    "mixed lists": (["a", ["b"]], {}, ("several kinds", "a list of names"), 2),
    "bool among numbers": ([1, True], {}, ("several kinds", "true or false"), 2),
    "one class": (["a", "a"], {}, ("same label", "found:    a"), None),
    "no label at all": ([[], []], {}, ("no row has any label",), None),
    "unequal vectors": ([[0, 1], [1, 0, 0]], {}, ("differ in length", "3 places"), 2),
    "no flag": ([[0, 2], [1, 0]], {}, ("label[1]: this is no label", "number 2"), 1),
    "blank": (["a", " "], {}, ("this is no label",), 2),
    "object": (["a", {"b": 1}], {}, ("this is no label", "object"), 2),
    "twice": ([["a", "a"], ["b"]], {}, ("twice in one row",), 1),
    "fractions as classes": ([0.5, 1.0], {"task": "classification"}, ("do not fit", "a number"), 1),
    "names as values": (["a", "b"], {"task": "regression"}, ("no value to learn", "string 'a'"), 1),
    "labels for a chat": (["a", "b"], {"task": "causal"}, ("not for the task causal", "data.format=text"), None),
    "a setting of chats": (["a", "b"], {"loss_on": "all"}, ("data.loss_on", "no turns"), None),
    "packing": (["a", "b"], {"packing": True}, ("data.packing", "padded"), None),
    "cut prompt": (["a", "b"], {"over_length": "truncate_prompt"}, ("data.over_length", "error, drop, truncate"), None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_labels_are_refused_with_their_place(name: str, tmp_path: Path) -> None:
    labels, settings, mentions, row = BAD[name]
    records = [{"text": task_nets.text(index, 3), "label": label} for index, label in enumerate(labels)]
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, records, **settings)
    assert caught.value.row == row
    for mention in mentions:
        assert mention in str(caught.value)


def test_not_a_number_is_refused_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 0.5}\n{"text": "b", "label": NaN}\n', encoding="utf-8")
    with pytest.raises(UserError, match="row 2"):
        prepare(Data(dataset=str(path), val_size=0), task_nets.tokenizer("Bert"), 64)


def test_a_label_of_the_held_out_rows_alone_is_refused(tmp_path: Path) -> None:
    held = task_nets.write(tmp_path / "held.jsonl", [{"text": "ten", "label": "a"}, {"text": "we", "label": "new"}])
    records = [{"text": "good", "label": "a"}, {"text": "bad", "label": "b"}]
    with pytest.raises(UserError, match="held-out rows alone") as caught:
        prepared(tmp_path, records, eval_dataset=str(held))
    assert (caught.value.row, caught.value.found) == (2, "new")
    task_nets.write(held, [{"text": "ten"}])
    with pytest.raises(UserError, match="of another kind"):
        prepared(tmp_path, records, eval_dataset=str(held))


def test_columns_rename_and_blank_rows_are_dropped_on_request(tmp_path: Path) -> None:
    columns = {"text": "review", "label": "stars", "text_pair": "title"}
    records = [
        {"review": "good film", "stars": 5, "title": "a plot"}, {"review": "bad", "stars": None},
        {"review": "bad film", "stars": 1},
    ]  # fmt: skip
    with pytest.raises(UserError, match="row 2, field stars: the label is missing"):
        prepared(tmp_path, records, columns=columns)
    found = prepared(tmp_path, records, columns=columns, empty="drop")
    assert found.task.labels == ("1", "5")
    assert len(found.ledger.dropped) == 1
    assert [example.text_pair for example in found.train_examples] == ["a plot", None]


def test_check_counts_labels_contradictions_and_imbalance(tmp_path: Path) -> None:
    records = [{"text": task_nets.text(index, 4), "label": "many"} for index in range(24)]
    records += [{"text": records[0]["text"], "label": "few"}]
    found = prepared(tmp_path, records)
    said = report_of(found)
    assert said["labels"] == {"few": 1, "many": 24}
    assert said["label_examples"]["few"] == records[0]["text"]
    assert said["contradictory_rows"] == 2
    assert json.loads(json.dumps(said)) == said
    assert any("24 times the rows of few" in line for line in warnings(found))
    assert masked_row(found, 0)[-1] == ("many", True)
    values = prepared(tmp_path, [{"text": "a", "label": 1.0}, {"text": "the", "label": 3.0}])
    assert report_of(values)["labels"] == {"mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0}


# Token ids.


def test_texts_get_the_tokenizers_own_special_tokens() -> None:
    bert, llama, t5 = map(task_nets.tokenizer, ("Bert", "Llama", "T5"))
    word = len(task_nets.SPECIALS)
    assert [row.tolist() for row in encode_texts(bert, ["good", "bad fine"])] == [
        [2, word, 3],
        [2, word + 1, word + 2, 3],
    ]
    assert encode_texts(llama, ["good"])[0].tolist() == [word]
    assert encode_texts(t5, ["good"])[0].tolist() == [word, 4]
    assert encode_texts(bert, ["good bad fine"], max_length=4)[0].tolist() == [2, word, word + 1, 3]
    ((ids, types),) = encode_typed(bert, ["good"], ["bad fine"])
    assert ids.tolist() == [2, word, 3, word + 1, word + 2, 3]
    assert types.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("policy", "rows", "lost"), [("truncate", 3, 4), ("drop", 2, 12), (None, 3, 4)])
def test_long_texts_are_cut_or_dropped_and_counted(policy: Any, rows: int, lost: int, tmp_path: Path) -> None:
    records = [{"text": task_nets.text(index, words), "label": index % 2} for index, words in enumerate((2, 10, 6))]
    settings = {} if policy is None else {"over_length": policy}
    found = prepared(tmp_path, records, max_length=8, **settings)
    assert (len(found.train), found.ledger.tokens_lost, found.ledger.rows_over_length) == (
        rows,
        lost if policy == "drop" else 4,
        1,
    )
    assert all(found.train.row(index)[0][-1] == 3 for index in range(rows))
    assert found.train.labels is not None
    assert found.train.labels.tolist() == ([0, 1, 0] if policy != "drop" else [0, 0])
    with pytest.raises(UserError, match=r"row 2, field data\.over_length"):
        prepared(tmp_path, records, max_length=8, over_length="error")


def test_seq2seq_rows_are_sources_and_answers(tmp_path: Path) -> None:
    word = len(task_nets.SPECIALS)
    found = prepared(tmp_path, [{"prompt": "good bad", "completion": "fine"}], "T5")
    assert found.task == Task("seq2seq")
    assert found.train.answers is not None
    assert found.train.row(0)[0].tolist() == [word, word + 1, 4]
    assert found.train.answers.row(0)[0].tolist() == [word + 2, 4]
    assert found.train.answers.row(0)[1].all()
    assert found.train.targets == 2
    turns = [{"role": role, "content": "good"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(UserError, match="row 1, field messages: an encoder-decoder model reads one text"):
        prepared(tmp_path, [{"messages": turns}], "T5")
    system = prepared(tmp_path, [{"messages": [{"role": "system", "content": "a"}, *turns[:2]]}], "T5")
    assert len(system.train.ids) == 3
    with pytest.raises(UserError, match="no answer to learn"):
        prepared(tmp_path, [{"text": "good"}], "T5")
    changed = prepared(tmp_path, [{"prompt": "good bad", "completion": "great"}], "T5")
    assert changed.train.sha256() != found.train.sha256()


def test_a_cut_answer_still_ends(tmp_path: Path) -> None:
    records = [
        {"prompt": task_nets.text(1, 12), "completion": task_nets.text(2, 12)},
        {"prompt": "a", "completion": "a"},
    ]
    cut = prepared(tmp_path, records, "T5", max_length=8, over_length="truncate").train
    assert cut.answers is not None
    assert cut.lengths.tolist() == [8, 2]
    assert cut.answers.row(0)[0].tolist()[-1] == 4
    assert len(prepared(tmp_path, records, "T5", max_length=8).train) == 1
    assert len(prepared(tmp_path, records, "T5", max_length=8, over_length="truncate_prompt").train) == 1


# Batches.


def test_an_epoch_has_every_row_once_and_steps_do_not_depend_on_the_cut(tmp_path: Path) -> None:
    rows = prepared(tmp_path, task_nets.rows("classification", 203)).train
    whole, cut = (PaddedBatches(rows, order=Order(5), cut=Cut(size, 8 // size)) for size in (8, 2))
    orders = []
    for epoch in range(2):
        steps = [whole.step(epoch * whole.steps_per_epoch + step) for step in range(whole.steps_per_epoch)]
        orders.append([row for (batch,) in steps for row in batch.sources])
        assert sorted(orders[-1]) == list(range(203))
        for step, (batch,) in enumerate(steps):
            small = cut.step(epoch * whole.steps_per_epoch + step)
            assert [row for one in small for row in one.sources] == list(batch.sources)
    assert orders[0] != orders[1]
    fresh = PaddedBatches(rows, order=Order(5), cut=Cut(8))
    assert fresh.step(30)[0].sha256() == whole.step(30)[0].sha256()
    assert fresh.step(30)[0].sha256() != fresh.step(29)[0].sha256()
    places = sum(batch.ids.size for step in range(whole.steps_per_epoch) for batch in whole.step(step))
    by_chance = np.random.default_rng(0).permutation(203)
    parts = [by_chance[start : start + 8] for start in range(0, 203, 8)]
    assert places < 0.8 * sum(len(part) * rows.lengths[part].max() for part in parts)


def test_the_steps_of_an_epoch_come_in_no_order_of_length(tmp_path: Path) -> None:
    """Rows are sorted within pools so that little is padded; then the steps are drawn again."""
    batches = PaddedBatches(prepared(tmp_path, task_nets.rows("classification", 203)).train, order=Order(5), cut=Cut(8))
    longest = [int(batches.lengths[list(batch.sources)].max()) for step in range(26) for batch in batches.step(step)]
    rising = sum(one <= other for one, other in pairwise(longest))
    assert 6 <= rising <= 20, "pools of sorted steps would rise nearly always"


@pytest.mark.parametrize(("kind", "task"), [("Bert", "classification"), ("T5", "seq2seq")])
def test_the_most_tokens_that_a_forward_pass_can_have(kind: str, task: str, tmp_path: Path) -> None:
    rows = prepared(tmp_path, task_nets.rows(task, 9), kind).train
    batches = PaddedBatches(rows, order=Order(0), cut=Cut(2))
    lengths = [
        len(rows.row(row)[0]) + (0 if rows.answers is None else len(rows.answers.row(row)[0])) for row in range(9)
    ]
    assert len(set(lengths)) > 1
    assert batches.most_tokens() == 2 * max(lengths)


def test_a_batch_is_padded_under_a_mask(tmp_path: Path) -> None:
    records = [{"text": "good", "label": "a", "text_pair": "bad"}, {"text": "good bad fine", "label": "b"}]
    rows = prepared(tmp_path, records).train
    batch: Any
    (batch,) = PaddedBatches(rows, order=Order(0), cut=Cut(2)).step(0)
    order = np.argsort(batch.sources)
    assert batch.mask[order].sum(1).tolist() == [5, 5]
    assert batch.types is not None
    assert batch.types[order].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert batch.tokens == 10
    assert [len(part.targets) for part in by_length(batch)] == [2]


# Losses.


def theirs(network: Any, batch: Any, task: str) -> float:
    """The mean loss by transformers itself."""
    labels = torch.from_numpy(batch.targets)
    if task == "seq2seq":
        labels = torch.from_numpy(np.where(batch.answer_mask, batch.answers, -100))
    ids = torch.from_numpy(np.where(batch.mask, batch.ids, network.config.pad_token_id))
    mask = torch.from_numpy(batch.mask).long()
    return network(input_ids=ids, attention_mask=mask, labels=labels).loss.item()


def made(
    nets: Nets, place: Path, kind: str, task: str, count: int = 8
) -> tuple[Any, PaddedObjective[Any, Any], Prepared]:
    found = prepared(place, task_nets.rows(task, count), kind)
    assert found.task.name == task
    torch.manual_seed(1)
    network, objective = opened(nets(kind), found.task)
    return network, objective, found


PAIRS = [(kind, task) for kind in (*ENCODERS, *DECODERS) for task in LABELLED] + [("T5", "seq2seq")]


@pytest.mark.parametrize(("kind", "task"), PAIRS)
def test_the_loss_is_transformers_own_however_the_batch_is_cut(
    kind: str, task: str, nets: Nets, tmp_path: Path
) -> None:
    network, objective, found = made(nets, tmp_path, kind, task)
    results = []
    for size in (8, 1, 3):
        network.zero_grad()
        batches = PaddedBatches(found.train, order=Order(0), cut=Cut(size, 8 // size))
        parts = [batches.batch(rows) for rows in batches.all()]
        count = sum(len(part.targets) for part in parts)
        losses = [objective.loss(network, part) / count for part in parts]
        torch.stack(losses).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        results.append((float(torch.stack(losses).detach().sum()), gradients.clone()))
        if size == 8:
            assert results[0][0] == pytest.approx(theirs(network, parts[0], task), rel=1e-6)
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert float((gradients - results[0][1]).norm() / results[0][1].norm()) < 1e-5


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_a_row_has_the_same_logits_alone_and_beside_a_longer_one(kind: str, nets: Nets, tmp_path: Path) -> None:
    network, objective, found = made(nets, tmp_path, kind, "classification")
    assert network.config.pad_token_id is not None
    batches = PaddedBatches(found.train, order=Order(0), cut=Cut(8))
    (batch,) = (batches.batch(rows) for rows in batches.all())
    together = objective.call(network, objective.inputs(batch.ids, batch.mask)).logits
    for place, row in enumerate(batch.sources):
        one = batches.batch([row])
        alone = objective.call(network, objective.inputs(one.ids, one.mask)).logits
        assert torch.allclose(alone[0], together[place], atol=1e-6)
    if kind in DECODERS:  # the fault that it would be: the head reads the padding
        network.config.pad_token_id = 5
        wrong = objective.call(network, objective.inputs(batch.ids, batch.mask)).logits
        assert not torch.allclose(wrong[0], together[0], atol=1e-3)


def test_token_types_of_pairs_reach_the_model(nets: Nets, tmp_path: Path) -> None:
    records = [{"text": "good", "text_pair": "bad", "label": index % 2, "n": index} for index in range(2)]
    found = prepared(tmp_path, records)
    network, objective = opened(nets("Bert"), found.task)
    batch: Any
    (batch,) = PaddedBatches(found.train, order=Order(0), cut=Cut(2)).step(0)
    assert batch.types is not None
    inputs = objective.inputs(batch.ids, batch.mask)
    expected = network(**inputs, token_type_ids=torch.from_numpy(batch.types), labels=torch.from_numpy(batch.targets))
    assert objective.loss(network, batch).item() / 2 == pytest.approx(expected.loss.item(), rel=1e-6)
    assert not torch.allclose(expected.logits, network(**inputs).logits, atol=1e-4)


# What cannot be.


def test_what_models_are_built_for() -> None:
    kinds = {kind: kind_of(task_nets.config(kind)) for kind in task_nets.CHANGES}
    assert kinds == dict.fromkeys(ENCODERS, "encoder") | dict.fromkeys(DECODERS, "decoder") | {"T5": "encoder_decoder"}
    for kind, task in (
        ("Bert", "causal"),
        ("ModernBert", "causal"),
        ("Llama", "seq2seq"),
        ("T5", "causal"),
        ("Bert", "seq2seq"),
    ):
        assert not fits_task(task, task_nets.config(kind))  # type: ignore[arg-type]


def test_positions_of_roberta_begin_behind_its_padding_and_t5_has_no_last_one() -> None:
    assert longest_input(task_nets.config("Roberta", pad_token_id=1)) == 62
    assert longest_input(task_nets.config("Bert")) == 64
    assert longest_input(task_nets.config("T5", max_position_embeddings=None)) is None


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("Bert", "seq2seq", {}, "causal"), ("Bert", "causal", {"model.task": "causal"}, "encoder"),
    ("Llama", "seq2seq", {"model.task": "seq2seq"}, "encoder-decoder"),
    ("Bert", "classification", {"model.chat_template": "chatml"}, "model.chat_template"),
    ("Bert", "classification", {"train.tile_mlp": 64}, "train.tile_mlp"),
    ("Bert", "classification", {"data.padding_free": True}, "data.padding_free"),
    ("Bert", "classification", {"model.task": "causal"}, "causal"),
    ("T5", "classification", {"model.task": "seq2seq"}, "model.task"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "rows", "changes", "mention"), REFUSED)
def test_impossible_tasks_are_refused_before_a_model_is_loaded(
    kind: str, rows: str, changes: dict[str, Any], mention: str, nets: Nets, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = task_nets.write(tmp_path / "rows.jsonl", task_nets.rows(rows))
    monkeypatch.setattr(loading, "load_model", None)
    with pytest.raises(UserError) as caught:
        train(tiny.recipe(nets(kind), data, tmp_path / "run", **changes))
    assert mention in str(caught.value)
    assert caught.value.fix
    assert not (tmp_path / "run").exists()


def test_peers_names_of_tasks() -> None:
    said_of = {
        "task_type=SEQ_CLS": None, "task_type=CAUSAL_LM": "causal", "model.task=seq2seq": "seq2seq",
        "problem_type=multi_label_classification": "multi_label",
    }  # fmt: skip
    for said, task in said_of.items():
        assert parse(None, [said]).recipe.model.task == task
    assert any("labels come from the data" in note for note in parse(None, ["num_labels=3"]).notes)


# Whole runs.


def run_recipe(nets: Nets, place: Path, kind: str, task: str, out: str = "run", count: int = 8, **changes: Any) -> Any:
    data = task_nets.write(place / f"{task}.jsonl", task_nets.rows(task, count))
    return tiny.recipe(nets(kind), data, place / out, **changes)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("kind", "task"),
    [("Bert", "classification"), ("Llama", "classification"), ("GPT2", "multi_label"), ("DistilBert", "multi_label"),
     ("Roberta", "regression"), ("Qwen3", "regression"), ("ModernBert", "classification"), ("T5", "seq2seq")],
)  # fmt: skip
def test_a_few_rows_are_learned_by_heart(kind: str, task: str, method: str, nets: Nets, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"method__r": 8} if method == "lora" else {"method__save_dtype": "fp32"}
    done = train(run_recipe(
        nets, tmp_path, kind, task, method__name=method, train__max_steps=60, train__logging_steps=1,
        train__learning_rate=0.02 if method == "lora" else 0.005, train__warmup_ratio=0.1, **changes,
    ))  # fmt: skip
    losses = [line["loss"] for line in done.lines("metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < 0.2 * losses[0] + 0.02
    saved = json.loads((done.trained / "labels.json").read_text())
    assert saved == {"task": task, "labels": list(done.task.labels)}
    assert done.recipe.model.task == task
    data = json.loads((done.path / "data.json").read_text())
    assert data["task"] == task
    assert not (done.trained / "whet_template.json").exists()
    assert (done.trained / "tokenizer.json").is_file()
    assert bool(done.read("layout.json")["groups"]) == (method == "lora" and kind != "GPT2")  # type: ignore[index]
    if method == "full" and task == "classification":
        config = load_config(Model(path=str(done.trained)))
        assert tuple((config.id2label or {}).values()) == ("bad", "fine", "good")


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"labels": []}', '{"task": "sorting", "labels": []}', '{"task": "regression"}']
)
def test_damaged_names_of_labels_are_refused(damage: str, nets: Nets, tmp_path: Path) -> None:
    done = train(run_recipe(nets, tmp_path, "Bert", "classification", train__max_steps=1))
    (done.trained / "labels.json").write_text(damage)
    with pytest.raises(UserError, match="names of the labels") as caught:
        _ = done.task
    assert caught.value.file == str(done.trained / "labels.json")


def test_a_killed_run_of_labels_ends_with_the_same_bytes(nets: Nets, tmp_path: Path) -> None:
    short = {
        "train__max_steps": 6, "train__save_steps": 2, "train__eval_steps": 3, "data__val_size": 3, "count": 16,
        "train__per_device_train_batch_size": 2, "method__lora_dropout": 0.1,
    }  # fmt: skip
    whole = train(run_recipe(nets, tmp_path, "Bert", "classification", "whole", **short))
    for step in (1, 4, 5):
        out = f"killed-{step}"
        killed_before(run_recipe(nets, tmp_path, "Bert", "classification", out, **short), step)
        again = train(run_recipe(nets, tmp_path, "Bert", "classification", out, **short))
        assert tiny.final_bytes(again.path) == tiny.final_bytes(whole.path)


def test_a_plan_counts_the_head_and_says_what_it_assumes(nets: Nets, tmp_path: Path) -> None:
    found = plan(run_recipe(nets, tmp_path, "Bert", "classification").recipe)
    assert found["assumed"]["task"] == "classification"
    assert found["assumed"]["labels"] == 2
    assert found["memory"]["logits"] == 0
    with pytest.raises(UserError, match="cannot be trained for the task"):
        plan(run_recipe(nets, tmp_path, "Bert", "classification", model__task="seq2seq").recipe)


def test_layers_run_again_change_nothing(nets: Nets, tmp_path: Path) -> None:
    short = {"train__max_steps": 2, "train__gradient_checkpointing": True}
    plain = train(run_recipe(nets, tmp_path, "Bert", "classification", "plain", train__max_steps=2))
    again = train(run_recipe(nets, tmp_path, "Bert", "classification", "again", **short))
    assert (again.read("layout.json") or {})["mode"]["checkpointed_layers"]
    name = "adapter_model.safetensors"
    assert (again.adapter / name).read_bytes() == (plain.adapter / name).read_bytes()
