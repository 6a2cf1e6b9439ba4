"""Templates by name render as the models' own do, and refuse a vocabulary without their markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chats import CASES, chat
from mask_table import MARKERS, backend

from whet.base.errors import UserError
from whet.data.template.named import MARKERS as NEEDED
from whet.data.template.named import NAMED, use_template
from whet.data.template.row_tokenizer import RowTokenizer
from whet.data.template.template import Template

SHARED = Path(__file__).parents[2] / "shared" / "data"
OWN = {"llama-3": "llama3", "gemma": "gemma", "phi-3": "phi3", "chatml": "qwen2_5"}


def tokenizer(markers: list[str], eos: str | None = "<|im_end|>") -> Any:
    from transformers import PreTrainedTokenizerFast

    found = PreTrainedTokenizerFast(tokenizer_object=backend("tiny"), eos_token=eos, bos_token="<s>")
    found.add_special_tokens({"additional_special_tokens": markers})
    return found


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("prompt", [False, True])
def test_a_named_template_renders_as_the_models_own(name: str, prompt: bool) -> None:
    if not SHARED.is_dir():
        pytest.skip("shared/data with the models' own templates is not beside this checkout")
    ours, own = tokenizer(MARKERS), tokenizer(MARKERS)
    use_template(ours, name)
    own.chat_template = (SHARED / "chat_templates" / f"{OWN[name]}.jinja").read_text(encoding="utf-8")
    compared = 0
    for messages in CASES.values():
        if name == "gemma" and messages[0].role == "system":
            continue  # gemma itself refuses one; ours writes it where gemma 3 does
        said = messages if name != "chatml" or messages[0].role == "system" else [*chat("s:x"), *messages]
        asked = said[:-1] if prompt else said
        assert Template(ours).text(asked, prompt=prompt) == Template(own).text(asked, prompt=prompt)
        compared += 1
    assert compared > 30


def test_gemma_and_mistral_write_a_system_message_into_the_first_question() -> None:
    for name, expected in (("gemma", "<start_of_turn>user\ns\n\nq<end_of_turn>"), ("mistral", "[INST] s\n\nq [/INST]")):
        found = tokenizer(MARKERS)
        use_template(found, name)
        assert expected in Template(found).text(chat("s:s", "u:q", "a:a"))


@pytest.mark.parametrize("name", [name for name, needed in NEEDED.items() if needed])
def test_a_vocabulary_without_the_markers_is_refused_with_the_nearest_that_works(name: str) -> None:
    others = [marker for other, needed in NEEDED.items() if other != name for marker in needed]
    with pytest.raises(UserError, match="would never end") as caught:
        use_template(only([]), name)
    assert caught.value.fix.startswith("model.chat_template=alpaca")
    with pytest.raises(UserError) as caught:
        use_template(only(others), name)
    near = "llama-3" if name == "chatml" else "chatml"
    assert caught.value.fix == f"model.chat_template={near}"
    use_template(only(list(NEEDED[name])), name)


def only(markers: list[str]) -> Any:
    """A tokenizer of one word and these markers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a")), eos_token="</s>"
    )
    found.add_special_tokens({"additional_special_tokens": markers})
    return found


def test_without_an_end_token_no_template_would_end() -> None:
    for name in ("alpaca", "mistral"):
        found = only([])
        found.eos_token = None
        with pytest.raises(UserError, match=r"no token \(eos_token\)"):
            use_template(found, name)


@pytest.mark.parametrize("name", sorted(NAMED.keys() - {"chatml"}))
def test_no_named_template_passes_over_what_a_tool_says(name: str) -> None:
    from chats import TOOL_CASES

    found = tokenizer(MARKERS)
    use_template(found, name)
    with pytest.raises(UserError):
        RowTokenizer(found, chat=True).conversations([TOOL_CASES["call_and_answer"]], "assistant")


def test_the_markers_of_a_template_are_those_that_it_writes() -> None:
    for name, needed in NEEDED.items():
        text = NAMED[name].read_text(encoding="utf-8")
        assert set(NEEDED) == set(NAMED)
        found = tokenizer(MARKERS)
        use_template(found, name)
        written = Template(found).text(chat("s:s", "u:q", "a:a"))
        assert all(marker in written for marker in needed if marker != "<|system|>" or "role" not in text), name
