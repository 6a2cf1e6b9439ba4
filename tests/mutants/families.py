"""Careless edits of what whet asks a model about itself: attention, sizes, targets, padding, generate, ids."""

from mutants.mutant import Mutant

ATTENTION = "test_own_attention.py"
STRUCTURE = "test_model_structure.py"

MUTANTS = [
    Mutant(
        "own attention: never asked", "engine/load/load.py",
        "    prove_attention(network)\n", "",
        "windows that stand in a mask are lost in every verb", "test_own_attention.py -k 'loaded or cap'",
    ),
    Mutant(
        "own attention: rules not compared", "engine/compute/proven_attention.py",
        'if name == ATTENTION and (unlike := next(_unlike(network), "")):',
        'if name == "" and (unlike := next(_unlike(network), "")):',
        "a window of 8,192 tokens in the mask is not seen", ATTENTION,
    ),
    Mutant(
        "own attention: any distance of logits is near", "engine/compute/proven_attention.py",
        'return "" if distance <= share', 'return "" if True or distance <= share',
        "caps and biases are lost", "test_own_attention.py -k cap",
    ),
    Mutant(
        "own attention: any keyword is taken", "engine/compute/attention.py",
        "    check_keywords(more)\n", "",
        "sinks, biases and sparse indices are dropped without a word", "test_own_attention.py -k keyword",
    ),
    Mutant(
        "own attention: documents share rows all the same", "training/load.py",
        "if ready.plan.facts.flat and not knows_documents(network):",
        "if ready.plan.facts.flat and False and not knows_documents(network):",
        "chunks are counted over the whole row", "test_own_attention.py -k share_a_row",
    ),
    Mutant(
        "layer by layer: each reads its own input", "engine/compute/layerwise.py",
        "        if forced is not None:\n            hidden",
        "        if forced is not None and not forced:\n            hidden",
        "rounding that grows from layer to layer makes a deep model choose the eager attention",
        "test_own_attention.py -k deep",
    ),
    Mutant(
        "layer by layer: the first layer alone", "engine/compute/layerwise.py",
        "    return max(distances)", "    return max(distances[:2])",
        "another attention in a later layer is not seen", "test_own_attention.py -k deep",
    ),
    Mutant(
        "linear: every subclass", "engine/weights/linear.py",
        "return isinstance(module, FrozenLinear) or _is_linear_class(type(module))",
        "return isinstance(module, FrozenLinear | nn.Linear) or _is_linear_class(type(module))",
        "routers that give a tuple are wrapped", STRUCTURE,
    ),
    Mutant(
        "targets: what PEFT refuses", "methods/targets.py",
        "if name not in shared and not peft_forbids(network.config, name)]", "if name not in shared]",
        "Mamba cannot be trained with the default recipe", STRUCTURE,
    ),
    Mutant(
        "targets: beyond the text", "methods/targets.py",
        "inside = within_text(network, names)", "inside = names",
        "adapters on a vision tower that no row reaches", STRUCTURE,
    ),
    Mutant(
        "targets: layers that share weights", "methods/targets.py",
        "if name not in shared and not peft_forbids", "if not peft_forbids",
        "each place of Zamba's block learns its own update, and a merge keeps one", "test_families.py -k zamba2",
    ),
    Mutant(
        "fold: layers that share weights", "methods/method.py",
        "        if len(adapted) > 1:\n", "        if len(adapted) > 1000:\n",
        "a merge keeps the update of one of the places", "test_merged_attention.py -k share",
    ),
    Mutant(
        "fold: PEFT's word on a tied head", "methods/method.py",
        "if tied and _head_is_shared(folded):", "if tied and False and _head_is_shared(folded):",
        "the merged T5Gemma is read with a random head", "test_families.py -k t5gemma",
    ),
    Mutant(
        "whole model: the attention that transformers chooses is trusted", "training/load.py",
        'attention_to_name(network) if recipe', '"" if recipe',
        "UMT5 that was trained whole loses its positions in every other program", "test_merged_attention.py -k whole",
    ),
    Mutant(
        "merge: the attention that transformers chooses is trusted", "ship/merge.py",
        "    if prove_attention(network):\n", "    if prove_attention(network) and False:\n",
        "UMT5 answers without positions where it is served", "test_families.py -k umt5",
    ),
    Mutant(
        "own attention: asked without a mask", "engine/compute/proven_attention.py",
        "return _logits(network, EAGER, masked=True)", "return _logits(network, EAGER, masked=False)",
        "Moshi is refused as one that sees ahead", "test_families.py -k moshi",
    ),
    Mutant(
        "excerpt: never asked", "planning/plan.py",
        "    check_code(network, task, recipe.train)\n", "",
        "XLNet is refused when its weights are there", "test_families.py -k 'xlnet or reformer'",
    ),
    Mutant(
        "excerpt: masks that nobody filled are looked at", "engine/compute/excerpt.py",
        "    return all(_is_filled(buffer) for buffer in first.buffers())\n", "    return True\n",
        "a decoder whose mask lies ready is refused", "test_excerpt.py -k nobody_fills",
    ),
    Mutant(
        "excerpt: a config without a padding token", "engine/compute/probe.py",
        'pad = getattr(network.config.get_text_config(), "pad_token_id", None)',
        "pad = network.config.get_text_config().pad_token_id",
        "CodeGen's checkpoints fail with an AttributeError", "test_excerpt.py -k padding_token",
    ),
    Mutant(
        "head: one name of caps", "engine/compute/head.py",
        'CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")',
        'CAPS = ("final_logit_softcapping",)',
        "xLSTM is trained on logits without their cap in bf16", "test_logit_caps.py",
    ),
    Mutant(
        "head: fp32 is compared as loosely as bf16", "engine/compute/head.py",
        "share, least = (1e-4, 1e-5) if exact else (1e-2, 1e-3)", "share, least = 1e-2, 1e-3",
        "a cap of a new name is not seen", "test_logit_caps.py",
    ),
    Mutant(
        "adapter: own tensors of a whole module", "methods/layers/key_names.py",
        "own = {name for name, _ in network.named_parameters(remove_duplicate=False)}", "own = set()",
        "an adapter beside a vision head does not open again", "test_families.py -k modernvbert",
    ),
    Mutant(
        "types: by the input's name alone", "engine/task.py",
        'return types > 1 and takes(model, "token_type_ids")', 'return takes(model, "token_type_ids")',
        "GPT-2 predicts with the embedding of token 0 added", STRUCTURE,
    ),
    Mutant(
        "ids: one too many", "training/ids.py",
        "if table is not None and largest >= rows:", "if table is not None and largest > rows + 1000000:",
        "an id without a row reaches the device", STRUCTURE,
    ),
    Mutant(
        "padding: never seen", "engine/compute/probe.py",
        "return not bool((alone - beside)", "return False and not bool((alone - beside)",
        "FNet's labels depend on the rows beside", "test_own_attention.py -k padding",
    ),
    Mutant(
        "generate: rows are never mixed", "engine/answer/proof.py",
        "            return True\n    return False", "            return False\n    return False",
        "answers of recurrent models depend on the batch", STRUCTURE,
    ),
    Mutant(
        "generate: trusted", "engine/answer/proof.py",
        'return "" if near else f"the logits of its generate',
        'return "" if near or True else f"the logits of its generate',
        "RoBERTa answers from other positions than it learned", STRUCTURE,
    ),
]  # fmt: skip
