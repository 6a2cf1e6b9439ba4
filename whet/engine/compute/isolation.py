"""The start-up checks of attention: does an output move when a neighbour document changes, or a later token?

Two documents are laid end to end; the first is replaced; the second one's logits must stay the same to the bit. And
the second alone must give the same logits up to rounding, which shows that its positions restarted. A model that
ignores `documents` fails at once, and is then trained padded instead of contaminated.

A mixture of experts multiplies the tokens of an expert at once, so other tokens of a neighbour change the shape of a
product and with it its rounding, although nothing is seen. No size tells rounding from a faint leak, but the derivative
does: of what a document cannot see it is exactly 0, however products are rounded, because only zeros were ever added.
So logits that move by no more than rounding are excused where the second document's logits have no derivative by what
enters of the first. Gives up: a choice between documents that has no derivative and moves logits by no more than that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from whet.base.private import attention_name
from whet.engine.compute.attention import ATTENTION, Documents
from whet.engine.compute.probe import FAILURES, ROUNDED, tolerance


@dataclass(frozen=True)
class Isolation:
    """moved: largest change of the second document's logits; alone: its largest difference to being alone; share: how
    much of `scale`, the largest logit, that may be; reached: the largest derivative of its logits by the embeddings of
    the first, asked only where they move within rounding."""

    moved: float
    alone: float
    scale: float
    share: float = ROUNDED
    reached: float = math.inf

    @property
    def rounded(self) -> bool:
        """Whether no difference is larger than rounding."""
        return max(self.moved, self.alone) <= self.share * max(self.scale, 1e-6)

    @property
    def holds(self) -> bool:
        return self.rounded and (self.moved == 0.0 or self.reached == 0.0)


def knows_documents(network: Any) -> bool:
    """Whether a model computes with whet's attention: any other one counts windows, chunks and what it selects over the
    whole row, whatever documents stand in it."""
    return attention_name(network) == ATTENTION


def check_isolation(
    model: torch.nn.Module, vocabulary: int, *, autocast: torch.dtype | None = None, length: int = 12
) -> Isolation:
    """Run the check on `model` as it will be trained. Costs three forward passes of 2 * `length` tokens, and where
    products are rounded otherwise beside another neighbour, one more with its backward pass."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(0, vocabulary, (3, length), generator=generator).to(device)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        one = _flat_logits(model, [first, second])[length:]
        two = _flat_logits(model, [other, second])[length:]
        alone = model(input_ids=second[None]).logits[0].float()
    found = Isolation(
        moved=float((one - two).abs().max()),
        alone=float((one - alone).abs().max()),
        scale=float(alone.abs().max()),
        share=tolerance(model) if autocast is None else ROUNDED,
    )
    if found.moved and found.rounded:
        found = replace(found, reached=_reached(model, first, second, autocast))
    model.train(was_training)
    return found


def _reached(model: Any, first: torch.Tensor, second: torch.Tensor, autocast: torch.dtype | None) -> float:
    """The largest derivative of the second document's logits by the embeddings of the first; infinite where the model
    cannot be asked. Leaves the weights' gradients alone as long as no layer is made to run again in backward."""
    entering: list[torch.Tensor] = []

    def enter(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        entering.append(output.detach().requires_grad_())
        return entering[-1]

    try:
        hook = model.get_input_embeddings().register_forward_hook(enter)
    except FAILURES:
        return math.inf
    try:
        with torch.enable_grad(), torch.autocast(first.device.type, autocast, enabled=autocast is not None):
            logits = _flat_logits(model, [first, second])[len(first) :]
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits.device)
            gradients = torch.autograd.grad((logits * weights).sum(), entering)  # a plain sum may be blind to a shift
    except FAILURES:
        return math.inf
    finally:
        hook.remove()
    parts = [gradient.reshape(-1, gradient.shape[-1])[: len(first)] for gradient in gradients]
    return float(torch.stack([part.abs().max() for part in parts]).max())  # of torch, so that no number stays none


def check_causality(
    model: torch.nn.Module, vocabulary: int, *, flat: bool, autocast: torch.dtype | None = None, length: int = 12
) -> float:
    """The largest change of any earlier token's logits when the last token changes, as a share of the largest logit.

    A language model whose attention lost its mask still learns, and its loss even looks good: it reads the answer.
    flat: ask in the layout of documents in one row, else in that of padded rows. Costs two small forward passes.
    """
    device = next(model.parameters()).device
    ids = torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(1)).to(device)
    changed = ids.clone()
    changed[-1] = (ids[-1] + 1) % vocabulary
    was_training = model.training
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        one, two = (
            _flat_logits(model, [row]) if flat else model(input_ids=row[None], use_cache=False).logits[0].float()
            for row in (ids, changed)
        )
    model.train(was_training)
    return float((one - two)[:-1].abs().max() / one.abs().max().clamp_min(1e-6))


def flat_inputs(documents: list[torch.Tensor]) -> dict[str, object]:
    """Model inputs for documents laid end to end: ids and restarting positions [1, T], and the boundaries."""
    device = documents[0].device
    bounds = [0]
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    positions = torch.cat([torch.arange(len(document), device=device) for document in documents])
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": positions[None],
        "documents": Documents(
            torch.tensor(bounds, dtype=torch.int32, device=device),
            max(len(document) for document in documents),
            bounds=tuple(bounds),
        ),
    }


def _flat_logits(model: torch.nn.Module, documents: list[torch.Tensor]) -> torch.Tensor:
    return model(**flat_inputs(documents), use_cache=False).logits[0].float()
