"""Writing files so that nobody finds half of one, and locking a folder: for the package and the tools alike.

`write` is the one way in which files are written: a regular file is replaced by renaming a complete temporary one,
links are followed, devices and pipes are written into. Errors leave the old file and no temporary.
"""
import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Union

from filelock import FileLock, Timeout
from safetensors import SafetensorError

__all__ = [
    'Damaged', 'Locked', 'check_torch', 'lock_folder', 'named_errors', 'remove_temporaries', 'write', 'write_folder',
    'write_text', 'write_torch']

_LOCK = '.lock'
_OWNER = '.lock-owner'
_SUM_START = b'sha256:'
_SUM_LENGTH = len(_SUM_START) + 64
_EMPTY_COMMENT = b'\0\0'  # the last field of a zip archive without one: its length
_ZIP_END, _ZIP_END_LENGTH = b'PK\5\6', 22  # the record that the comment follows
_COMMENT_LENGTH = _SUM_LENGTH.to_bytes(len(_EMPTY_COMMENT), 'little')


def write(path: Union[str, os.PathLike], fill: Callable[[str], object]) -> None:
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
            content = os.path.join(folder, 'content')
            fill(content)
            with named_errors(path), open(content, 'rb') as source, open(path, 'ab') as sink:
                shutil.copyfileobj(source, sink)
        return
    target = Path(os.path.realpath(path))
    tmp = _temporary(target)
    try:
        with named_errors(path):
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
    """Write what `torch.save` writes, see `write`, with a SHA-256 sum that `check_torch` verifies.

    The sum is the comment of the zip archive that such a file is, so that `torch.load` reads it as any other.
    """
    import torch

    def fill(tmp: str) -> None:
        with open(tmp, 'wb') as f:
            try:
                torch.save(state, f)
            except RuntimeError as e:  # a full disk is an OSError, which PyTorch hides in a RuntimeError
                cause: Optional[BaseException] = e
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__context__
                raise cause or e from None
        with open(tmp, 'rb+') as f:
            f.seek(-len(_EMPTY_COMMENT), os.SEEK_END)
            f.write(_COMMENT_LENGTH)
            f.seek(0)
            digest = _sha256(f, os.fstat(f.fileno()).st_size)
            f.seek(0, os.SEEK_END)
            f.write(_SUM_START + digest)

    write(path, fill)


def check_torch(path: Union[str, os.PathLike]) -> None:
    """Verify that a file of `torch.save` is as it was written, which `torch.load` does not.

    By its own sum, or, where it has none, by those that a zip archive has of its parts.

    Raises:
        Damaged: the sums differ, or the file would unpack to more than is stored.
        OSError: it cannot be read.
    """
    problem = None
    with open(path, 'rb') as f:
        zipped = f.read(2) == b'PK'
        f.seek(0, os.SEEK_END)
        end = max(f.tell() - _SUM_LENGTH, _ZIP_END_LENGTH)
        f.seek(end - _ZIP_END_LENGTH)
        zip_end, comment = f.read(_ZIP_END_LENGTH), f.read()
        # either tells that there is a sum, so that damage to the other, or to the sum, is not taken for none
        if zip_end.startswith(_ZIP_END) and zip_end.endswith(_COMMENT_LENGTH) or comment.startswith(_SUM_START):
            f.seek(0)
            if comment != _SUM_START + _sha256(f, end):
                problem = 'its SHA-256 sum is not the one that it was written with'
        elif zipped:
            problem = _zip_problem(f)
    if problem:
        raise Damaged(problem)


def _sha256(file, length: int) -> bytes:
    """The sum of the next `length` bytes, in hexadecimal."""
    digest = hashlib.sha256()
    while length and (chunk := file.read(min(length, 1 << 20))):
        digest.update(chunk)
        length -= len(chunk)
    return digest.hexdigest().encode()


def _zip_problem(file) -> Optional[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                return 'it is compressed, which torch.save does not do'
            part = archive.testzip()
            return f'the sum of its part {part} is wrong' if part else None
    except Exception as e:  # zipfile has many errors for damaged archives
        return ' '.join(str(e).split()) or type(e).__name__


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
        with named_errors(path):
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


class Damaged(Exception):
    """A file is not as it was written; the text says how that shows."""


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
def named_errors(path: Path) -> Iterator[None]:
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
