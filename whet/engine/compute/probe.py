"""The small inputs with which a model is asked about itself before it is trusted, and how exactly it answers."""

from __future__ import annotations

from typing import Any

import torch

from whet.base.out_of_memory import ran_out
from whet.engine.task import head_names, takes

LONGEST_ROW = 160  # tokens; eager attention holds the scores of each pair
EXACT, ROUNDED = 1e-3, 0.05  # of the largest logit: how far two ways may be apart in fp32, and in shorter types
ODD_LENGTH = 27  # tokens; a length that no block divides
# What a model raises where it cannot work with something that it does not know.
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError, AssertionError)


def windows(config: Any) -> list[int]:
    """The numbers in a config that say how far attention reaches, in tokens."""
    found: list[int] = []
    for name, value in vars(config.get_text_config(decoder=True)).items():
        if "window" in name or "chunk" in name or name == "local_attention":
            numbers = value if isinstance(value, list | tuple) else [value]
            found += [number for number in numbers if type(number) is int and number > 1]
    return found


def row_length(config: Any) -> int:
    """Tokens of a row that is longer than every short window."""
    short = [number for number in windows(config) if number <= LONGEST_ROW - 8]
    return max([24, *(number + 8 for number in short)])


def tolerance(network: Any) -> float:
    """How far apart, as a share of the largest logit, two ways of the same computation may be."""
    exact = all(parameter.dtype == torch.float32 for parameter in network.parameters() if parameter.is_floating_point())
    return EXACT if exact else ROUNDED


def probe_inputs(network: Any, tokens: int) -> dict[str, Any]:
    """Inputs of one row of `tokens` ids, the same ones each time, that ends as a text does."""
    table, config = network.get_input_embeddings().weight, network.config
    ids = torch.randint(
        4, max(5, table.shape[0]), (1, tokens), generator=torch.Generator().manual_seed(2), device="cpu"
    )
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 < end < table.shape[0]:
        ids[ids == end] = end - 1
        ids[:, -1] = end
    ids = ids.to(table.device)
    writes = config.is_encoder_decoder and not head_names(network)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if writes else {}) | uncached(network)


def unreadable(network: Any) -> str:
    """Why a model cannot read a row of token ids, and nothing else, in training; empty where it can.

    network: without memory. What a family asks for beside tokens (a language, boxes, a length) is raised by its own
    code before any number is looked at. Errors of torch's operators, some of which need numbers, say nothing here.
    """
    was_training = network.training
    network.train()
    try:
        if getattr(network.get_input_embeddings(), "weight", None) is None:
            return "it has no table of token embeddings"
        with torch.device("meta"):
            network(**probe_inputs(network, ODD_LENGTH))
    except (ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        return first_line(error)
    except NotImplementedError as error:
        return "it has no table of token embeddings" if "get_input_embeddings" in str(error) else ""
    except RuntimeError:
        return ""
    finally:
        network.train(was_training)
    return ""


def first_line(error: BaseException) -> str:
    """An error in a few words."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def uncached(network: Any) -> dict[str, Any]:
    """The switch that keeps a model from keeping a cache, where it has one."""
    return {"use_cache": False} if takes(network, "use_cache") else {}


@torch.inference_mode()
def sees_padding(network: Any, *, masked: bool = True) -> bool:
    """Whether a row's answer changes when it is filled up on the right beside a longer one.

    Some families mix tokens in spite of a mask (FNet), or keep no account of one; some decoders compute positions from
    the width of a batch (ProphetNet). Their rows share a batch only with rows of their own length. masked: the model is
    given an attention mask, as those that label or read a source are; a decoder in training is not.
    """
    short, long = (probe_inputs(network, tokens) for tokens in (9, row_length(network.config)))
    pad = getattr(network.config.get_text_config(), "pad_token_id", None)
    ids = torch.full_like(long["input_ids"], pad if pad is not None and pad >= 0 else 0)
    ids[:, :9] = short["input_ids"]
    both = {"input_ids": torch.cat([ids, long["input_ids"]])}
    if masked:
        both["attention_mask"] = torch.ones_like(ids).repeat(2, 1)
        both["attention_mask"][0, 9:] = 0
    if "decoder_input_ids" in short:
        both |= {"decoder_input_ids": both["input_ids"], "decoder_attention_mask": both["attention_mask"]}
    was_training = network.training
    network.eval()
    try:
        alone = network(**short).logits[0].float()
        beside = network(**both, **uncached(network)).logits[0].float()[: len(alone)]
    except FAILURES as error:
        if ran_out(error):
            raise
        return True
    finally:
        network.train(was_training)
    return not bool((alone - beside).abs().max() <= tolerance(network) * alone.abs().max())
