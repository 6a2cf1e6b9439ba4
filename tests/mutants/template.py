"""Careless edits of data/template: what is learned of a conversation, and which tokens it has."""

from mutants.mutant import Mutant

EDGES = "test_template_edges.py"
TABLE = f"{EDGES} test_mask_table.py test_template.py"
KNOWN = f"{EDGES} test_template_known.py"
REFUSALS = f"{EDGES} test_template_refusals.py"

MUTANTS = [
    Mutant(
        "template: prompt check turned round", "data/template/template.py",
        "        if not text.startswith(asked):", "        if text.startswith(asked):",
        "sound templates are refused, those that rewrite the prompt are trained on", REFUSALS,
    ),
    Mutant(
        "template: prompt check left out", "data/template/template.py",
        "            self._check_prompt(str.__str__(traced), messages, tools)", "            pass",
        "a template that asks with other text than stands in a conversation is trained on", REFUSALS,
    ),
    Mutant(
        "template: end of turn before its token", "data/template/template.py",
        "return token.end() if token else 0", "return token.start() if token else 0",
        "the end of a turn is not learned: the model never stops", TABLE,
    ),
    Mutant(
        "template: prompt without generation header", "data/template/template.py",
        "tools=tools, documents=None, add_generation_prompt=prompt,",
        "tools=tools, documents=None, add_generation_prompt=False,",
        "the model is asked without the header that it learned to answer behind", TABLE,
    ),
    Mutant(
        "example: tools forgotten for plain turns", "data/example.py",
        "    if messages is None or (isinstance(chat, Example) and chat.tools is not None):\n",
        "    if messages is None:\n",
        "rows with tools are rendered without their definitions", TABLE,
    ),
    Mutant(
        "template: turn starts behind its content", "data/template/template.py",
        "turns.append((turn.role, turn.content - turn.start, turn.stop - turn.end, turn.closed))",
        "turns.append((turn.role, turn.start - turn.content, turn.stop - turn.end, turn.closed))",
        "a block before the answer is not learned where rows are planned", f"{REFUSALS} test_mask_table.py",
    ),
    Mutant(
        "template: answers left out are not looked for", "data/template/template.py",
        "        left_out = dropped(traced, messages, tools)\n", "        left_out = ()\n",
        "what the template drops is neither said nor refused", REFUSALS,
    ),
    Mutant(
        "skeleton: text behind it ignored", "data/template/skeleton.py",
        "if len(text) == position + len(skeleton.literals[-1]) else None",
        "if len(text) >= position + len(skeleton.literals[-1]) else None",
        "what a template writes only now and then at the end is lost", EDGES,
    ),
    Mutant(
        "skeleton: turn starts at its content", "data/template/skeleton.py",
        "Turn(index, role, start - ahead, start, position, position + behind, closed)",
        "Turn(index, role, start, start, position, position + behind, closed)",
        "a block before the answer is not learned", REFUSALS,
    ),
    Mutant(
        "skeleton: one content that stands alone is enough", "data/template/skeleton.py",
        "if not all(map(stands_alone, turns.contents)):", "if not any(map(stands_alone, turns.contents)):",
        "a template that strips is not run for rows that it would strip", KNOWN,
    ),
    Mutant(
        "skeleton: guards not asked", "data/template/skeleton.py",
        "    for guard in guards:  # noqa", "    for guard in ():  # noqa",
        "a recorded run stands for rows that the template would treat otherwise", KNOWN,
    ),
    Mutant(
        "spans: nothing stands before an answer", "data/template/spans.py",
        "if behind + len(prompt[1]) <= first:", "if behind + len(prompt[1]) < first:",
        "templates without a block before the answer are refused", TABLE,
    ),
    Mutant(
        "spans: another closing token kept", "data/template/spans.py",
        "            stop = last  # the answer was closed with another token when it was written",
        "            closed = False",
        "the token that opens the next turn is learned as the end of an answer", TABLE,
    ),
    Mutant(
        "spans: late echo allowed", "data/template/spans.py",
        "span.start >= last and not _echoed(span, spans, first)",
        "span.start >= last and _echoed(span, spans, first)",
        "an answer is placed in front of the question that it answers", REFUSALS,
    ),
    Mutant(
        "spans: a lost end is not missed", "data/template/spans.py",
        "    return bool(text[at:].strip())", "    return False",
        "an answer whose end the template cuts is learned as if it were whole", REFUSALS,
    ),
    Mutant(
        "spans: echoes count as the answer", "data/template/spans.py",
        "if alone is None or again < max(",
        "if alone is None or again <= max(",
        "a later turn that names the called tool makes rows with tools fail", TABLE,
    ),
    Mutant(
        "spans: an emptied answer is enough", "data/template/spans.py",
        "any(span.source.message == index and span.end > span.start for span in spans)",
        "any(span.source.message == index and span.end >= span.start for span in spans)",
        "answers of which the template leaves nothing are trained on as empty ones", EDGES,
    ),
    Mutant(
        "row tokenizer: only unlearned turns lose their marks", "data/template/row_tokenizer.py",
        "            if chosen:\n                marks[first:last] = False",
        "            if not chosen:\n                marks[first:last] = False",
        "loss_on=all learns turns of weight 0 and leaves out the others", "test_template.py",
    ),
    Mutant(
        "row tokenizer: closed is said of the last turn", "data/template/row_tokenizer.py",
        "        closed = closed and turn.closed", "        closed = turn.closed",
        "rows whose first answers have no end are not reported", EDGES,
    ),
    Mutant(
        "row tokenizer: completion begins one later", "data/template/row_tokenizer.py",
        "if index >= chat.completion_from]", "if index > chat.completion_from]",
        "the first answer of a completion is not learned", "test_template.py",
    ),
    Mutant(
        "row tokenizer: the first answer for the last", "data/template/row_tokenizer.py",
        "        answers = answers[-1:]\n", "        answers = answers[:1]\n",
        "last_assistant learns the first answer", "test_template.py",
    ),
    Mutant(
        "row tokenizer: documents without an end", "data/template/row_tokenizer.py",
        "np.array([*start, *encoding.ids, self.document_end], dtype=np.int32)",
        "np.array([*start, *encoding.ids], dtype=np.int32)",
        "raw text is learned without the token that ends a document", EDGES,
    ),
    Mutant(
        "row tokenizer: stops at the first token of an answer", "data/template/row_tokenizer.py",
        "stops.add(int(row.ids[np.flatnonzero(row.learned)[-1]]))",
        "stops.add(int(row.ids[np.flatnonzero(row.learned)[0]]))",
        "answers are cut where a letter comes, and not where the turn ends", EDGES,
    ),
    Mutant(
        "row tokenizer: closing token with a space behind it lost", "data/template/row_tokenizer.py",
        "                last, stop = last + 1, turn.stop", "                last, stop = last, turn.stop",
        "where the closing token takes a line feed along, it is not learned", TABLE,
    ),
    Mutant(
        "row tokenizer: token shared with the template counted in", "data/template/row_tokenizer.py",
        "            first += start < turn.content  # that token is partly the template's",
        "            first += 0",
        "a token of the template counts as content", "test_template.py",
    ),
    Mutant(
        "row tokenizer: spelled markers overlooked", "data/template/row_tokenizer.py",
        "        if len(special) == row.markers:\n", "        if len(special) >= row.markers:\n",
        "a marker that a user types becomes the model's own token", "test_template.py test_template_refusals.py",
    ),
    Mutant(
        "row tokenizer: prompt with the tokenizer's own start", "data/template/row_tokenizer.py",
        "return self._spans(row, self.backend.encode(row.text, add_special_tokens=False)).ids",
        "return self._spans(row, self.backend.encode(row.text, add_special_tokens=True)).ids",
        "prompts begin with two start tokens, rows with one", EDGES,
    ),
    Mutant(
        "literal ids: only the beginning of a content is looked at", "data/template/literal_ids.py",
        "return self._start.search(content) is None", "return self._start.match(content) is None",
        "a marker inside a content becomes a token of its own", KNOWN,
    ),
    Mutant(
        "literal ids: turn without its end", "data/template/literal_ids.py",
        "turns.append((start - ahead, end + behind))", "turns.append((start - ahead, end))",
        "the end of a turn is not learned", KNOWN,
    ),
    Mutant(
        "literal ids: first answer for the last", "data/template/literal_ids.py",
        'answers = answers[-1:] if loss_on == "last_assistant" else answers',
        'answers = answers[:1] if loss_on == "last_assistant" else answers',
        "last_assistant learns the first answer of rows that are known", KNOWN,
    ),
    Mutant(
        "traced: a cut forgets where it begins", "data/template/traced.py",
        "offset = CHANGED if span.offset == CHANGED else span.offset + first - span.start", "offset = span.offset",
        "what a template cuts off in front is not noticed", REFUSALS,
    ),
    Mutant(
        "traced: lines without their ends", "data/template/traced.py",
        "            start += len(whole)\n", "            start += len(line)\n",
        "in templates that go through lines the answer is placed wrong", EDGES,
    ),
    Mutant(
        "traced: replace loses the source", "data/template/traced.py",
        "return self._changed(super().replace(old, new, count))", "return super().replace(old, new, count)",
        "templates that replace in contents are refused", REFUSALS,
    ),
    Mutant(
        "watched: one guard for all questions", "data/template/watched.py",
        "self.guards[ask.__name__, index, asked] = Guard(", "self.guards[ask.__name__, index, None] = Guard(",
        "of two questions about a content only the last is asked again", KNOWN,
    ),
    Mutant(
        "goldens: ids and prompt must both differ", "data/template/goldens.py",
        'if ids != golden["ids"] or prompt != old_prompt:', 'if ids != golden["ids"] and prompt != old_prompt:',
        "a tokenizer that drifted is used with the adapter", "test_merge.py -k contract",
    ),
    Mutant(
        "goldens: template beside the adapter unchecked", "data/template/goldens.py",
        "        if beside.is_file() and beside", "        if not beside.is_file() and beside",
        "a changed template beside an adapter is accepted", "test_merge.py -k template_that_was_changed",
    ),
    Mutant(
        "goldens: one conversation kept", "data/template/goldens.py",
        "    goldens = goldens[:COUNT]\n", "    goldens = goldens[:1]\n",
        "a drift that the first conversation does not show goes through", "test_merge.py -k changed_beside",
    ),
    Mutant(
        "named: a marker of llama-3 forgotten", "data/template/named.py",
        '"llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),',
        '"llama-3": ("<|start_header_id|>", "<|end_header_id|>"),',
        "a model without <|eot_id|> is given llama-3 turns that never end", f"test_named_templates.py {EDGES}",
    ),
    Mutant(
        "pieces: what is after a special token forgotten", "data/template/pieces.py",
        "after_special = not ids or ids[-1] in self._special", "after_special = not ids",
        "sentence-piece tokenizers get other tokens behind a marker", TABLE,
    ),
    Mutant(
        "pieces: the check of plain markers turned round", "data/template/pieces.py",
        "if not self._special.isdisjoint(ids) or _bare(spelt) != _bare(text):",
        "if _bare(spelt) != _bare(text):",
        "a content becomes a special token where the tokenizer cannot write it otherwise", EDGES,
    ),
    Mutant(
        "sandbox: blocks keep their indentation", "data/template/sandbox.py",
        "trim_blocks=True, lstrip_blocks=True", "trim_blocks=True, lstrip_blocks=False",
        "texts differ from what transformers renders", TABLE,
    ),
    Mutant(
        "sandbox: JSON escapes other scripts", "data/template/sandbox.py",
        "value: Any, ensure_ascii: bool = False,", "value: Any, ensure_ascii: bool = True,",
        "Korean arguments of tools are learned as escapes", TABLE,
    ),
    Mutant(
        "sandbox: the date of the day", "data/template/sandbox.py",
        "DATE = datetime(2025, 1, 1)", "DATE = datetime.now()",
        "the same row has other tokens tomorrow", "test_template.py -k same_every_day",
    ),
]  # fmt: skip
