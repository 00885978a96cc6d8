"""Files that have no name in the cache yet.

They are made in the folder where they will be, without a name at all (O_TMPFILE), so that nothing is left
of them when the process is killed. The folder matters: ext4 puts a new file's inode near its folder's, and
making all files in one folder to move them out crowds one place of the disk (2.5 times slower over
30,000 files). Where the file system knows no O_TMPFILE they get a name in the session's staging folder.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from types import TracebackType
from typing import Self

from snaploader.filecache.content import suppress_errnos
from snaploader.filecache.session import Session
from snaploader.folders import open_new

NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
"""What open(2) says where the file system knows no O_TMPFILE."""
_FLAGS = os.O_RDWR | os.O_CLOEXEC


class StagedFile:
    """A new empty file, open for writing. A context manager that drops it, unless it was linked.

    Args:
        session: Whose staging folder is used where the file system leaves no better way.
        folder: Where the file will be; made if absent.
    """

    def __init__(self, session: Session, folder: str) -> None:
        self._path: str | None = None
        self._session = session
        self.fd = -1
        with suppress_errnos(NO_TMPFILE):
            try:
                self.fd = os.open(folder, _FLAGS | os.O_TMPFILE, 0o600)
            except (FileNotFoundError, NotADirectoryError):
                session.make_folder(folder)
                self.fd = os.open(folder, _FLAGS | os.O_TMPFILE, 0o600)
            return
        path = session.temp_path()
        self.fd = open_new(path, 0o600)
        self._path = path

    def link(self, target: str) -> None:
        """Give the file a name, in one step. FileExistsError when that is taken."""
        if self._path is not None:
            os.link(self._path, target)
        else:
            link_nameless(self.fd, target)

    def close(self) -> None:
        """Drop the file, unless it was linked. Again is fine."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            if self._path is not None and self._session.is_own:
                with suppress(FileNotFoundError):
                    os.unlink(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def link_nameless(fd: int, target: str) -> None:
    """Give a file made with O_TMPFILE a name; see open(2)."""
    # A descriptor among the arguments makes this linkat(2), which follows the symbolic link.
    os.link(f"/proc/self/fd/{fd}", target, src_dir_fd=fd, follow_symlinks=True)
