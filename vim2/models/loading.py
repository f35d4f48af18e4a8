"""How every family creates a model with timm: what `pretrained=True` loads is found and checked before it is read."""
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Type, Union

from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from vim2 import pretrained

__all__ = ['abridged', 'check_source', 'create', 'key_problems', 'source_of']


def create(
        model_cls: Type[nn.Module],
        variant: str,
        load: bool,
        filter_fn: Callable,
        feature_cfg: Dict[str, Any],
        **kwargs: Any,
) -> nn.Module:
    """timm's `build_model_with_cfg`, with what it loads checked by :func:`check_source`.

    Args:
        model_cls, variant: the class, and the registered name.
        load: timm's `pretrained`.
        filter_fn: of (state dict, model), gives the state dict in the model's own keys, or raises RuntimeError.
        feature_cfg: how timm extracts features.
        kwargs: the model's arguments, and those of timm's `create_model`.
    """
    if load:
        overlay = check_source(variant, **kwargs)
        kwargs['pretrained_cfg_overlay'] = {**(kwargs.get('pretrained_cfg_overlay') or {}), **overlay}
    return build_model_with_cfg(
        model_cls, variant, load, pretrained_filter_fn=filter_fn, feature_cfg=feature_cfg, **kwargs)


def source_of(model: nn.Module) -> Tuple[str, str]:
    """Where a model's weights come from, and its architecture's name, for messages."""
    cfg = getattr(model, 'pretrained_cfg', {})
    return (str(cfg.get('file') or cfg.get('hf_hub_id') or cfg.get('url') or 'the state dict'),
            cfg.get('architecture') or 'this architecture')


def key_problems(own: Dict[str, Tuple[int, ...]], given: Dict[str, Tuple[int, ...]]) -> List[str]:
    """What keeps a state dict from being a model's, each with its keys; from names to shapes. Empty if it fits."""
    missing = [k for k in own if k not in given]
    unexpected = [k for k in given if k not in own]
    shapes = [f'{k} {given[k]} instead of {own[k]}' for k in own if k in given and given[k] != own[k]]
    return [f'{what}: {abridged(keys)}' for what, keys in (
        ('missing', missing), ('unexpected', unexpected), ('of another shape', shapes)) if keys]


def abridged(items: List[str], most: int = 8) -> str:
    return ', '.join(items[:most]) + (f' and {len(items) - most} more' if len(items) > most else '')


def check_source(variant: str, cache_dir: Optional[Union[str, Path]] = None, **kwargs: Any) -> Dict[str, Any]:
    """Find and verify what `pretrained=True` is going to load, before anything is built.

    Returns:
        What to lay over the configuration, so that timm reads the verified file and no other.

    Raises:
        RuntimeError: no weights are published; bytes that differ from those published, a damaged or a pickle file.
        FileNotFoundError: no such file. Or huggingface_hub's errors.
    """
    try:
        cfg = resolve_pretrained_cfg(
            variant, pretrained_cfg=kwargs.get('pretrained_cfg'),
            pretrained_cfg_overlay=kwargs.get('pretrained_cfg_overlay'))
    except TypeError as e:  # a config.json with fields that timm does not know
        raise RuntimeError(f'{variant}: this timm cannot read the pretrained configuration: {e}') from None
    if cfg.source == 'local-dir':
        pretrained.check_folder(Path(cfg.file))
        return {}
    if cfg.source == 'hf-hub' or (cfg.hf_hub_id and not cfg.file and not cfg.state_dict):
        repo, revision = pretrained.split_hub_id(cfg.hf_hub_id)
        path, commit = pretrained.fetch_weights(repo, revision, cfg.hf_hub_filename, cache_dir)
        # the commit, so that timm finds this very file in the cache, even if the branch moves meanwhile
        return dict(hf_hub_id=f'{repo}@{commit}', hf_hub_filename=cfg.hf_hub_filename or path.name, custom_load=False)
    if cfg.state_dict:
        return {}
    if not cfg.has_weights:
        raise RuntimeError(
            f'No pretrained weights are published for {variant}. Pass pretrained=False for random weights, or your own '
            f"checkpoint: timm.create_model('{variant}', pretrained=True, pretrained_cfg_overlay=dict(file=PATH)), "
            'which adapts it to other num_classes and in_chans, or '
            f"timm.create_model('{variant}', checkpoint_path=PATH), which does not.")
    if not cfg.file:
        return {}
    path = Path(cfg.file)
    if not path.is_file():
        raise FileNotFoundError(f'{variant}: there is no weights file {path}')
    if path.suffix == '.safetensors':
        pretrained.check_readable(path, variant)
        pretrained.check_bundled(path)
    elif not zipfile.is_zipfile(path):  # the container of torch.save, with its index at the end
        raise RuntimeError(f'{variant}: {path} is not a readable PyTorch checkpoint (corrupt or truncated)')
    return {}
