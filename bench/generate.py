"""Batched greedy generation: a session of whet against transformers' own `generate` on the same model and prompts.

    python bench/generate.py MODEL_DIR --prompts 32 --prompt-tokens 128 --new-tokens 128 --out FILE.json
    python bench/generate.py --from-config Qwen3-4B.json --storage nf4 --out FILE.json      # random weights

All systems share one process, one model object and one set of random prompts; no token stops an answer, so every system
makes the same number. transformers runs in its defaults and, where that works, with cache_implementation="static",
which compiles. A figure is the median of the timed calls after a warm-up call and contains everything a call does:
prefill, dense copies, capturing the graph. Rounding differs between systems, and bf16 with random weights has many
near ties: `equal` is the share of answers that agree to the last token, `prefix` the share of tokens before the first
difference. On a quantised storage transformers generates on whet's layers, rebuilding each weight for every token.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from whet.base.console import quiet_libraries
from whet.engine.answer.generate import DecoderSession, DecodingOptions
from whet.engine.config import Model
from whet.engine.device import Placement, device_name
from whet.engine.load.load import load_model

Answers = list[list[int]]
say = partial(print, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model directory or builtin:tiny")
    parser.add_argument("--from-config", help="config.json of a shape to fill with random weights")
    parser.add_argument("--storage", default=None, choices=["fp32", "bf16", "nf4", "fp8", "int8"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=None, help="prompts together; default all")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--shortest", type=int, default=None, help="of the prompts; default as the longest")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="also whet with torch.compile")
    parser.add_argument("--no-static", action="store_true", help="without transformers' static cache")
    parser.add_argument("--out", type=Path)
    found = parser.parse_args()
    if (found.model is None) == (found.from_config is None):
        parser.error("give either a model directory or --from-config")
    return found


def build(chosen: argparse.Namespace) -> Any:
    """The model on its device; random weights are drawn there, which takes seconds and not minutes."""
    device = torch.device(chosen.device)
    storage = chosen.storage or ("fp32" if device.type == "cpu" else "bf16")
    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = torch.float32 if storage == "fp32" else torch.bfloat16 if storage == "bf16" else compute
    torch.manual_seed(0)
    if chosen.from_config and storage in ("fp32", "bf16"):
        config = transformers.AutoConfig.from_pretrained(chosen.from_config)
        with device:
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model = Model(path=chosen.from_config or chosen.model, from_config=bool(chosen.from_config))
    return load_model(model, Placement(device, storage, dtype, storage == "nf4", {}))


def draw_prompts(chosen: argparse.Namespace, vocabulary: int) -> Answers:
    generator = torch.Generator().manual_seed(1)
    shortest = chosen.shortest or chosen.prompt_tokens
    lengths = torch.randint(shortest, chosen.prompt_tokens + 1, (chosen.prompts,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def transformers_answers(model: Any, prompts: Answers, new_tokens: int, size: int, **options: Any) -> Answers:
    """Left-padded batches in order of length, as a careful user of `generate` would make them."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: Answers = [[] for _ in prompts]
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        longest = max(len(prompts[index]) for index in chosen)
        rows = [[0] * (longest - len(prompts[index])) + prompts[index] for index in chosen]
        real = [[0] * (longest - len(prompts[index])) + [1] * len(prompts[index]) for index in chosen]
        output = model.generate(
            input_ids=torch.tensor(rows, device=model.device), attention_mask=torch.tensor(real, device=model.device),
            max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options,
        )  # fmt: skip
        for index, row in zip(chosen, output[:, longest:].tolist(), strict=True):
            answers[index] = row
    return answers


def time_calls(call: Callable[[], Answers], repeat: int) -> tuple[Answers, dict[str, Any]]:
    """The answers, and seconds of the warm-up and of each timed call with the peak memory in bytes."""
    cuda = torch.cuda.is_available()
    seconds, answers = [], []
    for _ in range(repeat + 1):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        answers = call()  # ends in a copy to the host, so the device is done
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    tokens = sum(len(row) for row in answers)
    median = statistics.median(seconds[1:])
    result = {"warm_up_seconds": seconds[0], "seconds": seconds[1:], "tokens": tokens, "peak_bytes": peak}
    return answers, result | {"tokens_per_second": tokens / median}


def agreement(ours: Answers, theirs: Answers) -> dict[str, float]:
    same, tokens = 0, 0
    for mine, other in zip(ours, theirs, strict=True):
        pairs = list(zip(mine, other, strict=True))
        same += next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
        tokens += len(pairs)
    equal = sum(mine == other for mine, other in zip(ours, theirs, strict=True))
    return {"equal": equal / len(ours), "prefix": same / tokens}


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    model = build(chosen)
    model.generation_config.eos_token_id = None
    prompts = draw_prompts(chosen, model.get_input_embeddings().weight.shape[0])
    size, new_tokens = chosen.batch_size or len(prompts), chosen.new_tokens

    def whet(options: DecodingOptions) -> Answers:
        """A session for each call: dense copies and the graph are part of what is timed."""
        with DecoderSession(model, options=options) as session:
            return session.answer(prompts, stop_ids=(), max_new_tokens=new_tokens, batch_size=size)

    calls: dict[str, Callable[[], Answers]] = {"whet": lambda: whet(DecodingOptions())}
    if chosen.compiled:
        calls["whet compiled"] = lambda: whet(DecodingOptions(compiled=True))
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    # For transformers, whose sdpa leaves a soft cap out; whet takes its own attention for the time of a call.
    model.set_attn_implementation("eager" if capped else "sdpa")
    calls["transformers"] = lambda: transformers_answers(model, prompts, new_tokens, size)
    if not chosen.no_static:
        static = {"cache_implementation": "static"}
        calls["transformers static"] = lambda: transformers_answers(model, prompts, new_tokens, size, **static)
    found: dict[str, Any] = {}
    answers: dict[str, Answers] = {}
    for name, call in calls.items():
        try:
            answers[name], found[name] = time_calls(call, chosen.repeat)
        except RuntimeError as error:  # a peer that cannot run here is a result, too
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            if name.startswith("whet"):
                raise
            continue
        finally:
            say(name, json.dumps(found.get(name)))
    for name, result in found.items():
        if name != "whet" and name in answers:
            result |= agreement(answers["whet"], answers[name])
            result["whet_is_faster_by"] = found["whet"]["tokens_per_second"] / result["tokens_per_second"]
    return found


def main() -> None:
    chosen = arguments()
    quiet_libraries()
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(torch.device(chosen.device)),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__},
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(chosen).items()},
        "results": measure(chosen),
    }
    text = json.dumps(report, indent=1)
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
