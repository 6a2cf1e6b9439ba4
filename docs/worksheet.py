"""Writes the table of docs/memory.md and its Korean twin: what `whet plan` reckons for 7B, 13B and 70B.

`python docs/worksheet.py`; a test compares rows of the pages with what this would write. The shapes are those of
Llama 2, as facts: nothing is downloaded. One row of 2,048 tokens, layers run again, not compiled.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGES = ("memory.md", "memory.ko.md")
TABLE = re.compile(r"(?s)(<!-- worksheet -->\n).*?(<!-- /worksheet -->)")
SHAPES: dict[str, dict[str, Any]] = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8},
}  # fmt: skip
COMMON = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False}
WAYS: dict[str, tuple[dict[str, Any], float]] = {  # settings, and bytes a parameter by the rule of thumb
    "full": ({"method": {"name": "full"}}, 16.0),
    "LoRA": ({"base": {"storage": "bf16"}}, 2.0),
    "QLoRA": ({"base": {"storage": "nf4", "compute": "bf16"}}, 0.5),
}
GB = 1e9


def planned(size: str, way: str) -> dict[str, Any]:
    """The plan of one row, for a GPU that need not be here."""
    import whet

    train = {
        "compile": False, "gradient_checkpointing": True, "offload_optimizer": False, "max_steps": 100,
        "per_device_train_batch_size": 1,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(COMMON | SHAPES[size]))
        model = {"path": str(path), "from_config": True}
        return whet.plan({"model": model, "train": train} | WAYS[way][0], gpu="H200")


def row(size: str, way: str, found: Mapping[str, Any]) -> str:
    """A line of the table, in GB of 10^9 bytes."""
    memory = found["memory"]
    trained = found["trainable_params"]
    base = found["all_params"] - (0 if way == "full" else trained)
    weights = memory["frozen weights"] + memory["trained weights"]
    working = memory["activations"] + memory["logits"]
    cells = [weights, memory["gradients"], memory["optimiser"], working, found["peak_bytes"]["train"]]
    shown = [f"{count / GB:,.2f}" if count < GB else f"{count / GB:,.1f}" for count in cells]
    thumb = f"{WAYS[way][1]:g} B: {WAYS[way][1] * base / GB:,.0f}"
    return f"| {size} {way} | {trained / 1e6:,.0f} M | {' | '.join(shown)} | {thumb} |\n"


def body() -> str:
    """All rows."""
    return "".join(row(size, way, planned(size, way)) for size in SHAPES for way in WAYS)


def main() -> None:
    rows = body()
    for name in PAGES:
        path = DOCS / name
        page = path.read_text(encoding="utf-8")
        head = "".join(line + "\n" for line in TABLE.search(page)[0].splitlines()[1:3])  # type: ignore[index]
        path.write_text(TABLE.sub(lambda found, head=head: f"{found[1]}{head}{rows}{found[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
