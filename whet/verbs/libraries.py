"""Libraries that a verb with a model loads, kept quiet."""

from __future__ import annotations


def prepare_libraries() -> None:
    import transformers  # noqa: F401

    from whet.base.console import quiet_libraries

    quiet_libraries()
