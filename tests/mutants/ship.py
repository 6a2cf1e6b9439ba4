"""Careless edits of ship/: merging and its certificate, adapters by name, predictions, chat."""

from mutants.mutant import Mutant

MERGE = "test_merge.py"
CERTIFICATE = "test_certificate.py"
ADAPTERS = "test_adapters.py"
EDGES = "test_ship_edges.py"
ATTENTION = "test_certificate_attention.py"
THEIRS = "test_foreign_adapters.py"
FURTHER = "test_further.py"

MUTANTS = [
    Mutant(
        "merge: the farthest candidate", "ship/merge.py",
        "if best is None or verdict.order < best[0].order:", "if best is None or verdict.order > best[0].order:",
        "the worst of the merged models is kept", "test_merge.py -k quantised_run",
    ),
    Mutant(
        "merge: the first that is near enough", "ship/merge.py",
        "        if verdict.perfect:\n", "        if verdict.near:\n",
        "answers change although an exact merge was possible", MERGE,
    ),
    Mutant(
        "merge: far ones are written", "ship/merge.py",
        "        if not best.near:\n", "        if not best.near and not tried:\n",
        "a merged model that answers otherwise is written", "test_merge.py -k wrong_merge",
    ),
    Mutant(
        "merge: stops forgotten", "ship/merge.py",
        "        plain.generation_config.eos_token_id = stop_ids", "        plain.generation_config.eos_token_id = 2",
        "the merged model does not stop where a turn ends", EDGES,
    ),
    Mutant(
        "merge: no contract beside the model", "ship/merge.py",
        "                write_contract(prepared.row_tokenizer, directory / CONTRACT)\n", "                pass\n",
        "a template that drifts is not noticed with the merged model", EDGES,
    ),
    Mutant(
        "merge: labels forgotten when read back", "ship/merge.py",
        'assert names == task.labels, f"the', 'assert len(names) == len(task.labels), f"the',
        "a merged model that names its labels otherwise is written", "test_task_evaluation.py -k merge",
    ),
    Mutant(
        "merge: the 16-bit base for the dequantised", "ship/merge.py",
        '        if base_kind == "dequantised":\n', '        if base_kind != "dequantised":\n',
        "the certificate names another base than was merged", "test_merge.py -k 'quantised_run or plain_transformers'",
    ),
    Mutant(
        "merge: read back with whet's own attention", "ship/merge.py",
        "from_pretrained(str(folder), dtype=placement.compute, use_safetensors=True)",
        "from_pretrained(str(folder), dtype=placement.compute, attn_implementation=\"whet\")",
        "an attention that is wrong in whet is in both sides of the proof", ATTENTION,
    ),
    Mutant(
        "merge: always bf16", "ship/merge.py",
        "for dtype in (stored, *WIDER[stored]) for base", 'for dtype in ("bf16", "fp32") for base',
        "a checkpoint in fp16 or fp32 loses its type", ATTENTION,
    ),
    Mutant(
        "merge: infinite weights are written", "ship/merge.py",
        "if not all(bool(tensor.isfinite().all())", "if not any(bool(tensor.isfinite().all())",
        "weights that the type cannot hold become infinite", ATTENTION,
    ),
    Mutant(
        "agreement: the loss decides nothing", "ship/agreement.py",
        "and self.moved_loss <= self.loss_limit", "and self.moved_loss >= 0",
        "a merged model that predicts held-out rows worse passes", ATTENTION,
    ),
    Mutant(
        "agreement: divergence the other way", "ship/agreement.py",
        "divergences.append((first.exp() * (first - second))", "divergences.append((second.exp() * (second - first))",
        "the certificate's KL is that of live from merged", CERTIFICATE,
    ),
    Mutant(
        "agreement: differences that cancel", "ship/agreement.py",
        "(first.exp() * (first - second)).sum(-1)", "(first - second).mean(-1)",
        "the certificate's KL is no divergence", CERTIFICATE,
    ),
    Mutant(
        "agreement: a hundred times the limit", "ship/agreement.py",
        "MEAN_KL_LIMIT = 0.05", "MEAN_KL_LIMIT = 5.0",
        "bad merges are accepted", "test_merge.py -k 'wrong_merge or doubled or forgotten'",
    ),
    Mutant(
        "agreement: one distribution for all prompts", "ship/agreement.py",
        "            return self.remembered[index]\n", "            return next(iter(self.remembered.values()))\n",
        "candidates are held against the answer to another prompt", "test_merge.py -k quantised_run",
    ),
    Mutant(
        "agreement: largest divergence for the mean", "ship/agreement.py",
        "return Agreement(name, dtype, float(kl.mean()), float(kl.max()),",
        "return Agreement(name, dtype, float(kl.median()), float(kl.max()),",
        "a merge that is far off in a few places passes", CERTIFICATE,
    ),
    Mutant(
        "agreement: the end of an answer is not compared", "ship/agreement.py",
        "ids, count = torch.tensor([[*prompt, *reply]], device=device), len(reply) + 1",
        "ids, count = torch.tensor([[*prompt, *reply]], device=device), len(reply)",
        "the certificate says nothing of whether a merged model stops", CERTIFICATE,
    ),
    Mutant(
        "labels: change vanishes among many classes", "ship/label_agreement.py",
        "probabilities(self.task, self.logits)).max(axis=1)", "probabilities(self.task, self.logits)).mean(axis=1)",
        "a merge that changes one of many labels passes", CERTIFICATE,
    ),
    Mutant(
        "labels: any number may differ", "ship/label_agreement.py",
        "unequal <= max(1, UNEQUAL_LIMIT * self.rows)", "unequal <= max(1, self.rows)",
        "merged models with other labels pass", EDGES,
    ),
    Mutant(
        "labels: change in units of the value", "ship/label_agreement.py",
        "return LabelAgreement(*facts, None, float(moved.mean()) / spread, None)",
        "return LabelAgreement(*facts, None, float(moved.mean()) * spread, None)",
        "whether a value is near hangs on its unit", CERTIFICATE,
    ),
    Mutant(
        "adapters: the one before is not put back", "adapters/loaded.py",
        "        finally:\n            self.use(before)", "        finally:\n            self.use(name)",
        "one request with another adapter changes all later ones", EDGES,
    ),
    Mutant(
        "adapters: base with an adapter", "adapters/loaded.py",
        "            self._switched_off.enter_context(self.wrapped.disable_adapter())\n",
        "            pass\n",
        "the base answers with the last adapter", ADAPTERS,
    ),
    Mutant(
        "adapters: a mean for a sum", "adapters/loaded.py",
        "weights = [1.0] * len(parts) if weights is None",
        "weights = [1.0 / len(parts)] * len(parts) if weights is None",
        "composed adapters act with half of their strength", EDGES,
    ),
    Mutant(
        "adapters: renamed one falls out of use", "adapters/loaded.py",
        "        self.in_use = new if self.in_use == old else self.in_use\n", "        self.in_use = self.in_use\n",
        "after a new name the old one is asked for", ADAPTERS,
    ),
    Mutant(
        "adapters: a deleted one stays in use", "adapters/loaded.py",
        "self.use(self.in_use if self.in_use in self._peft_names else None)", "self.use(self.in_use)",
        "the chat goes on with an adapter that is gone", ADAPTERS,
    ),
    Mutant(
        "adapters: loading switches", "adapters/loaded.py",
        "            self._peft_names[name] = peft_name\n\n    def use(",
        "            self._peft_names[name] = peft_name\n        self.use(name)\n\n    def use(",
        "the last adapter that was loaded answers", EDGES,
    ),
    Mutant(
        "adapters: the smallest rank", "adapters/loaded.py",
        "rank or max(config.r for config in configs)", "rank or min(config.r for config in configs)",
        "a composition loses what the larger adapter learned", EDGES,
    ),
    Mutant(
        "compose: weights forgotten on disk", "ship/compose.py",
        'adapters.compose("out", names, weights, how=how,', 'adapters.compose("out", names, None, how=how,',
        "whet adapters compose ignores --weights", EDGES,
    ),
    Mutant(
        "adapters: modules that were trained whole are lost", "adapters/loaded.py",
        'BESIDE = ("use_dora", "trainable_token_indices", "modules_to_save")',
        'BESIDE = ("use_dora", "trainable_token_indices")',
        "a composition drops a trained head", ADAPTERS,
    ),
    Mutant(
        "compose: base of any name", "ship/compose.py",
        "        if locate(model.path) != locate(bases[0][0].path):\n", "        if not locate(model.path):\n",
        "adapters of different models are added up", EDGES,
    ),
    Mutant(
        "adapters: density is not passed on", "adapters/loaded.py",
        'options["density"] = density', 'options["density"] = 0.5',
        "ties and dare thin out by half whatever is asked", EDGES,
    ),
    Mutant(
        "predict: rows cut otherwise than in training", "ship/predict.py",
        "encode_typed(self.answerer.row_tokenizer.tokenizer, texts, pairs, self.max_length)",
        "encode_typed(self.answerer.row_tokenizer.tokenizer, texts, pairs, None)",
        "long texts are read in another length than they were learned in", EDGES,
    ),
    Mutant(
        "predict: numbers from 0", "ship/questions.py",
        "numbered = ((row, line.rstrip(\"\\r\\n\")) for row, line in enumerate(lines, 1))",
        "numbered = ((row, line.rstrip(\"\\r\\n\")) for row, line in enumerate(lines))",
        "answers and errors name the line before", "test_task_evaluation.py -k 'predict or bad_row'",
    ),
    Mutant(
        "predict: second text first", "ship/questions.py",
        'value = {"text": value[0], "text_pair": value[1]}', 'value = {"text": value[1], "text_pair": value[0]}',
        "pairs are read the other way round", "test_task_evaluation.py -k pairs",
    ),
    Mutant(
        "predict: labels that are off", "ship/predict.py",
        "zip(task.labels, decision, strict=True) if on]",
        "zip(task.labels, decision, strict=True) if not on]",
        "the labels that do not fit are named", "test_task_evaluation.py -k predictions_are",
    ),
    Mutant(
        "predict: answers in reverse", "ship/predict.py",
        "for index, row in zip(indices, encoded, strict=True):",
        "for index, row in zip(reversed(indices), encoded, strict=True):",
        "rows get each other's answers", "test_task_evaluation.py -k predictions_are",
    ),
    Mutant(
        "predict: columns of the run forgotten", "ship/questions.py",
        "named = rename(value, columns)", "named = dict(value)",
        "a file with the columns of the training rows cannot be answered", "test_predict.py -k any_kind",
    ),
    Mutant(
        "predict: the reference is part of the question", "ship/questions.py",
        'while messages and messages[-1].role == "assistant":', 'while messages and messages[-1].role == "nobody":',
        "rows that training takes are refused or answered twice", "test_predict.py -k every_format",
    ),
    Mutant(
        "predict: an input is written over", "ship/answer_file.py",
        "[*rows, *inputs_of_run(run), ", "[*inputs_of_run(run), ",
        "the rows of the user are lost", "test_predict.py -k never_written",
    ),
    Mutant(
        "predict: the unlikeliest classes", "ship/predict.py",
        'likeliest = np.argsort(-shares, kind="stable")[:top]', 'likeliest = np.argsort(shares, kind="stable")[:top]',
        "--top names the classes that fit least", "test_predict.py -k likeliest",
    ),
    Mutant(
        "chat: system message forgotten", "ship/talk.py",
        'Talk(chat, [Message("system", system)] if system else [])', "Talk(chat, [])",
        "--system has no effect", EDGES,
    ),
    Mutant(
        "chat: no memory of the conversation", "ship/talk.py",
        'asked = [*conversation.messages, Message("user", text)]', 'asked = [Message("user", text)]',
        "each message is answered as if it were the first", EDGES,
    ),
    Mutant(
        "chat: an error ends the conversation", "ship/talk.py",
        '        write_error(error_text(error) + "\\n")\n', "        raise\n",
        "a typo in a command costs the conversation", "test_chat.py -k typo",
    ),
    Mutant(
        "adapter folder: the base's tokenizer", "adapters/folder.py",
        "    if not differing:\n", "    if differing:\n",
        "an adapter answers with another template than it was trained with", f"{THEIRS} -k own_template",
    ),
    Mutant(
        "adapters of others: names are not turned", "methods/layers/adapter.py",
        "for old, new in beginnings} or None", "for old, new in ()} or None",
        "an adapter of another class of the model cannot be opened", f"{THEIRS} -k names_of_another",
    ),
    Mutant(
        "adapters of others: tables stay small", "methods/layers/adapter.py",
        "    rows = _grown_rows(network, shapes, beginnings)\n", "    rows = None\n",
        "an adapter with new tokens cannot be opened", f"{THEIRS} -k 'answers and new'",
    ),
    Mutant(
        "further: step 0 is not compared", "methods/layers/adapter.py",
        'problem = problem or f"other numbers in {key}"', "pass",
        "training goes on from other numbers than the adapter's", f"{FURTHER} -k not_the_adapter",
    ),
    Mutant(
        "further: the method is not compared", "adapters/further.py",
        "    if (found := disagreement(given, settings)) is not None:\n",
        "    if (found := disagreement({}, settings)) is not None:\n",
        "what a recipe says of the method is dropped without a word", f"{FURTHER} -k not_agree",
    ),
    Mutant(
        "carry: the base's text part", "ship/carry.py",
        "tensors[name] = opened.get_tensor(new)", "tensors[name] = old.get_tensor(name)",
        "the whole model that is merged is the base", "test_vision_text.py -k whole_model",
    ),
]  # fmt: skip
