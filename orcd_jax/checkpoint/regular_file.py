"""Opens files that somebody else may exchange at any moment: what is opened is a regular file, and nothing waits.

What a file is, is asked of the open file. Between a look at a name and its opening, the name can come to lead to a
pipe, which waits for its writer, or to a device, which may never end.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # the last changes nothing for a regular file
_ENTER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading, through links.

    Raises:
      OSError: it cannot be opened, or is something else.
    """
    return _checked(os.open(path, _READ))


def open_listed(directory: Path, name: str) -> BufferedReader:
    """Opens a regular file below a directory for reading, through no link, symbolic or hard.

    Args:
      directory: where it lies; may itself be reached through links.
      name: relative and normalised, with ``/`` between its parts.

    Raises:
      OSError: it cannot be opened, is something else, or a part of its name is a link.
    """
    *folders, last = name.split("/")
    here = os.open(directory, _ENTER)
    try:
        for folder in folders:
            inner = os.open(folder, _ENTER | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = inner
        file = _checked(os.open(last, _READ | os.O_NOFOLLOW, dir_fd=here))
    finally:
        os.close(here)
    if os.fstat(file.fileno()).st_nlink > 1:
        file.close()
        raise OSError(errno.EMLINK, "it has another name, a hard link")
    return file


def _checked(opened: int) -> BufferedReader:
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, "not a regular file")
    return open(opened, "rb")
