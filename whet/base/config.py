"""Configurations: frozen, keyword-only dataclasses that reject unknown keys and document each field.

The owner of a setting defines it (`engine` its storage, `methods` its ranks); `recipe.py` alone turns text into these
objects. They stay plain standard-library dataclasses: pydantic reads them, nothing else depends on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


def setting(default: Any, doc: str) -> Any:
    """A field with its default and the sentence that the recipe reference prints for it."""
    if isinstance(default, list | dict):
        copied = type(default)
        return dataclasses.field(default_factory=lambda: copied(default), metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
    """Make a class a configuration: frozen, keyword-only, and an unknown key is an error when a recipe is parsed."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    make: Callable[[type[T]], type[T]] = dataclasses.dataclass(frozen=True, kw_only=True)
    return make(cls)


def field_docs(cls: type) -> dict[str, str]:
    """The one-sentence description of each field, by its name."""
    return {f.name: f.metadata.get("doc", "") for f in dataclasses.fields(cls)}
