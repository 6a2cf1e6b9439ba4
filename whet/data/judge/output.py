"""Write the JSON lines of a judge or of a writer of paraphrases: whole files or none, and never over another file.

Lines go to a file beside, which is renamed at the end. A file that stands there already is replaced only if it is of
the same kind, so that a slip in `--out` cannot cost the data. Replies are stored beside it (see `replies`), so a run
that breaks off loses nothing that was paid for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from whet.base.errors import UserError
from whet.base.files import flush, whole_file

Ours = Callable[[dict[str, Any]], bool]


def replies_beside(out: Path) -> Path:
    """The path of the file of replies for `out`."""
    return out.with_name(f"{out.name}.replies")


@contextmanager
def json_lines(*files: tuple[Path, Ours]) -> Iterator[Sequence[IO[str]]]:
    """Open the files to write, each given with a test for lines of its kind; all appear at the end or none.

    Raises UserError where a file of another kind stands, or nothing can be written.
    """
    for target, ours in files:
        _check_ours(target, ours)
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(whole_file(target)) for target, _ in files]
            yield opened
            for file in opened:  # before the first of them gets its name
                flush(file)
    except OSError as error:
        raise UserError(
            f"the file cannot be written: {error.strerror or error}", file=str(files[0][0]),
            fix="name a file that can be written",
        ) from error  # fmt: skip


def _check_ours(path: Path, ours: Ours) -> None:
    try:
        with path.open("rb") as file:
            first = file.readline(1 << 24)
        value = json.loads(first) if first else None
        if not first or (isinstance(value, dict) and ours(value)):
            return
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError):
        pass
    raise UserError(
        "another file stands here and would be lost", file=str(path), field="--out",
        expected="a new name, or a file that the same command wrote", fix="name another file",
    )  # fmt: skip
