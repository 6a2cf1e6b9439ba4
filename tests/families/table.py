"""docs/families.md from the verdicts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date

from families.judge import BESIDE, Verdict

HEAD = """# Model families

Korean: [families.ko.md](families.ko.md).

Every family that transformers {version} offers as a language model, a classifier of sequences or an encoder-decoder,
built small with random weights, and taken through whet: trained, evaluated, asked one by one and in batches, and, with
its adapter, merged. The judge is plain transformers, with the attention that the family is written in, one row at a
time, without padding: the loss of the first step, greedy answers, and the held-out loss of the merged model must be
what it computes; of the merged model also when it is opened as anybody would, with nothing said of attention.
`make families` does it again, and writes this page; `tests/families` holds the code.

**{held} of {all}**: {right} are right, {refused} are refused with a reason before weights are read, {absent} cannot be
built here. One run of all of them on {date}, on a CPU in fp32, with torch {torch}, transformers {transformers}, peft
{peft}.

How whet computes attention in a family is not listed anywhere: it is asked of the model when it is loaded. Where the
model's own attention has to be used, training takes padded rows and is slower; the run says so. What a family's code
cannot do is asked of its first layer with random numbers, so it is refused before the weights are read. Where the
attention that transformers chooses for a merged model computes something else than the family's own (UMT5, Doge),
`attn_implementation` in its config.json asks for the own one. Layers that share one weight in several places (Zamba)
are left as they are.
"""
TASKS = {"causal": "Language models", "classification": "Classifiers", "seq2seq": "Encoder-decoders"}
SHORT = {
    "attention as": "own attention", "padded instead": "padded rows", "without a cache": "answers without a cache",
    "left as they are, because": "some layers not adapted", "beside the text part": "text part alone",
    "transformers' generate": "answers by transformers' generate", BESIDE: "one row in a batch",
}  # fmt: skip


def document(verdicts: Sequence[Verdict]) -> str:
    """The page, as Markdown."""
    import peft
    import torch
    import transformers

    count = {name: sum(v.outcome == name for v in verdicts) for name in ("right", "refused", "not built")}
    held = sum(verdict.holds for verdict in verdicts)
    parts = [HEAD.format(
        version=".".join(transformers.__version__.split(".")[:2]), held=held, all=len(verdicts), right=count["right"],
        refused=count["refused"], absent=count["not built"], date=date.today().isoformat(),
        torch=torch.__version__.partition("+")[0], transformers=transformers.__version__, peft=peft.__version__,
    )]  # fmt: skip
    parts.append(_distances(verdicts))
    for task, title in TASKS.items():
        of_task = [verdict for verdict in verdicts if verdict.name.endswith(f":{task}")]
        parts.append(f"## {title}\n")
        parts.append(_supported(of_task))
        parts.append(_listed(of_task, "not merged", "Right, but not merged"))
        parts += [_listed(of_task, "refused", "Refused"), _listed(of_task, "not built", "Not built here")]
        parts.append(_listed(of_task, "wrong", "Wrong"))
        parts.append(_listed(of_task, "crash", "Fails"))
    return "\n".join(part for part in parts if part)


def _distances(verdicts: Sequence[Verdict]) -> str:
    """What was compared, and how far it was apart at most."""
    largest: dict[str, float] = {}
    for verdict in verdicts:
        for what, share in verdict.distances.items():
            largest[what] = max(share, largest.get(what, 0.0))
    rows = [f"| {what} | {share:.0e} |" for what, share in largest.items()]
    head = [
        "The largest distances, as shares of a loss or of the largest logit:\n",
        "| what | apart |",
        "| --- | --- |",
    ]
    return "\n".join([*head, *rows]) + "\n" if rows else ""


def _supported(verdicts: Sequence[Verdict]) -> str:
    """The families that are right, by what whet says of them."""
    groups: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.outcome == "right":
            said = [short for phrase, short in SHORT.items() if any(phrase in note for note in verdict.notes)]
            groups.setdefault(", ".join(said) or "right", []).append(verdict.name.partition(":")[0])
    lines = ["| how | families |", "| --- | --- |"]
    lines += [
        f"| {how} | {', '.join(sorted(names))} |" for how, names in sorted(groups.items(), key=lambda one: -len(one[1]))
    ]
    return "\n".join(lines) + "\n"


def _listed(verdicts: Sequence[Verdict], outcome: str, title: str) -> str:
    """A table of the families of one outcome with the reason of each; nothing where there are none."""
    chosen = [verdict for verdict in verdicts if verdict.outcome == outcome]
    if not chosen:
        return ""
    rows = [f"| {verdict.name.partition(':')[0]} | {_plain(verdict.reason)} |" for verdict in chosen]
    return "\n".join([f"{title}:\n", "| family | why |", "| --- | --- |", *rows]) + "\n"


def _plain(reason: str) -> str:
    """A reason that a table cell can hold."""
    without_place = re.sub(r"/\S*/(run|family|model)/?\S*:? ?", "", reason)
    return re.sub(r"\s+", " ", without_place).replace("|", "/").strip()[:220]
