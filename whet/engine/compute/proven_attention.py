"""The choice of a model's attention: the fastest one that computes what the model's own does, asked of the model.

Own means the eager attention that its family is written in. whet's attention makes no mask, so what a family puts into
a mask (windows, chunks), adds to the scores (biases, caps, sinks) or asks of attention by a keyword of its own would be
lost without a word, and a shorter loss would even look good. Therefore, whenever a model is loaded:

- what each layer may see by the rule of its mask (`engine.compute.watched`) must be what the attention lets it see, at
  positions on both sides of every number in the config: exact, and as cheap for a window of 8,192 tokens as for one
  of 16;
- the logits of a short row, and of one longer than every short window, must be those of the eager attention. In bf16
  it is each layer's output for what it read under the eager attention (`engine.compute.layerwise`).

Where one of them fails the next attention is tried, and the last is the model's own. Gives up: in bf16 outputs are
compared in the median over tokens, since rounding may send a token to another expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from whet.base.errors import UserError
from whet.base.out_of_memory import ran_out
from whet.base.private import attention_name, has_sdpa, takes_attention
from whet.engine.compute.attention import ATTENTION, check_keywords
from whet.engine.compute.cached_attention import CACHED_ATTENTION
from whet.engine.compute.layerwise import LayerCalls, largest_distance, layer_calls
from whet.engine.compute.probe import EXACT, FAILURES, first_line, probe_inputs, row_length, tolerance
from whet.engine.compute.readable import cannot_read
from whet.engine.compute.watched import WATCHED, LayerCall, positions, sees, watched_calls
from whet.engine.layers import decoder_layers
from whet.engine.task import takes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EAGER = "eager"
COMPUTED = ("scaling", "dropout", "softcap", "sliding_window")  # keywords that whet's attention computes with


def prove_attention(network: PreTrainedModel) -> str:
    """Give `network`, which is loaded with the attention that is wanted, the fastest that is right; returns why it is
    another one, or nothing. The reason also stays with the network, for `attention_notice`."""
    wanted = attention_name(network)
    reason = _choose(network, [wanted, *(["sdpa"] if wanted == ATTENTION and has_sdpa(network) else [])])
    network.attention_reason = reason  # type: ignore[assignment]
    return reason


def attention_notice(network: Any) -> str | None:
    """What to tell a person of a network whose attention is not the one that was wanted, or None."""
    reason = getattr(network, "attention_reason", "")
    return f"attention as the model's own code computes it: {reason}" if reason else None


def attention_to_name(network: PreTrainedModel) -> str:
    """The attention that the config of a saved `network` has to name, as the one that transformers would choose by
    itself computes something else than the model's own (UMT5 loses its positions); nothing where that one is right.

    network: loaded by `load_model`, so what it uses was proven. Afterwards it uses the same again.
    """
    used = attention_name(network)
    if used == "sdpa" or not takes_attention(type(network)) or not has_sdpa(network):
        return ""
    if used == EAGER:  # torch's was tried and left
        return EAGER
    reason = _choose(network, ["sdpa"])
    set_attention(network, used)
    return EAGER if reason else ""


def use_attention_with_masks(network: PreTrainedModel) -> str:
    """Give `network` an attention that reads masks and caches; returns why it is the eager one, or nothing."""
    unwrap: Any = getattr(network, "get_base_model", None)  # of PEFT's wrapper
    inside = network if unwrap is None else unwrap()
    if has_sdpa(inside):
        return _choose(inside, [CACHED_ATTENTION])
    # Without sdpa of its own a model has scores that only its eager attention knows, as with attention sinks.
    set_attention(inside, EAGER)
    return ""


def set_attention(network: Any, name: str) -> None:
    """Give a model and all parts of it this attention.

    Encoder and decoder of some families (UMT5) have configs of their own, which transformers' setter does not reach.
    """
    from transformers import PreTrainedModel

    for module in network.modules():
        if not isinstance(module, PreTrainedModel) or not takes_attention(type(module)):
            continue
        if module is network or attention_name(module) != name:
            module.set_attn_implementation(name)


@torch.inference_mode()
def _choose(network: Any, names: Sequence[str]) -> str:
    """Set the first of `names` that computes what eager attention does, else that one; returns why not the first."""
    if not takes_attention(type(network)):
        return ""
    if next(network.parameters()).is_meta:  # it is counted, and computes nothing
        set_attention(network, names[0])
        return ""
    first = ""
    was_training = network.training
    network.eval()
    own: torch.Tensor | LayerCalls | None = None
    for name in names:
        if name == EAGER:
            break
        own = _own_answer(network) if own is None else own
        reason = _difference(network, name, own)
        if not reason:
            break
        first = first or reason
    else:
        name = EAGER
    set_attention(network, name)
    network.train(was_training)
    return first


def _own_answer(network: Any) -> torch.Tensor | LayerCalls:
    """The logits of the model's own attention, given a mask as `generate` does: without one Moshi masks nothing. In
    short types it is what its layers read and give, where they can be found. UserError for a model that cannot read
    rows of tokens."""
    try:
        if tolerance(network) != EXACT and not network.config.is_encoder_decoder:
            with contextlib.suppress(UserError, LookupError):
                return _layer_calls(network, EAGER, masked=True)
        return _logits(network, EAGER, masked=True)
    except FAILURES as error:
        if ran_out(error):
            raise
        raise cannot_read(network, first_line(error)) from error


def _difference(network: Any, name: str, own: torch.Tensor | LayerCalls) -> str:
    """Why attention `name` is not what gave the answer `own`; nothing where it is."""
    try:
        if name == ATTENTION and (unlike := next(_unlike(network), "")):
            return unlike
        if isinstance(own, LayerCalls):
            share = largest_distance(own, _layer_calls(network, name, own))
            return "" if share <= tolerance(network) else f"with another one a layer's output is {share:.2g} away"
        logits = _logits(network, name)
    except FAILURES as error:
        if ran_out(error):
            raise
        return first_line(error)
    distances = (logits - own).abs().flatten(1).amax(1)
    share = tolerance(network)
    distance = float(distances.max() if share == EXACT else distances.median())
    return "" if distance <= share * float(own.abs().max()) else f"with another one its logits are {distance:.2g} away"


def _unlike(network: Any) -> Iterator[str]:
    """What whet's attention would leave out, layer by layer."""
    set_attention(network, WATCHED)
    calls = watched_calls(lambda: _pass(network, 8))
    device = next(network.parameters()).device
    asked = positions(network.config.get_text_config(decoder=True), device)
    for call in calls:
        check_keywords({name: value for name, value in call.keywords.items() if name not in COMPUTED})
        yield from _unseen(call, asked)


def _unseen(call: LayerCall, asked: torch.Tensor) -> Iterator[str]:
    seen = call.sees(asked, asked)
    if not call.causal:
        yield "its layers also look ahead"
    elif seen is None:
        yield "it makes its masks by itself"
    elif not torch.equal(seen, sees(call.keywords.get("sliding_window"), asked, asked)):
        yield "its windows or chunks stand in the mask alone"


def _logits(network: Any, name: str, *, masked: bool = False) -> torch.Tensor:
    """[T, V] float32 (or [2, C] of a labelled task) with attention `name`, of a short row and a long one: within a
    window transformers leaves out masks that some families take for given. masked: under a mask of no padding."""
    set_attention(network, name)
    return torch.cat([torch.atleast_2d(_pass(network, n, masked).logits[0].float()) for n in _lengths(network)])


def _layer_calls(
    network: Any, name: str, forced: LayerCalls | None = None, *, masked: bool = False
) -> LayerCalls:  # fmt: skip
    """The calls of the layers with attention `name`, of the same rows."""
    set_attention(network, name)

    def run() -> None:
        for tokens in _lengths(network):
            _pass(network, tokens, masked)

    return layer_calls(decoder_layers(network), run, forced)


def _lengths(network: Any) -> tuple[int, int]:
    return 8, row_length(network.config)


def _pass(network: Any, tokens: int, masked: bool = False) -> Any:
    """The output for one row of `tokens` ids."""
    inputs = probe_inputs(network, tokens)
    if masked and takes(network, "attention_mask"):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return network(**inputs)
