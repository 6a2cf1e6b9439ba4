"""Labels, values and sequences: the answer to a row is its own, evaluation says what is true, a merged model agrees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tasks
import tiny
import torch

import whet
from whet import runs
from whet.base.errors import UserError
from whet.cli import run as command
from whet.engine.answer import encoder_decoder
from whet.engine.answer import logits as engine_logits
from whet.engine.answer.encoder_decoder import EncoderDecoderSession
from whet.engine.answer.logits import LabelSession, decisions, probabilities
from whet.engine.load.load import load_model
from whet.engine.load.open import open_trained
from whet.engine.task import Task
from whet.evaluation.labels import judge, predict
from whet.evaluation.run import evaluate
from whet.methods.layers.lora_layer import LoraLinear
from whet.report.page import write_page
from whet.runs import LABELS, Run
from whet.ship import predict as prediction
from whet.ship.chat import open_chat
from whet.ship.merge import CERTIFICATE, merge
from whet.ship.talk import talk

LABELLED = ("classification", "multi_label", "regression")
KINDS = {"llama": "decoder", "bert": "encoder"}
THREE = Task("classification", tasks.NAMES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tasks.save_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "bert", "t5")}


@pytest.fixture(scope="module")
def made(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Run]:
    """A run of each kind of model and task; what is written into them is only results."""
    pairs = [(kind, task) for kind in KINDS for task in LABELLED] + [("t5", "seq2seq")]
    return {
        (kind, task): tasks.make_run(kind, task, models[kind], tmp_path_factory.mktemp(f"{kind}-{task}"))
        for kind, task in pairs
    }


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def opened(run: Run) -> Any:
    return open_trained(run.recipe.model, run.recipe.base, run.trained, run.recipe.method, run.task)


def logits(model: Any, rows: Any, types: Any = None, *, batch_size: int) -> np.ndarray:
    with LabelSession(model) as session:
        return session.logits(rows, types, batch_size=batch_size)


def written(model: Any, rows: Any, max_new_tokens: int, batch_size: int) -> list[list[int]]:
    with EncoderDecoderSession(model) as session:
        return session.answer(rows, max_new_tokens=max_new_tokens, batch_size=batch_size)


class Deaf(torch.nn.Module):
    """The planted fault: a model that reads padding as text."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.config = network, network.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.network(input_ids=input_ids, attention_mask=torch.ones_like(attention_mask))


# the answer to a row


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_answered_alone_as_in_a_batch(
    kind: str, made: dict[tuple[str, str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made[kind, "classification"]
    model, rows = opened(run), tasks.token_rows()
    together = predict(model, rows, 9)
    alone = np.concatenate([predict(model, [row], 1) for row in rows])
    assert together.shape == (9, 3)
    assert together.dtype == np.float32
    assert float(np.abs(together).max()) > 0.05
    np.testing.assert_allclose(together, alone, atol=2e-5)
    backwards = predict(model, rows[::-1], 4)[::-1]
    np.testing.assert_allclose(backwards, alone, atol=2e-5)
    if kind == "bert":
        monkeypatch.setattr(engine_logits, "sees_padding", lambda *_, **__: False)
        deaf = logits(Deaf(model.answering), rows, batch_size=9)
        assert float(np.abs(deaf - alone).max()) > 1e-3, "the planted fault"


def test_padding_on_the_wrong_token_is_seen(made: dict[tuple[str, str], Run]) -> None:
    """A decoder's head reads the last token that is none of padding: with another padding token it reads padding."""
    run = made["llama", "classification"]
    model, rows = opened(run).answering, tasks.token_rows()
    right = logits(model, rows, batch_size=9)
    model.config.pad_token_id = 1
    ids = engine_logits.filled_up([np.asarray(row, np.int64) for row in rows])
    mask = engine_logits.filled_up([np.ones(len(row), np.int64) for row in rows])
    with torch.inference_mode():
        wrong = model(input_ids=ids, attention_mask=mask).logits.numpy()
    assert float(np.abs(wrong - right).max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_do_not_bring_padding_into_the_answer(
    kind: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt tuning hands over embeddings, of which a decoder's head takes the last, padding or not."""
    import peft

    network = load_model(whet.recipe.Model(path=str(models[kind])), tasks.CPU, THREE)
    settings = peft.PromptTuningConfig(task_type=peft.TaskType.SEQ_CLS, num_virtual_tokens=3)
    model = peft.PeftModelForSequenceClassification(network, settings).eval()
    rows = tasks.token_rows()
    together = logits(model, rows, batch_size=9)
    alone = np.concatenate([logits(model, [row], batch_size=1) for row in rows])
    np.testing.assert_allclose(together, alone, atol=2e-5)
    if kind == "llama":
        monkeypatch.setattr(engine_logits, "_has_virtual_tokens", lambda _: False)
        monkeypatch.setattr(engine_logits, "sees_padding", lambda *_, **__: False)
        assert float(np.abs(logits(model, rows, batch_size=9) - alone).max()) > 1e-3, "the planted fault"


def test_a_model_without_padding_token_gets_one_row_at_a_time(made: dict[tuple[str, str], Run]) -> None:
    model, rows = opened(made["llama", "classification"]).answering, tasks.token_rows()
    right = logits(model, rows, batch_size=9)
    model.config.pad_token_id = None
    np.testing.assert_allclose(logits(model, rows, batch_size=9), right, atol=2e-5)


def test_token_types_reach_a_model_that_knows_them(made: dict[tuple[str, str], Run]) -> None:
    rows = tasks.token_rows()
    types = [np.arange(len(row)) // 4 % 2 for row in rows]
    for kind, moves in (("bert", True), ("llama", False)):
        model = opened(made[kind, "classification"]).answering
        plain, typed = logits(model, rows, batch_size=9), logits(model, rows, types, batch_size=9)
        assert (float(np.abs(plain - typed).max()) > 1e-3) is moves
        alone = np.concatenate(
            [logits(model, [row], [type_], batch_size=1) for row, type_ in zip(rows, types, strict=True)]
        )
        np.testing.assert_allclose(typed, alone, atol=2e-5)


def test_an_answer_that_is_not_finite_is_refused(made: dict[tuple[str, str], Run]) -> None:
    model, rows = opened(made["llama", "classification"]).answering, tasks.token_rows()
    with torch.no_grad():
        next(model.model.layers[0].mlp.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        logits(model, rows, batch_size=9)


def test_probabilities_and_decisions() -> None:
    found = np.array([[2.0, 0.0, -800.0], [-1.0, 900.0, 0.0]], np.float32)
    shares = probabilities(THREE, found)
    np.testing.assert_allclose(shares.sum(1), 1)
    np.testing.assert_allclose(shares[0, :2], [np.exp(2) / (np.exp(2) + 1), 1 / (np.exp(2) + 1)])
    assert decisions(THREE, found).tolist() == [0, 1]
    several = Task("multi_label", tasks.NAMES)
    assert decisions(several, found).tolist() == [[1, 0, 0], [0, 1, 0]]
    np.testing.assert_allclose(probabilities(several, found)[0, 0], 1 / (1 + np.exp(-2)))
    assert ((probabilities(several, found) > 0.5) == (decisions(several, found) == 1)).all()
    value = Task("regression")
    assert decisions(value, found[:, :1]).tolist() == [2.0, -1.0]
    with pytest.raises(ValueError, match="no probabilities"):
        probabilities(value, found[:, :1])


# evaluation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", LABELLED)
def test_evaluation_says_what_the_model_says(kind: str, task: str, made: dict[tuple[str, str], Run]) -> None:
    run = made[kind, task]
    result = evaluate(run)
    assert read(run.path / "results/evaluation.json") == json.loads(json.dumps(result))
    prepared = runs.prepared(run.recipe)
    held = prepared.evaluation
    model = opened(run).answering
    values = [logits(model, [held.row(index)[0]], batch_size=1)[0] for index in range(len(held))]
    said = decisions(run.task, np.stack(values))
    shown = lines(run.results / "predictions.jsonl")
    assert result["rows"] == len(shown) == len(held) == 12
    for index, row in enumerate(shown):
        example = prepared.held_out[int(held.sources[index])]
        assert (row["id"], row["text"]) == (example.id, example.text)
        if task == "regression":
            assert row["label"] == pytest.approx(example.label)
            assert row["predicted"] == pytest.approx(float(said[index]), abs=1e-4)
        elif task == "classification":
            assert row["label"] == example.label
            assert row["predicted"] == run.task.labels[said[index]]
            share = probabilities(run.task, np.stack(values))[index].max()
            assert row["probability"] == pytest.approx(share, abs=1e-4)
        else:
            assert row["label"] == sorted(example.label)
            assert row["predicted"] == [name for name, on in zip(run.task.labels, said[index], strict=True) if on]
    assert "random one says nothing" in result["baseline"]
    if task == "regression":
        assert result["base"]["metrics"]["r2"] == pytest.approx(0, abs=1e-6)
        assert "labels" not in result
    else:
        wrong = [row for row in shown if row["predicted"] != row["label"]]
        assert sorted(row["id"] for row in lines(run.results / "mismatches.jsonl")) == sorted(r["id"] for r in wrong)
        assert all(row["exact"] is (row["predicted"] == row["label"]) for row in shown)
        share = result["tuned"]["metrics"]["accuracy" if task == "classification" else "subset_accuracy"]
        assert share == pytest.approx(1 - len(wrong) / 12)
        assert [item["class"] for item in result["labels"]["per_class"]] == list(run.task.labels)
    assert set(result["difference"]) <= set(result["tuned"]["metrics"])


def test_the_judge_sees_a_model_that_repeats_one_class_as_no_better_than_the_baseline() -> None:
    references = np.array([0, 0, 0, 0, 1, 2])
    result = judge(THREE, np.zeros(6, np.int64), references, None)
    assert result["difference"]["accuracy"]["mean_difference"] == 0
    assert "billing" in result["baseline"]
    right = judge(THREE, references, references, ["accuracy", "mcc"])
    assert right["tuned"]["metrics"] == {"accuracy": 1.0, "mcc": 1.0}
    assert right["base"]["metrics"]["accuracy"] == pytest.approx(4 / 6)
    assert right["difference"]["accuracy"]["test"] == "mcnemar"
    assert [line[place] for place, line in enumerate(right["labels"]["confusion"])] == [4, 1, 1]
    with pytest.raises(UserError, match="no such metric") as caught:
        judge(THREE, references, references, ["acuracy"])
    assert caught.value.fix == "write accuracy"


def test_labels_in_another_order_than_in_training_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    run = tasks.make_run("llama", "classification", models["llama"], tmp_path)
    found = read(run.trained / LABELS)
    evaluate(run)
    (run.trained / LABELS).write_text(json.dumps(found | {"labels": found["labels"][::-1]}), encoding="utf-8")
    with pytest.raises(UserError, match="not those that the run was trained on"):
        evaluate(run)
    (run.trained / LABELS).write_text(json.dumps({"task": "regression", "labels": []}), encoding="utf-8")
    with pytest.raises(UserError, match="not those that the run was trained on"):
        evaluate(run)


def test_nothing_held_out_is_said(models: dict[str, Path], tmp_path: Path) -> None:
    run = tasks.make_run("llama", "classification", models["llama"], tmp_path, data__val_size=0)
    with pytest.raises(UserError, match="nothing to score on"):
        evaluate(run)


def test_evaluation_of_an_encoder_decoder_compares_base_and_tuned(made: dict[tuple[str, str], Run]) -> None:
    run = made["t5", "seq2seq"]
    result = evaluate(run, max_rows=5)
    shown = lines(run.results / "predictions.jsonl")
    assert result["rows"] == len(shown) == 5
    assert {"exact_match", "token_f1"} <= result["tuned"]["metrics"].keys() == result["base"]["metrics"].keys()
    assert any(row["base"] != row["tuned"] for row in shown)
    network = load_model(run.recipe.model, tasks.CPU, run.task)
    prepared, tokenizer = runs.prepared(run.recipe), tasks.tokenizer(Path(run.recipe.model.path))
    limit = int(result["decoding"].split()[3])
    for index, row in enumerate(shown):
        ids = torch.as_tensor(prepared.evaluation.row(index)[0].astype(np.int64))[None]
        plain = network.generate(input_ids=ids, max_new_tokens=limit, do_sample=False)[0]
        assert row["base"] == tokenizer.decode(plain, skip_special_tokens=True)
        assert row["reference"] == prepared.held_out[int(prepared.evaluation.sources[index])].answer


def test_a_source_is_answered_alone_as_in_a_batch(
    made: dict[tuple[str, str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = opened(made["t5", "seq2seq"]).answering, tasks.token_rows()
    together = written(model, rows, 8, 9)
    alone = [written(model, [row], 8, 1)[0] for row in rows]
    assert together == alone
    assert len({tuple(one) for one in alone}) > 1
    chances = encoder_decoder.answer_log_probabilities(model, rows[1], alone[1])
    assert chances.shape == (len(alone[1]) + 1, tiny.VOCABULARY)
    assert chances.argmax(-1).tolist()[: len(alone[1])] == alone[1]
    monkeypatch.setattr(
        encoder_decoder.torch, "zeros_like", torch.ones_like
    )  # the planted fault: padding is read as text
    assert written(model, rows, 8, 9) != alone


def test_what_was_trained_is_evaluated_predicted_merged_and_told(models: dict[str, Path], tmp_path: Path) -> None:
    """From rows to a merged model through the public verbs: words that give the class away are learned and told."""
    words = [("환불", "refund"), ("dog", "pet"), ("배송 언제", "delivery"), ("brown card", "card")]
    records = [{"text": f"{index} {words[index % 4][0]}", "label": words[index % 4][1]} for index in range(200)]
    data = tiny.write_rows(tmp_path / "rows.jsonl", records)
    changes = {"data__val_size": 48, "train__max_steps": 40, "train__learning_rate": 0.01}
    run = whet.train(None, **tiny.settings(models["bert"], data, tmp_path / "run", **changes))
    result = whet.evaluate(run.path)
    assert run.task == Task("classification", ("card", "delivery", "pet", "refund"))
    assert result["tuned"]["metrics"]["accuracy"] > 0.7 > result["base"]["metrics"]["accuracy"]
    assert result["difference"]["accuracy"]["low"] > 0
    certificate = whet.merge(run.path, tmp_path / "out")
    assert certificate["agreement"] == 1.0
    said = [one["label"] for one in whet.predict(run.path, [row["text"] for row in records])]
    assert sum(a == row["label"] for a, row in zip(said, records, strict=True)) > 140
    html = (run.path / "report.html").read_text(encoding="utf-8")
    assert "one answer for all rows would have" in html
    assert "Labels learned" in html
    assert "Mean probability change" in html
    assert "per supervised token" not in html


# the report


@pytest.mark.parametrize("task", LABELLED)
def test_the_report_shows_labels(task: str, made: dict[tuple[str, str], Run]) -> None:
    run = made["bert", task]
    evaluate(run)
    html = write_page(run.path).read_text(encoding="utf-8")
    assert "Baseline" in html
    assert "random one says nothing" in html
    assert ("Classes (3), the lowest F1 first" in html) is (task != "regression")
    assert ("Confusions" in html) is (task == "classification")
    assert ("rows are right" in html) is (task != "regression")
    assert "before training" not in html, "an untrained head was not measured"


def test_the_report_of_damaged_labels_is_still_written(made: dict[tuple[str, str], Run], tmp_path: Path) -> None:
    labels = {"per_class": [{"class": "<b>x</b>", "f1": "?"}, 3], "confusion": "no", "names": None}
    (tmp_path / "results").mkdir()
    text = json.dumps({"baseline": 3, "labels": labels, "tuned": {"metrics": {"accuracy": 0.5}}, "rows": 2})
    (tmp_path / "results/evaluation.json").write_text(text, encoding="utf-8")
    (tmp_path / "results/predictions.jsonl").write_text('{"predicted": "<i>", "text": 3}\n', encoding="utf-8")
    html = write_page(tmp_path).read_text(encoding="utf-8")
    assert "&lt;b&gt;x&lt;/b&gt;" in html
    assert "<i>" not in html.split("Sample answers")[1].split("</section>")[0].replace("<i class", "")


# predict


def test_predictions_are_those_of_the_evaluation(made: dict[tuple[str, str], Run]) -> None:
    for kind, task in [(kind, task) for kind in KINDS for task in LABELLED]:
        run = made[kind, task]
        evaluate(run)
        shown = lines(run.results / "predictions.jsonl")
        found = whet.predict(run.path, [row["text"] for row in shown])
        assert [one["row"] for one in found] == list(range(1, 13))
        for row, one in zip(shown, found, strict=True):
            if task == "regression":
                assert one["value"] == pytest.approx(row["predicted"], abs=1e-4)
                continue
            assert one["label" if task == "classification" else "labels"] == row["predicted"]
            assert set(one["probabilities"]) == set(run.task.labels)
            if task == "classification":
                assert one["probability"] == pytest.approx(row["probability"], abs=1e-4)
                assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-4)


def test_an_encoder_decoder_predicts_texts(made: dict[tuple[str, str], Run]) -> None:
    run = made["t5", "seq2seq"]
    evaluate(run, max_rows=4)
    shown = lines(run.results / "predictions.jsonl")
    found = whet.predict(run.path, [row["prompt"] for row in shown])
    for row, one in zip(shown, found, strict=True):
        assert one["text"].startswith(row["tuned"]), "predict may write more than the evaluation"
    with pytest.raises(UserError, match="one text"):
        whet.predict(run.path, [("a", "b")])


def test_pairs_are_encoded_as_pairs(models: dict[str, Path], tmp_path: Path) -> None:
    records = [row | {"text_pair": f"second {index}"} for index, row in enumerate(tasks.rows("classification"))]
    run = tasks.make_run("bert", "classification", models["bert"], tmp_path, records=records)
    evaluate(run)
    shown = lines(run.results / "predictions.jsonl")
    pairs = [(row["text"], row["text_pair"]) for row in shown]
    found = whet.predict(run.path, pairs)
    assert [one["label"] for one in found] == [row["predicted"] for row in shown]
    objects = [{"text": text, "text_pair": pair} for text, pair in pairs]
    assert whet.predict(run.path, objects) == found
    assert whet.predict(run.path, [text for text, _ in pairs]) != found


def test_predict_streams_lines_in_order(
    made: dict[tuple[str, str], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = made["llama", "classification"], tmp_path / "new.txt"
    texts = [f"row {index} " + "word " * (index % 7) for index in range(70)]
    file.write_text("\n".join(texts[:3]) + "\n\n" + "\n".join(texts[3:]), encoding="utf-8")
    assert command(["predict", str(run.path), str(file)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["row"] for one in found] == [1, 2, 3, *range(5, 72)]
    expected = whet.predict(run.path, texts)
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert command(["predict", str(run.path), str(tmp_path / "new.jsonl"), "--json"]) == 0
    assert [one["label"] for one in json.loads(capsys.readouterr().out)["predictions"]] == [o["label"] for o in found]


def test_predict_reads_standard_input(
    made: dict[tuple[str, str], Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    text = '{"text": "안녕하세요"}\n{"text": "two"}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert command(["predict", str(made["llama", "multi_label"].path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "content", "row", "field"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ""}\n', 2, "text"),
        ("a.jsonl", b'{"text": "x"}\n\n{"label": 1}\n', 3, "text"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', 2, None),
        ("a.jsonl", b'["x"]\n', 1, None),
        ("a.jsonl", b'{"text": "x", "text_pair": 3}\n', 1, "text_pair"),
        ("a.txt", b'{"text": "x"}\nplain\n', 2, None),
        ("a.txt", b"x\n\xff\xfe\n", 2, None),
        ("a.txt", b"\n \n", None, None),
    ],
)
def test_a_bad_row_is_named(
    name: str, content: bytes, row: int | None, field: str | None, made: dict[tuple[str, str], Run], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        prediction.predict_file(made["llama", "classification"], str(tmp_path / name), quiet=True)
    assert (caught.value.file, caught.value.row, caught.value.field) == (str(tmp_path / name), row, field)
    assert caught.value.fix


def test_a_file_that_is_not_there_is_said(made: dict[tuple[str, str], Run], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        prediction.predict_file(made["llama", "classification"], str(tmp_path / "no.txt"), quiet=True)


def test_a_chat_with_a_run_of_labels_names_the_verb_that_fits(made: dict[tuple[str, str], Run]) -> None:
    with pytest.raises(UserError, match="does not write") as caught:
        open_chat(str(made["bert", "multi_label"].path))
    assert "whet predict" in caught.value.fix


def test_a_chat_with_an_encoder_decoder_has_one_turn(made: dict[tuple[str, str], Run]) -> None:
    chat = open_chat(str(made["t5", "seq2seq"].path), max_new_tokens=6)
    found = talk(chat, "the quick fox", None, quiet=True)
    assert found[-1]["role"] == "assistant"
    (only,) = whet.predict(made["t5", "seq2seq"].path, ["the quick fox"])
    assert only["text"].startswith(found[-1]["content"])
    from whet.data.example import Message

    history = [Message("user", "other"), Message("assistant", "x"), Message("user", "the quick fox")]
    assert chat.reply(history) == found[-1]["content"]


# merge


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", LABELLED)
def test_the_merged_model_in_plain_transformers_labels_as_the_live_one(
    kind: str, task: str, storage: str, models: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    run = tasks.make_run(kind, task, models[kind], tmp_path, base__storage=storage)
    certificate = merge(run, tmp_path / "out")
    assert read(tmp_path / "out" / CERTIFICATE) == read(run.path / "results/merge.json")
    assert certificate["prompts"] == 12
    assert certificate["agreement"] >= 1 - 1 / 12
    plain = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "out"), dtype=torch.float32).eval()
    if task != "regression":
        assert tuple(plain.config.id2label[index] for index in range(3)) == run.task.labels
    prepared = runs.prepared(run.recipe)
    rows = [prepared.evaluation.row(index)[0] for index in range(12)]
    with torch.inference_mode():
        found = np.concatenate([plain(torch.as_tensor(row.astype(np.int64))[None]).logits.numpy() for row in rows])
    live = predict(opened(run), rows, 4)
    rounding = 2e-4 if certificate["chosen"].endswith("fp32") else 4e-2
    assert float(np.abs(found - live).max()) <= rounding * max(1.0, float(np.abs(live).max()))
    if task == "classification" and storage == "fp32":
        ask = pipeline("text-classification", model=plain, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "out"))
        texts = [prepared.held_out[int(source)].text for source in prepared.evaluation.sources]
        said = [one["label"] for one in ask(texts, batch_size=1)]
        assert said == [run.task.labels[index] for index in decisions(run.task, live)]


@pytest.mark.parametrize(("kind", "task"), [("llama", "classification"), ("bert", "regression"), ("t5", "seq2seq")])
@pytest.mark.parametrize("factor", [0, 4])
def test_a_wrong_merge_of_any_task_is_refused(
    kind: str, task: str, factor: float, made: dict[tuple[str, str], Run], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The planted fault: the update is forgotten, or added four times over."""
    right = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda self, name: factor * right(self, name))
    with pytest.raises(UserError, match="near enough"):
        merge(made[kind, task], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert read(made[kind, task].path / "results/merge.json")["path"] is None


def test_a_merge_that_loses_the_head_is_refused(
    made: dict[tuple[str, str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made["llama", "classification"]
    fold = type(run.recipe.method).fold

    def forgetful(self: Any, network: Any, directory: Path, task: Task) -> Any:
        plain = fold(self, network, directory, task)
        torch.nn.init.normal_(plain.score.weight, std=0.15, generator=torch.Generator().manual_seed(9))
        return plain

    monkeypatch.setattr(type(run.recipe.method), "fold", forgetful)
    with pytest.raises(UserError, match="near enough"):
        merge(run, tmp_path / "out")


def test_a_merged_model_that_forgot_its_labels_is_seen(
    made: dict[tuple[str, str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made["bert", "classification"]
    fold = type(run.recipe.method).fold

    def forgetful(self: Any, network: Any, directory: Path, task: Task) -> Any:
        plain = fold(self, network, directory, task)
        plain.config.id2label = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
        return plain

    monkeypatch.setattr(type(run.recipe.method), "fold", forgetful)
    with pytest.raises(AssertionError, match="names its labels"):
        merge(run, tmp_path / "out")


def test_the_merged_encoder_decoder_writes_as_the_live_one(made: dict[tuple[str, str], Run], tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    run = made["t5", "seq2seq"]
    certificate = merge(run, tmp_path / "out")
    assert certificate["agreement"] == 1.0
    assert 0 <= certificate["kl"] <= 0.05
    plain = AutoModelForSeq2SeqLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32).eval()
    rows = tasks.token_rows(5)
    live = written(opened(run).answering, rows, 6, 5)
    agreed = sum(a == b for a, b in zip(written(plain, rows, 6, 5), live, strict=True))
    assert agreed >= 4, "rounding to bf16 may turn one"


def test_a_labelled_full_run_has_nothing_to_merge(models: dict[str, Path], tmp_path: Path) -> None:
    run = tasks.make_run("bert", "classification", models["bert"], tmp_path, method__name="full")
    assert whet.predict(run.path, ["a"])[0]["label"] in tasks.NAMES
    with pytest.raises(UserError, match="no adapter to merge"):
        merge(replace(run), tmp_path / "out")
