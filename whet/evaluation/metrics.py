"""Text metrics that are right in every script: predictions and references in, numbers in 0..1 out.

The usual metrics are silently wrong outside English. rouge-score's own tokenizer keeps [a-z0-9] only, so that two
identical Korean, Thai or Hindi answers score 0.0 (huggingface/evaluate#256); splitting at spaces makes one token of a
whole Thai or Chinese sentence. So there is one tokenizer here for all of them, and the tests hold metric(x, x) = 1.

What a token is. Words by Unicode word segmentation (UAX #29, through `regex`, which transformers brings along), and
single characters in the scripts written without spaces: Han, Kana, Thai, Lao, Khmer, Burmese. Korean has spaces but is
also read by the syllable, as in KorQuAD (arXiv:1909.07005), because particles are written onto the noun: "환불을" and
"환불" share nothing as space-separated words. The price is overlap by chance, but it is the one English has: token F1
of two unrelated answers is 0.15 for Korean chat by syllables and 0.12 for English bank questions by words; by
space-separated words it is 0.01 for Korean (songys/Chatbot_data and banking77, 2,000 random pairs each).

`exact_match`, `token_f1`, `rouge_l` and `field_matches` give one value per row, and the metric is the mean of the
rows, so that `compare.paired` tests the very difference that is reported. BLEU and chrF are defined on a corpus, not
as a mean over rows, and therefore give one number and no rows.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING

import regex

from whet.base.errors import UserError, nearest

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

# `&&\p{L}` leaves the digits of these scripts together, as those of every other script are.
_UNSPACED_CHARACTER = regex.compile(
    r"(?V1)[[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]&&\p{L}]\p{M}*"
)
_WORD_BOUNDARY = regex.compile(r"(?V1w)\b")
_PUNCTUATION = regex.compile(r"[\p{P}\p{Cf}\p{Cc}]+")
# A colon needs a space after it, so that "https://" and "12:30" are not keys; a full-width one (：) brings its own.
_FIELD = regex.compile(r"(?P<key>\p{L}[^:：]{0,39}?) ?(?:: |： ?)(?P<value>.+)")


@dataclass(frozen=True)
class Scores:
    """What `score` found.

    metrics: name -> value in 0..1. rows: name -> one value in 0..1 per row, for the metrics that are the mean of their
    rows. skipped: metrics left out because their package is not installed.
    """

    metrics: dict[str, float]
    rows: dict[str, list[float]]
    skipped: list[str]


def normalise(text: str) -> str:
    """`text` in Unicode NFC, each line stripped and its runs of whitespace made one space, outer blank lines removed.

    Nothing else: case, punctuation, inner line breaks and compatibility forms (full-width letters) still count.
    Indentation does not, so that wrongly indented code can still be an exact match.
    """
    lines = unicodedata.normalize("NFC", text).splitlines()
    return "\n".join(" ".join(line.split()) for line in lines).strip()


def tokens(text: str) -> list[str]:
    """The case-folded words of `text`, and its characters where the script has no spaces (see the module's text).

    Punctuation is dropped, as SQuAD does, unless there is nothing else; symbols and emoji are tokens. Only a text that
    is empty once normalised has no tokens.
    """
    pieces = _WORD_BOUNDARY.split(_spread(normalise(text).casefold()))
    visible = [piece for piece in pieces if piece.strip()]
    return [piece for piece in visible if not _PUNCTUATION.fullmatch(piece)] or visible


def _spread(text: str) -> str:
    """`text` with a space on either side of each character of a script that is read by the character."""
    return _UNSPACED_CHARACTER.sub(r" \g<0> ", text)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Per row 1.0 when prediction and reference are the same text after `normalise`, else 0.0."""
    return [float(normalise(p) == normalise(r)) for p, r in zip(predictions, references, strict=True)]


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Per row the F1 of the two bags of `tokens`, 0..1; 1 when both texts are empty, 0 when one is.

    After SQuAD (Rajpurkar et al., arXiv:1606.05250), but articles are kept: they exist in few languages, and removing
    "a" spoils the answer "Vitamin A".
    """
    return [_bag_f1(tokens(p), tokens(r)) for p, r in zip(predictions, references, strict=True)]


def _bag_f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted and not expected:
        return 1.0
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Per row the ROUGE-L F-measure (Lin 2004, aclanthology.org/W04-1013) over `tokens`, 0..1, without stemming.

    1 when both texts are empty, where rouge-score says 0. Needs rouge-score.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=tokens))
    return [
        scorer.score(r, p)["rougeL"].fmeasure if normalise(p) or normalise(r) else 1.0
        for p, r in zip(predictions, references, strict=True)
    ]


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0..1 (sacrebleu divided by 100; Papineni et al. 2002; Post 2018, arXiv:1804.08771). Case counts.

    sacrebleu's `intl` tokenizer, after the characters of scripts read by the character have been spread apart. Without
    such characters this is sacrebleu's `tok:intl` to the last digit, with Hangul or Han alone its `tok:char`. `intl`
    on its own sees one token in a Chinese sentence; the morpheme and sentence-piece tokenizers need a dictionary or a
    download. The n-gram order falls to the longest there is (`eff:yes`): otherwise a set of answers of under four
    tokens scores 0 against itself. 1 when every text is empty. Needs sacrebleu.
    """
    from sacrebleu.metrics.bleu import BLEU

    # `force` silences a warning about text that looks tokenized, which spread text does.
    return _corpus_score(BLEU(tokenize="intl", effective_order=True, force=True), predictions, references, _spread)


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2, 0..1 (sacrebleu divided by 100): F-score of character 1- to 6-grams, spaces left out.

    Popović 2015, aclanthology.org/W15-3049. It needs no tokenizer, hence the same in every script; case counts. 1 when
    every text is empty. Needs sacrebleu.
    """
    from sacrebleu.metrics.chrf import CHRF

    return _corpus_score(CHRF(), predictions, references, str)


def _corpus_score(
    metric: Metric, predictions: Sequence[str], references: Sequence[str], prepare: Callable[[str], str]
) -> float:
    hypotheses = [prepare(normalise(text)) for text in predictions]
    targets = [prepare(normalise(text)) for text in references]
    if not any(hypotheses) and not any(targets):
        return 1.0
    # Rounding takes sacrebleu's 100 % to 100.00000000000004.
    return min(metric.corpus_score(hypotheses, [targets]).score / 100, 1.0)


def fields(text: str) -> dict[str, str]:
    """The `Key: value` lines of an answer, in order; other lines are passed over, a value is one non-empty line.

    Keys are case-folded with `_` for a space, so that they can name a metric. A key that comes again with another
    value keeps both, one per line: an answer that contradicts itself must not be right by its first half.
    """
    found: dict[str, str] = {}
    for line in normalise(text).split("\n"):
        if match := _FIELD.fullmatch(line):
            key, value = match["key"].casefold().replace(" ", "_"), match["value"]
            found[key] = value if found.get(key, value) == value else f"{found[key]}\n{value}"
    return found


def field_matches(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Per key of structured references, per row, 1.0 when the prediction's value is the reference's, else 0.0.

    References are structured when all of them have the same keys (see `fields`); otherwise the result is empty.
    Only they decide, so that a base and a tuned model are always measured on the same fields.
    """
    expected = [fields(text) for text in references]
    predicted = [fields(text) for text in predictions]
    if not expected or any(row.keys() != expected[0].keys() for row in expected):
        return {}
    return {key: [float(p.get(key) == r[key]) for p, r in zip(predicted, expected, strict=True)] for key in expected[0]}


_BY_ROW: dict[str, Callable[[Sequence[str], Sequence[str]], list[float]]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}
_BY_CORPUS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {"bleu": bleu, "chrf": chrf}
_PACKAGES = {"rouge_l": "rouge_score", "bleu": "sacrebleu", "chrf": "sacrebleu"}


def available() -> list[str]:
    """The metrics whose packages are installed; field accuracies depend on the references and are not among them."""
    return [name for name in (*_BY_ROW, *_BY_CORPUS) if name not in _PACKAGES or find_spec(_PACKAGES[name])]


def score(predictions: Sequence[str], references: Sequence[str], names: Sequence[str] | None = None) -> Scores:
    """Every metric in `names`, or with None all that can run, over prediction and reference rows in the same order.

    Names: exact_match, token_f1, rouge_l, bleu, chrf and `<key>_accuracy` (`category_accuracy`) for each field of
    structured references. UserError: a name that is unknown or whose package is absent. ValueError: no rows, or lists
    of different lengths.
    """
    if not references or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    by_field = {f"{key}_accuracy": rows for key, rows in field_matches(predictions, references).items()}
    known, runnable = [*_BY_ROW, *_BY_CORPUS, *by_field], [*available(), *by_field]
    for name in names or ():
        _require(name, known, runnable)

    metrics: dict[str, float] = {}
    rows: dict[str, list[float]] = {}
    for name in runnable if names is None else names:
        if name in _BY_CORPUS:
            metrics[name] = _BY_CORPUS[name](predictions, references)
            continue
        rows[name] = by_field[name] if name in by_field else _BY_ROW[name](predictions, references)
        # fsum is exact, so the order of the rows does not move the last digit.
        metrics[name] = math.fsum(rows[name]) / len(rows[name])
    return Scores(metrics, rows, skipped=[name for name in known if name not in runnable] if names is None else [])


def _require(name: str, known: list[str], runnable: list[str]) -> None:
    if name not in known:
        near = nearest(name, known)
        raise UserError(
            "unknown metric",
            fix=f"write {near}" if near else "take one of these, or leave the choice to whet",
            found=name,
            expected=", ".join(known) + "; <key>_accuracy for a `Key: value` line that every reference has",
        )
    if name not in runnable:
        package = _PACKAGES[name].replace("_", "-")
        raise UserError(f"the metric {name} needs {package}, which is not installed", fix='pip install "whet[eval]"')
