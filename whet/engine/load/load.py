"""Tokenizer and model from a local directory, a hub name or the built-in one; nothing of the repository is executed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from whet.base.errors import UserError
from whet.base.private import has_sdpa, takes_attention
from whet.engine.compute import attention
from whet.engine.compute.proven_attention import prove_attention
from whet.engine.config import Model
from whet.engine.device import DTYPES, PACKED, Placement
from whet.engine.load.locate import locate
from whet.engine.load.new_tokens import add_tokens, grow
from whet.engine.memory.scarce import refusing
from whet.engine.sizes import longest_text
from whet.engine.task import CAUSAL, Task, set_pad

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# Their positions begin behind the padding token's number, which takes places from the table.
_POSITIONS_AFTER_PAD = frozenset((
    "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "xmod",
    "longformer", "mpnet", "ibert", "esm", "luke",
))  # fmt: skip


def load_config(model: Model) -> PreTrainedConfig:
    """The model's configuration; a `config.json` by itself is enough."""
    from transformers import AutoConfig

    path = Path(model.path).expanduser()
    source = str(path) if path.suffix == ".json" and path.is_file() else locate(model.path)
    return _opened(lambda: AutoConfig.from_pretrained(source, revision=model.revision or "main"), model.path, "config")


def load_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """The model's tokenizer (or `model.tokenizer`), always the fast kind, whose offsets the loss mask needs."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    field = "model.tokenizer" if model.tokenizer else "model.path"
    source = locate(model.tokenizer or model.path, field)
    revision = model.revision or "main"
    tokenizer = _opened(lambda: AutoTokenizer.from_pretrained(source, revision=revision), source, "tokenizer", field)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            "the tokenizer has no fast form, and the loss mask needs its offsets",
            file=source,
            field="model.tokenizer",
            fix="save it once with transformers' AutoTokenizer and use_fast=True",
        )
    if model.new_tokens:
        add_tokens(tokenizer, model.new_tokens)
    return tokenizer


def load_model(model: Model, placement: Placement, task: Task = CAUSAL) -> PreTrainedModel:
    """The model on its device, weights stored as `placement` says, in evaluation mode, with the fastest attention for
    training that computes what the model's own does.

    Host and device hold the final weights and one dense layer at most. Raises UserError for what cannot be opened, for
    a checkpoint whose weights are absent, of another shape, or in a format that cannot be trained on, and for a model
    that does not fit in memory.
    """
    from whet.engine.load.room import no_room_to_load

    with refusing(lambda: no_room_to_load(empty_model(model, "fp32", task), placement, model.path)):
        return _loaded(model, placement, task)


def _loaded(model: Model, placement: Placement, task: Task) -> PreTrainedModel:
    dense = torch.float32 if placement.storage == "fp32" else placement.compute
    config = load_config(model)
    if model.from_config:
        network = _random_model(config, placement, dense, task)
    else:
        network = _stored_model(model, config, placement, dense, task)
    if model.new_tokens:
        grow(network, load_tokenizer(replace(model, new_tokens=[])), model.new_tokens)
    if task.labelled:
        pad = network.config.get_text_config().pad_token_id
        set_pad(network.config, load_tokenizer(model) if pad is None or pad < 0 else None)  # type: ignore[operator]
    network = network.to(placement.device).eval()  # type: ignore[arg-type]
    prove_attention(network)
    return network


def _stored_model(
    model: Model, config: PreTrainedConfig, placement: Placement, dense: torch.dtype, task: Task
) -> PreTrainedModel:
    """The model with the weights of its checkpoint; see `load_model`."""
    from whet.engine.load.headers import check_checkpoint
    from whet.engine.load.prequantised import load_quantised, stored_as
    from whet.engine.load.stream import load_frozen, load_plain

    source, storage = locate(model.path), placement.storage
    options: dict[str, Any] = {
        "revision": model.revision or "main",
        "dtype": dense,
        "attn_implementation": attention_of(task, config),
    }
    if placement.device.type != "cpu":
        options["device_map"] = {"": placement.device}
    stored = stored_as(config, source)
    check_checkpoint(model, task, plain=stored is None)
    if stored is not None:
        return _opened(
            lambda: load_quantised(source, stored, storage, placement.double_quant, options, task), source, "model"
        )
    if storage in PACKED:
        return _opened(lambda: load_frozen(source, storage, placement.double_quant, options, task), source, "model")
    return _opened(lambda: load_plain(source, options, task), source, "model")


def checkpoint_storage(model: Model) -> str | None:
    """nf4 or int8 for a checkpoint that bitsandbytes quantised, else None: what `base.storage: auto` should take."""
    from whet.engine.load.prequantised import stored_as

    return None if model.from_config else stored_as(load_config(model), model.path)


def checkpoint_type(model: Model) -> str:
    """fp16, bf16 or fp32: the type that a checkpoint's weights are kept in, as its config says it, which is what plain
    transformers would open."""
    found = None if model.from_config else load_config(model).dtype
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(_type_named(found), "fp32")  # type: ignore[arg-type]


def _type_named(name: Any) -> Any:
    return getattr(torch, str(name).removeprefix("torch."), None)


def rebuilding_notice(model: Model, placement: Placement) -> str | None:
    """What to tell a person before `load_model` rebuilds quantised weights to store them otherwise, or None."""
    stored = checkpoint_storage(model)
    if stored in (None, placement.storage):
        return None
    return f"{locate(model.path)} holds {stored} weights: rebuilt, and stored as {placement.storage}"


def attention_of(task: Task, config: PreTrainedConfig) -> str:
    """The attention to load a model with: whet's own reads the documents of a row, other tasks have padded rows.

    A family that computes attention by itself (BLOOM) would be given no mask for whet's, and so would see the future;
    one that torch's attention is not enough for (the sinks of gpt-oss) would lose a part of it without a word.
    """
    owner = task.classes().get(type(config), None)
    if owner is not None and not has_sdpa(owner):
        return "eager"
    own = owner is not None and not takes_attention(owner)
    return "sdpa" if own or task.name != "causal" else attention.ATTENTION


def _random_model(
    config: PreTrainedConfig, placement: Placement, dense: torch.dtype, task: Task = CAUSAL
) -> PreTrainedModel:
    for name, value in task.config_values().items():
        setattr(config, name, value)
    make = task.auto_class().from_config
    if placement.storage not in PACKED:
        network = make(config, attn_implementation=attention_of(task, config), dtype=dense)
        return network.to(placement.device)
    from whet.engine.load.stream import random_frozen

    with torch.device("meta"):
        network = make(config, attn_implementation=attention_of(task, config), dtype=dense)
    random_frozen(network, placement.device, placement.storage, placement.double_quant)
    return network


def empty_model(model: Model, dtype: str = "bf16", task: Task = CAUSAL) -> PreTrainedModel:
    """The model without memory (meta device), from its config alone: for counting."""
    config = load_config(model)
    for name, value in task.config_values().items():
        setattr(config, name, value)
    with torch.device("meta"):
        network = task.auto_class().from_config(config, dtype=DTYPES[dtype])
    if model.new_tokens:
        grow(network, load_tokenizer(replace(model, new_tokens=[])), model.new_tokens)
    return network


def longest_input(config: PreTrainedConfig) -> int | None:
    """How many tokens the model can read, or None when its config does not say, or has no such bound (T5)."""
    text = config.get_text_config()
    if getattr(text, "relative_attention_num_buckets", None) and config.is_encoder_decoder:
        return None
    found = longest_text(config)
    if found and config.model_type in _POSITIONS_AFTER_PAD:
        found -= (text.pad_token_id or 0) + 1
    return found if found and found > 0 else None


def _opened(open_it, source: str, what: str, field: str = "model.path"):
    """Run a transformers loader and turn what it says of bad input into a UserError."""
    from safetensors import SafetensorError

    try:
        return open_it()
    except SafetensorError as error:
        raise UserError(
            f"the {what} cannot be read: {error}",
            file=source,
            fix="the file is damaged or a git-lfs pointer; fetch it again",
        ) from error
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the {what} cannot be opened: {reason}",
            field=field,
            found=source,
            expected="a directory written by save_pretrained, or a hub name that this machine can reach",
            fix=_fix_of_hub(error, source),
        ) from error


def _fix_of_hub(error: BaseException, source: str) -> str:
    """What to do about a model that the hub does not give away; it says so in the causes of an error."""
    from huggingface_hub.errors import GatedRepoError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return f"accept its terms at https://huggingface.co/{source}, then set HF_TOKEN or run hf auth login"
        cause = cause.__cause__ or cause.__context__
    return ("check the name; a private model needs HF_TOKEN; without a network, give a local directory or "
            "builtin:tiny")  # fmt: skip
