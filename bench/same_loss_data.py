"""The rows of the experiment in same_loss.py: a stream of tokens to pre-train on, and instruction rows it never saw.

Pre-training text is books, court judgments, film reviews and technical pages (Korean and English), tokenised here so
that no GPU minute is spent on it: uint16 ids, documents separated by <|endoftext|>, packed by xz to about a byte a
token. A thousand short conversations in the chat format go in too: an adapter on the linear layers cannot teach the
embeddings of the turn markers. Fine-tuning is on school mathematics (GSM8K) and Korean small talk.

That pre-training never saw those rows is checked, not assumed: a row that shares 16 tokens in sequence with the stream
is dropped. A row shorter than that can repeat a phrase of the stream.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "whet" / "builtin" / "tiny"
BYTES = {"en_gutenberg": 60_000_000, "ko_reviews": 20_000_000, "ko_judgments": 15_000_000, "ko_technical": 15_000_000}
TRAIN_ROWS = {"gsm8k_train": 2400, "korean_chatbot": 800}
HELD_OUT_ROWS = {"gsm8k_test": 300, "korean_chatbot": 100}
WINDOW = 16  # tokens in sequence that count as having seen a text
END = 0  # <|endoftext|>
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]  # two-byte units
SCAN = 1 << 22
FACTORS = np.cumprod(np.full(WINDOW, 0x9E3779B97F4A7C15, np.uint64))  # odd, so no position is lost


def build(source: Path | None, out: Path) -> dict[str, Any]:
    """Write tokens.npy.xz, train.jsonl, heldout.jsonl and data.json into `out`; returns what data.json says.

    source: folder with pretrain/, instruction/ and formats/ as named above; None: a few pages of this repository and
    its example tickets, to try the script.
    """
    texts = _texts(source) if source else _own_texts()
    stream, counts = tokenised(texts)
    train, held_out = _rows(source) if source else _own_rows()
    known = window_hashes_of(stream, [row_text(row) for row in [*train, *held_out]])
    sides = {"train": unseen(train, known), "heldout": unseen(held_out, known)}
    learned = {text for row in sides["train"] for text in (row["instruction"] + row["input"], row["output"])}
    sides["heldout"] = [row for row in sides["heldout"] if row["instruction"] + row["input"] not in learned]
    out.mkdir(parents=True, exist_ok=True)
    with lzma.open(out / "tokens.npy.xz", "wb", format=lzma.FORMAT_XZ, filters=XZ) as file:
        np.save(file, stream)
    for name, rows in sides.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    facts = {
        "tokens": len(stream), "tokens_by_source": counts, "rows": {name: len(rows) for name, rows in sides.items()},
        "rows_dropped": len(train) + len(held_out) - sum(len(rows) for rows in sides.values()),
        "window": WINDOW, "sha256": hashlib.sha256(stream.tobytes()).hexdigest(),
        "bytes": sum(path.stat().st_size for path in out.glob("*") if path.name != "data.json"),
    }  # fmt: skip
    (out / "data.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def read_tokens(folder: Path) -> np.ndarray:
    """The pre-training stream of a folder that `build` wrote: [tokens] uint16."""
    with lzma.open(folder / "tokens.npy.xz", "rb") as file:
        return np.load(file)


def tokenised(texts: dict[str, list[str]]) -> tuple[np.ndarray, dict[str, int]]:
    """(all documents one after the other, each followed by END, as uint16; tokens by source)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    parts: list[np.ndarray] = []
    counts = {}
    for source, documents in texts.items():
        start = len(parts)
        for first in range(0, len(documents), 1000):
            for found in tokenizer.encode_batch(documents[first : first + 1000], add_special_tokens=False):
                parts.append(np.array([*found.ids, END], np.uint16))
        counts[source] = sum(map(len, parts[start:]))
    return np.concatenate(parts), counts


def hashes(ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each run of WINDOW tokens: [n] -> [n - WINDOW + 1], or none for a shorter text."""
    if len(ids) < WINDOW:
        return np.empty(0, np.uint64)
    wide = ids.astype(np.uint64) + np.uint64(1)
    count = len(ids) - WINDOW + 1
    found = np.zeros(count, np.uint64)
    for place, factor in enumerate(FACTORS):
        found += wide[place : place + count] * factor
    return found


def window_hashes_of(stream: np.ndarray, texts: list[str]) -> set[int]:
    """The hashes of those windows of `texts` that occur in the stream."""
    wanted = np.unique(np.concatenate([hashes(ids) for ids in _ids_of(texts)]))
    seen = np.zeros(len(wanted), bool)
    for first in range(0, len(stream), SCAN):
        there = hashes(stream[first : first + SCAN + WINDOW - 1])
        places = np.searchsorted(wanted, there).clip(max=len(wanted) - 1)
        seen[places[wanted[places] == there]] = True
    return set(wanted[seen].tolist())


def unseen(rows: list[dict[str, str]], known: set[int]) -> list[dict[str, str]]:
    """The rows none of whose windows is known."""
    ids = _ids_of([row_text(row) for row in rows])
    return [row for row, tokens in zip(rows, ids, strict=True) if known.isdisjoint(hashes(tokens).tolist())]


def row_text(row: dict[str, str]) -> str:
    """All that a row says, in one text."""
    return "\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part)


def _ids_of(texts: list[str]) -> list[np.ndarray]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    return [np.array(found.ids, np.uint16) for found in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _stable(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _texts(source: Path) -> dict[str, list[str]]:
    """Documents by source, in a stable shuffled order, up to so many bytes of each."""
    found: dict[str, list[str]] = {}
    for name, limit in BYTES.items():
        documents = sorted((row["text"] for row in _read(source / "pretrain" / f"{name}.jsonl.xz")), key=_stable)
        chosen, total = [], 0
        for document in documents:
            size = len(document.encode())
            if total + size <= limit and not any(mark in document for mark in ("<|im_", "<|endoftext|>")):
                chosen.append(re.sub(r"[ \t]{3,}", "  ", document))  # tables
                total += size
        found[name] = chosen
    chats = json.loads((source / "formats" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    return found | {"chats": _chats(chats)}


def _chats(rows: list[dict[str, str]]) -> list[str]:
    """Rows as conversations in the tokenizer's own chat format."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(TOKENIZER))
    found = []
    for row in rows:
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        found.append(str(tokenizer.apply_chat_template(turns, tokenize=False)))
    return found


def _rows(source: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, held out). No question or answer of the small talk comes twice."""
    pools = {}
    for name in (*TRAIN_ROWS, *HELD_OUT_ROWS):
        rows: dict[str, dict[str, str]] = {}
        questions: set[str] = set()
        for row in sorted(_read(source / "instruction" / f"{name}.jsonl.xz"), key=lambda row: _stable(row["question"])):
            if row["question"] not in questions and row["answer"] not in rows:
                questions.add(row["question"])
                rows[row["answer"]] = {"instruction": row["question"], "input": "", "output": row["answer"]}
        pools[name] = list(rows.values())
    sides = []
    for wanted in (TRAIN_ROWS, HELD_OUT_ROWS):
        sides.append([row for name, count in wanted.items() for row in pools[name][:count]])
        pools = {name: pool[wanted.get(name, 0) :] for name, pool in pools.items()}
    return sides[0], sides[1]


def _own_texts() -> dict[str, list[str]]:
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))]
    chats = [{"instruction": page.splitlines()[0], "input": "", "output": page[:300]} for page in pages]
    return {"pages": pages, "chats": _chats(chats)}


def _own_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    files = [ROOT / "examples" / "support_tickets" / name for name in ("train.jsonl", "test.jsonl")]
    train, test = ([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files)
    return train[100:228], test[:32]
