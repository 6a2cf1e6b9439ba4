"""Memory of every phase of a run, not of training alone: load, train, evaluate, generate, merge; and what lies on disk.

Each phase is reckoned with the function that decides in it: what a decoder's cache takes and whether dense copies of
packed layers fit (`engine.answer`, `engine.weights.unpacked`), the rows of a held-out pass, the types in which a merge
is folded and tried. Where a phase runs on the device, what it needs of host memory beside it stands in `host`.

- load: weights are read one tensor at a time, so the final bytes and the largest dense tensor.
- evaluate: held-out rows during training. A captured step keeps its activations meanwhile.
- generate: answers of `whet eval`, a process of its own without optimiser; the loss of the longest row is measured
  there too, with its logits in one piece.
- merge: the trained model and a merged one side by side, to be compared; the merged one is folded in host memory.
  Exporting a merged model needs no more than merging.

Gives up: Python, torch and its kernels (about 0.8 GiB of a GPU, which free memory does not show before they are loaded,
and 2 to 4 GiB of host memory), the system's cache of files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from whet.data.batch.batches import Cut
from whet.engine.answer.losses import POSITIONS_TOGETHER
from whet.engine.answer.static_cache import generation_numbers
from whet.engine.device import DTYPES, PACKED
from whet.engine.load.load import checkpoint_type
from whet.engine.sizes import Sizes
from whet.engine.weights.unpacked import copies_fit
from whet.planning import memory
from whet.planning.facts import Facts
from whet.planning.layout import Layout
from whet.recipe import Recipe
from whet.settings import Train

FOLDED_IN = "fp32"  # type in which base and adapter are added
ANSWER_SHARE = 0.25  # an answer may be so much longer than the longest reference
Classes = dict[str, int]


@dataclass(frozen=True)
class Phases:
    """device, host: bytes by phase and class; disk: bytes by what lies there."""

    device: dict[str, Classes]
    host: dict[str, int]
    disk: dict[str, int]

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes on the device by phase."""
        return {phase: sum(classes.values()) for phase, classes in self.device.items()}


def held_out_cut(train: Train) -> Cut:
    """How many held-out rows a forward pass has during training."""
    return Cut(train.per_device_train_batch_size)


def phases_of(recipe: Recipe, facts: Facts, layout: Layout, sizes: Sizes) -> Phases:
    """The phases of a recipe in this layout. sizes: of the model's config."""
    device = {"load": _load(facts, layout), "train": dict(layout.memory), "evaluate": _evaluate(recipe, facts, layout)}
    if not facts.padded_task and sizes.heads is not None:
        device["generate"] = _generate(recipe, facts, sizes)
    if recipe.method.can.mergeable and not recipe.method.can.whole_model:
        device["merge"] = _merge(recipe, facts)
    return Phases(
        {phase: {name: int(count) for name, count in classes.items() if count} for phase, classes in device.items()},
        _host(facts, layout, "merge" in device), _disk(recipe, facts, layout),
    )  # fmt: skip


def _load(facts: Facts, layout: Layout) -> Classes:
    """The base and the largest tensor before it is stored; then what is trained, which is made when that is gone."""
    model = facts.model
    if layout.short_weights:
        return {"trained weights": memory.weights_and_optimiser(facts, layout)["trained weights"]}
    whole = 0 if model.has_peft else 4 * (model.trainable - _added(facts))
    added = 4 * model.trainable - whole
    return {
        "frozen weights": model.frozen_bytes, "trained weights": whole + added,
        "a tensor on its way": max(0, model.largest_dense - added) if facts.on_gpu else model.largest_dense,
    }  # fmt: skip


def _added(facts: Facts) -> int:
    """Trained numbers that no checkpoint holds."""
    return max(0, facts.model.total - facts.model.base)


def _evaluate(recipe: Recipe, facts: Facts, layout: Layout) -> Classes:
    """A pass over held-out rows without a gradient, beside all that training holds."""
    held = memory.weights_and_optimiser(facts, layout)
    tokens = held_out_cut(recipe.train).size * _longest(facts)
    captured = layout.memory.get("activations", 0) if layout.cuda_graphs else 0
    one = replace(layout, tokens=tokens)
    return held | {
        "activations": captured + tokens * facts.model.shape.working_bytes, "logits": memory.logits(facts, one),
    }  # fmt: skip


def _generate(recipe: Recipe, facts: Facts, sizes: Sizes) -> Classes:
    """The trained model as it answers, the cache of a batch of answers, or the logits of the longest row.

    Prompts are halved where they do not fit, as answering does when memory runs out.
    """
    rows, free = recipe.eval.per_device_eval_batch_size, facts.hardware.free_bytes
    found = _answers(recipe, facts, sizes, rows)
    while free is not None and rows > 1 and sum(found.values()) > free:
        rows = (rows + 1) // 2
        found = _answers(recipe, facts, sizes, rows)
    return found


def _answers(recipe: Recipe, facts: Facts, sizes: Sizes, rows: int) -> Classes:
    """The same for so many prompts of the longest row at once."""
    found, item, prompt = answering(facts), _item(facts), _longest(facts)
    tokens = prompt + (recipe.eval.max_new_tokens or int(prompt * ANSWER_SHARE))
    cached, passing = (item * numbers for numbers in generation_numbers(sizes, rows, tokens))
    vocabulary = sizes.vocabulary or facts.model.vocabulary
    logits = max(4 * item * rows * vocabulary, vocabulary * (item * prompt + 2 * 4 * min(prompt, POSITIONS_TOGETHER)))
    free = facts.hardware.free_bytes
    copies = item * facts.model.multiplied if facts.placement.storage in PACKED else 0
    if copies and free is not None and copies_fit(free - sum(found.values()), copies, cached + passing + logits):
        found["dense copies"] = copies
    return found | {"keys and values": cached, "activations": passing, "logits": logits}


def _merge(recipe: Recipe, facts: Facts) -> Classes:
    """The trained model and one candidate, each with a row's activations; on a CPU the fold, where that is more."""
    item, base = _item(facts), facts.model.base
    candidate = item * base
    if not facts.on_gpu:
        candidate = max(candidate, DTYPES[FOLDED_IN].itemsize * base)
    row = _longest(facts)
    return answering(facts) | {
        "merged weights": candidate, "activations": row * facts.model.shape.working_bytes,
        "logits": 3 * 4 * min(row, POSITIONS_TOGETHER) * facts.model.vocabulary,
    }  # fmt: skip


def answering(facts: Facts) -> Classes:
    """The weights of a trained model that answers: stored as in training, dense ones in fp32 on a CPU."""
    model, frozen = facts.model, facts.model.frozen_bytes
    if not facts.on_gpu and facts.placement.storage not in PACKED and model.base:
        frozen = 4 * (model.total - model.trainable)
    return {"frozen weights": frozen, "trained weights": 4 * model.trainable}


def _host(facts: Facts, layout: Layout, merges: bool) -> dict[str, int]:
    """Bytes of host memory by phase, beside what the device holds; nothing where that is the host."""
    if facts.hardware.device.type == "cpu":
        return {}
    model = facts.model
    folded = DTYPES[FOLDED_IN].itemsize * model.base + model.largest_dense
    loading = 4 * model.total if layout.short_weights else model.largest_dense
    found = {"load": loading, "train": layout.host_bytes, "evaluate": layout.host_bytes, "generate": 0}
    return found | ({"merge": folded} if merges else {})


def _disk(recipe: Recipe, facts: Facts, layout: Layout) -> dict[str, int]:
    """Bytes on disk: the checkpoints that are kept (one is written before an older one goes), what was trained, the
    tokens of rows, and a merged model."""
    model, train = facts.model, recipe.train
    one = 4 * model.trainable + int(memory.OPTIMISER_BYTES[layout.optim] * model.trainable)
    saved = 2 if getattr(recipe.method, "save_dtype", None) == "bf16" else 4
    found = {
        "a checkpoint": one, "all checkpoints": (train.save_total_limit + 2) * one,
        "what was trained": saved * model.trainable,
    }  # fmt: skip
    if not facts.work.assumed:  # a token's number and whether it is learned
        found["tokens of the rows"] = 5 * int(facts.work.batches.rows.lengths.sum())
    if recipe.method.can.mergeable and not recipe.method.can.whole_model:
        found["a merged model"] = (2 if checkpoint_type(recipe.model) != "fp32" else 4) * model.base
    return found


def _longest(facts: Facts) -> int:
    return int(facts.work.batches.rows.lengths.max())


def _item(facts: Facts) -> int:
    """Bytes of a number in the arithmetic of answers."""
    if not facts.on_gpu or facts.placement.arithmetic == "fp32":
        return 4
    return facts.placement.compute.itemsize
