"""What is wrong with the machine rather than with the model: full disks, permissions, memory."""

from __future__ import annotations

import errno
import os

from octoc.errors import HostError, OctocError, UsageError

_FULL = "free some space, or choose another folder"
_DENIED = "check its permissions, or choose another folder"
# errno -> what to do about it
_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: _DENIED,
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk or its connection fails",
    errno.ENOMEM: "free some memory, or give fewer samples",
}
# What libraries written in other languages say in errors that are no OSError.
_WORDS = {
    "No space left on device": errno.ENOSPC,
    "StorageFull": errno.ENOSPC,
    "Permission denied": errno.EACCES,
    "Read-only file system": errno.EROFS,
    "can't allocate memory": errno.ENOMEM,
}


def host_fault(error: BaseException) -> str | None:
    """What is wrong with the machine, on one line, where that is what lies behind an error; else None.

    A full disk reaches the entry point under many names, because libraries wrap it: the chain of causes is followed.
    """
    if isinstance(error, UsageError):
        return None
    link: BaseException | None = error
    while link is not None:
        number = errno.ENOMEM if isinstance(link, MemoryError) else link.errno if isinstance(link, OSError) else None
        if number is None:
            number = next((code for words, code in _WORDS.items() if words in str(link)), None)
        if number in _ADVICE:
            return _said(error, link, number)
        link = link.__cause__ or link.__context__
    return _said(error, error, error.errno) if isinstance(error, OSError) and error.errno else None


def _said(error: BaseException, cause: BaseException, number: int) -> str:
    if isinstance(error, HostError):
        return str(error)
    if isinstance(error, OctocError):
        return f"{error}; {_ADVICE[number]}"
    file = cause.filename if isinstance(cause, OSError) else None
    what = os.strerror(number) + (f": {file}" if file is not None else "")
    return f"{what}; {_ADVICE[number]}" if number in _ADVICE else what
