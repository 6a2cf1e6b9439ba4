"""Sample answers of a run: the prompt with its roles, all answers side by side, fields that differ marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from whet.base.language import phrase
from whet.report.charts import JsonObject, own_label, plain, text_of
from whet.report.labels import is_labelled, label_samples
from whet.report.markup import Html, excerpt, paragraph, safe, spread
from whet.report.masks import role_name

SAMPLE_COUNT = 8
SHOWN_MESSAGES = 12
LONGEST_FIELD = 700


def sample_section(rows: Sequence[JsonObject], count: int = SAMPLE_COUNT) -> str:
    """A note, and `count` of the rows, right and wrong ones in turn."""
    if any(map(is_labelled, rows)):
        return label_samples([row for row in rows if is_labelled(row)])
    right, wrong = ([row for row in rows if _is_exact(row) == exact] for exact in (True, False))
    bad = spread(wrong, max(count // 2, count - len(right)))
    good = spread(right, count - len(bad))
    note = phrase(
        "{0} of {1} tuned answers match the reference exactly. Shown: {2} that do not and {3} that do, taken at even "
        "distances through the file.", plain(len(right)), plain(len(rows)), len(bad), len(good),
    )  # fmt: skip
    return paragraph("lead", note) + "".join(_sample(row) for pair in zip_longest(bad, good) for row in pair if row)


def _is_exact(row: JsonObject) -> bool:
    return row.get("exact", row.get("tuned") == row.get("reference")) is True


def _sample(row: JsonObject) -> str:
    css, badge = ("good", phrase("✓ exact")) if _is_exact(row) else ("bad", phrase("✗ differs"))
    reference = text_of(row.get("reference"))

    def shown(key: str) -> str:
        return _marked(row.get(key), reference) if key == "tuned" else excerpt(row.get(key))

    answers = "".join(
        f'<div class="{key} {css}"><h4>{own_label(key)}</h4><p dir="auto">{shown(key)}</p></div>'
        for key in ("base", "tuned", "reference")
    )
    title = f'<header><b>{safe(row.get("id"), 80)}</b><span class="tag {css}">{badge}</span></header>'
    body = f'{_prompt(row.get("prompt"))}<div class="answers">{answers}</div>'
    return f'<article class="card sample">{title}{body}</article>'


def _prompt(prompt: object) -> str:
    """The question: one text, or the messages of a conversation with their roles."""
    messages = [one for one in prompt if isinstance(one, dict)] if isinstance(prompt, list) else []
    if not messages:
        return f'<p class="prompt" dir="auto">{excerpt(prompt)}</p>'
    left = len(messages) - SHOWN_MESSAGES
    cut = f'<p class="cut">{phrase("{0} earlier messages", plain(left))}</p>' if left > 0 else ""
    lines = "".join(
        f'<div class="message"><span class="tag">{safe(role_name(one.get("role")), 20)}</span>'
        f'<p class="prompt" dir="auto">{excerpt(one.get("content"))}</p></div>'
        for one in messages[-SHOWN_MESSAGES:]
    )
    return f'{cut}<div class="dialogue">{lines}</div>'


def _marked(value: object, reference: str) -> str:
    """An answer; of answers in fields (`Key: value` lines), the lines that differ from the reference are marked."""
    text, expected = text_of(value), _fields(reference)
    if len(expected) < 2 or not text or len(text) > LONGEST_FIELD or text == reference:
        return excerpt(value)
    lines = []
    for line in text.split("\n"):
        key, colon, _ = line.partition(":")
        differs = not colon or expected.get(key.strip()) != line.strip()
        lines.append(Html(f"<mark>{safe(line)}</mark>") if differs and line.strip() else safe(line))
    return Html("\n".join(lines))


def _fields(text: str) -> dict[str, str]:
    """The lines of a structured answer by their keys; {} for any other text."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not all(":" in line for line in lines):
        return {}
    return {line.partition(":")[0].strip(): line.strip() for line in lines}
