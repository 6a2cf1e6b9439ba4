"""Metrics and paired statistics. Every check that matters is also run on a planted fault, which it must catch."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
import tracemalloc
import unicodedata
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from whet.base.errors import UserError
from whet.evaluation import compare, metrics

Metric = Callable[[list[str], list[str]], "list[float] | float"]

SCRIPTS = {
    "english": "The quick brown fox can't jump 3.14 metres.",
    "one letter": "a",
    "one word": "Yes",
    "number": "1,234.50",
    "german": "Größe und Straße",
    "turkish": "İstanbul'da ışık",
    "vietnamese": "Tôi đang học tiếng Việt",
    "russian": "Привет, как дела?",
    "greek": "Καλημέρα κόσμε, σας",
    "armenian": "Բարեւ աշխարհ",
    "georgian": "გამარჯობა მსოფლიო",
    "hebrew": "שלום עולם",
    "arabic": "مرحبا بالعالم، كيف الحال؟",
    "persian": "می‌خواهم بروم",
    "urdu": "آپ کیسے ہیں؟",
    "syriac": "ܫܠܡܐ ܥܠܡܐ",
    "dhivehi": "ދިވެހިރާއްޖެ",
    "hindi": "नमस्ते दुनिया, आप कैसे हैं?",
    "bengali": "আমি বাংলায় কথা বলি",
    "gujarati": "કેમ છો દુનિયા",
    "punjabi": "ਸਤ ਸ੍ਰੀ ਅਕਾਲ",
    "tamil": "வணக்கம் உலகம்",
    "telugu": "నమస్కారం ప్రపంచం",
    "kannada": "ನಮಸ್ಕಾರ ಜಗತ್ತು",
    "malayalam": "നമസ്കാരം ലോകം",
    "sinhala": "ආයුබෝවන් ලෝකය",
    "tibetan": "བཀྲ་ཤིས་བདེ་ལེགས།",
    "thai": "สวัสดีครับ วันนี้อากาศดี ๑๒ องศา",
    "lao": "ສະບາຍດີຊາວໂລກ",
    "khmer": "សួស្តី​ពិភពលោក",
    "burmese": "မင်္ဂလာပါ ကမ္ဘာ ၁၂",
    "korean": "안녕하세요, 3개 GPU에서 학습합니다.",
    "korean word": "네",
    "korean jamo": "ㅋㅋㅋ ㅠㅠ",
    "korean decomposed": unicodedata.normalize("NFD", "한국어 문장"),
    "old korean": "나랏말ᄊᆞ미 듕귁에 달아",
    "chinese": "我是一个学生。你呢？",
    "traditional chinese": "臺灣的繁體中文",
    "rare han": "𠮷野家 𪚥",
    "japanese": "今日はコーヒーを飲みます。",
    "half-width kana": "ﾃｽﾄ",
    "yi": "ꆈꌠꉙ",
    "mongolian": "ᠮᠣᠩᠭᠣᠯ ᠬᠡᠯᠡ",
    "amharic": "ሰላም ዓለም፡ እንዴት",
    "cherokee": "ᎣᏏᏲ ᎡᎶᎯ",
    "inuktitut": "ᐊᐃᓐᖓᐃ",
    "braille": "⠓⠑⠇⠇⠕",
    "deseret": "𐐐𐐯𐑊𐐬",
    "emoji": "👩‍💻👍🏽❤️🇰🇷",
    "one emoji": "🎉",
    "punctuation": "?!... —",
    "cjk punctuation": "。、！",
    "mathematics": "∑ x² ≤ √2 → ∞",
    "code": "def f(x): return x[0] != '\\n'",
    "url": "https://example.com/a?b=1&c=2",
    "lines": "Category: billing\nPriority: high\n\nAction: refund",
    "invisible": "\u200b\u200d",
    "private use": "\ue000",
    "lone surrogate": "\ud800",
    "spaces": " \t\u3000\n ",
    "empty": "",
}
TEXTS = list(SCRIPTS.values())
METRICS: dict[str, Metric] = {
    "exact_match": metrics.exact_match,
    "token_f1": metrics.token_f1,
    "rouge_l": metrics.rouge_l,
    "bleu": metrics.bleu,
    "chrf": metrics.chrf,
}


def value(metric: Metric, predictions: list[str], references: list[str]) -> float:
    result = metric(predictions, references)
    return sum(result) / len(result) if isinstance(result, list) else result


def default_rouge_l(predictions: list[str], references: list[str]) -> list[float]:
    scorer = RougeScorer(["rougeL"])
    return [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]


def default_bleu(predictions: list[str], references: list[str]) -> float:
    return BLEU().corpus_score(predictions, [references]).score / 100


# --- identity: metric(x, x) = 1, and only then -----------------------------------------------------------------------


def assert_identity(metric: Metric, texts: list[str]) -> None:
    for text in texts:
        assert value(metric, [text], [text]) == 1.0, repr(text)
    assert value(metric, texts, texts) == 1.0


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_a_text_scores_one_against_itself_in_every_script(metric: Metric) -> None:
    assert len(TEXTS) >= 40
    assert_identity(metric, TEXTS)


@pytest.mark.parametrize("broken", [default_rouge_l, default_bleu])
def test_the_identity_check_catches_the_libraries_defaults(broken: Metric) -> None:
    with pytest.raises(AssertionError):
        assert_identity(broken, TEXTS)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_no_text_scores_one_against_another(metric: Metric) -> None:
    visible = [text for text in TEXTS if text.strip()]
    for prediction, reference in itertools.permutations(visible, 2):
        assert value(metric, [prediction], [reference]) < 1.0, (prediction, reference)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_empty_against_text_is_zero(metric: Metric) -> None:
    for text in ("Yes.", "네", "?!", "🎉"):
        assert value(metric, [""], [text]) == 0.0
        assert value(metric, [text], [""]) == 0.0


@pytest.mark.parametrize("text", ["동일한 한국어 문장입니다.", "ประโยคเดียวกัน", "वही वाक्य", "同一句话"])
def test_the_default_rouge_tokenizer_gives_zero_where_ours_gives_one(text: str) -> None:
    assert default_rouge_l([text], [text]) == [0.0]
    assert metrics.rouge_l([text], [text]) == [1.0]


# --- tokens and normalisation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Can't stop: 3.14, 1,000!", ["can't", "stop", "3.14", "1,000"]),
        ("GPU에서 3개", ["gpu", "에", "서", "3", "개"]),
        ("我有12个", ["我", "有", "12", "个"]),
        ("コーヒー", ["コ", "ー", "ヒ", "ー"]),
        ("ที่นี่ ๑๒", ["ที่", "นี่", "๑๒"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("می‌خواهم", ["می‌خواهم"]),
        ("👩‍💻👍🏽 ok", ["👩‍💻", "👍🏽", "ok"]),
        ("$5 + 3", ["$", "5", "+", "3"]),
        ("x\u200b", ["x"]),
        (unicodedata.normalize("NFD", "한글"), ["한", "글"]),
        ("?!", ["?", "!"]),
        (" \n", []),
    ],
)
def test_tokens(text: str, expected: list[str]) -> None:
    assert metrics.tokens(text) == expected


def test_only_whitespace_and_composition_are_normalised() -> None:
    assert metrics.normalise("\n a\u00a0\u3000 b \r\n c\t\n\n") == "a b\nc"
    assert metrics.exact_match([unicodedata.normalize("NFD", "한글 é")], ["한글  é "]) == [1.0]
    different = [("Yes", "yes"), ("Yes.", "Yes"), ("a b", "a\nb"), ("a\n\nb", "a\nb"), ("Ａ", "A"), ("한 글", "한글")]
    for prediction, reference in different:
        assert metrics.exact_match([prediction], [reference]) == [0.0]


def test_normalising_twice_changes_nothing() -> None:
    for text in TEXTS:
        once = metrics.normalise(text)
        assert metrics.normalise(once) == once
        assert bool(metrics.tokens(text)) == bool(once)


# --- known values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "The cat", 2 * 2 / 5),
        ("a cat", "the cat", 1 / 2),  # articles count
        ("no no no", "no", 2 * 1 / 4),  # a word repeated matches once
        ("Yes.", "No.", 0.0),  # a full stop is no agreement
        ("환불 요청", "환불을 요청", 2 * 4 / 9),  # a particle costs one syllable, not the word
    ],
)
def test_token_f1_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert metrics.token_f1([prediction], [reference]) == [pytest.approx(expected)]


def test_rouge_l_is_the_papers_example() -> None:
    """Lin 2004, section 3.1: with the same bigrams, ROUGE-L tells the two sentences apart."""
    predictions = ["police kill the gunman", "the gunman kill police"]
    assert metrics.rouge_l(predictions, ["police killed the gunman"] * 2) == [
        pytest.approx(3 / 4),
        pytest.approx(1 / 2),
    ]


def test_rouge_l_in_english_is_the_librarys() -> None:
    predictions, references = ["The quick brown fox jumps", "A dog, lazily"], ["the brown dog jumps", "A lazy dog."]
    assert metrics.rouge_l(predictions, references) == default_rouge_l(predictions, references)


def test_bleu_by_hand() -> None:
    """1- to 4-gram precisions 5/6, 3/5, 2/4, 1/3 ("the" counts once), no brevity penalty; then one of exp(1 - 6/4)."""
    reference = "the cat sat on a mat"
    assert metrics.bleu(["the cat sat on the mat"], [reference]) == pytest.approx((1 / 12) ** (1 / 4))
    assert metrics.bleu(["the cat sat on"], [reference]) == pytest.approx(math.exp(1 - 6 / 4))


@pytest.mark.parametrize(
    ("tokenize", "predictions", "references"),
    [
        ("intl", ["It costs 3,50 € (not $4).", "Да, это так."], ["It costs 3,50 €, not $5.", "Да, это правда."]),
        ("char", ["오늘 날씨가 좋습니다"], ["오늘은 날씨가 참 좋네요"]),
        ("char", ["今天天气很好我们走吧"], ["今天的天气很好走吧"]),
    ],
)
def test_bleu_is_sacrebleus_own_where_the_docstring_says_so(
    tokenize: str, predictions: list[str], references: list[str]
) -> None:
    theirs = BLEU(tokenize=tokenize, effective_order=True).corpus_score(predictions, [references]).score / 100
    assert 0 < theirs < 1
    assert metrics.bleu(predictions, references) == theirs


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("今天天气很好我们走吧", "今天天气很好他们走吧"), ("วันนี้อากาศดีมากครับ", "วันนี้อากาศดีมากค่ะ")],
    ids=["chinese", "thai"],
)
def test_bleu_gives_credit_inside_a_sentence_without_spaces(prediction: str, reference: str) -> None:
    assert BLEU(tokenize="intl", effective_order=True).corpus_score([prediction], [[reference]]).score == 0.0
    assert metrics.bleu([prediction], [reference]) > 0.5


def test_bleu_does_not_warn_about_spread_text(caplog: pytest.LogCaptureFixture) -> None:
    metrics.bleu(["좋습니다 ."] * 100, ["좋습니다."] * 100)
    assert not caplog.records
    default_bleu(["좋습니다 ."] * 100, ["좋습니다."] * 100)
    assert caplog.records


@pytest.mark.parametrize(
    ("metric", "expected"), [("exact_match", 0.0), ("bleu", 0.0), ("chrf", 0.0), ("token_f1", 1.0)]
)
def test_case_counts_but_for_token_overlap(metric: str, expected: float) -> None:
    assert value(METRICS[metric], ["YES"], ["yes"]) == expected


def test_chrf_by_hand() -> None:
    """ "ab" for "ac": one of two characters and no pair agree, so precision = recall = F = (1/2 + 0) / 2."""
    assert metrics.chrf(["ab"], ["ac"]) == pytest.approx(1 / 4)
    assert metrics.chrf(["가나"], ["가다"]) == pytest.approx(1 / 4)


# --- fields ----------------------------------------------------------------------------------------------------------

TICKETS = [
    "Category: billing\nPriority: high\nAction: refund",
    "Category: login\nPriority: low\nAction: reset password",
]


def test_fields_are_parsed_in_order() -> None:
    parsed = metrics.fields(
        "Hello,\nDue date :  next  Friday\n분류：결제\nURL: https://a.b/c\nhttps://x.y\n12:30 lunch\nEmpty:"
    )
    assert list(parsed.items()) == [("due_date", "next Friday"), ("분류", "결제"), ("url", "https://a.b/c")]


def test_field_matches_count_per_row() -> None:
    predictions = ["category: billing\nPriority: High", "Priority: low\nCategory: login\nAction: reset password"]
    assert metrics.field_matches(predictions, TICKETS) == {
        "category": [1.0, 1.0],
        "priority": [0.0, 1.0],  # the case of a value counts
        "action": [0.0, 1.0],  # a field left out is wrong
    }


@pytest.mark.parametrize("references", [["Category: a", "plain"], ["Category: a", "Kind: a"], ["plain", "text"], []])
def test_references_without_the_same_keys_are_not_structured(references: list[str]) -> None:
    assert metrics.field_matches(references, references) == {}


def test_an_answer_that_contradicts_itself_is_wrong() -> None:
    for prediction, right in [("A: x\nA: y", 0.0), ("A: y\nA: x", 0.0), ("A: x\nA: x", 1.0)]:
        assert metrics.field_matches([prediction], ["A: x"]) == {"a": [right]}


# --- score -----------------------------------------------------------------------------------------------------------


def test_score_has_stable_names_and_rows_whose_mean_is_the_metric() -> None:
    scores = metrics.score([TICKETS[0], "Category: login"], TICKETS)
    by_row = ["exact_match", "token_f1", "rouge_l", "category_accuracy", "priority_accuracy", "action_accuracy"]
    assert list(scores.rows) == by_row
    assert set(scores.metrics) == {*by_row, "bleu", "chrf"}
    assert scores.skipped == []
    assert scores.metrics["category_accuracy"] == 1.0
    assert scores.metrics["action_accuracy"] == 0.5
    for name, rows in scores.rows.items():
        assert scores.metrics[name] == pytest.approx(sum(rows) / 2)
    assert all(0 <= number <= 1 for number in scores.metrics.values())


def test_only_the_metrics_asked_for_are_computed() -> None:
    scores = metrics.score(TICKETS, TICKETS, names=["chrf", "priority_accuracy"])
    assert scores == metrics.Scores({"chrf": 1.0, "priority_accuracy": 1.0}, {"priority_accuracy": [1.0, 1.0]}, [])


def test_an_unknown_metric_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="rouge_l") as caught:
        metrics.score(["a"], ["a"], names=["rougel"])
    assert caught.value.fix == "write rouge_l"
    with pytest.raises(UserError, match="unknown metric"):
        metrics.score(["a"], ["a"], names=["priority_accuracy"])


@pytest.mark.parametrize(
    ("package", "gone"), [("sacrebleu", ["bleu", "chrf"]), ("rouge_score", ["rouge_l"])], ids=["sacrebleu", "rouge"]
)
def test_a_missing_package_is_skipped_or_refused(
    monkeypatch: pytest.MonkeyPatch, package: str, gone: list[str]
) -> None:
    assert metrics.available() == list(METRICS)
    monkeypatch.setitem(sys.modules, package, None)
    assert metrics.available() == [name for name in METRICS if name not in gone]
    scores = metrics.score(["a"], ["a"])
    assert scores.skipped == gone
    assert list(scores.metrics) == metrics.available()
    with pytest.raises(UserError, match=package.replace("_", "-")) as caught:
        metrics.score(["a"], ["a"], names=["exact_match", gone[0]])
    assert caught.value.fix == 'pip install "whet[eval]"'


def test_rows_that_do_not_pair_are_refused() -> None:
    for predictions, references in [(["a"], ["a", "b"]), (["a", "b"], ["a"]), ([], [])]:
        with pytest.raises(ValueError, match="predictions for"):
            metrics.score(predictions, references)


def assert_order_is_free(metric: Metric) -> None:
    shuffled = random.Random(0)
    references = TEXTS[:40]
    predictions = references[::2] + references[1::2]
    before = metric(predictions, references)
    order = shuffled.sample(range(40), 40)
    after = metric([predictions[i] for i in order], [references[i] for i in order])
    assert after == ([before[i] for i in order] if isinstance(before, list) else before)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_the_order_of_the_rows_does_not_matter(metric: Metric) -> None:
    assert_order_is_free(metric)


def test_the_order_of_the_rows_does_not_move_the_last_digit_of_a_mean() -> None:
    rows = [(" ".join("abcdefghij"[:n]), "a b c") for n in range(1, 11)] * 3
    means = set()
    for seed in range(20):
        predictions, references = zip(*random.Random(seed).sample(rows, len(rows)), strict=True)
        means.add(metrics.score(predictions, references, names=["token_f1"]).metrics["token_f1"])
    assert len(means) == 1


def test_the_order_check_catches_a_metric_that_carries_state_from_row_to_row() -> None:
    def leaky(predictions: list[str], references: list[str]) -> list[float]:
        seen: Counter[str] = Counter()
        rows = []
        for prediction, reference in zip(predictions, references, strict=True):
            seen.update(prediction)
            rows.append(float((seen & Counter(reference)).total()))
        return rows

    with pytest.raises(AssertionError):
        assert_order_is_free(leaky)


def test_importing_brings_in_neither_torch_nor_the_optional_packages() -> None:
    code = (
        "import sys, whet.evaluation.metrics, whet.evaluation.compare;"
        "assert not {'torch', 'rouge_score', 'sacrebleu'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- paired statistics -----------------------------------------------------------------------------------------------


def coverage(interval: Callable[[np.ndarray, np.ndarray, int], tuple[float, float]], trials: int = 300) -> float:
    """How often an interval for tuned - base holds the true difference, 0.1, when both share the rows' difficulty."""
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(trials):
        difficulty = rng.normal(size=60)
        base, tuned = difficulty + 0.2 * rng.exponential(size=60), difficulty + 0.3 * rng.exponential(size=60)
        low, high = interval(base, tuned, trial)
        hits += low <= 0.1 <= high
    return hits / trials


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    def at(confidence: float) -> float:
        return coverage(
            lambda base, tuned, seed: compare.bootstrap_interval(
                tuned - base, resamples=1000, confidence=confidence, seed=seed
            )
        )

    assert 0.91 <= at(0.95) <= 0.98
    assert 0.74 <= at(0.80) <= 0.86


def test_the_coverage_check_catches_an_interval_of_unpaired_rows() -> None:
    def unpaired(base: np.ndarray, tuned: np.ndarray, seed: int) -> tuple[float, float]:
        rng = np.random.default_rng(seed)
        means = [rng.choice(tuned, 60).mean() - rng.choice(base, 60).mean() for _ in range(200)]
        return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))

    assert coverage(unpaired, trials=100) == 1.0  # far too wide: pairing is where the power is


def test_the_interval_of_two_rows_by_hand() -> None:
    """Means 0, 1/2 and 1 come with probability 1/4, 1/2 and 1/4, so that the middle 40 % is 1/2 alone."""
    differences = np.array([0.0, 1.0])
    assert compare.bootstrap_interval(differences) == (0.0, 1.0)
    assert compare.bootstrap_interval(differences, confidence=0.4) == (0.5, 0.5)


def test_memory_is_bounded() -> None:
    differences = np.random.default_rng(0).normal(size=20_000)
    tracemalloc.start()
    compare.bootstrap_interval(differences, resamples=1000)
    compare.sign_flip_p(differences, flips=1000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 64e6 < differences.size * 1000 * 8  # all resamples at once would take 160 MB


def exact_sign_flip_p(differences: list[float]) -> float:
    """By definition, over all 2^n swaps."""
    swaps = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(sum(sign * d for sign, d in zip(signs, differences, strict=True))) for signs in swaps]
    return sum(total >= abs(sum(differences)) - 1e-9 for total in sums) / len(sums)


@pytest.mark.parametrize(("only_base", "only_tuned"), [(0, 0), (0, 1), (1, 9), (9, 1), (5, 5), (4, 7), (0, 10)])
def test_mcnemar_is_the_sign_flip_test_in_closed_form(only_base: int, only_tuned: int) -> None:
    differences = [-1.0] * only_base + [1.0] * only_tuned
    assert compare.mcnemar_p(only_base, only_tuned) == pytest.approx(exact_sign_flip_p(differences))


def test_mcnemar_by_hand_and_far_out() -> None:
    assert compare.mcnemar_p(1, 9) == 2 * (1 + 10) / 1024
    assert compare.mcnemar_p(0, 5000) == 0.0  # 2^-4999 is below the smallest float
    assert compare.mcnemar_p(9_900, 10_100) == pytest.approx(
        0.1593, abs=2e-4
    )  # normal, continuity: z = 199 / sqrt(20000)


def test_sign_flip_is_near_the_exact_answer() -> None:
    differences = [0.4, 0.1, -0.2, 0.3, 0.25, -0.05, 0.6, 0.15]
    exact = exact_sign_flip_p(differences)
    assert compare.sign_flip_p(np.array(differences)) == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))
    assert compare.sign_flip_p(np.full(40, 0.1)) == pytest.approx(1 / 10_001)  # never zero
    assert compare.sign_flip_p(np.zeros(5)) == 1.0


def test_sign_flip_counts_ties_in_spite_of_rounding() -> None:
    steps = np.array([1.0] * 10 + [-1.0] * 5 + [3.0])
    assert compare.sign_flip_p(steps / 10) == compare.sign_flip_p(steps)


def test_alike_models_differ_significantly_one_time_in_twenty() -> None:
    rng = np.random.default_rng(3)
    p_values = [compare.sign_flip_p(rng.standard_cauchy(size=30), flips=500, seed=i) for i in range(600)]
    assert 0.03 <= np.mean(np.array(p_values) <= 0.05) <= 0.07


def test_paired_chooses_the_test_and_gives_the_sign() -> None:
    base, tuned = [0.0] * 9 + [1.0] * 11, [1.0] * 19 + [0.0]
    better = compare.paired(base, tuned)
    assert better.mean_difference == pytest.approx(8 / 20)
    assert 0 < better.low < 8 / 20 < better.high
    assert (better.p_value, better.test) == (2 * (1 + 10) / 1024, "mcnemar")

    worse = compare.paired(tuned, base)
    assert worse.mean_difference == -better.mean_difference
    assert worse.p_value == better.p_value

    graded = compare.paired([0.5, 0.2, 0.9], [0.6, 0.4, 0.9])
    assert graded.test == "sign_flip"
    assert graded.p_value == pytest.approx(0.5, abs=0.03)  # of eight swaps, with one row at 0, four are as large


def test_paired_does_not_depend_on_the_order_of_rows_and_repeats_exactly() -> None:
    rng = np.random.default_rng(5)
    base, tuned = rng.random(50), rng.random(50)
    first = compare.paired(base.tolist(), tuned.tolist())
    assert compare.paired(base.tolist(), tuned.tolist()) == first
    for _ in range(10):
        order = rng.permutation(50)
        assert compare.paired(base[order].tolist(), tuned[order].tolist()) == first
        assert compare.paired(base.tolist(), tuned[order].tolist()) != first  # pairs broken


@pytest.mark.parametrize(("base", "tuned"), [([], []), ([1.0], [1.0, 0.0]), ([math.nan], [1.0]), ([0.0], [math.inf])])
def test_rows_that_cannot_be_paired_are_refused(base: list[float], tuned: list[float]) -> None:
    with pytest.raises(ValueError, match="row"):
        compare.paired(base, tuned)
