"""Models from the Hugging Face Hub or from a folder, of whichever family they are.

`load` looks at config.json and gives a ViM2, VMamba or Vim (which `timm.create_model('hf-hub:ORG/NAME')` gives as well)
or a TSM2 (`TSM2.from_pretrained('ORG/NAME')`). Weights are checked before they are read: vim2/pretrained.py.
"""
import json
import os
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import timm
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import model_entrypoint
from torch import nn

from . import pretrained
from .models import model_names

__all__ = ['load']

CONFIG = 'config.json'
_TSM2_KEYS = {'num_variates', 'lookback', 'horizon'}


def load(
        repo_or_dir: Union[str, Path],
        revision: Optional[str] = None,
        token: Union[bool, str, None] = None,
        cache_dir: Optional[Union[str, Path]] = None,
        allow_pickle: bool = False,
        **kwargs: Any,
) -> nn.Module:
    """A trained model in evaluation mode: from the Hub, a folder, or the list of published weights.

    Args:
        repo_or_dir: Hub repository (`ORG/NAME`, also `ORG/NAME@REVISION`), folder with config.json and
            model.safetensors, or a name of `vim2.list_pretrained()`.
        revision: branch, tag, commit or pull request (`refs/pr/1`) of the repository. Default: main.
        token: access token of a private repository; False sends none. Default: HF_TOKEN, or that of `hf auth login`.
        cache_dir: where downloads are kept. Default: huggingface_hub's cache.
        allow_pickle: read a pickle file, with weights_only=True, where there is no safetensors file.
        kwargs: to the model; for ViM2 what `timm.create_model` takes: `num_classes`, `in_chans`, `features_only`, …

    Raises:
        FileNotFoundError: no such folder, no config.json, or no weights.
        RuntimeError: a configuration of another project's model, damaged or foreign weights, a pickle file.
        ValueError: a `revision` of a folder, or two of them.
        huggingface_hub's errors: no such repository or revision, no access, no network.
    """
    name = str(repo_or_dir)
    with pretrained.access(token, allow_pickle):
        if name in pretrained.manifest():
            if revision:
                raise ValueError(f'{name} is a published entry with a revision of its own, got revision={revision!r}')
            entry = pretrained.manifest()[name]
            if entry.path is None and entry.pinned:
                name, revision = str(entry.repo), entry.revision
            elif timm.is_model(entry.architecture):
                return timm.create_model(name, pretrained=True, cache_dir=cache_dir, **kwargs).eval()
            else:
                assert entry.path is not None
                return _load_folder(entry.path.parent, **kwargs)
        if os.path.isdir(name):
            if revision:
                raise ValueError(f'{name} is a folder, which has no revision {revision!r}')
            return _load_folder(Path(name), **kwargs)
        if isinstance(repo_or_dir, Path) or name.startswith(('.', '/', '~')) or name.count('/') > 1:
            raise FileNotFoundError(f'there is no folder {name}')
        name, inline = pretrained.split_hub_id(name.removeprefix('hf-hub:'))
        if inline and revision not in (None, inline):
            raise ValueError(f'two revisions of {name}: {inline!r} and {revision!r}')
        return _load_repo(name, inline or revision, cache_dir, **kwargs)


def _load_folder(folder: Path, **kwargs: Any) -> nn.Module:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f'{folder} is no model: it has no {CONFIG}')
    family, config = _read_config(path, str(folder))
    if family == 'vim2':
        return _create(f'local-dir:{folder}', config, str(folder), **kwargs)
    return _create_tsm2(str(folder), str(folder), **kwargs)


def _load_repo(repo: str, revision: Optional[str], cache_dir, **kwargs: Any) -> nn.Module:
    where = f'{repo}@{revision}' if revision else repo
    try:
        path, commit = pretrained.fetch(repo, CONFIG, revision, cache_dir)
    except LocalEntryNotFoundError:
        raise  # no network: nothing is known about the repository
    except EntryNotFoundError:
        raise FileNotFoundError(f'{where} is no model of vim2: it has no {CONFIG}') from None
    family, config = _read_config(path, where)
    if family == 'vim2':  # timm finds the files of this commit in the cache; check_source fetches and verifies them
        return _create(f'hf-hub:{repo}@{commit}', config, where, cache_dir=cache_dir, **kwargs)
    token = pretrained.current_token()
    return _create_tsm2(repo, where, revision=commit, cache_dir=cache_dir, token=token, **kwargs)


def _read_config(path: Path, where: str) -> Tuple[str, Dict[str, Any]]:
    """The family that a config.json is of, 'vim2' or 'tsm2', and its contents."""
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e:  # json's and UTF-8's errors
        raise RuntimeError(f'{where}: {CONFIG} is no JSON: {e}') from None
    if not isinstance(config, dict):
        raise RuntimeError(f'{where}: {CONFIG} must hold an object, it holds a {type(config).__name__}')
    if 'architecture' in config:
        architecture = config['architecture']
        ours = model_names()
        if architecture in ours:
            return 'vim2', config
        if isinstance(architecture, str) and timm.is_model(architecture):
            module = model_entrypoint(architecture).__module__
            raise RuntimeError(f'{where} is a {architecture} of {module}, no model of vim2: load it with '
                               f"timm.create_model('hf-hub:…' or 'local-dir:…', pretrained=True)")
        raise RuntimeError(f'{where}: {CONFIG} names the unknown architecture {architecture!r}; this version of vim2 '
                           f'has {", ".join(ours)}')
    if _TSM2_KEYS <= set(config):
        return 'tsm2', config
    raise RuntimeError(f"{where} is no model of vim2: {CONFIG} has neither timm's key `architecture` nor TSM2's "
                       f'{", ".join(sorted(_TSM2_KEYS))}; it has {", ".join(sorted(config)[:8]) or "nothing"}')


def _create(source: str, config: Dict[str, Any], where: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(source, pretrained=True, **kwargs).eval()
    except (TypeError, AttributeError) as e:  # arguments that the model does not have, or of another kind
        kwargs.pop('cache_dir', None)
        arguments = {**(config.get('model_args') or {}), **kwargs}
        raise RuntimeError(f'{where}: cannot make a {config["architecture"]} with {arguments}: {e}') from e


def _create_tsm2(source: str, where: str, **kwargs: Any) -> nn.Module:
    from .models.tsm2 import TSM2
    try:
        return TSM2.from_pretrained(source, **kwargs)
    except (TypeError, ValueError) as e:  # other arguments, or a newer format
        raise RuntimeError(f'{where}: cannot make a TSM2 of its {CONFIG}: {e}') from e
