"""Published weights: the manifest that lists them, and how a weights file is found, checked and read.

`weights/manifest.json` is the one list, of this project's weights and of other projects' that a family here loads.
timm's default configurations are made from it, so that an entry there is all that publishing needs. Whatever is
downloaded or comes with the package is compared with the SHA-256 that is known of it *before* anything reads it:

- of an entry of the manifest, with the entry's, whether the file comes with the package or from the Hub;
- of any other large file from the Hub, with the one that the Hub announced (the name of the file in the cache);
- of other projects' releases nobody has published a sum. Their entries say "not pinned", and the sum of what came is
  printed once, when it is downloaded.

That costs a pass over the file at each load (about 0.1 s for 100 MB), and finds damaged disks and mirrors as well.
Pickle files can execute code when they are read carelessly. Here PyTorch reads them with `weights_only=True`, and they
are refused altogether where nobody asked for this very file: from a repository of the Hub that the manifest does not
list they need VIM2_ALLOW_PICKLE=1 or `vim2.hub.load(…, allow_pickle=True)`.
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from numpy._core import multiarray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import clean_state_dict
from timm.models._hub import get_cache_dir
from torch import Tensor

from . import _files

__all__ = ['Weights', 'fetch', 'fetch_url', 'fetch_weights', 'list_pretrained', 'manifest', 'read_checkpoint',
           'read_manifest', 'read_torch', 'select']

WEIGHTS_DIR = Path(__file__).resolve().parent / 'weights'
SAFETENSORS, PICKLE = 'model.safetensors', 'pytorch_model.bin'
PICKLE_SUFFIXES = ('.bin', '.pth', '.pt', '.tar', '.pkl', '.ckpt')
_FORMAT = 1
_SHA256 = re.compile(r'[0-9a-f]{64}')
NOT_PINNED = 'not pinned'
_RETRIES = 2  # of a download that the server answers with 5xx, beyond what huggingface_hub retries itself
_RETRY_SECONDS = 1.


# ---------------------------------------------------------------------------------------------------------- manifest

@dataclass(frozen=True)
class Weights:
    """An entry of the manifest.

    Args:
        name: timm's name, ARCHITECTURE.TAG.
        file: file in the package's `weights` folder (of a TSM2: in a folder of it, with config.json); with `repo`, file
            in that repository; with `url`, its name in the cache.
        sha256: its SHA-256, in hexadecimal; or 'not pinned', of another project's release.
        license: SPDX identifier, lower case as the Hub has it.
        data: what the weights were trained on.
        metric: `name`, `value`, `unit`, `on` (the data) and `command`, which measures it; of another project's release
            as published there, without `command`.
        size: its length in bytes. None where it is not pinned.
        command: what trained them. None where it is not pinned.
        config: what differs from the architecture's default configuration (classes, image size, mean, …).
        repo: Hub repository, ORG/NAME. Default: the file comes with the package, or from `url`.
        revision: its commit, 40 hexadecimal digits: a branch could move away from the bytes that are listed.
        url: where the file is, of another project's release.
    """
    name: str
    file: str
    sha256: str
    license: str
    data: str
    metric: Dict[str, Any]
    size: Optional[int] = None
    command: Optional[str] = None
    config: Dict[str, Any] = field(default_factory=dict)
    repo: Optional[str] = None
    revision: Optional[str] = None
    url: Optional[str] = None

    @property
    def architecture(self) -> str:
        return self.name.partition('.')[0]

    @property
    def path(self) -> Optional[Path]:
        """The file, if it comes with the package."""
        return None if self.repo or self.url else WEIGHTS_DIR / self.file

    @property
    def pinned(self) -> bool:
        """Whether the bytes are known. Those that are not are another project's, in its own format."""
        return self.sha256 != NOT_PINNED

    @property
    def hub_id(self) -> Optional[str]:
        return f'{self.repo}@{self.revision}' if self.revision else self.repo

    @property
    def result(self) -> str:
        """The metric as text: `top-1 53.63 %`."""
        m = self.metric
        value = f'{m["value"]:.2f} %' if m.get('unit') == '%' else f'{m["value"]:.4g} {m.get("unit", "")}'.rstrip()
        return f'{m["name"]} {value}' + ('' if self.pinned else ', as published')

    @property
    def source(self) -> str:
        """Where the file is from, for people."""
        return self.repo or (urlsplit(self.url).netloc if self.url else 'the package')

    def pretrained_cfg(self) -> Dict[str, Any]:
        """What timm's default configuration says about these weights."""
        if self.url:
            source: Dict[str, Any] = dict(url=self.url)
        elif self.repo:
            source = dict(hf_hub_id=self.hub_id, hf_hub_filename=self.file)
        else:
            source = dict(file=str(self.path))
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in self.config.items()}
        return dict(config, license=self.license, **source)


def read_manifest(path: Union[str, Path]) -> Dict[str, Weights]:
    """The entries of a manifest by name, in their order.

    Raises:
        ValueError: names the entry and the field that is missing, unknown, or of another kind.
    """
    path = Path(path)
    with open(path, encoding='utf-8') as f:
        data = json.load(f)
    if data.get('format') != _FORMAT:
        raise ValueError(f'{path}: format {data.get("format")!r}, expected {_FORMAT}')
    known = dict(file=str, sha256=str, license=str, data=str, metric=dict, size=int, command=str, config=dict, repo=str,
                 revision=str, url=str)
    out = {}
    for name, values in data['weights'].items():
        pinned = values.get('sha256') != NOT_PINNED
        required = ['file', 'sha256', 'license', 'data', 'metric', *(['size', 'command'] if pinned else [])]
        problems = [f'{k} is missing' for k in required if k not in values]
        for k, v in values.items():
            kind = known.get(k)
            if kind is None:
                problems.append(f'{k} is unknown')
            elif not isinstance(v, kind):
                problems.append(f'{k} is {v!r}, no {kind.__name__}')
        if not problems:
            metric = values['metric']
            checks = (
                ('the name must be ARCHITECTURE.TAG', re.fullmatch(r'\w+\.[\w-]+', name)),
                ('sha256 must be 64 hexadecimal digits, lower case, or "not pinned"',
                 not pinned or _SHA256.fullmatch(values['sha256'])),
                ('repo needs a revision of 40 hexadecimal digits, and a revision a repo', not pinned or (
                    'repo' not in values and 'revision' not in values
                    or re.fullmatch('[0-9a-f]{40}', values.get('revision', '')) and 'repo' in values)),
                ('what is not pinned has either a repo or a url, and what is pinned no url',
                 ('url' in values) != ('repo' in values) if not pinned else 'url' not in values),
                ('file must be a plain relative name of a .safetensors file, or of a .pth file that is not pinned',
                 _is_plain(values['file']) and values['file'].endswith('.safetensors' if pinned else
                                                                       ('.safetensors', '.pth'))),
                ('metric needs name, value and on', {'name', 'value', 'on'} <= set(metric)),
            )
            problems = [text for text, ok in checks if not ok]
        if problems:
            raise ValueError(f'{path}: {name}: {"; ".join(problems)}')
        out[name] = Weights(name=name, **values)
    return out


@lru_cache(maxsize=None)
def manifest() -> Dict[str, Weights]:
    """The published weights by name."""
    return read_manifest(WEIGHTS_DIR / 'manifest.json')


class _Table(List[Weights]):
    """A list that prints as a table."""

    def __repr__(self) -> str:
        rows = [('name', 'size', 'licence', 'data', 'result', 'from')]
        for w in self:
            rows.append((w.name, f'{w.size / 1e6:.1f} MB' if w.size else '?', w.license, w.data, w.result, w.source))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def list_pretrained(filter: str = '*') -> List[Weights]:
    """The published weights, those whose name matches `filter` (`vim2_*`, `*.in1k`); prints as a table."""
    from fnmatch import fnmatch
    return _Table(w for w in manifest().values() if fnmatch(w.name, filter))


# ------------------------------------------------------------------------------------------------------- permissions

@dataclass(frozen=True)
class _Access:
    """What a call of `vim2.hub.load` grants to the code below timm, which cannot pass it on."""
    token: Union[bool, str, None] = None
    allow_pickle: bool = False


_NO_ACCESS = _Access()
_access: ContextVar[_Access] = ContextVar('vim2_hub_access', default=_NO_ACCESS)


@contextlib.contextmanager
def access(token: Union[bool, str, None] = None, allow_pickle: bool = False) -> Iterator[None]:
    """Use `token` and the permission to read pickle files for every download inside."""
    reset = _access.set(_Access(token, allow_pickle))
    try:
        yield
    finally:
        _access.reset(reset)


def current_token() -> Union[bool, str, None]:
    return _access.get().token


def pickle_allowed() -> bool:
    return _access.get().allow_pickle or os.environ.get('VIM2_ALLOW_PICKLE', '').lower() in ('1', 'true', 'yes', 'on')


_HOW_TO_ALLOW = ('Reading a pickle file can execute code, so it is refused. Ask for a safetensors file; or, where you '
                 'trust the source, set VIM2_ALLOW_PICKLE=1 or call vim2.hub.load(…, allow_pickle=True), which read '
                 'it with weights_only=True')


# ------------------------------------------------------------------------------------------------------------- files

def sha256(path: Union[str, Path]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb', buffering=0) as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _is_plain(name: str) -> bool:
    """A relative path without `..`, of the same meaning on every system."""
    return bool(name) and not re.search(r'[\\:\x00]', name) and all(
        part not in ('', '.', '..') for part in name.split('/'))


def _verify(path: Path, expected: Dict[str, str]) -> None:
    """Compare a file with the SHA-256 sums that are known of it: what says so, and the sum."""
    if not expected:
        return
    actual = sha256(path)
    for who, digest in expected.items():
        if actual != digest:
            raise RuntimeError(f'{path} is not what {who} lists: its SHA-256 is {actual}, expected {digest}')


def check_readable(path: Path, what: str) -> None:
    """Raise RuntimeError if a .safetensors file is corrupt or truncated; reads its header only."""
    try:
        with safe_open(path, framework='pt'):
            pass
    except SafetensorError as e:
        raise RuntimeError(f'{what}: {path} is not a readable safetensors file (corrupt or truncated): {e}') from e


def split_hub_id(hub_id: str) -> Tuple[str, Optional[str]]:
    """`org/repo@revision` as (org/repo, revision)."""
    repo, _, revision = hub_id.partition('@')
    return repo, revision or None


def fetch(
        repo: str,
        filename: str,
        revision: Optional[str] = None,
        cache_dir: Optional[Union[str, Path]] = None,
        **download: Any,
) -> Tuple[Path, str]:
    """A file of a Hub repository, from the cache or downloaded, verified; and the commit that it is of.

    Honours what huggingface_hub does: HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN, HF_HOME, … A file that fails the
    verification is removed from the cache, so that the next call downloads it anew. `download` are further arguments
    of its hf_hub_download: force_download, local_files_only.

    Raises:
        huggingface_hub's own errors (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, …).
        ValueError: a file name that is no plain relative one.
        RuntimeError: the bytes are not those that the manifest or the Hub lists.
    """
    if not _is_plain(filename):
        raise ValueError(f'{repo}: {filename!r} is no plain file name inside a repository')
    unpinned = any(w.repo == repo and w.file == filename and not w.pinned for w in manifest().values())
    known = not unpinned or isinstance(try_to_load_from_cache(repo, filename, cache_dir, revision), str)
    for attempt in range(_RETRIES + 1):
        try:
            path = Path(hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir,
                                        token=current_token(), library_name='vim2', **download))
            break
        except HfHubHTTPError as e:  # huggingface_hub retries the first request, not the download itself
            status = getattr(e.response, 'status_code', None)
            if attempt == _RETRIES or status is None or status < 500:
                raise
            time.sleep(_RETRY_SECONDS * 2 ** attempt)
    commit = path.parents[len(PurePosixPath(filename).parts) - 1].name  # …/snapshots/COMMIT/FILENAME
    expected = {}
    # …/blobs/SHA256, which may be a link itself, into a store with names of another hash
    blob = Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path
    if _SHA256.fullmatch(blob.name):
        expected[f'the Hub ({repo})'] = blob.name
    for w in manifest().values():
        if w.pinned and w.repo == repo and w.file == filename and commit == w.revision:
            expected[f'the manifest of vim2 ({w.name})'] = w.sha256
    try:
        _verify(path, expected)
    except RuntimeError as e:
        for file in (path.resolve(), blob, path):
            file.unlink(missing_ok=True)
        raise RuntimeError(f'{e}. The file was removed from the cache: a second attempt downloads it again; if that '
                           'fails as well, the server (HF_ENDPOINT) has other bytes than were published') from None
    if not known:
        _announce(path, f'{repo}@{commit}')
    return path, commit


def _announce(path: Path, source: str) -> None:
    """Print the sum of a download that nothing here can be compared with."""
    print(f'vim2: {path.name} ({path.stat().st_size / 1e6:.1f} MB) from {source} is not pinned: nobody has published '
          f'its SHA-256, which is {sha256(path)}', file=sys.stderr)


def fetch_url(url: str, cache_dir: Optional[Union[str, Path]] = None) -> Path:
    """A file of a release page, from the cache (torch.hub's, as timm's) or downloaded.

    A connection that breaks is continued where it broke; nothing that is incomplete gets the file's name. Obeys
    HF_HUB_OFFLINE.

    Raises:
        ValueError: the address names no file.
        RuntimeError: it cannot be downloaded; says where a file that comes by another way belongs.
    """
    name = unquote(urlsplit(url).path).rpartition('/')[2]
    if not _is_plain(name):
        raise ValueError(f'{url} names no file')
    folder = Path(cache_dir or get_cache_dir())
    path = folder / name
    if path.is_file():
        return path
    elsewhere = f'Where you have the file, put it at {path}, or pass pretrained_cfg_overlay=dict(file=PATH)'
    if constants.HF_HUB_OFFLINE:
        raise RuntimeError(f'{name} is not in the cache and HF_HUB_OFFLINE forbids to download {url}. {elsewhere}')
    folder.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f'{name}.', suffix='.incomplete', dir=folder)
    try:
        with os.fdopen(handle, 'wb') as f:
            http_get(url, f, displayed_filename=name)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except Exception as e:  # of the client's HTTP library, which is another one in each major version
        raise RuntimeError(f'cannot download {url}: {type(e).__name__}: {e}. {elsewhere}') from e
    finally:
        Path(part).unlink(missing_ok=True)
    _announce(path, url)
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _Ignored:
    """Takes the place of an object in a checkpoint that is of no use here; nothing of it is run."""

    def __setstate__(self, state: Any) -> None:
        pass


def _ignored(*args: Any) -> None:
    """Takes the place of a function in a checkpoint."""


# What training loops save beside the weights; read as plain data, of which no code is run, whether the class is
# installed or not: argparse's options (Vim), the yacs configuration (VMamba) as a dict, arrays; and, replaced by
# nothing, mmengine's log of losses with the methods that it names.
_PLAIN_CLASSES: List[Any] = [
    argparse.Namespace, (OrderedDict, 'yacs.config.CfgNode'), (OrderedDict, 'mmengine.config.config.ConfigDict'),
    (_Ignored, 'mmengine.logging.history_buffer.HistoryBuffer'), (_ignored, 'builtins.getattr'),
    np.ndarray, np.dtype, *(type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
    *((getattr(multiarray, f), f'{m}.multiarray.{f}') for f in ('_reconstruct', 'scalar')
      for m in ('numpy.core', 'numpy._core'))]


def read_checkpoint(path: Union[str, Path], ema: Optional[bool] = None) -> Dict[str, Tensor]:
    """The weights in a file; nothing in it is executed (safetensors, or torch.load with weights_only=True).

    Args:
        path: .safetensors, or a PyTorch file with the weights bare or under `model`, `state_dict`, `model_ema`,
            `state_dict_ema`, with or without `module.`.
        ema: True for the averaged weights, False for the others, None for the averaged ones where there are any. Bare
            weights are what they are.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: corrupt or truncated, Python objects besides plain data, no tensors, or not those asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'weights file {path} does not exist')
    if path.suffix == '.safetensors':
        check_readable(path, path.name)
        return load_file(path)
    return select(read_torch(path), path, ema)


def read_torch(path: Union[str, Path]) -> Any:
    """What is in a PyTorch file, on the CPU, verified and read with weights_only=True: nothing in it is executed.

    Raises:
        RuntimeError: corrupt or truncated, or Python objects besides plain data.
    """
    path = Path(path)
    if not zipfile.is_zipfile(path):  # the container of torch.save, with its index at the end
        raise RuntimeError(f'{path} is not a readable PyTorch checkpoint (corrupt or truncated; or older than PyTorch '
                           '1.6, then save it again)')
    with torch.serialization.safe_globals(_PLAIN_CLASSES):
        try:
            _files.check_torch(path)
            code = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
            loaded = None if code else torch.load(path, map_location='cpu', weights_only=True)
        except Exception as e:  # zip, pickle and tensor storage have their own
            raise RuntimeError(f'{path} is not a readable PyTorch checkpoint (corrupt or truncated): {e}') from e
    if code:
        raise RuntimeError(
            f'{path} holds Python objects besides tensors ({", ".join(code[:4])}); reading them could execute code, so '
            "it is refused. Where you trust the file, save its weights alone: torch.save({'model': state_dict}, FILE)")
    return loaded


def select(loaded: Any, path: Path, ema: Optional[bool]) -> Dict[str, Tensor]:
    """The weights of a training loop's file: the averaged ones or the others."""
    plain, averaged = ([k for k in keys if isinstance(loaded, dict) and isinstance(loaded.get(k), dict)]
                       for keys in (('state_dict', 'model'), ('state_dict_ema', 'model_ema')))
    if plain or averaged:
        wanted = averaged if ema or ema is None and averaged else plain
        if not wanted:
            raise RuntimeError(f'{path} holds no {"averaged" if ema else "plain"} weights, only '
                               + ', '.join(plain + averaged))
        loaded = loaded[wanted[0]]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise RuntimeError(f'{path} holds no state dict of tensors')
    return clean_state_dict(loaded)


def fetch_weights(
        repo: str,
        revision: Optional[str] = None,
        filename: Optional[str] = None,
        cache_dir: Optional[Union[str, Path]] = None,
        **download: Any,
) -> Tuple[Path, str]:
    """The weights of a Hub repository, `model.safetensors` or the file that its configuration names; see `fetch`.

    Raises:
        FileNotFoundError: there is no safetensors file.
        RuntimeError: it is corrupt or truncated; a pickle file that is not allowed.
    """
    where = f'{repo}@{revision}' if revision else repo
    if filename is None:
        try:
            path, commit = fetch(repo, SAFETENSORS, revision, cache_dir, **download)
        except LocalEntryNotFoundError:
            raise  # no network: nothing is known about the repository
        except EntryNotFoundError:
            if not pickle_allowed():
                raise FileNotFoundError(f'{where} has no {SAFETENSORS}. {_HOW_TO_ALLOW}') from None
            return fetch(repo, PICKLE, revision, cache_dir, **download)
    else:
        listed = any(w.repo == repo and w.file == filename for w in manifest().values())
        if not filename.endswith('.safetensors') and not listed and not pickle_allowed():
            raise RuntimeError(f'{where} names {filename!r} as its weights. {_HOW_TO_ALLOW}')
        path, commit = fetch(repo, filename, revision, cache_dir, **download)
    if path.suffix == '.safetensors':
        check_readable(path, where)
    return path, commit


def check_folder(folder: Path) -> None:
    """Raise if timm (`local-dir:`) or TSM2 would read a damaged file or a pickle file from this folder."""
    file = folder / SAFETENSORS
    if file.is_file():
        check_readable(file, str(folder))
        return
    pickles = [f.name for f in sorted(folder.iterdir()) if f.suffix in PICKLE_SUFFIXES] if folder.is_dir() else []
    if pickles and not pickle_allowed():
        raise RuntimeError(f'{folder} has no {SAFETENSORS}, but {", ".join(pickles[:3])}. {_HOW_TO_ALLOW}')


def check_bundled(path: Path) -> None:
    """Compare a file of the package with the manifest; other files pass."""
    for w in manifest().values():
        if w.path is not None and path == w.path:
            _verify(path, {f'the manifest of vim2 ({w.name})': w.sha256})
