"""Files of JSON lines that a judge or a writer of paraphrases leaves: there whole or not at all, and over nothing else.

Lines go to a file beside, which takes the name at the end. A file that stands there already is replaced only if it is
of the same kind, so that a slip in `--out` cannot cost the data. Replies wait beside it (see `replies`), so what is cut
off loses nothing that was paid for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from whet.base.errors import UserError
from whet.base.files import sync

Ours = Callable[[dict[str, Any]], bool]


def replies_beside(out: Path) -> Path:
    """Where the replies for `out` are kept."""
    return out.with_name(f"{out.name}.replies")


@contextmanager
def json_lines(*files: tuple[Path, Ours]) -> Iterator[Sequence[IO[str]]]:
    """The files to write, each with a test of whether a line is of its kind; all appear at the end or none.

    Raises UserError where a file of another kind stands, or nothing can be written.
    """
    for place, ours in files:
        _check_ours(place, ours)
    beside = [place.with_name(f".{place.name}.{os.getpid()}.tmp") for place, _ in files]
    try:
        with ExitStack() as stack:
            for place, _ in files:
                place.parent.mkdir(parents=True, exist_ok=True)
            opened = [stack.enter_context(path.open("w", encoding="utf-8")) for path in beside]
            yield opened
            for file in opened:
                file.flush()
                os.fsync(file.fileno())
        for path, (place, _) in zip(beside, files, strict=True):
            path.replace(place)
            sync(place.parent)
    except OSError as error:
        raise UserError(
            f"the file cannot be written: {error.strerror or error}", file=str(files[0][0]),
            fix="name a place that can be written",
        ) from error  # fmt: skip
    finally:
        for path in beside:
            path.unlink(missing_ok=True)


def _check_ours(place: Path, ours: Ours) -> None:
    try:
        with place.open("rb") as file:
            first = file.readline(1 << 24)
        value = json.loads(first) if first else None
        if not first or (isinstance(value, dict) and ours(value)):
            return
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError):
        pass
    raise UserError(
        "another file stands here and would be lost", file=str(place), field="--out",
        expected="a new name, or a file that the same command wrote", fix="name another file",
    )  # fmt: skip
