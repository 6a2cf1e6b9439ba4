"""Guard every path that whet writes: no output may be an input, and none may be what no file can be.

An output is held against all inputs of the same call by what lies on the disk (device and inode), so a link, a hard
link, another spelling or `..` is seen as well; a directory that is written must not be above an input either. A file
that would be read as data the next time, because it lands in a directory of data, is refused too. Gives up: inputs
that appear between the check and the writing.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from whet.base.disk import disk_fault
from whet.base.errors import UserError

_VARIABLE = re.compile(r"\$(?:\w|\{)")


@dataclass(frozen=True)
class Input:
    """A file or directory that a call reads, or a glob of such. what: for the error, "the data".

    closed: what may not be added to the directory: files, because they would be read the next time; or anything.
    """

    path: Path
    what: str
    closed: Literal["no", "files", "all"] = "no"


def output_path(text: str | Path, field: str | None = None) -> Path:
    """The path of an output as the user wrote it, with `~` for the home directory. UserError for no path at all."""
    name = str(text)
    if not name.strip() or "\0" in name:
        raise UserError(
            "this is no name of a file", field=field, found=repr(name), expected="a path", fix="give another path"
        )
    if _VARIABLE.search(name):
        raise UserError(
            "a shell variable in a path is not replaced", field=field, found=name, expected="the path itself",
            fix=f"write {os.path.expandvars(name)}",
        )  # fmt: skip
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(
            "there is no such user", field=field, found=name, expected="~ or ~user", fix="write the whole path"
        ) from error


def output_file(
    text: str | Path, inputs: Iterable[Input], field: str | None = None, ours: Callable[[bytes], bool] | None = None
) -> Path:
    """The file to write: as it was given, or where a link leads. Raises UserError where it is an input, or none can be.

    ours: told from the first line of a file that stands there, whether the same command wrote it; another one is
    refused.
    """
    given = output_path(text, field)
    path = _real(given, field)
    state = _state(path)
    if state is not None and not stat.S_ISREG(state.st_mode):
        raise UserError(
            "the output is no regular file", file=str(text), field=field,
            found="a directory" if stat.S_ISDIR(state.st_mode) else "a device or a pipe", expected="the name of a file",
            fix="name a file; to see the output in the terminal leave the option out",
        )  # fmt: skip
    for one in inputs:
        for real in _files(one):
            if path == real or (state is not None and _same(state, real)):
                raise _taken(text, field, one, real)
        if one.closed != "no" and _would_be_read(path, one):
            raise UserError(
                f"the output would lie among {one.what}, and be read as such the next time", file=str(text),
                field=field, found=str(one.path), expected="a path elsewhere", fix="name a file in another directory",
            )  # fmt: skip
    if state is not None and state.st_size and ours is not None and not ours(_first_line(path)):
        raise UserError(
            "another file stands here and would be lost", file=str(text), field=field,
            expected="a new name, or a file that the same command wrote", fix="name another file",
        )  # fmt: skip
    return path if given.is_symlink() else given


def output_directory(text: str | Path, inputs: Iterable[Input], field: str | None = None) -> Path:
    """The directory to write, likewise. Raises UserError where it is or lies above an input, or is a file."""
    given = output_path(text, field)
    path = _real(given, field)
    state = _state(path)
    if state is not None and not stat.S_ISDIR(state.st_mode):
        raise UserError(
            "the output is in the way: it is a file", file=str(text), field=field, expected="a new directory",
            fix="name a new directory",
        )  # fmt: skip
    for one in inputs:
        for real in _matches(one):
            above = [real, *real.parents]
            if path in above or (state is not None and any(_same(state, place) for place in above)):
                raise _taken(text, field, one, real)
        if one.closed == "all" and _would_be_read(path, one):
            raise UserError(
                f"the output would lie inside of {one.what}", file=str(text), field=field, found=str(one.path),
                expected="a path elsewhere", fix="name a directory elsewhere",
            )  # fmt: skip
    return path if given.is_symlink() else given


def _taken(text: str | Path, field: str | None, one: Input, real: Path) -> UserError:
    return UserError(
        f"the output would overwrite {one.what}", file=str(text), field=field, found=str(real),
        expected="a path that is read by nothing in this call", fix="give another name",
    )  # fmt: skip


def _real(path: Path, field: str | None) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle are a RuntimeError up to Python 3.12
        fault = disk_fault(error, str(path))
        raise fault or UserError("links lead round in a circle", fix="correct the link", file=str(path)) from error


def _state(path: Path) -> os.stat_result | None:
    """The state of what stands at `path`, None for nothing. Raises UserError."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise disk_fault(error, str(path)) or error from error


def _first_line(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.readline(1 << 20)
    except OSError as error:
        raise disk_fault(error, str(path)) or error from error


def _same(state: os.stat_result, path: Path) -> bool:
    try:
        other = path.stat()
    except OSError:
        return False
    return (state.st_dev, state.st_ino) == (other.st_dev, other.st_ino)


def _matches(one: Input) -> Iterator[Path]:
    """What an input stands for, links followed: itself, or what its glob matches now."""
    import glob

    try:
        if one.path.exists() or not glob.has_magic(str(one.path)):
            yield one.path.resolve()
        else:
            yield from (Path(name).resolve() for name in glob.iglob(str(one.path), recursive=True))  # noqa: PTH207
    except (OSError, RuntimeError):  # whoever reads it says what is wrong
        return


def _files(one: Input) -> Iterator[Path]:
    """Every file of an input; those of a directory wherever they lie in it."""
    for real in _matches(one):
        if real.is_dir():
            for folder, _, names in os.walk(real):
                yield from (Path(folder) / name for name in names)
        else:
            yield real


def _would_be_read(path: Path, one: Input) -> bool:
    """Whether a new `path` lies in the directory of an input, or matches its glob."""
    if one.path.is_dir():
        real = one.path.resolve()
        return any(place == real or _same(place.stat(), real) for place in path.parents if place.exists())
    return fnmatch.fnmatch(str(path), str(one.path.absolute()))
