"""Trains the tokenizer of the built-in model and saves it for transformers.

What: a byte-level BPE of 16,384 entries over a balanced English and Korean sample of the corpus
that `corpus.py` wrote, saved with `PreTrainedTokenizerFast.save_pretrained`.

Why: bytes make every text round-trip (no normaliser, no unknown token), a vocabulary that is a
multiple of 128 suits the matrix units, and a balanced sample keeps Korean from costing several
tokens a syllable. The pre-tokenisation is that of Qwen and GPT-4 with digits split singly.
The chat template is ChatML without a default system prompt.

Source: the `train.jsonl.xz` of `corpus.py`. The same corpus gives the same tokenizer.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 16_384
DOCUMENT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Shares of the sample: Korean script takes three bytes a syllable, so equal bytes are equal weight.
SAMPLE_SHARES = {
    "en_gutenberg": 0.40,
    "ko_reviews": 0.22,
    "ko_judgments": 0.06,
    "ko_technical": 0.12,
    "instructions": 0.20,
}
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('Unknown role ' ~ message['role'] ~ ': use system, user, assistant or tool.') }}
{%- endif %}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
PROBES = (
    "Hello, world! It's 2024-05-17.\r\n\r\n\tTabs  and   spaces   ",
    "안녕하세요, 결제가 두 번 됐어요ㅠㅠ ㅋㅋㅋ",
    "🙂👩‍👩‍👧‍👦🇰🇷 ꙮ 𒀀𒁀 ᚠᚢᚦ العربية हिन्दी ไทย",
    "\u1112\u1161\u11ab\u1100\u1173\u11af \u1112\u11ab\u1161 ㅎㅏㄴ e\u0301 \ufeff\u200b\x00\x7f",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
)


def sample_texts(corpus: Path, sample_bytes: int) -> Iterator[str]:
    """Texts of every source up to its share; corpus.py already wrote them in shuffled order."""
    left = {source: int(share * sample_bytes) for source, share in SAMPLE_SHARES.items()}
    with lzma.open(corpus, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            source, text = record["source"], record["text"]
            if left[source] <= 0:
                continue
            left[source] -= len(text.encode("utf-8"))
            for marker in (DOCUMENT_END, TURN_START, TURN_END):
                text = text.replace(marker, "\n")
            yield text
            if all(value <= 0 for value in left.values()):
                return


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """The trained tokenizer with its special tokens and its chat template."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        special_tokens=[DOCUMENT_END, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=DOCUMENT_END,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises if the tokenizer is not what the built-in model needs."""
    if len(tokenizer) != VOCABULARY_SIZE:
        raise SystemExit(f"The tokenizer has {len(tokenizer)} entries, not {VOCABULARY_SIZE}.")
    for probe in PROBES:
        if tokenizer.decode(tokenizer.encode(probe)) != probe:
            raise SystemExit(f"The tokenizer does not give back {probe!r}.")
    markers = tokenizer.encode(TURN_START + TURN_END + DOCUMENT_END)
    if markers != tokenizer.convert_tokens_to_ids([TURN_START, TURN_END, DOCUMENT_END]):
        raise SystemExit("The chat markers are not single tokens.")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Trains the tokenizer of the built-in model.")
    parser.add_argument("corpus", type=Path, help="folder with the train.jsonl.xz of corpus.py")
    parser.add_argument("output", type=Path, help="folder for the tokenizer files")
    parser.add_argument(
        "--sample-megabytes", type=int, default=40, metavar="MB", help="text to train on (default: %(default)s)"
    )
    options = parser.parse_args()
    texts = sample_texts(options.corpus / "train.jsonl.xz", options.sample_megabytes * 1_000_000)
    tokenizer = train_tokenizer(texts)
    check_tokenizer(tokenizer)
    tokenizer.save_pretrained(options.output)
    print(f"{len(tokenizer)} entries written to {options.output}")


if __name__ == "__main__":
    main()
