"""Careless edits of engine/: attention, isolation, layers that run again, what waits on the host, loading."""

from mutants.mutant import Mutant

KERNELS = "test_kernels.py -k attention"
CACHED = "test_generate.py test_engine_edges.py -k 'cap or cached'"
ISOLATION = "test_equivalence.py test_engine_edges.py -k isolation"
EXPERTS = "test_isolation_experts.py"
MODES = "test_memory_modes.py"
EDGES = "test_engine_edges.py"
HOST = "test_host_adam.py"
LOAD = "test_load.py"
KEPT = "test_kept_weights.py"

MUTANTS = [
    Mutant(
        "attention: window one wider", "engine/compute/attention.py",
        "return (distance >= 0) & (distance < window)", "return (distance >= 0) & (distance <= window)",
        "models with sliding windows see a token more than they learned to", KERNELS,
    ),
    Mutant(
        "attention: a token does not see itself", "engine/compute/attention.py",
        "return (distance >= 0) & (distance < window)", "return (distance > 0) & (distance < window)",
        "scores of windowed and soft-capped models are wrong", KERNELS,
    ),
    Mutant(
        "attention: documents ignored", "engine/compute/attention.py",
        "lengths = [query.shape[2]] if documents is None else documents.lengths()", "lengths = [query.shape[2]]",
        "packed documents see each other", "test_equivalence.py -k 'alone or isolation'",
    ),
    Mutant(
        "attention: window forgotten in dense rows", "engine/compute/attention.py",
        "_one(q, k, v, None, scaling, 0.0, sliding_window)",
        "_one(q, k, v, None, scaling, 0.0, None)",
        "where all documents have one length, windows have no effect", "test_kernels.py test_engine_edges.py",
    ),
    Mutant(
        "attention: heads of a group interleaved", "engine/compute/attention.py",
        "return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)",
        "return key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1)",
        "query heads read the keys of another group", KERNELS,
    ),
    Mutant(
        "attention: soft cap without scale", "engine/compute/attention.py",
        "scores = torch.tanh((query @ key.transpose(2, 3)) * scale / softcap) * softcap\n    length",
        "scores = torch.tanh((query @ key.transpose(2, 3)) / softcap) * softcap\n    length",
        "Gemma 2 is trained on other scores", KERNELS,
    ),
    Mutant(
        "attention: scale of the family forgotten", "engine/compute/attention.py",
        "scale = query.shape[-1] ** -0.5 if scaling is None else scaling\n    scores",
        "scale = query.shape[-1] ** -0.5\n    scores",
        "families with a scale of their own are computed with the usual one", KERNELS,
    ),
    Mutant(
        "attention: dropout forgotten", "engine/compute/attention.py",
        "_one(q, k, v, attention_mask, scaling, dropout, sliding_window)",
        "_one(q, k, v, attention_mask, scaling, 0.0, sliding_window)",
        "attention_dropout of a model has no effect", "test_memory_modes.py test_engine_edges.py -k dropout",
    ),
    Mutant(
        "attention: causal although a mask is given", "engine/compute/attention.py",
        "if mask is None and sliding_window is not None and length > sliding_window:",
        "if sliding_window is not None and length > sliding_window:",
        "the mask of a caller is thrown away", EDGES,
    ),
    Mutant(
        "isolation: either is enough", "engine/compute/isolation.py",
        "return self.rounded and (self.moved", "return self.rounded or (self.moved",
        "models whose positions do not restart are trained packed", EDGES,
    ),
    Mutant(
        "isolation: what is within rounding is no leak", "engine/compute/isolation.py",
        "(self.moved == 0.0 or self.reached == 0.0)", "(self.moved == 0.0 or self.reached < 1.0)",
        "documents of a mixture of experts see each other a little", EXPERTS,
    ),
    Mutant(
        "isolation: rounding is a leak", "engine/compute/isolation.py",
        "    if found.moved and found.rounded:", "    if found.moved and not found.rounded:",
        "every mixture of experts is trained padded", EXPERTS,
    ),
    Mutant(
        "isolation: the derivative by the document's own tokens", "engine/compute/isolation.py",
        "gradient.shape[-1])[: len(first)] for", "gradient.shape[-1])[len(first) :] for",
        "every mixture of experts is trained padded", EXPERTS,
    ),
    Mutant(
        "isolation: the embeddings stay cut off", "engine/compute/isolation.py",
        "        hook.remove()", "        pass",
        "whoever trains embeddings teaches them nothing", EXPERTS,
    ),
    Mutant(
        "isolation: the neighbour stays", "engine/compute/isolation.py",
        "two = _flat_logits(model, [other, second])[length:]", "two = _flat_logits(model, [first, second])[length:]",
        "contaminated models pass the check", EDGES,
    ),
    Mutant(
        "isolation: only the first document is compared", "engine/compute/isolation.py",
        "two = _flat_logits(model, [other, second])[length:]", "two = _flat_logits(model, [other, second])[:length]",
        "every model fails the check and is trained padded", "test_equivalence.py -k isolation",
    ),
    Mutant(
        "isolation: positions go on", "engine/compute/isolation.py",
        "positions = torch.cat([torch.arange(len(document), device=device) for document in documents])",
        "positions = torch.arange(bounds[-1], device=device)",
        "the check runs in another layout than training", "test_equivalence.py -k 'alone or isolation'",
    ),
    Mutant(
        "isolation: the model stays in evaluation mode", "engine/compute/isolation.py",
        "    model.train(was_training)\n    return found", "    return found",
        "whoever checks a model in training goes on without dropout", EDGES,
    ),
    Mutant(
        "isolation: the last token may be seen", "engine/compute/isolation.py",
        "return float((one - two)[:-1].abs().max()", "return float((one - two)[:-2].abs().max()",
        "a model that sees one token ahead passes", EDGES,
    ),
    Mutant(
        "cached: causality from the first key", "engine/compute/cached_attention.py",
        ".tril(key.shape[2] - length)", ".tril()",
        "with a cache, new tokens do not see what is before them", EDGES,
    ),
    Mutant(
        "cached: mask turned round", "engine/compute/cached_attention.py",
        "scores = scores.masked_fill(~mask,", "scores = scores.masked_fill(mask,",
        "generation attends to padding and the future", "test_generate.py -k 'greedy or cap'",
    ),
    Mutant(
        "cached: cap forgotten", "engine/compute/cached_attention.py",
        "scores = (torch.tanh(scores / softcap) * softcap)", "scores = (scores)",
        "Gemma 2 answers with other scores than it was trained with", CACHED,
    ),
    Mutant(
        "cached: scale of the family forgotten", "engine/compute/cached_attention.py",
        "(width**-0.5 if scaling is None else scaling)", "width**-0.5",
        "families with a scale of their own answer with the usual one", EDGES,
    ),
    Mutant(
        "cached: heads of a group interleaved", "engine/compute/cached_attention.py",
        "grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)\n    output",
        "grouped = query.reshape(rows, heads // key.shape[1], key.shape[1], width).transpose(1, 2)\n    output",
        "in generation, query heads read the keys of another group", "test_generate.py -k greedy",
    ),
    Mutant(
        "checkpointing: other random numbers", "engine/memory/checkpointing.py",
        "ctx.random = before if kept.random else None", "ctx.random = None",
        "layers that run again draw other dropout masks", "test_memory_modes.py -k 'dropout or draw'",
    ),
    Mutant(
        "checkpointing: autocast forgotten", "engine/memory/checkpointing.py",
        "with torch.enable_grad(), ctx.autocast(), drawn_again(ctx.random, fresh[0].device):\n"
        "            output = ctx.inner",
        "with torch.enable_grad(), drawn_again(ctx.random, fresh[0].device):\n            output = ctx.inner",
        "layers run again in another precision", "test_memory_modes.py -k autocast",
    ),
    Mutant(
        "checkpointing: only the last layer is offloaded", "engine/memory/checkpointing.py",
        "away=offload and index != max(chosen, default=-1))", "away=offload and index == max(chosen, default=-1))",
        "activation_offload frees nothing",
        "test_memory_modes.py -k pool",
    ),
    Mutant(
        "checkpointing: the last layer too", "engine/memory/checkpointing.py",
        "chosen = sorted(set(range(len(stack) - 1) if layers is None else layers))",
        "chosen = sorted(set(range(len(stack)) if layers is None else layers))",
        "a layer is run again for nothing", "test_memory_modes.py",
    ),
    Mutant(
        "checkpointing: all layers keep their activations", "engine/memory/checkpointing.py",
        "layer.gradient_checkpointing = index in chosen", "layer.gradient_checkpointing = index not in chosen",
        "gradient checkpointing acts on the other layers", MODES,
    ),
    Mutant(
        "checkpointing: arguments with gradients lose them", "engine/memory/checkpointing.py",
        "return None, None, None, None, *(tensor.grad for tensor in fresh)",
        "return None, None, None, None, fresh[0].grad, *(None for _ in fresh[1:])",
        "layers that take several tensors train wrong", MODES,
    ),
    Mutant(
        "stash: chunks given twice", "engine/memory/stash.py",
        "taken, self._free = self._free[:count], self._free[count:]", "taken = self._free[:count]",
        "an offloaded input is overwritten by the next", MODES,
    ),
    Mutant(
        "stash: chunks never come back", "engine/memory/stash.py",
        "    pool.give(chunks)\n", "    del pool\n",
        "host memory grows with every step", "test_memory_modes.py -k pool",
    ),
    Mutant(
        "stash: one chunk too few", "engine/memory/stash.py",
        "count = -(-nbytes // self.chunk_bytes)", "count = nbytes // self.chunk_bytes",
        "the end of a tensor is lost", MODES,
    ),
    Mutant(
        "stash: may be fetched twice", "engine/memory/stash.py",
        "        if not stowed.free.alive:\n", "        if stowed.returned is not None and not stowed.free.alive:\n",
        "a second backward reads memory that belongs to another tensor", MODES,
    ),
    Mutant(
        "rerun: random state not put back", "engine/memory/rerun.py",
        "    torch.set_rng_state(state[0])\n", "",
        "dropout masks differ between the two runs", "test_memory_modes.py -k 'dropout or draw'",
    ),
    Mutant(
        "rerun: numbers drawn again are used up outside", "engine/memory/rerun.py",
        '    with torch.random.fork_rng([device] if device.type == "cuda" else []):\n',
        "    with contextlib.nullcontext():\n",
        "after a backward pass other rows and masks are drawn than without checkpointing",
        "test_memory_modes.py test_engine_edges.py -k 'dropout or draw'",
    ),
    Mutant(
        "rerun: any generator that stood still counts as moved", "engine/memory/rerun.py",
        "return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))",
        "return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))",
        "states are kept for the layers that draw nothing", "test_memory_modes.py -k 'dropout or draw or generators'",
    ),
    Mutant(
        "tiles: gradients of the first tile for all", "engine/memory/tiles.py",
        "torch.autograd.backward(output, grad_outputs[0][:, span])",
        "torch.autograd.backward(output, grad_outputs[0][:, : output.shape[1]])",
        "tiled MLPs learn from the wrong tokens", MODES,
    ),
    Mutant(
        "tiles: masks not drawn again", "engine/memory/tiles.py",
        "ctx.states.append(before if has_moved(before, random_state_of(rows.device)) else None)",
        "ctx.states.append(None)",
        "tiles run again with other dropout masks", "test_memory_modes.py -k 'dropout or draw'",
    ),
    Mutant(
        "tiles: attention taken for an MLP", "engine/memory/tiles.py",
        'if len(linears) >= 2 and len(needed) == 2 and "attention_mask" not in takes:',
        "if len(linears) >= 2 and len(needed) == 2:",
        "attention is computed in pieces that do not see each other", EDGES,
    ),
    Mutant(
        "tables: a trained embedding goes", "engine/memory/host_tables.py",
        "if not isinstance(module, nn.Embedding) or module.weight.requires_grad or module.max_norm is not None:",
        "if not isinstance(module, nn.Embedding) or module.max_norm is not None:",
        "an embedding that is trained is put away and no longer learns", "test_memory_modes.py -k embedding",
    ),
    Mutant(
        "tables: the head stays on the device", "engine/memory/host_tables.py",
        "arrived, self._coming = self._coming, None", "arrived = self._coming",
        "offload_head frees nothing after the first micro-batch", "test_offload_head.py",
    ),
    Mutant(
        "tables: tied means apart", "engine/memory/host_tables.py",
        'getattr(output, "weight", None) is table', 'getattr(output, "weight", None) is not table',
        "tied models lose their embedding on the device, others keep a second one", "test_offload_head.py",
    ),
    Mutant(
        "host adam: later micro-batches replace earlier ones", "engine/memory/host_adam.py",
        "self.link.to_host(grad, pair.room, add=pair.master.grad is not None)",
        "self.link.to_host(grad, pair.room, add=False)",
        "with gradient accumulation only the last micro-batch counts", HOST,
    ),
    Mutant(
        "host adam: gradients are added for ever", "engine/memory/host_adam.py",
        "self.link.to_host(grad, pair.room, add=pair.master.grad is not None)",
        "self.link.to_host(grad, pair.room, add=True)",
        "each step learns from the ones before as well", HOST,
    ),
    Mutant(
        "host adam: gradients without a hook are lost", "engine/memory/host_adam.py",
        "            self._leave(pair, pair.parameter)  # one that no hook saw\n", "            pass\n",
        "weights whose gradient came late are not trained", "test_host_adam.py -k hook",
    ),
    Mutant(
        "host adam: a failed step leaves its gradients", "engine/memory/host_adam.py",
        "            pair.parameter.grad = None\n        super().zero_grad(set_to_none=True)\n\n    @torch.no_grad()",
        "            pair.parameter.grad = None\n\n    @torch.no_grad()",
        "a step that is made again counts twice", HOST,
    ),
    Mutant(
        "host adam: restored weights are not followed", "engine/memory/host_adam.py",
        "                self.link.to_host(pair.parameter, pair.master, add=False)\n", "                pass\n",
        "a resumed run goes on from the first weights", HOST,
    ),
    Mutant(
        "host adam: the first bucket alone", "engine/memory/host_adam.py",
        "            for pair in bucket:\n                self.link.to_device(",
        "            for pair in bucket[:1]:\n                self.link.to_device(",
        "most weights on the device are never updated", HOST,
    ),
    Mutant(
        "host adam: weights with two owners are halved", "engine/memory/host_adam.py",
        "or not weight.requires_grad or owners[id(weight)] > 1:", "or not weight.requires_grad:",
        "a tied weight is read in fewer bits than without offloading", EDGES,
    ),
    Mutant(
        "load: dropout stays on", "engine/load/load.py",
        "network = network.to(placement.device).eval()", "network = network.to(placement.device).train()",
        "models answer with dropout", "test_load.py test_engine_edges.py -k 'converted or dropout'",
    ),
    Mutant(
        "load: always the main branch", "engine/load/load.py",
        '    options: dict[str, Any] = {\n        "revision": model.revision or "main",',
        '    options: dict[str, Any] = {\n        "revision": "main",',
        "model.revision loads another model than its config", "test_every_field.py -k revision",
    ),
    Mutant(
        "load: whet's attention for families with their own", "engine/load/load.py",
        "    if owner is not None and not has_sdpa(owner):\n",
        "    if owner is not None and has_sdpa(owner):\n",
        "BLOOM loses its mask and sees the future", "test_isolation_fallback.py test_models.py",
    ),
    Mutant(
        "load: one position too many", "engine/load/load.py",
        "found -= (text.pad_token_id or 0) + 1", "found -= text.pad_token_id or 0",
        "the longest rows of RoBERTa end in an index error",
        EDGES,
    ),
    Mutant(
        "load: padding token not given", "engine/load/load.py",
        "load_tokenizer(model) if pad is None or pad < 0 else None)", "None)",
        "a decoder's head reads padding", "test_tasks.py test_models.py -k 'pad or classification'",
    ),
    Mutant(
        "stream: missing weights are filled in", "engine/load/stream.py",
        '    absent = sorted(missing)\n', '    absent: list[str] = []\n',
        "a checkpoint that lacks weights is trained with random ones", "test_load.py -k fit",
    ),
    Mutant(
        "stream: shapes are not compared", "engine/load/stream.py",
        "for name, (found, wanted) in shapes.items() if found != wanted]",
        "for name, (found, wanted) in shapes.items() if found.numel() != wanted.numel()]",
        "a square weight that is turned round is taken", EDGES,
    ),
    Mutant(
        "stream: biases dropped", "engine/load/stream.py",
        "return None if linear.bias is None else linear.bias.requires_grad_(False)", "return None",
        "quantised layers lose their bias", "test_load.py",
    ),
    Mutant(
        "prequantised: codes through 128", "engine/load/prequantised.py",
        "weight.SCB.float().reshape(-1) / INT8_MAX", "weight.SCB.float().reshape(-1) / 128",
        "all int8 weights are a hundredth too small", LOAD,
    ),
    Mutant(
        "prequantised: rows and columns exchanged", "engine/load/prequantised.py",
        "columns, rows = int(module.in_features), int(module.out_features)",
        "rows, columns = int(module.in_features), int(module.out_features)",
        "layers that are not square fail or are read turned round", LOAD,
    ),
    Mutant(
        "stored: a compiler sees both builds of fp8", "engine/weights/stored.py",
        "        return replace(self, scale=_unseen(self.scale))\n", "        return self\n",
        "a compiled model keeps all its fp8 weights in bf16 too", KEPT,
    ),
    Mutant(
        "stored: a compiler sees both builds of int8", "engine/weights/stored.py",
        "        return replace(self, scale=_unseen(self.scale), factor=_unseen(factor))\n", "        return self\n",
        "a compiled model keeps all its int8 weights in bf16 too", KEPT,
    ),
    Mutant(
        "stored: a compiler sees both builds of nf4", "engine/weights/stored.py",
        "        return Nf4Weight(tuple(part._replace(code=_unseen(part.code)) for part in self.parts))\n",
        "        return self\n",
        "a compiled model keeps all its nf4 weights in bf16 too", KEPT,
    ),
    Mutant(
        "stored: int8 has no factor of its own the second time", "engine/weights/stored.py",
        "factor=_unseen(factor))", "factor=None)",
        "a compiled model keeps the codes of its int8 weights in FP8 too", KEPT,
    ),
    Mutant(
        "new tokens: the first piece alone", "engine/load/new_tokens.py",
        "values[torch.tensor(list(before), device=values.device)].float().mean(0)",
        "values[torch.tensor(list(before)[:1], device=values.device)].float().mean(0)",
        "a new row starts as its first piece", "test_new_tokens.py -k 'start or faults'",
    ),
    Mutant(
        "new tokens: one row too few", "engine/load/new_tokens.py",
        "    if max(ids) >= rows:\n", "    if max(ids) > rows:\n",
        "the first token behind the table has no row", EDGES,
    ),
    Mutant(
        "new tokens: the head keeps random rows", "engine/load/new_tokens.py",
        "head is not None and head.weight is not embedding.weight",
        "head is not None and head.weight is embedding.weight",
        "rows of an untied head start as chance will have it", "test_new_tokens.py",
    ),
    Mutant(
        "open: double quantisation forgotten", "engine/load/open.py",
        "torch.float32, base.double_quant is not False, placement.reasons)",
        "torch.float32, base.double_quant is False, placement.reasons)",
        "nf4 runs answer on other weights than they were trained on",
        EDGES,
    ),
]  # fmt: skip
