"""What a disk that refuses says to a person: one error of the usual shape for each way in which a file operation fails.

A full disk, a missing permission or a name that is too long is nobody's bug: it is said with the path and one fix, and
the same command goes on once that is mended, because every file of whet is whole or absent (`base.files`). Libraries
written in Rust report the same faults as text, `... (os error 28)`.
"""

from __future__ import annotations

import errno
import re

from whet.base.errors import UserError

_AGAIN = "then the same command goes on"
# errno -> (what happened, one thing to do about it)
_FAULTS = {
    errno.ENOSPC: ("no space is left on the disk", f"free some space, {_AGAIN}"),
    errno.EDQUOT: ("the disk quota is used up", f"free some space or ask for more, {_AGAIN}"),
    errno.EFBIG: ("the file is larger than this file system or this user may write", f"raise the limit, {_AGAIN}"),
    errno.EACCES: ("no permission", f"change the permissions or name another path, {_AGAIN}"),
    errno.EPERM: ("the system does not permit it", f"change the permissions or name another path, {_AGAIN}"),
    errno.EROFS: ("the file system can only be read", "name a path that can be written"),
    errno.EIO: ("the disk reports an input or output error", f"check the disk, or name a path on another, {_AGAIN}"),
    errno.ESTALE: ("the network file system has lost the file", f"mount it again, {_AGAIN}"),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "name a shorter path"),
    errno.ELOOP: ("symbolic links lead round in a circle", "correct the link"),
    errno.EXDEV: ("the path is on another file system", "name a path on the same file system"),
    errno.ENOTDIR: ("a part of the path is a file, not a directory", "name a path below directories"),
    errno.EISDIR: ("the path is a directory, not a file", "name a file"),
    errno.ENOENT: ("there is no such file or directory", "check the path"),
    errno.EEXIST: ("something stands there already", "name a new path"),
    errno.ENOTEMPTY: ("the directory is not empty", "name a new path"),
    errno.EBUSY: ("the file or directory is in use by the system", "name another path"),
    errno.EMFILE: ("too many files are open", "ulimit -n 4096"),
    errno.ENFILE: ("too many files are open on this machine", "close other programs"),
    errno.ETXTBSY: ("the file is a program that runs", "name another path"),
    errno.ENOLCK: ("the file system has no locks", "name a path on another file system"),
}  # fmt: skip
_RUST = re.compile(r"\(os error (\d+)\)")


def disk_fault(error: BaseException, path: str | None = None) -> UserError | None:
    """The error for a person of a file operation that failed, or None if `error` is something else.

    path: named where the error itself names none.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (reported := _RUST.search(str(error))):
        number = int(reported[1])
    if number not in _FAULTS or isinstance(error, ConnectionError):
        return None
    problem, fix = _FAULTS[number]
    named = getattr(error, "filename", None)
    return UserError(problem, fix=fix, file=str(named) if named else path)
