"""The language that people read: English as it stands in the code, or Korean from the catalogue in whet/builtin/korean.

Texts stay plain literals and f-strings where they are written, and are translated where they are shown: an error by
`error_text`, what goes through the console by its class, help by its formatter. A page names each of its texts by
`phrase`, which puts the values in afterwards, so that nothing from the data is ever looked up. What programs read
(`--json`, files, `str` of an error) stays English. English costs nothing: `whet.base.catalogue` is imported for Korean
alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from whet.base.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

LANGUAGES = ("en", "ko")
_chosen: list[str] = []  # empty: what the environment says


def choose(arguments: Sequence[str]) -> None:
    """Take the language of `--lang` among the words of a command, else of the environment. Raises UserError."""
    _chosen.clear()
    words = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    named = [word.removeprefix("--lang=") for word in words if word.startswith("--lang=")]
    named += [after for word, after in itertools.pairwise(words) if word == "--lang"]
    if named and named[-1] in LANGUAGES:  # the parser says what is wrong with another one
        use(named[-1])
    elif (wanted := os.environ.get("WHET_LANG")) and wanted not in LANGUAGES:
        use("en")
        raise UserError(
            "there is no such language", f"export WHET_LANG={LANGUAGES[-1]}, or remove it", field="WHET_LANG",
            found=wanted, expected=", ".join(LANGUAGES),
        )  # fmt: skip


def use(language: str) -> None:
    """Show this language from now on: en or ko."""
    _chosen[:] = [language]


def korean() -> bool:
    """True if people read Korean: as chosen, else by WHET_LANG, else by the locale of a terminal that can show it."""
    if not _chosen:
        _chosen.append(of_environment(os.environ, (sys.stdout, sys.stderr)))
    return _chosen[0] == "ko"


def of_environment(environment: Mapping[str, str], streams: Sequence[TextIO | None]) -> str:
    """The language of WHET_LANG, else of LC_ALL, LC_MESSAGES and LANG, the first that is set."""
    if (wanted := environment.get("WHET_LANG")) in LANGUAGES:
        return str(wanted)
    names = ("LC_ALL", "LC_MESSAGES", "LANG")
    locale = next((environment[name] for name in names if environment.get(name)), "")
    language = locale.partition(".")[0].partition("_")[0].lower()
    return "ko" if language == "ko" and all(_shows_hangul(stream) for stream in streams) else "en"


def _shows_hangul(stream: TextIO | None) -> bool:
    try:
        "한".encode(getattr(stream, "encoding", None) or "utf-8")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def translated(text: str) -> str:
    """The text of whet that a person reads; unchanged in English, and where the catalogue does not know it."""
    if not korean():
        return text
    from whet.base.catalogue import catalogue

    return catalogue().translated(text)


def phrase(english: str, *values: object) -> str:
    """A text of whet with values in its numbered places, as people read it. Values stay as they are."""
    return named(english).format(*values)


def named(english: str) -> str:
    """A text of whet, its places still open, or a name of its own; unchanged where the catalogue does not know it."""
    if not korean():
        return english
    from whet.base.catalogue import by_english

    return by_english().get(english, english)


def written(text: str) -> str:
    """A sentence that whet wrote into a file, in English for programs, as people read it. Values in it stay."""
    shown = named(text)
    return translated(text) if shown == text else shown


def column_name(text: str) -> str:
    """The name of a column that is printed without a table; unchanged in English."""
    if not korean():
        return text
    from whet.base.catalogue import TABLES, catalogue_of

    return catalogue_of(TABLES).translated(text)


def error_text(error: UserError) -> str:
    """The lines that show an error in the terminal."""
    if not korean():
        return f"error: {error}"
    from whet.base.korean import error_in_korean

    return error_in_korean(error)


def recipe_text(text: str) -> str:
    """A commented recipe as people read it."""
    if not korean():
        return text
    from whet.base.korean import recipe_in_korean

    return recipe_in_korean(text)


def console_class() -> type[Console]:
    """rich's console, or one that translates the plain strings that it prints."""
    if korean():
        from whet.base.korean import KoreanConsole

        return KoreanConsole
    from rich.console import Console

    return Console


def help_format() -> type[argparse.HelpFormatter]:
    """The form of `--help`: argparse's own, or one in Korean."""
    if not korean():
        return argparse.RawDescriptionHelpFormatter
    from whet.base.korean import KoreanHelp

    return KoreanHelp
