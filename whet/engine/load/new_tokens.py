"""New tokens: into the tokenizer, and a row for each in the embedding and the output head.

A new row starts as the mean of the rows of the pieces that its text was cut into before, so the model reads nothing
foreign on the first day (Hewitt, 2021, "Initializing New Word Embeddings for Pretrained Language Models"). It is the
same wherever the model is opened again, and what was learned is then put over it. Tables only grow: many models have
more rows than tokens, and rows that are there already are taken first. Gives up: nothing is known of these tokens until
their rows are trained, so methods that train no rows are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from whet.base.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> list[int]:
    """Let the tokenizer read and write `tokens` whole; returns their ids. Raises UserError for one that it has."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    for place, token in enumerate(tokens):
        problem = (
            "a token needs a text" if not token.strip()
            else "the tokenizer has this token already" if token in known
            else "the token is listed twice" if token in tokens[:place]
            else None
        )  # fmt: skip
        if problem is not None:
            raise UserError(
                problem, field="model.new_tokens", found=repr(token), expected="texts that are no tokens yet",
                fix="remove it from model.new_tokens; method.trainable_token_indices trains tokens that are there"
                if token in known else "remove it from model.new_tokens",
            )  # fmt: skip
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])  # type: ignore[arg-type]
    return list(tokenizer.convert_tokens_to_ids(list(tokens)))  # type: ignore[arg-type]


def grow(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> None:
    """Give `network` a row for each of `tokens` in its embedding and its own output head, and tell it their ids.

    tokenizer: as it was before; it has the tokens afterwards. Raises UserError.
    """
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    ids = add_tokens(tokenizer, tokens)
    rows = network.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr,index]
    if max(ids) >= rows:
        network.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    for table in tables(network).values():
        for values in (table.weight, getattr(table, "bias", None)):
            if values is not None and not values.is_meta:
                _start(values, ids, pieces)  # type: ignore[arg-type]
    network.new_token_ids = tuple(ids)  # type: ignore[assignment]


def new_token_ids(network: nn.Module) -> list[int]:
    """Ids of the tokens that `grow` gave this network; none for most."""
    return list(getattr(network, "new_token_ids", ()))


def tables(network: Any) -> dict[str, Any]:
    """The input embedding by its name in the network, and the output head where it has rows of its own."""
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    wanted = [embedding] + ([head] if head is not None and head.weight is not embedding.weight else [])
    names = {id(module): name for name, module in network.named_modules()}
    return {names[id(module)]: module for module in wanted}


@torch.no_grad()
def _start(values: torch.Tensor, ids: Sequence[int], pieces: Sequence[Sequence[int]]) -> None:
    """Rows `ids` of `values` become the mean of the rows of their pieces."""
    for place, before in zip(ids, pieces, strict=True):
        values[place] = values[torch.tensor(list(before), device=values.device)].float().mean(0).to(values.dtype)
