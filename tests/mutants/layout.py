"""Careless edits of what decides, carries out and runs a layout: planning/, the loop, batches, objectives, LoRA groups
and sessions."""

from mutants.mutant import Mutant

FORMS = "test_engine_forms.py"
GROUP = "test_engine_group.py"

MUTANTS = [
    Mutant(
        "decide: the optimiser leaves too early", "planning/decide.py",
        "wanted = room < memory.passing(facts, _leanest(facts, layout))",
        "wanted = room < memory.passing(facts, layout)",
        "updates run on the host where recomputed layers would have done", "test_decide.py",
    ),
    Mutant(
        "decide: memory of one form", "planning/decide.py",
        "2 * memory.passing(facts, layout) > room", "memory.passing(facts, layout) > room",
        "a second captured form runs out of memory", "test_decide.py -k one_form",
    ),
    Mutant(
        "decide: one layer too many runs again", "planning/decide.py",
        "count = layers if facts.padded_task else layers - 1", "count = layers",
        "the last layer is recomputed, which saves nothing", "test_decide.py -k asked_for",
    ),
    Mutant(
        "decide: layers that draw and run again are captured", "planning/decide.py",
        "again = layout.mode.checkpointed_layers > 0 and facts.model.draws\n", "again = False\n",
        "a captured step asks torch's generator for the state that it cannot give", "test_decide.py -k keyed",
    ),
    Mutant(
        "decide: a captured optimiser on the host", "planning/decide.py",
        "on_host = tables or layout.offload_optimizer or", "on_host = tables or",
        "a graph waits for the host", "test_decide.py -k captured",
    ),
    Mutant(
        "decide: checkpointing although forbidden", "planning/decide.py",
        "    if train.gradient_checkpointing is False:\n        return layout\n", "",
        "train.gradient_checkpointing=false does nothing", "test_decide.py -k forbidden",
    ),
    Mutant(
        "decide: what autograd keeps is forgotten", "planning/decide.py",
        "memory.passing(facts, replace(layout, mode=mode)))", "memory.passing(facts, replace(layout, mode=mode)) // 2)",
        "too few layers are recomputed and memory runs out", "test_decide.py -k order_of_speed",
    ),
    Mutant(
        "decide: both orders where weights are large", "planning/decide.py",
        "return held < TRANSPOSED_SHARE *", "return held > TRANSPOSED_SHARE *",
        "the bytes of large weights are kept twice", "test_decide.py -k both_orders",
    ),
    Mutant(
        "decide: no slack", "planning/decide.py",
        " - taken - slack_bytes(free)\n", " - taken\n",
        "torch's own needs have no room", "test_decide.py",
    ),
    Mutant(
        "memory: moments of one optimiser for all", "planning/memory.py",
        "int(OPTIMISER_BYTES[layout.optim] * model.trainable)", 'int(OPTIMISER_BYTES["adamw"] * model.trainable)',
        "8-bit moments are planned at four times their size", "test_decide.py -k is_the_sum",
    ),
    Mutant(
        "memory: a host optimiser takes device memory", "planning/memory.py",
        'start | {"gradients": 8 * model.largest_trained}', "start",
        "gradients that leave at once are counted as kept", "test_decide.py",
    ),
    Mutant(
        "memory: all gradients beside all activations", "planning/memory.py",
        "not whole or layout.cut.accumulate > 1", "True",
        "training a whole model is planned a quarter too large", "test_decide.py -k trained_whole",
    ),
    Mutant(
        "memory: unpacked weights weigh nothing", "planning/memory.py",
        "shape, tokens, layout.mode, kept) + unpacked", "shape, tokens, layout.mode, kept)",
        "a 70B in 4 bits runs out of memory where it was said to fit", "test_decide.py -k unpacked",
    ),
    Mutant(
        "dropout: each pass begins with the first token", "training/objective/objective.py",
        "self.place(step, before)\n", "self.place(step, 0)\n",
        "micro-batches share masks, and another cut is another training", "test_dropout.py -k cut",
    ),
    Mutant(
        "dropout: one mask for all layers", "methods/layers/group.py",
        "group.number.fill_(number)", "group.number.fill_(0)",
        "layers drop the same features", "test_dropout.py -k own",
    ),
    Mutant(
        "8 bits: a skipped step is counted", "engine/memory/adam_8bit.py",
        "learns if verdict.skip is None else learns & (verdict.skip == 0)", "learns",
        "steps that were not made correct the moments", "test_adam_8bit.py -k skipped",
    ),
    Mutant(
        "8 bits: moments lose their sign", "engine/memory/adam_8bit.py",
        "code = code + ((x > 0) & ~positive).long() - ((x < 0) & positive).long()", "code = code + 0",
        "a small moment turns round", "test_adam_8bit.py -k float64",
    ),
    Mutant(
        "8 bits: a state is loaded elsewhere", "engine/memory/adam_8bit.py",
        "tensor.copy_(torch.as_tensor(flat[name]).view(tensor.shape))",
        "self.state[parameter][name] = torch.as_tensor(flat[name]).view(tensor.shape)",
        "captured steps go on with the old moments", "test_adam_8bit.py -k saved_state",
    ),
    Mutant(
        "memory: tables that wait are counted", "planning/memory.py",
        "    frozen -= _waiting_bytes(facts)\n", "",
        "whet plan does not see what offload_head saves", "test_offload_head.py -k plan_counts",
    ),
    Mutant(
        "rules: either is enough", "planning/rules.py",
        'asked.storage == "bf16" and asked.compute == "fp32"', 'asked.storage == "bf16" or asked.compute == "fp32"',
        "plain fp32 training is refused", "test_rules.py -k fp32",
    ),
    Mutant(
        "rules: 8-bit Adam is no Adam", "planning/rules.py",
        'is not None and "adamw" not in asked.train.optim', 'is not None and asked.train.optim != "adamw"',
        "8-bit Adam is refused its betas", "test_rules.py -k adam",
    ),
    Mutant(
        "rules: open counts as off", "planning/rules.py",
        "(asked.train.activation_offload or asked.train.tile_mlp) and asked.train.gradient_checkpointing is False",
        "(asked.train.activation_offload or asked.train.tile_mlp) and not asked.train.gradient_checkpointing",
        "tiles are refused without a line that they do not need", "test_rules.py",
    ),
    Mutant(
        "rules: a tied table is refused", "planning/rules.py",
        "            and not (asked.base.offload_head and asked.built.tied)\n", "",
        "tied tables cannot wait on the host together", "test_rules.py",
    ),
    Mutant(
        "rules: no device but CUDA has FP8", "planning/rules.py",
        'asked.device != "cpu" and not asked.has_fp8', "asked.has_fp8",
        "FP8 is refused where the hardware has it", "test_rules.py -k fp8",
    ),
    Mutant(
        "rules: packing in front of prefixes", "planning/rules.py",
        "packing=False, padding_free=False", "padding_free=False",
        "documents share a row behind the tokens of another", "test_rules.py -k behind",
    ),
    Mutant(
        "rules: only some forbid", "planning/rules.py",
        "if not all(rule.holds(wanted) for rule in RULES):", "if not all(rule.holds(wanted) for rule in LAYOUT):",
        "what whet decides by itself is refused afterwards", "test_rules.py -k turned_off",
    ),
    Mutant(
        "rule: one known fact is enough", "planning/rule.py",
        "return any(getattr(asked, fact) is None", "return all(getattr(asked, fact) is None",
        "a rule without needs never refuses, another one too early", "test_rules.py",
    ),
    Mutant(
        "asked: padded only if both", "planning/asked.py",
        'self.task != "causal" or not self.method.can.inside', 'self.task != "causal" and not self.method.can.inside',
        "labelled rows are laid end to end", "test_rules.py",
    ),
    Mutant(
        "loop: patience of one more", "training/loop.py",
        "self.state.evaluations_without_gain >= patience", "self.state.evaluations_without_gain > patience",
        "early stopping waits longer than it was told", "test_training.py -k early_stopping",
    ),
    Mutant(
        "loop: tokens of the last step", "training/loop.py",
        "self.state.tokens += sum(", "self.state.tokens = sum(",
        "metrics.jsonl counts the tokens of one step", "test_training.py -k what_they_learned",
    ),
    Mutant(
        "loop: no save at the end", "training/loop.py",
        "return looks, last or self.interrupted or", "return looks, self.interrupted or",
        "what was learned after the last save is lost", "test_training.py -k last_step_is_saved",
    ),
    Mutant(
        "loop: the state of a checkpoint is dropped", "training/loop.py",
        "self.state = self.launcher.with_room(", "self.launcher.with_room(",
        "a resumed run does its first steps again", "test_resume.py -k 'each_line or early_stop'",
    ),
    Mutant(
        "launch: gradients of the step that failed", "training/launch.py",
        "        free_memory(self.optimiser)\n        before = ", "        before = ",
        "rows that were computed before memory ran out count twice", "test_launch.py -k counted_twice",
    ),
    Mutant(
        "launch: the trial uses random numbers up", "training/launch.py",
        "            restore_random_state(*state)\n", "",
        "dropout differs between machines with much and little memory", "test_launch.py -k early_and_forgotten",
    ),
    Mutant(
        "launch: the trial is learned", "training/launch.py",
        "            self.optimiser.zero_grad(set_to_none=True)\n            restore_random_state(*state)\n",
        "            restore_random_state(*state)\n",
        "the longest rows count twice in the second step", "test_launch.py -k early_and_forgotten",
    ),
    Mutant(
        "out of memory: only a stated cause counts", "base/out_of_memory.py",
        "error = error.__cause__ or error.__context__\n    return False", "error = error.__cause__\n    return False",
        "a run ends although smaller pieces would fit", "test_launch.py -k raised_in_its_place",
    ),
    Mutant(
        "relief: the smallest row is named", "training/relief.py",
        "        largest = max(batches, key=", "        largest = min(batches, key=",
        "the wrong row is blamed for the lack of memory", "test_launch.py -k largest_is_named",
    ),
    Mutant(
        "launch: a capture that failed leaves its factor", "training/launch.py",
        "        optimiser.grad_scale = optimiser.found_inf = None\n", "",
        "after memory ran out every gradient is divided once more", "test_out_of_memory.py -k given_up_leave",
    ),
    Mutant(
        "scarce: an error keeps what failed", "engine/memory/scarce.py",
        "        traceback.clear_frames(error.__traceback__)\n", "        pass\n",
        "the second try finds the memory of the first one taken", "test_out_of_memory.py -k held_is_let",
    ),
    Mutant(
        "session: a broken answer goes on", "engine/answer/state.py",
        "            streamer.end()\n", "            pass\n",
        "the next prompt is shown as a part of the answer", "test_out_of_memory.py -k turn_that",
    ),
    Mutant(
        "probe: without memory a family mixes rows", "engine/compute/probe.py",
        "        if ran_out(error):\n            raise\n", "",
        "a full GPU is told as a fault of the model", "test_out_of_memory.py -k taken_for",
    ),
    Mutant(
        "load: what the recipe says is overruled", "training/load.py",
        'origins["data.padding_free"]["origin"] != "decided"', 'origins["data.padding_free"]["origin"] == "decided"',
        "a run that could fall back is refused, one that asked for shared rows is changed",
        "test_isolation_fallback.py",
    ),
    Mutant(
        "load: attention is not looked at", "training/load.py",
        "return ready if isolation.holds else _padded(", "return ready if True else _padded(",
        "documents that share a row see each other", "test_isolation_fallback.py",
    ),
    Mutant(
        "optim: biases decay", "training/optim.py",
        "((matrices, decay), (vectors, 0.0))", "((matrices, decay), (vectors, decay))",
        "norms and biases are pulled to zero", "test_training.py -k do_not_decay",
    ),
    Mutant(
        "optim: one rate for all", "training/optim.py",
        'its_own = rate * group.get("rate_ratio", 1.0)', "its_own = rate",
        "LoRA+ is plain LoRA after the first step", "test_lora_family.py -k lora_plus_is_pefts",
    ),
    Mutant(
        "apply: copies are never refreshed", "training/apply.py",
        "refresh=groups.refresh, draws", "refresh=None, draws",
        "grouped LoRA answers as at the start, whatever it learns", "test_methods.py -k update_is_seen",
    ),
    Mutant(
        "apply: the recipe's cut for the layout's", "training/apply.py",
        "plan.facts.work.batches.with_cut(layout.cut)", "plan.facts.work.batches",
        "what was decided about forward passes does not happen", "test_equivalence.py -k laid_out",
    ),
    Mutant(
        "labels: labels are added up", "training/objective/labels.py",
        'reduction="none").mean(1)', 'reduction="none").sum(1)',
        "a row with many labels counts more than another", "test_tasks.py -k transformers_own",
    ),
    Mutant(
        "seq2seq: an answer is read as it is predicted", "training/objective/seq2seq.py",
        "before[:, 1:] = np.where(mask, batch.answers, self.pad)[:, :-1]",
        "before[:] = np.where(mask, batch.answers, self.pad)",
        "a decoder learns to repeat the token that it reads", "test_tasks.py -k 'transformers_own and T5'",
    ),
    Mutant(
        "text: filler is a target", "training/objective/text.py",
        "np.full(missing, -1, np.int64)", "np.zeros(missing, np.int64)",
        "steps learn token 0 where they are filled up", f"{FORMS} -k same_step",
    ),
    Mutant(
        "text: weights of the capture for all batches", "training/objective/text.py",
        "self.indices, self.targets, *weights, *ends]", "self.indices, self.targets, *ends]",
        "a replayed step has the weights of another one", "test_objective.py -k every_tensor",
    ),
    Mutant(
        "text: weighted tokens count as one", "training/objective/text.py",
        "return len(batch.targets) if batch.weights is None else float(batch.weights.sum(dtype=np.float64))",
        "return len(batch.targets)",
        "a weight of 2 for all rows doubles the learning rate", "test_objective.py -k is_divided",
    ),
    Mutant(
        "text: a form's documents for the row's", "training/objective/text.py",
        "* (form.documents + 1 - len(bounds))", "* (form.documents - len(bounds))",
        "batches of one form differ in shape", f"{FORMS} test_objective.py -k 'form and shape or same_step'",
    ),
    Mutant(
        "virtual text: positions from the front", "training/objective/virtual_text.py",
        "logits[:, -length:]", "logits[:, :length]",
        "tokens are predicted from virtual ones", "test_objective.py -k in_front",
    ),
    Mutant(
        "padded rows: zeros for the padding token", "training/objective/padded_rows.py",
        "move(np.where(mask, ids, self.pad))", "move(ids)",
        "a decoder's head reads a padding place", "test_tasks.py -k 'alone_and_beside or transformers_own'",
    ),
    Mutant(
        "objective: float32 weights without autocast", "training/objective/objective.py",
        "placement.compute != torch.float32 if float32_trained else placement.autocast", "placement.autocast",
        "padded runs compute in float32 whatever was asked", "test_objective.py -k float32",
    ),
    Mutant(
        "choose: heads look for padding", "training/objective/choose.py",
        'apart=(virtual and kind == "decoder") or sees_padding(network)', "apart=sees_padding(network)",
        "labels behind virtual tokens are read off the padding", "test_objective.py -k choose",
    ),
    Mutant(
        "batches: a step is one forward pass", "data/batch/batches.py",
        "starts[number] : starts[number] + self.cut.step_size", "starts[number] : starts[number] + self.size",
        "accumulated steps leave rows out", "test_launch.py -k same_order",
    ),
    Mutant(
        "text batches: a target predicts itself", "data/batch/text_batches.py",
        "np.zeros(len(targets), np.int64), targets - 1,", "np.zeros(len(targets), np.int64), targets,",
        "the model learns to repeat a token", "test_equivalence.py -k laid_out",
    ),
    Mutant(
        "text batches: the first epoch alone", "data/batch/text_batches.py",
        "largest // per_epoch * self.steps_per_epoch + largest", "largest",
        "another step than the largest is tried out", "test_launch.py -k largest_batch_is_found",
    ),
    Mutant(
        "text batches: weights of unlearned tokens", "data/batch/text_batches.py",
        "[self.rows.weights[span][self.rows.learned[span]] for span in spans]",
        "[self.rows.weights[span] for span in spans]",
        "weights stand beside the wrong targets", "test_objective.py -k is_divided",
    ),
    Mutant(
        "forms: one that is just large enough", "data/batch/forms.py",
        "if form.tokens >= tokens), None)", "if form.tokens > tokens), None)",
        "a full batch gets a larger form, or none", f"{FORMS} -k smallest_form",
    ),
    Mutant(
        "forms: filler is no document", "data/batch/forms.py",
        "documents = int((facts.documents[chosen] + filled).max())", "documents = int(facts.documents[chosen].max())",
        "a filled batch has more documents than its form", f"{FORMS} -k 'fits_its_form or size_of_the_form'",
    ),
    Mutant(
        "padded batches: token types forgotten", "data/batch/padded_batches.py",
        "            types[mask] = np.concatenate([self.rows.types[self.rows.span(row)] for row in units])\n", "",
        "both texts of a pair look like the first", "test_tasks.py -k pair",
    ),
    Mutant(
        "group: a copy without the scale", "methods/layers/group.py",
        "b = (self.b.detach() * shape.scale).to(shape.compute)", "b = self.b.detach().to(shape.compute)",
        "sharded runs train with scale 1", f"{GROUP} -k same_bits",
    ),
    Mutant(
        "group: refreshed without the scale", "methods/layers/group.py",
        "torch.mul(rows[:, block], shape.scale, out=", "torch.mul(rows[:, block], 1.0, out=",
        "lora_alpha does nothing", f"{GROUP} -k same_bits",
    ),
    Mutant(
        "group: gradient without the scale", "methods/layers/group.py",
        "_diagonal_blocks(grad.t() @ reduced, ctx.sizes) * ctx.scale",
        "_diagonal_blocks(grad.t() @ reduced, ctx.sizes)",
        "B learns at another rate than A", f"{GROUP} -k gradients_over",
    ),
    Mutant(
        "group: every block is the first", "methods/layers/group.py",
        "wide[start : start + size, index * r : (index + 1) * r].float()", "wide[start : start + size, :r].float()",
        "key and value learn from the rank-r product of the query", f"{GROUP} -k 'gradients_are_pefts'",
    ),
    Mutant(
        "group: only A is looked at", "methods/layers/group.py",
        "if copy is not None and copy.of_a is self.a and copy.of_b is self.b:",
        "if copy is not None and copy.of_a is self.a:",
        "a gathered B is ignored for a stale copy", f"{GROUP} -k were_replaced",
    ),
    Mutant(
        "group: whatever was computed last", "methods/layers/group.py",
        "elif waiting.x is not x:", "elif waiting.x is None:",
        "a layer answers for the input of another", f"{GROUP} -k another_input",
    ),
    Mutant(
        "group: outputs are kept", "methods/layers/group.py",
        "            waiting.x, waiting.outputs = None, []\n", "            pass\n",
        "activations stay in memory after the backward pass", f"{GROUP} -k nothing_waits",
    ),
    Mutant(
        "group: dropout in evaluation", "methods/layers/group.py",
        "drops = self.dropout and self.training\n", "drops = self.dropout\n",
        "held-out losses are noisy", f"{GROUP} -k dropped_in_evaluation",
    ),
    Mutant(
        "group: only B is refreshed", "methods/layers/group.py",
        "            copy_all(slices, [group.a for copies in self._copies for group in copies.groups])\n",
        "            pass\n",
        "A stays as it was drawn", f"{GROUP} -k same_bits",
    ),
    Mutant(
        "fuse: ranks are not compared", "methods/layers/fuse.py",
        "        and first.r[one] == layer.r[one]\n", "",
        "layers of unlike rank become one product", f"{GROUP} -k ranks_of_one_scale",
    ),
    Mutant(
        "fuse: scales are not compared", "methods/layers/fuse.py",
        "        and first.scaling[one] == layer.scaling[one]\n", "",
        "a layer gets the scale of its neighbour", f"{GROUP} -k different_ranks",
    ),
    Mutant(
        "fuse: a layer that is called twice", "methods/layers/fuse.py",
        "        grouped.add(layer)\n", "",
        "one layer stands in two groups", f"{GROUP} -k called_twice",
    ),
    Mutant(
        "fuse: biases in another order", "methods/layers/fuse.py",
        "zip(biases, sizes, strict=True)]", "zip(reversed(biases), sizes, strict=True)]",
        "the bias of the query is added to the value", f"{GROUP} -k bias",
    ),
    Mutant(
        "member: rows of the next layer", "methods/layers/member.py",
        "self.group.shape.sizes[: self.index]", "self.group.shape.sizes[: self.index + 1]",
        "a layer shows the bias of its neighbour", f"{GROUP} -k member_shows",
    ),
    Mutant(
        "member: switched off for ever", "methods/layers/member.py",
        "        self.group.enabled = enabled\n", "        self.group.enabled = False\n",
        "after a question to the base the adapter is gone", f"{GROUP} -k switch_groups_off",
    ),
    Mutant(
        "state: the parts of B for A", "methods/layers/state.py",
        "[group.shape.r] * len(group.members)", "[group.shape.r * len(group.members)]",
        "a group's A is saved under the name of its first layer", f"{GROUP} -k files_have",
    ),
    Mutant(
        "state: rounded weights", "methods/layers/state.py",
        "name: _whole((exact or {}).get(parameter, parameter))", "name: _whole(parameter)",
        "checkpoints hold bf16 weights of a float32 optimiser", "test_host_adam.py",
    ),
    Mutant(
        "state: names with the group's path", "methods/layers/state.py",
        "if not name.startswith(inside)}", "}",
        "files hold what PEFT does not know", f"{GROUP} -k names_no_group",
    ),
    Mutant(
        "session: a switch finds what is set up", "engine/answer/state.py",
        "        self.release()\n        with change:\n", "        with change:\n",
        "the base answers through the graph of the adapter", "test_session.py",
    ),
    Mutant(
        "session: contents are not compared", "engine/answer/state.py",
        "state += (tensor.data_ptr(), version_of(tensor))", "state += (tensor.data_ptr(),)",
        "dense copies of old weights answer", "test_session.py -k another_state",
    ),
    Mutant(
        "session: what is half set up stays", "engine/answer/state.py",
        "                self.release()\n                if not isinstance(", "                if not isinstance(",
        "a failed question leaves the model in evaluation mode", "test_session.py -k set_up_is_put_back",
    ),
    Mutant(
        "session: every module trains again", "engine/answer/state.py",
        "            module.training = training\n", "            module.training = True\n",
        "a model that was not in training is, after a question", "test_session.py -k left_as_it_was",
    ),
    Mutant(
        "generate: copies are not compared", "engine/answer/generate.py",
        "return chain(super()._modules(), self._packed)", "return super()._modules()",
        "a changed quantised layer goes on answering as before", "test_session.py -k dense_copy",
    ),
    Mutant(
        "generate: no room is asked for", "engine/answer/generate.py",
        "            if free_bytes(next(self.model.parameters()).device) + held < needed:\n",
        "            if not needed:\n",
        "longer answers run out of memory beside dense copies", "test_session.py -k make_way",
    ),
    Mutant(
        "generate: the decoder outlives its state", "engine/answer/generate.py",
        "        self._decoder, self._packed, self._room_bytes = None, [], 0\n",
        "        self._packed, self._room_bytes = [], 0\n",
        "memory of the cache is never given back", "test_session.py -k left_as_it_was",
    ),
    Mutant(
        "proof: the base is not proven", "engine/answer/generate.py",
        'find_fault(self.model, layout) if options.static is None else ""',
        'find_fault(self.model, layout) if options.static else ""',
        "a model that our loop gets wrong answers wrongly", "test_session.py -k proven",
    ),
    Mutant(
        "proof: the first tokens are compared", "engine/answer/proof.py",
        "logits[0, -TOKENS:].float()", "logits[0, :TOKENS].float()",
        "no model is ever trusted with the fast loop", "test_session.py -k proven",
    ),
    Mutant(
        "rows: answers go to the rows of the group", "engine/answer/rows.py",
        "        self._origin = self._origin[rows]\n", "        self._origin = rows\n",
        "answers change places once rows are taken out twice", "test_generate.py -k different_times",
    ),
    Mutant(
        "rows: answers end behind the stop token", "engine/answer/rows.py",
        "return ids[: next((index for index,", "return ids[: next((index + 1 for index,",
        "answers hold the token that ends them", "test_generate.py -k different_times",
    ),
]  # fmt: skip
