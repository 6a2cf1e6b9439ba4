"""Chat templates by name, for base models that lack one. The model's own always wins: a name has to be asked for.

Each writes turns as the family of its name does. A marker that the vocabulary does not have as one token would be read
as ordinary text and a turn would never end, so such a template is refused, with the nearest that would work.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from whet.base.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LARGEST = 1_000_000  # characters; published templates have under 20,000
NAMED = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
# In the order in which one is proposed for another. alpaca and mistral end turns with the model's own end token.
MARKERS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi-3": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "alpaca": (),
    "mistral": (),
}


def use_template(tokenizer: PreTrainedTokenizerFast, name: str | None) -> None:
    """Give the tokenizer the template that the recipe names; the model's own stays when it names none.

    name: one of NAMED, or a path that ends in .jinja. Raises UserError for an unknown name and for markers that the
    vocabulary does not have.
    """
    if name is None:
        return
    if name in NAMED:
        _check_markers(tokenizer, name)
        tokenizer.chat_template = NAMED[name].read_text(encoding="utf-8")
        return
    path = Path(name).expanduser()
    if path.suffix == ".jinja" and path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            tokenizer.chat_template = file.read(LARGEST + 1)
        return
    raise UserError(
        "there is no such chat template",
        field="model.chat_template",
        found=name,
        expected=f"{', '.join(NAMED)} or a .jinja file",
        fix=f"write {nearest(name, NAMED) or 'chatml'}",
    )


def _check_markers(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    missing = _missing(tokenizer, name)
    if not missing:
        return
    near = next((other for other in MARKERS if not _missing(tokenizer, other)), None)
    ends = "which ends turns with the model's own end token"
    fix = f"model.chat_template={near}" + (f", {ends}" if near in ("alpaca", "mistral") else "")
    title = "ChatML" if name == "chatml" else name
    raise UserError(
        f"the tokenizer has no token {missing[0]}, so {title} turns would never end",
        field="model.chat_template",
        found=name,
        expected="a template whose markers are in the vocabulary",
        fix=fix if near else "set eos_token in the model's tokenizer_config.json, then model.chat_template=alpaca",
    )


def _missing(tokenizer: PreTrainedTokenizerFast, name: str) -> list[str]:
    """Markers that are not one token each; "(eos_token)" where the template ends turns with it and there is none."""
    if not MARKERS[name]:
        return [] if tokenizer.eos_token else ["(eos_token)"]
    vocabulary = tokenizer.get_vocab()
    return [marker for marker in MARKERS[name] if marker not in vocabulary]
