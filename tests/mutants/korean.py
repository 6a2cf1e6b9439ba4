"""Careless edits of how Korean is looked up and shown."""

from mutants.mutant import Mutant

TEST = "test_korean.py"

MUTANTS = [
    Mutant(
        "korean: found values are translated as texts", "base/korean.py",
        "catalogue_of(FOUND).translated(shorten(values[\"found\"]))",
        "catalogue().translated(shorten(values[\"found\"]))",
        "a row with words of whet is shown as another one", f"{TEST} -k stays_as_it_is",
    ),
    Mutant(
        "korean: what has two readings is taken", "base/catalogue.py",
        "if one != other and _WORD.search(literal):", "if one != other and not literal:",
        "values are cut at words of their own", f"{TEST} -k two_ways",
    ),
    Mutant(
        "korean: every value is a text of whet", "base/catalogue.py",
        "self.words(values[part[0]], depth + 1) if part[1] else values[part[0]]",
        "self.words(values[part[0]], depth + 1)",
        "names and paths are translated", f"{TEST} -k most_specific",
    ),
]  # fmt: skip
