"""Files and folders of a runtime: replaced in one step, reached without following symbolic links."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import tempfile
from contextlib import suppress

from cow import clone_range, data_extents
from snaploader.errors import InvalidArgument, translate_os_errors
from snaploader.files import copy_range

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""What renameat2(2) says where the kernel or the file system cannot exchange."""


def exchange(first: str, second: str) -> bool:
    """Let two paths change places, in one step; False where that cannot be done. Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    rename = getattr(library, "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), first)


def replace_file(path: str, data: bytes) -> None:
    """Give a file new content, in one step. Not flushed. Raises OSError."""
    fd, temporary = tempfile.mkstemp(prefix=".new-", dir=os.path.dirname(path))
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def read_file(path: str) -> bytes | None:
    """What a file holds; None when it is not there. Raises OSError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def make_beneath(root: str, path: str) -> None:
    """Make a folder and those above it, up to `root`. What is there already stays.

    Raises:
        OSError: NotADirectoryError when anything on the way is a symbolic link or a file: no link is
            followed, so nothing is made outside of `root`.
    """
    fd = os.open(root, _FOLDER)
    try:
        for part in path.split("/"):
            with suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=fd)
            inner = os.open(part, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = inner
    finally:
        os.close(fd)


def copy_tree(source: str, target: str) -> None:
    """Copy the content of a folder to a new one: modes, times and symbolic links too; blocks are shared
    where the disk can, and holes stay holes.

    Raises:
        InvalidArgument: there is something else than files, folders and symbolic links, or a name that is
            not UTF-8, which no snapshot can hold.
        NotFound, ResourceExhausted, …: as the operating system says.
    """
    with translate_os_errors(f"cannot copy {source!r}"):
        if not stat.S_ISDIR(os.stat(source).st_mode):
            raise InvalidArgument(f"{source!r} is no folder that a workspace could begin with")
        _check_names(source)
        try:
            shutil.copytree(source, target, symlinks=True, copy_function=_copy_file)
        except shutil.Error as error:
            _, _, reason = error.args[0][0]
            raise InvalidArgument(f"cannot copy {source!r}: {reason}") from error


def _check_names(source: str) -> None:
    """Find a name that no snapshot can hold before there is anything to be removed again."""
    for folder, folders, others in os.walk(source):
        for name in (*folders, *others):
            try:
                name.encode()
            except UnicodeEncodeError:
                path = os.path.join(folder, name)
                raise InvalidArgument(
                    f"cannot copy {path!r}: its name is not valid UTF-8. Rename it"
                ) from None


def _copy_file(source: str, target: str) -> None:
    status = os.stat(source, follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode):
        # Not through an OSError, of which copytree keeps nothing but the text.
        raise InvalidArgument(f"{source!r} is no file, folder or symbolic link, and cannot be copied")
    reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        writer = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _copy_content(reader, writer, os.fstat(reader).st_size)
        finally:
            os.close(writer)
    finally:
        os.close(reader)
    shutil.copystat(source, target, follow_symlinks=False)


def _copy_content(source: int, target: int, size: int) -> None:
    """Make the empty file `target` hold the bytes of `source`, with holes where it has some."""
    whole = 0  # as a length: up to the end
    if not clone_range(source, 0, whole, target, 0):
        for start, end in data_extents(source, size):
            copy_range(source, target, start, end)
    os.ftruncate(target, size)
