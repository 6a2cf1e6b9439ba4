"""A tokenizer as transformers opened it once, usable without transformers.

Opening a tokenizer with transformers imports torch and takes seconds; its tokens come from `tokenizers` alone. So what
it came to (the serialised tokenizer of `tokenizers`, its special tokens, its template) is kept, and rows are made from
that. What is not kept opens the whole tokenizer, so nothing answers otherwise than the real one does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

STATE = "tokenizer.json"
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_KEPT = (
    *_TOKENS, *(f"{name}_id" for name in _TOKENS), "all_special_tokens", "all_special_ids", "special_tokens_map",
    "truncation_side", "chat_template",
)  # fmt: skip
# What `encode_typed` asks of a tokenizer's call, and no more.
_CALL = {"padding": False, "return_token_type_ids": True, "return_attention_mask": False, "verbose": False}


def keep(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, Any]:
    """Write the serialised tokenizer into `folder`; returns the rest of what is kept, as plain values."""
    (folder / STATE).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    return {name: getattr(tokenizer, name) for name in _KEPT} | {"kind": kind_of_tokenizer(tokenizer)}


def kind_of_tokenizer(tokenizer: Any) -> str:
    """The name of its class in transformers, also of one that was kept."""
    return tokenizer.kind if isinstance(tokenizer, RememberedTokenizer) else type(tokenizer).__name__


class _Encoded(dict[str, list[int]]):
    """One encoded text, read as a mapping or by its attribute, as transformers' BatchEncoding is."""

    @property
    def input_ids(self) -> list[int]:
        return self["input_ids"]


class RememberedTokenizer:
    """Answers as the PreTrainedTokenizerFast that was kept in a folder; `open_whole` opens it for what was not kept."""

    def __init__(self, folder: Path, kept: dict[str, Any], open_whole: Callable[[], PreTrainedTokenizerFast]) -> None:
        from tokenizers import Tokenizer

        values = json.loads(json.dumps(kept))  # of its own: the caller's may change
        self.kind: str = values.pop("kind")
        self.chat_template: Any = values.pop("chat_template")
        self.backend_tokenizer = Tokenizer.from_str((folder / STATE).read_text(encoding="utf-8"))
        self._kept = values
        self._open_whole = open_whole
        self._whole: PreTrainedTokenizerFast | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        kept = self.__dict__.get("_kept", {})
        return kept[name] if name in kept else getattr(self.whole(), name)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __call__(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        """input_ids and token_type_ids of one text, or of a list of texts (with their pairs) without padding."""
        if isinstance(text, str) and options.keys() <= {"add_special_tokens", "verbose"}:
            special = options.get("add_special_tokens", True)
            one = self._encoded([text if text_pair is None else (text, text_pair)], None, special)[0]
            return _Encoded(input_ids=one.ids, token_type_ids=one.type_ids)
        length, cut = options.pop("max_length", None), options.pop("truncation", False)
        if not isinstance(text, list) or options != _CALL or cut != (length is not None):
            return self.whole()(text, text_pair, max_length=length, truncation=cut, **options)
        encoded = self._encoded(text if text_pair is None else list(zip(text, text_pair, strict=True)), length)
        return {"input_ids": [one.ids for one in encoded], "token_type_ids": [one.type_ids for one in encoded]}

    def _encoded(self, texts: Sequence[Any], length: int | None, special: bool = True) -> list[Any]:
        self.backend_tokenizer.no_padding()
        if length is None:
            self.backend_tokenizer.no_truncation()
        else:
            self.backend_tokenizer.enable_truncation(length, direction=self._kept["truncation_side"])
        return self.backend_tokenizer.encode_batch(texts, add_special_tokens=special)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that were added to the vocabulary, by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **options: Any) -> str:
        """The text of `ids`."""
        if options != {"clean_up_tokenization_spaces": False}:
            return self.whole().decode(list(ids), skip_special_tokens=skip_special_tokens, **options)  # type: ignore[return-value]
        return self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def whole(self) -> PreTrainedTokenizerFast:
        """The tokenizer itself, opened with transformers at the first call."""
        if self._whole is None:
            self._whole = self._open_whole()
            self._whole.chat_template = self.chat_template
        return self._whole
