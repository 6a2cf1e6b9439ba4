"""Libraries that a verb with a model loads, kept quiet."""

from __future__ import annotations


def prepare_libraries(doing: str | None = None, style: str = "dim") -> None:
    """Import what models need, which takes seconds. doing: what is said before, so that nobody waits without a word."""
    from whet.base.console import quiet_libraries, say
    from whet.base.secrets import hide

    if doing is not None:
        say(hide(doing), style=style)
    import transformers  # noqa: F401

    quiet_libraries()
