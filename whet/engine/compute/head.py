"""The output head and the cross-entropy in one: no tensor of rows x vocabulary ever exists.

Logits are made for a few rows at a time; their losses and the gradient of each loss are taken at once, while they are
in the cache, as in Liger's and Apple's cut cross-entropy (arXiv:2410.10989, arXiv:2411.09009). The result is exact:
chunks change neither a loss nor, beyond rounding, a gradient. It needs the hidden states that the model's own head
would get, so `find_head` proves on the model at hand that head(decoder(x)) is what the model computes, and a model with
anything in between keeps its own logits.

The losses come one by one, [N], and may go into any function. With a frozen head, the forward pass keeps the gradient
of each loss for its own hidden state, [N, H], and the backward pass multiplies it by the incoming gradient of that
loss: one product less than making the logits again. Gives up: the gradient of a trained head's weight is summed over
the tokens in the forward pass, so the factor of each loss must be known by then (`weights`), and the losses can only be
added up. A loss that is no weighted sum reads them first, without gradients, and then asks again with its own
derivatives as weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from whet.engine.compute.probe import EXACT, tolerance
from whet.engine.memory.host_tables import HostTensors, offload_head
from whet.engine.task import takes
from whet.engine.weights.linear import freeze
from whet.engine.weights.product import backward_product, forward_product
from whet.engine.weights.stored import Fp8Weight

SLICE_ROWS = 1 << 14
CHUNK_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 27, "mps": 1 << 25}
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # what configs call the cap of logits


@dataclass(frozen=True)
class Head:
    """decoder: gives hidden states [B, T, H]; output: the head's linear layer; softcap: cap tanh(logits / cap).

    fp8: None, or the tensors of the FP8 products (see `HeadLoss`); away: None, or the weight (or they) on the host.
    """

    decoder: nn.Module
    output: Any
    softcap: float | None
    fp8: tuple[torch.Tensor, ...] | None = None
    away: HostTensors | None = None

    @property
    def trained(self) -> bool:
        """True where the head's own weight or bias learns, so that its losses can only be added up."""
        return any(parameter.requires_grad for parameter in self.output.parameters())

    def losses(
        self, inputs: dict[str, Any], indices: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """-log p(target) of the tokens predicted at `indices` of the flattened batch, float32 [N].

        indices, targets: int64 [N]; a target below 0 has loss 0. weights: factor on each loss, float32 [N].
        The backward pass raises RuntimeError where the head is trained and its losses are not simply added up.
        """
        if self.away is not None:
            self.away.call()
        hidden = self.decoder(**inputs).last_hidden_state
        chosen = hidden.flatten(0, 1).index_select(0, indices)
        if torch.is_autocast_enabled(chosen.device.type):
            chosen = chosen.to(torch.get_autocast_dtype(chosen.device.type))
        if self.away is not None:
            tensors = self.away.arrive()
        else:
            tensors = (self.output.weight,) if self.fp8 is None else self.fp8
        fp8 = None if self.fp8 is None else tensors
        beforehand = weights if self.trained else None
        losses: Any = HeadLoss.apply(chosen, tensors[0], self.output.bias, targets, self.softcap, fp8, beforehand)
        return losses if weights is None or self.trained else losses * weights

    def on_host(self, network: nn.Module) -> Head:
        """The same head of `network`, which waits in host memory and comes for the loss alone; it must be frozen."""
        away = offload_head(network, self.output, self.fp8)
        return replace(self, fp8=None if self.fp8 is None else away.tensors, away=away)

    def in_fp8(self, network: nn.Module, *, both_orders: bool) -> Head:
        """The same head with its products on FP8 tensor cores; it must be frozen.

        A head of its own gives way to its FP8 form in `network` (half the bytes, twice with `both_orders`, which saves
        turning them round in every chunk); one that is the input embedding too stays beside it.
        """
        frozen = freeze(self.output, "fp8")
        if frozen is None:
            return self
        codes, scale = frozen.codes.detach(), frozen.scale.detach()  # type: ignore[union-attr]
        output: Any = self.output
        if network.get_input_embeddings().weight is not output.weight:  # type: ignore[operator,union-attr]
            network.set_output_embeddings(frozen)  # type: ignore[operator]
            output = frozen
        turned = (codes.t().contiguous(),) if both_orders else ()
        return Head(self.decoder, output, self.softcap, (codes, scale, *turned))


class HeadLoss(torch.autograd.Function):
    """-log softmax(h W^T + b)[target] of each row: h [N, H], W [V, H], b [V] or None, targets [N]; float32 [N].

    fp8: None, or W (which is given as its bytes then) as e4m3 bytes [V, H], the scale of each row [V], and, if kept,
    the bytes turned round [H, V]. weights: None, or what each loss is multiplied with, float32 [N]; they are for a W
    or b that is trained, for which every loss must get the same gradient in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        softcap: float | None, fp8: tuple[torch.Tensor, ...] | None = None, weights: torch.Tensor | None = None,
    ):  # fmt: skip
        rows = chunk_rows(hidden.device.type, weight.shape[0])
        matrix = weight.to(hidden.dtype) if fp8 is None else weight
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        # Buffers are used again for every chunk: fresh memory costs a CPU more than the arithmetic on it.
        room = (min(rows, hidden.shape[0]), weight.shape[0])
        raw = hidden.new_empty(room if fp8 is None else 0)
        wide = raw if hidden.is_cuda else hidden.new_empty(room, dtype=torch.float32)
        for start in range(0, hidden.shape[0], rows):
            part, wanted = hidden[start : start + rows], targets[start : start + rows]
            if fp8 is None:
                logits = raw[: part.shape[0]]
                torch.mm(part, matrix.t(), out=logits)
            else:
                logits = forward_product(Fp8Weight(*fp8), part, None, fp8=True)
            each = _gradients(logits, wide[: part.shape[0]], bias, wanted, softcap)
            if weights is not None:
                factor = weights[start : start + rows]
                each = each * factor
                logits.mul_(factor[:, None])
            losses[start : start + rows] = each
            if grad_hidden is not None and fp8 is None:
                torch.mm(logits, matrix, out=grad_hidden[start : start + rows])
            elif grad_hidden is not None:
                grad_hidden[start : start + rows] = _times_fp8(logits, fp8)  # type: ignore[arg-type]
            if grad_weight is not None:
                grad_weight += logits.t() @ part
            if grad_bias is not None:
                grad_bias += logits.float().sum(0)
            del logits  # before the next ones are made
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.types = (weight.dtype, None if bias is None else bias.dtype)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        incoming = grad_outputs[0]
        hidden, weight, bias = ctx.saved_tensors
        grad_hidden = grad_weight = grad_bias = None
        if hidden is not None:  # multiplied in float32, whatever the type of the hidden states
            grad_hidden = torch.mul(hidden, incoming[:, None], out=torch.empty_like(hidden))
        if weight is not None or bias is not None:
            same = _same_for_all(incoming)
            grad_weight = None if weight is None else (weight * same).to(ctx.types[0])
            grad_bias = None if bias is None else (bias * same).to(ctx.types[1])
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _same_for_all(incoming: torch.Tensor) -> torch.Tensor:
    """The one gradient that all losses got, a scalar; it is told by the strides, so nothing waits for the device.

    Raises RuntimeError where each loss has a gradient of its own.
    """
    if len(incoming) < 2:
        return incoming.sum()
    if incoming.stride(0) != 0:
        raise RuntimeError(
            "the output head is trained, so its losses can only be added up (losses.sum()): the gradient of its weight "
            "was summed in the forward pass; give the factor of each loss beforehand, as weights"
        )
    return incoming[0]


def chunk_rows(device: str, vocabulary: int) -> int:
    """How many rows get their logits at once: a bound on the memory, whole tiles where a GPU multiplies."""
    rows = max(1, CHUNK_LOGITS.get(device, 1 << 19) // vocabulary)
    return rows if rows < 256 or device == "cpu" else rows // 128 * 128


def _times_fp8(grad: torch.Tensor, fp8: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """grad [C, V] times the head [V, H]. Bytes that are not kept turned round are turned a slice at a time: turning all
    of them would take more memory than the logits."""
    if len(fp8) == 3:
        return backward_product(Fp8Weight(*fp8), grad, fp8=True)
    codes, scale = fp8
    total = torch.zeros(grad.shape[0], codes.shape[1], dtype=torch.float32, device=grad.device)
    for start in range(0, codes.shape[0], SLICE_ROWS):
        part = slice(start, start + SLICE_ROWS)
        total += backward_product(Fp8Weight(codes[part], scale[part]), grad[:, part], fp8=True)
    return total.to(grad.dtype)


def _gradients(
    logits: torch.Tensor, wide: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Loss of each of a few rows of raw `logits` [C, V], which become its gradient; wide: float32 room of that size."""
    if logits.is_cuda and logits.dtype != torch.float32:
        from whet.engine.compute.head_triton import rows_to_gradients

        return rows_to_gradients(logits, bias, targets, softcap)
    wide = logits if logits.dtype == torch.float32 else wide
    wide = wide if wide.dtype == torch.float32 else torch.empty_like(logits, dtype=torch.float32)
    wide.copy_(logits if bias is None else logits + bias)
    loss = _chunk(wide, targets, softcap)
    if logits is not wide:
        logits.copy_(wide)
    return loss


def _chunk(logits: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Loss of each of a few rows [C]; `logits` [C, V], float32 and raw, are replaced by their gradient."""
    squashed = None
    if softcap is not None:
        squashed = torch.tanh(logits / softcap)
        torch.mul(squashed, softcap, out=logits)
    counts = (targets >= 0)[:, None]
    index = targets.clamp_min(0)[:, None]
    chosen = logits.gather(1, index)
    peak = logits.amax(1, keepdim=True)
    logits.sub_(peak).exp_()
    mass = logits.sum(1, keepdim=True)
    loss = ((mass.log() + peak - chosen) * counts)[:, 0]
    logits.mul_(counts / mass)
    logits.scatter_add_(1, index, -counts.to(logits.dtype))
    if squashed is not None:
        logits.mul_(1 - squashed * squashed)
    return loss


def plain_losses(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The twin of `HeadLoss` on logits [N, V] that exist, float32 [N]: for models with a head of their own."""
    losses = cross_entropy(logits.float(), targets, reduction="none", ignore_index=-1)
    return losses if weights is None else losses * weights


@torch.inference_mode()
def find_head(network: nn.Module, *, autocast: torch.dtype | None = None) -> Head | None:
    """The parts that `HeadLoss` needs, or None when head(decoder(x)) is not what `network` computes.

    In fp32 they must be the same numbers up to rounding: a cap of an unknown name moves small logits by less than the
    rounding of shorter types.
    """
    output = network.get_output_embeddings()  # type: ignore[operator]
    decoder = network.get_decoder() if hasattr(network, "get_decoder") else None  # type: ignore[operator]
    if not isinstance(output, nn.Linear) or decoder is None or decoder is network or not takes(decoder, "input_ids"):
        return None
    config: Any = network.config.get_text_config()  # type: ignore[union-attr,operator]
    softcap = next((cap for name in CAPS if (cap := getattr(config, name, None))), None)
    device = output.weight.device
    ids = torch.arange(8, device=device)[None]
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        logits = network(input_ids=ids, use_cache=False).logits.float()
        ours = output(decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
    if softcap is not None:
        ours = torch.tanh(ours / softcap) * softcap
    exact = autocast is None and tolerance(network) == EXACT
    share, least = (1e-4, 1e-5) if exact else (1e-2, 1e-3)
    if not torch.allclose(ours, logits, rtol=share, atol=least * float(logits.abs().max())):
        return None
    return Head(decoder, output, softcap)
