"""Careless edits of evaluation/: paired statistics, metrics of texts and labels, and what base and tuned are asked."""

from mutants.mutant import Mutant

TEXTS = "test_metrics.py"
LABELS = "test_label_metrics.py"
AGAINST = "test_base_against_tuned.py"

MUTANTS = [
    Mutant(
        "compare: base minus tuned", "evaluation/compare.py",
        "differences = tuned - base", "differences = base - tuned",
        "every difference has the wrong sign", AGAINST,
    ),
    Mutant(
        "compare: half the confidence", "evaluation/compare.py",
        "tail = (1 - confidence) / 2", "tail = 1 - confidence",
        "intervals are too narrow", TEXTS,
    ),
    Mutant(
        "compare: the larger count", "evaluation/compare.py",
        "discordant, fewer = only_base + only_tuned, min(only_base, only_tuned)",
        "discordant, fewer = only_base + only_tuned, max(only_base, only_tuned)",
        "no difference is ever significant", TEXTS,
    ),
    Mutant(
        "compare: one-sided", "evaluation/compare.py",
        "return min(1.0, 2 * tail / 2**discordant)", "return min(1.0, tail / 2**discordant)",
        "p-values are half of what they are", TEXTS,
    ),
    Mutant(
        "compare: ties do not count", "evaluation/compare.py",
        "- 2 * (swapped @ ordered)) >= observed).sum())", "- 2 * (swapped @ ordered)) > observed).sum())",
        "p-values are too small where values are few", TEXTS,
    ),
    Mutant(
        "compare: equal sums that round apart", "evaluation/compare.py",
        "observed = abs(ordered.sum()) - 1e-9 * np.abs(ordered).sum()", "observed = abs(ordered.sum())",
        "p-values hang on the last bits", TEXTS,
    ),
    Mutant(
        "compare: the observed signs left out", "evaluation/compare.py",
        "return (as_large + 1) / (flips + 1)", "return as_large / flips",
        "a p-value may be 0", TEXTS,
    ),
    Mutant(
        "compare: means over the other axis", "evaluation/compare.py",
        "rounds, ordered.size))].mean(axis=1)", "rounds, ordered.size))].mean(axis=0)",
        "intervals are as wide as a single row says", TEXTS,
    ),
    Mutant(
        "compare: sign of a sum kept", "evaluation/compare.py",
        "int((np.abs(ordered.sum() - 2 * (swapped @ ordered)) >= observed).sum())",
        "int((ordered.sum() - 2 * (swapped @ ordered) >= observed).sum())",
        "one-sided p-values, and wrong ones for losses", TEXTS,
    ),
    Mutant(
        "compare: the mean of n - 1", "evaluation/compare.py",
        "return Paired(math.fsum(differences) / differences.size,",
        "return Paired(math.fsum(differences) / max(1, differences.size - 1),",
        "the difference is not that of the metrics", AGAINST,
    ),
    Mutant(
        "compare: the base alone decides on the test", "evaluation/compare.py",
        "np.isin(np.concatenate([base, tuned]), (0.0, 1.0)).all()", "np.isin(base, (0.0, 1.0)).all()",
        "graded values are counted as right or wrong", AGAINST,
    ),
    Mutant(
        "compare: the last block is a whole one", "evaluation/compare.py",
        "yield min(size, rounds - start)", "yield size",
        "more swaps are drawn than p-values are divided by", TEXTS,
    ),
    Mutant(
        "compare: rows in the order given", "evaluation/compare.py",
        "    ordered = np.sort(differences)\n    means", "    ordered = differences\n    means",
        "the interval depends on the order of the rows", TEXTS,
    ),
    Mutant(
        "metrics: composed and decomposed text differ", "evaluation/metrics.py",
        'lines = unicodedata.normalize("NFC", text).splitlines()', "lines = text.splitlines()",
        "the same Korean word typed on a Mac is wrong", TEXTS,
    ),
    Mutant(
        "metrics: case counts in tokens", "evaluation/metrics.py",
        "_spread(normalise(text).casefold())", "_spread(normalise(text))",
        "token F1 punishes capitals", TEXTS,
    ),
    Mutant(
        "metrics: recall for F1", "evaluation/metrics.py",
        "return 2 * shared / (len(predicted) + len(expected))", "return shared / max(1, len(expected))",
        "an answer that says everything scores 1", TEXTS,
    ),
    Mutant(
        "metrics: two empty texts are apart", "evaluation/metrics.py",
        "    if not predicted and not expected:\n        return 1.0\n    shared",
        "    if not predicted and not expected:\n        return 0.0\n    shared",
        "a right empty answer scores 0", TEXTS,
    ),
    Mutant(
        "metrics: a reference inside an answer is a match", "evaluation/metrics.py",
        "float(normalise(p) == normalise(r)) for p, r", "float(normalise(r) in normalise(p)) for p, r",
        "exact match is given to answers with anything around them", TEXTS,
    ),
    Mutant(
        "metrics: rouge recall", "evaluation/metrics.py",
        '["rougeL"].fmeasure if', '["rougeL"].recall if',
        "long answers score too high", TEXTS,
    ),
    Mutant(
        "metrics: BLEU of short answers", "evaluation/metrics.py",
        'BLEU(tokenize="intl", effective_order=True, force=True)',
        'BLEU(tokenize="intl", effective_order=False, force=True)',
        "short answers score 0 against themselves", TEXTS,
    ),
    Mutant(
        "metrics: answers for references", "evaluation/metrics.py",
        "metric.corpus_score(hypotheses, [targets])", "metric.corpus_score(targets, [hypotheses])",
        "BLEU and chrF are those of the references against the answers", TEXTS,
    ),
    Mutant(
        "metrics: Thai as one word", "evaluation/metrics.py",
        r"\p{Hangul}\p{Thai}\p{Lao}", r"\p{Hangul}\p{Lao}",
        "a Thai sentence is one token", TEXTS,
    ),
    Mutant(
        "metrics: punctuation alone is nothing", "evaluation/metrics.py",
        "if not _PUNCTUATION.fullmatch(piece)] or visible", "if not _PUNCTUATION.fullmatch(piece)]",
        "'?' scores 0 against '?!', and 1 against nothing", TEXTS,
    ),
    Mutant(
        "metrics: the last value of a field wins", "evaluation/metrics.py",
        'found[key] = value if found.get(key, value) == value else f"{found[key]}\\n{value}"', "found[key] = value",
        "an answer that contradicts itself is right by its last half", TEXTS,
    ),
    Mutant(
        "metrics: any reference may have its own fields", "evaluation/metrics.py",
        "if not expected or any(row.keys() != expected[0].keys() for row in expected):",
        "if not expected or all(row.keys() != expected[0].keys() for row in expected):",
        "references without structure end in a crash or in a field of some rows", TEXTS,
    ),
    Mutant(
        "metrics: mean over references once more", "evaluation/metrics.py",
        "metrics[name] = math.fsum(rows[name]) / len(rows[name])",
        "metrics[name] = math.fsum(rows[name]) / len({*references})",
        "a metric over 1 where references repeat", "test_metrics.py test_base_against_tuned.py",
    ),
    Mutant(
        "labels: recall over what was said", "evaluation/label_metrics.py",
        "recalls = [hit / rows for hit, rows in zip(correct, present, strict=True) if rows]",
        "recalls = [hit / rows for hit, rows in zip(correct, answered, strict=True) if rows]",
        "balanced accuracy is balanced precision", LABELS,
    ),
    Mutant(
        "labels: macro F1 over what was said", "evaluation/label_metrics.py",
        "strict=True) if counts[2]]", "strict=True) if counts[1]]",
        "a class that is never said does not count against the model", LABELS,
    ),
    Mutant(
        "labels: confusion turned", "evaluation/label_metrics.py",
        "pairs = expected * len(names) + predicted", "pairs = predicted * len(names) + expected",
        "rows and columns of the confusion matrix are exchanged", LABELS,
    ),
    Mutant(
        "labels: precision and recall exchanged", "evaluation/label_metrics.py",
        '"precision": correct / answered if answered else None,\n            "recall": correct / present if present',
        '"precision": correct / present if present else None,\n            "recall": correct / answered if answered',
        "the table per class says the one for the other", LABELS,
    ),
    Mutant(
        "labels: rarest confusions first", "evaluation/label_metrics.py",
        "key=lambda item: (-item[1], item[0])", "key=lambda item: (item[1], item[0])",
        "the report shows confusions that hardly happen", LABELS,
    ),
    Mutant(
        "labels: ties take the last rank", "evaluation/label_metrics.py",
        "(np.cumsum(counts) - (counts - 1) / 2)[index]", "np.cumsum(counts)[index]",
        "Spearman is wrong where values repeat", LABELS,
    ),
    Mutant(
        "labels: spread of the predictions", "evaluation/label_metrics.py",
        "deviations, squares = _deviations(expected), np.square(errors)",
        "deviations, squares = _deviations(predicted), np.square(errors)",
        "r2 is divided by how much the predictions vary", LABELS,
    ),
    Mutant(
        "labels: half of the rows is a majority", "evaluation/label_metrics.py",
        'sum(axis=0) > len(given)).astype', 'sum(axis=0) >= len(given)).astype',
        "the baseline says a label that half of the rows have not", LABELS,
    ),
    Mutant(
        "labels: rightness per label", "evaluation/label_metrics.py",
        '"hamming_accuracy": right.mean(axis=1)', '"hamming_accuracy": right.mean(axis=0)',
        "rows are paired with labels", LABELS,
    ),
    Mutant(
        "labels: said or meant", "evaluation/label_metrics.py",
        "kinds = predicted & expected, predicted, expected", "kinds = predicted | expected, predicted, expected",
        "F1 counts what is only said or only meant", LABELS,
    ),
    Mutant(
        "labels: MCC without the predictions", "evaluation/label_metrics.py",
        "spread = (rows**2 - sum(a * a for a in answered))", "spread = (rows**2 - sum(p * p for p in present))",
        "MCC leaves -1..1 or is too small", LABELS,
    ),
    Mutant(
        "labels: no row has every label right", "evaluation/label_metrics.py",
        '"subset_accuracy": right.all(axis=1)', '"subset_accuracy": right.any(axis=1)',
        "a row counts as right with one right label", LABELS,
    ),
    Mutant(
        "losses: targets one place off", "engine/answer/losses.py",
        "wanted = ids[0, first:]", "wanted = ids[0, first:].roll(1)",
        "loss and perplexity are those of other tokens", "test_scored_rows.py -k plain_transformers",
    ),
    Mutant(
        "losses: context is a target too", "evaluation/likelihood.py",
        "weights = rows.learned[span].astype(np.float32)", "weights = np.ones(len(rows.ids[span]), np.float32)",
        "the loss counts the questions", "test_scored_rows.py -k plain_transformers",
    ),
    Mutant(
        "losses: base with the adapter on", "evaluation/likelihood.py",
        "with session.base():", "if True:",
        "training seems to change nothing", "test_scored_rows.py -k plain_transformers",
    ),
    Mutant(
        "turns: the last answer alone", "evaluation/turns.py",
        'and (loss_on != "last_assistant" or index == last)', "and index == last",
        "most answers of a dialogue are never scored", "test_scored_rows.py -k every_answer",
    ),
    Mutant(
        "turns: each answer a row of its own", "evaluation/turns.py",
        "share = len(sums) / len(values)", "share = 1.0",
        "intervals over conversations are of another number", "test_scored_rows.py -k conversations_are",
    ),
    Mutant(
        "rows: results of a test take the place of the held-out ones", "evaluation/rows.py",
        'prefix = "" if self.name == HELD_OUT else f"{self.name}."', 'prefix = ""',
        "predictions of the held-out rows are lost", "test_scored_rows.py -k results_of_its_own",
    ),
    Mutant(
        "rows: any label is one of the run's", "data/labels.py",
        "if name not in task.labels]", "if not name]",
        "a label that was never trained is scored or crashes", "test_scored_rows.py -k same_rows_held_out",
    ),
]  # fmt: skip
