"""What a model's layers may see, as transformers means it: the rule of each mask, caught where attention is computed.

A window or a chunk can stand in the mask alone, and real ones are thousands of tokens long. transformers makes a mask
from a rule (may query i see key j?), and hands the rule to whatever function is registered for the attention in use. So
an attention of its own is registered that notes, for each layer, the rule and every keyword that the layer passes on. A
forward pass over a few tokens is enough, and the rule can then be asked about any pair of positions. Gives up: masks
that a model makes by itself have no rule.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

WATCHED = "whet_watched"
Rule = Callable[..., torch.Tensor]  # (row, head, query, key) to whether the query may see the key
_SEEN: ContextVar[list[LayerCall]] = ContextVar("the calls of attention that are being watched")


@dataclass(frozen=True)
class LayerCall:
    """One call of attention. rule: of its mask; masked: it has one, perhaps without a rule; keywords: of the call,
    without those that are None; causal: what the layer says of itself."""

    rule: Rule | None
    masked: bool
    keywords: dict[str, Any]
    causal: bool

    def sees(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        """bool [Q, K]: which keys each query may see; None where the mask has no rule."""
        if self.rule is None:
            return None if self.masked else keys[None] <= queries[:, None]
        zero = torch.zeros((), dtype=torch.long, device=queries.device)
        seen = self.rule(zero, zero, queries[:, None], keys[None])
        return torch.as_tensor(seen, device=queries.device).expand(len(queries), len(keys))


def watched_calls(run: Callable[[], object]) -> list[LayerCall]:
    """The calls of attention that `run` makes with a model whose attention is WATCHED."""
    token = _SEEN.set([])
    try:
        run()
        return _SEEN.get()
    finally:
        _SEEN.reset(token)


def sees(window: int | None, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """bool [Q, K] of causal attention over the last `window` keys, the query's own among them."""
    distance = queries[:, None] - keys[None]
    return (distance >= 0) & (distance < window) if window is not None else distance >= 0


def positions(config: Any, device: torch.device) -> torch.Tensor:
    """Positions on both sides of every number in a config, and of twice that: where a window or a chunk can end."""
    found = {0, 1, 2, 3}
    for value in vars(config).values():
        for number in value if isinstance(value, list | tuple) else [value]:
            if type(number) is int and 1 < number < 1 << 22:
                found |= {number - 1, number, number + 1, 2 * number - 1, 2 * number, 2 * number + 1}
    return torch.tensor(sorted(found), device=device)


def _watch(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **keywords: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    rule = getattr(attention_mask, "rule", None)
    given = {name: one for name, one in keywords.items() if one is not None}
    causal = bool(getattr(module, "is_causal", True)) and given.get("is_causal", True) is not False
    _SEEN.get().append(LayerCall(rule, attention_mask is not None, given, causal))
    plain = {name: keywords[name] for name in ("dropout", "scaling") if name in keywords}
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **plain)
    return output, None


def _mask_with_rule(*, mask_function: Rule, allow_is_causal_skip: bool = True, **options: Any) -> Any:
    options.pop("allow_is_bidirectional_skip", None)
    mask: Any = sdpa_mask(mask_function=mask_function, allow_is_causal_skip=False, **options)
    if mask is not None:
        mask.rule = mask_function
    return mask


AttentionInterface.register(WATCHED, _watch)
AttentionMaskInterface.register(WATCHED, _mask_with_rule)
