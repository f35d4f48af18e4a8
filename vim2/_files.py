"""Writing files so that nobody finds half of one, and locking a folder: for the package and the tools alike.

`write` is the one way in which files are written: a regular file is replaced by renaming a complete temporary one,
links are followed, devices and pipes are written into. Errors leave the old file and no temporary.
"""
import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Union

from filelock import FileLock, Timeout
from safetensors import SafetensorError

__all__ = ['Locked', 'lock_folder', 'remove_temporaries', 'write', 'write_folder', 'write_text', 'write_torch']

_LOCK = '.lock'
_OWNER = '.lock-owner'


def write(path: Union[str, os.PathLike], fill: Callable[[str], None]) -> None:
    """Let `fill` write a temporary file, whose name it gets, flush that to the disk, and put it where `path` is.

    A regular file, or none: replaced by renaming, so that whoever reads `path` finds the old file or the new one, never
    a part, whenever the process dies; a replaced file's permissions stay. A symbolic link: the same with what it points
    to. A device, pipe or socket: written into.

    Raises:
        OSError: with the name of `path`; the temporary is removed, the old file is as it was.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # standard output may be a regular file, which whoever redirected to it holds open
    if mode is not None and not stat.S_ISREG(mode) or str(path).startswith(('/dev/std', '/dev/fd/', '/proc/')):
        with tempfile.TemporaryDirectory() as folder:
            tmp = os.path.join(folder, 'content')
            fill(tmp)
            with _named(path), open(tmp, 'rb') as source, open(path, 'ab') as sink:
                shutil.copyfileobj(source, sink)
        return
    target = Path(os.path.realpath(path))
    tmp = _temporary(target)
    try:
        with _named(path):
            fill(str(tmp))
            if mode is not None:
                os.chmod(tmp, stat.S_IMODE(mode))
            _sync(tmp)
            os.replace(tmp, target)
            _sync(target.parent)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def write_text(path: Union[str, os.PathLike], text: str) -> None:
    """Write a UTF-8 text file, see `write`."""
    write(path, lambda tmp: Path(tmp).write_text(text, encoding='utf-8'))


def write_torch(path: Union[str, os.PathLike], state: Any) -> None:
    """Write what `torch.save` writes, see `write`; a full disk is an OSError, which it hides in a RuntimeError."""
    import torch

    def fill(tmp: str) -> None:
        with open(tmp, 'wb') as f:
            try:
                torch.save(state, f)
            except RuntimeError as e:
                cause: Optional[BaseException] = e
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__context__
                raise cause or e from None

    write(path, fill)


def write_folder(path: Union[str, os.PathLike], fill: Callable[[str], None]) -> None:
    """Let `fill` write a temporary folder, whose name it gets, and put it where `path` is, whole.

    Files that `path` has beside those of the same names stay. While a folder is exchanged there is for a moment none:
    a reader finds the old files, the new ones, or an error, never some of each.

    Raises:
        OSError: with the name of `path`; the temporary is removed, the old folder is as it was.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    tmp = _temporary(target)
    try:
        with _named(path):
            fill(str(tmp))
            for file in tmp.rglob('*'):
                if file.is_file():
                    _sync(file)
            _sync(tmp)
            if not target.exists():
                os.rename(tmp, target)
            else:
                old = _temporary(target)
                os.rename(target, old)
                try:
                    os.rename(tmp, target)
                except OSError:
                    os.rename(old, target)
                    raise
                for file in old.iterdir():
                    if not os.path.lexists(target / file.name):
                        os.rename(file, target / file.name)
                shutil.rmtree(old)
            _sync(target.parent)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def remove_temporaries(folder: Union[str, os.PathLike]) -> None:
    """Remove what killed writers left in a folder. Only for who holds its lock: others may be writing."""
    for path in Path(folder).glob('.*.tmp'):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class Locked(Exception):
    """Another process holds the lock; the text says which."""


@contextlib.contextmanager
def lock_folder(folder: Union[str, os.PathLike]) -> Iterator[None]:
    """Hold a folder, which must exist, for this process alone.

    The lock is the operating system's: it goes when its process dies, however, and holds across containers that share
    the folder, where process numbers mean nothing.

    Raises:
        Locked: names host, process and since when.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            owner = ' '.join((folder / _OWNER).read_text(encoding='utf-8', errors='replace').split())
        except OSError:
            owner = ''
        raise Locked(f'{folder} is in use by {owner or "another process"}') from None
    owner = f'process {os.getpid()} on {socket.gethostname()} since {time.strftime("%Y-%m-%d %H:%M:%S")}\n'
    try:
        write_text(folder / _OWNER, owner)
        yield
    finally:
        (folder / _OWNER).unlink(missing_ok=True)
        lock.release()


def _temporary(target: Path) -> Path:
    """A name of its own beside `target`, of at most 255 bytes."""
    name = os.fsdecode(os.fsencode(target.name)[:200])
    return target.with_name(f'.{name}.{secrets.token_hex(6)}.tmp')


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder on Windows, a file whose mode says so
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the system name `path`, not the temporary, which nobody knows."""
    try:
        yield
    except OSError as e:
        if e.errno is None:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e
    except SafetensorError as e:
        number = re.search(r'\(os error (\d+)\)', str(e))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from e
