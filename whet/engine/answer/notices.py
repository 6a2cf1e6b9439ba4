"""What a caller should tell a person: collected, since the engine prints nothing."""

from __future__ import annotations

from collections.abc import Iterator


class Notices:
    """Sentences in the order in which they arose, each once."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._taken = 0

    def add(self, text: str) -> None:
        """Note `text`, unless it was noted before."""
        if text not in self._texts:
            self._texts.append(text)

    def take(self) -> list[str]:
        """Those that were not taken before."""
        new = self._texts[self._taken :]
        self._taken = len(self._texts)
        return new

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)
