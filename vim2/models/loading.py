"""How every family creates a model with timm: what `pretrained=True` loads is found and checked before it is read."""
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Type, Union

from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from vim2 import pretrained

__all__ = ['abridged', 'check_source', 'create', 'key_problems', 'published_cfgs', 'source_of']


def create(
        model_cls: Type[nn.Module],
        variant: str,
        load: bool,
        filter_fn: Callable,
        feature_cfg: Dict[str, Any],
        ema_by_tag: bool = False,
        **kwargs: Any,
) -> nn.Module:
    """timm's `build_model_with_cfg`, with what it loads checked by :func:`check_source`.

    Args:
        model_cls, variant: the class, and the registered name.
        load: timm's `pretrained`.
        filter_fn: of (state dict, model), gives the state dict in the model's own keys, or raises RuntimeError.
        feature_cfg: how timm extracts features.
        ema_by_tag: see :func:`check_source`.
        kwargs: the model's arguments, and those of timm's `create_model`.
    """
    stride = kwargs.pop('output_stride', None)  # segmentation_models_pytorch asks for one
    if stride not in (None, 32):
        raise ValueError(f'{variant}: output_stride={stride} is not possible, only 32 is: a stage that kept its '
                         'resolution would need dilated convolutions, and a scan over tokens has no dilation')
    if load:
        overlay = check_source(variant, ema_by_tag=ema_by_tag, **kwargs)
        kwargs['pretrained_cfg_overlay'] = {**(kwargs.get('pretrained_cfg_overlay') or {}), **overlay}
    model = build_model_with_cfg(
        model_cls, variant, load, pretrained_filter_fn=filter_fn, feature_cfg=feature_cfg, **kwargs)
    if load and 'state_dict' in overlay:  # a configuration is no place to keep the weights a second time
        for module in model.modules():
            for name in ('pretrained_cfg', 'default_cfg'):
                if isinstance(getattr(module, name, None), dict):
                    getattr(module, name).pop('state_dict', None)
    return model


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


def published_cfgs(architectures: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """timm's default configurations: one for each entry of the manifest, `untrained` where an architecture has none.

    A file of another project has a second one, with `_ema` at its end, for the averaged weights in the same file.

    Args:
        architectures: what every set of weights of an architecture has in common.
    """
    cfgs = {}
    for w in pretrained.manifest().values():
        if w.architecture in architectures:
            cfgs[w.name] = {**architectures[w.architecture], **w.pretrained_cfg()}
            if not w.pinned:
                cfgs[w.name + '_ema'] = dict(cfgs[w.name])
    trained = {name.partition('.')[0] for name in cfgs}
    cfgs.update({f'{name}.untrained': cfg for name, cfg in architectures.items() if name not in trained})
    return cfgs


def check_source(
        variant: str,
        cache_dir: Optional[Union[str, Path]] = None,
        ema_by_tag: bool = False,
        **kwargs: Any,
) -> Dict[str, Any]:
    """Find and verify what `pretrained=True` is going to load, before anything is built.

    Args:
        ema_by_tag: of a PyTorch file read the averaged weights if the tag ends with `_ema`, else the others. Default:
            the averaged ones where there are any.

    Returns:
        What to lay over the configuration, so that timm reads the verified file and no other; a PyTorch file is read
        here.

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
    ema = (cfg.tag or '').endswith('_ema') if ema_by_tag else None
    if cfg.source == 'local-dir':
        pretrained.check_folder(Path(cfg.file))
        return {}
    if cfg.source == 'hf-hub' or (cfg.hf_hub_id and not cfg.file and not cfg.state_dict):
        repo, revision = pretrained.split_hub_id(cfg.hf_hub_id)
        path, commit = pretrained.fetch_weights(repo, revision, cfg.hf_hub_filename, cache_dir)
        if cfg.source != 'hf-hub' and path.suffix != '.safetensors':
            return _read(variant, path, ema)
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
        return _read(variant, pretrained.fetch_url(cfg.url, cache_dir), ema)
    path = Path(cfg.file)
    if not path.is_file():
        raise FileNotFoundError(f'{variant}: there is no weights file {path}')
    if path.suffix != '.safetensors':
        return _read(variant, path, ema)
    pretrained.check_readable(path, variant)
    pretrained.check_bundled(path)
    return {}


def _read(variant: str, path: Path, ema: Optional[bool]) -> Dict[str, Any]:
    """A file's weights, for timm to adapt."""
    try:
        return dict(state_dict=pretrained.read_checkpoint(path, ema))
    except RuntimeError as e:
        raise RuntimeError(f'{variant}: {e}') from e
