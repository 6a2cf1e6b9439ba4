"""Make gsm8k.json: how many tokens the first 2,000 training rows of gsm8k have as chats (numbers only, file order).

Each row is rendered with Qwen3's chat template (user: question; assistant: answer) and tokenised with Qwen's tokenizer:

    python bench/lengths/make.py gsm8k_train.jsonl.xz TOKENIZER_FOLDER bench/lengths/gsm8k.json

gsm8k: openai/grade-school-math (MIT). TOKENIZER_FOLDER holds tokenizer.json and qwen3_tokenizer_config.json. Lengths
decide how much padding or packing costs, the text itself does not, so the benchmark carries lengths alone.
"""

from __future__ import annotations

import json
import lzma
import sys
from itertools import islice
from pathlib import Path

ROWS = 2000


def main(data: str, folder: str, out: str) -> None:
    from transformers import PreTrainedTokenizerFast

    template = json.loads((Path(folder) / "qwen3_tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"), chat_template=template)
    lengths = []
    with lzma.open(data, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, islice(lines, ROWS)):
            turns = [("user", row["question"]), ("assistant", row["answer"])]
            messages = [{"role": role, "content": content} for role, content in turns]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            lengths.append(len(tokenizer(text, add_special_tokens=False).input_ids))
    Path(out).write_text(json.dumps(lengths, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
