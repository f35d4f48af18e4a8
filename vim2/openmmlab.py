"""ViM2, VMamba and Vim as backbones of MMDetection and MMSegmentation

Everything is registered at mmengine's root registries, which those of mmdet and mmseg (and any other's of mmengine)
fall back to, so a config of any of them needs no more than

    custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)
    model = dict(backbone=dict(type='MambaBackbone', model_name='vmamba_tiny_s1l8', drop_path_rate=0.2))

The type has the name ViM2 as well, and the constructor of optimizers ViM2OptimWrapperConstructor, of the time when
there were no other families.

Needs mmengine, which `pip install vim2[openmmlab]` and `python -m vim2.install_openmmlab` install.

Copyright 2025 the vim2 authors. Licensed under the Apache License 2.0.
"""
import difflib
import math
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

try:
    from mmengine.analysis import complexity_analysis
    from mmengine.analysis.jit_handles import get_shape
    from mmengine.config import Config, ConfigDict
    from mmengine.config.utils import MODULE2PACKAGE
    from mmengine.logging import print_log
    from mmengine.model import BaseModule
    from mmengine.model.weight_init import update_init_info
    from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
    from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
    from mmengine.runner import autocast
    from mmengine.utils import is_installed
except ModuleNotFoundError as e:
    if e.name != 'mmengine':
        raise
    raise ModuleNotFoundError("vim2.openmmlab needs mmengine: `pip install 'vim2[openmmlab]'`, then `python -m "
                              'vim2.install_openmmlab` for mmcv with its compiled operators', name=e.name) from None
import timm
import torch
from timm.layers import LayerNorm2d, resample_patch_embed
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import vim2
from vim2 import pretrained
from vim2.layers import upgrade_state_dict
from vim2.models import Vim, VisionMambaMixer, VMamba, model_names
from vim2.models.loading import key_problems
from vim2.models.vmamba import is_vmamba, rename_vmamba

__all__ = ['BFloat16OptimWrapper', 'MambaBackbone', 'MambaOptimWrapperConstructor', 'ViM2',
           'ViM2OptimWrapperConstructor', 'list_configs', 'load_config', 'scan_flops']


@MODELS.register_module(name=['MambaBackbone', 'ViM2'])
class MambaBackbone(BaseModule):
    """A model of this package as a backbone: images (B, C, H, W) to a tuple of maps (B, C_i, H_i, W_i), one per level.

    `net` is the timm model without its classifier (and without the stages after the last level), under timm's names;
    `norms` are the norms of the levels, `out_channels` their channels. A level that nothing reads costs nothing but its
    norm, whose gradient is then zero.

    - ViM2 and VMamba: images of any size; the maps' strides are 4, 8, 16 and 32 with a stem of stride 4, and their
      sizes are rounded up.
    - Vim: a stage is a block, all of one stride, which the images' sides must be multiples of.

    A checkpoint of a whole detector or segmenter that VMamba's own code has trained loads as one of this package's
    does (`load_from`, `resume`, tools/test_openmmlab.py): `layers.I` and `outnormI` get the names here.
    """

    def __init__(
            self,
            model_name: str = 'vim2_tiny',
            out_indices: Optional[Sequence[int]] = None,
            frozen_stages: int = -1,
            norm_eval: bool = False,
            norm_cfg: Optional[Dict[str, Any]] = dict(type='LN'),  # noqa: B006
            with_cp: bool = False,
            drop_path_rate: float = 0.,
            in_channels: int = 3,
            model_kwargs: Optional[Dict[str, Any]] = None,
            init_cfg: Optional[Union[Dict[str, Any], List[Dict[str, Any]]]] = None,
    ):
        """
        Args:
            model_name: a registered ViM2, VMamba or Vim: `timm.list_models(module='vmamba')`.
            out_indices: stages (of Vim: blocks), from 0, whose outputs are the levels, in ascending order. Default: all
                stages, of Vim the last block.
            frozen_stages: -1 trains everything, 0 freezes the stem, n > 0 the stem and the first n stages with their
                norms: no gradient, and evaluation mode (no stochastic depth).
            norm_eval: keep batch norms in evaluation mode, those of convolutional blocks (`conv_depths`) and of
                `norm_cfg`.
            norm_cfg: norm of each level's output: 'LN' over the channels, any other layer of mmcv over the map, or
                None for none. They start at one and zero, whatever weights are loaded.
            with_cp: recompute each mixer in the backward pass instead of keeping its activations.
            drop_path_rate: stochastic depth rate of the last mixer, growing linearly from 0 at the first.
            in_channels: channels of the images.
            model_kwargs: further arguments of `timm.create_model`.
            init_cfg: `dict(type='Pretrained', checkpoint=SOURCE)` with SOURCE a timm name with its tag
                ('vmamba_tiny_s1l8.in1k'), 'hf-hub:USER/NAME', 'local-dir:DIR', or a weights file: of tools/train.py, or
                of VMamba's or Vim's code. They are loaded by timm, without their classifier; keys that do not match
                are an error. The weights of a stem of patches of another size are resampled (FlexiViT's, by timm), and
                a line says so. With `prefix='backbone.'` SOURCE is the checkpoint of a whole detector or segmenter,
                whose backbone is taken, with the norms of the levels that both have. Other types are mmengine's
                initialisers. Default: the model's own.

        Raises:
            ValueError: unknown model, or out_indices or frozen_stages out of range.
        """
        super().__init__(init_cfg)
        self.model_name = model_name
        self._net_kwargs = dict(model_kwargs or {}, in_chans=in_channels, drop_path_rate=drop_path_rate)
        self.net = self._create(model_name, **self._net_kwargs)
        num_stages = len(self._stages(self.net))
        if out_indices is None:
            out_indices = range(num_stages - 1 if isinstance(self.net, Vim) else 0, num_stages)
        self.out_indices = tuple(out_indices)
        if not self.out_indices or list(self.out_indices) != sorted(set(self.out_indices)) \
                or not all(isinstance(i, int) and 0 <= i < num_stages for i in self.out_indices):
            raise ValueError(f'out_indices={out_indices!r}: write one or more stages of {model_name} in ascending '
                             f'order, from 0 to {num_stages - 1}, for example out_indices={tuple(range(num_stages))}')
        # Parameters without a gradient would stop DistributedDataParallel. The final norm stays, so that net has all
        # that the timm model has, but nothing here reads it.
        self.net.prune_intermediate_layers(list(self.out_indices))
        num_stages = len(self._stages(self.net))
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= num_stages:
            raise ValueError(f'frozen_stages={frozen_stages!r}: write -1 to train everything, 0 to freeze the stem, '
                             f'or the number of stages to freeze with it, at most {num_stages}')
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.norms = nn.ModuleDict({
            str(i): _build_norm(norm_cfg, self.net.feature_info[i]['num_chs']) for i in self.out_indices})
        self.out_channels = tuple(self.net.feature_info[i]['num_chs'] for i in self.out_indices)
        self.net.norm.requires_grad_(False)
        self.net.set_grad_checkpointing(with_cp)
        self._freeze()
        self.register_load_state_dict_pre_hook(_rename_published)

    @staticmethod
    def _stages(net: nn.Module) -> nn.Module:
        return net.blocks if isinstance(net, Vim) else net.stages

    @staticmethod
    def _create(name: str, **kwargs: Any) -> nn.Module:
        names = model_names()
        base = name.partition('.')[0]
        if ':' not in name and base not in names:
            close = difflib.get_close_matches(base, names, n=3) or names
            raise ValueError(f'unknown model {name!r}: write model_name={close[0]!r}'
                             + ''.join(f' or {other!r}' for other in close[1:]))
        model = timm.create_model(name, num_classes=0, **kwargs)
        if not isinstance(model, (VisionMambaMixer, VMamba, Vim)):
            raise ValueError(f'{name!r} is no ViM2, VMamba or Vim: it is a {type(model).__name__}')
        return model

    def init_weights(self) -> None:
        """Load the pretrained weights of `init_cfg`, or run mmengine's initialisers where it names others."""
        cfgs = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []
        pretrained = [c for c in cfgs if c.get('type') == 'Pretrained']
        if not pretrained:
            return super().init_weights()
        cfg = dict(pretrained[0])
        cfg.pop('type')
        source, prefix = cfg.pop('checkpoint', None), cfg.pop('prefix', None)
        if len(cfgs) > 1 or not source or cfg:
            raise ValueError(f"init_cfg={self.init_cfg!r}: write init_cfg=dict(type='Pretrained', checkpoint=SOURCE), "
                             'with SOURCE a timm name with its tag, hf-hub:USER/NAME, local-dir:DIR or a weights file '
                             "(with prefix='backbone.' of a detector or segmenter, all of whose weights are loaded "
                             'by load_from)')
        if self._is_init:
            return None
        if prefix is None:
            self._load_net(self._read_classifier(str(source)), str(source))
        else:
            self._load_backbone(str(source), prefix)
        if hasattr(self, '_params_init_info'):  # of a model that lists how each parameter was initialised
            update_init_info(self, init_info=f'PretrainedInit: load from {source}')
        self._is_init = True
        return None

    def _read_classifier(self, source: str) -> Dict[str, Tensor]:
        """The weights of a timm model, from what `init_cfg` names: its patches may be of another size than here."""
        kwargs: Dict[str, Any] = {}
        if source.startswith(('http://', 'https://')):
            kwargs.update(pretrained_cfg_overlay=dict(url=source))
        elif not source.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')) and (
                source.partition('.')[0] not in model_names() or os.path.exists(source)):
            kwargs.update(pretrained_cfg_overlay=dict(file=source))
            stem = pretrained.read_checkpoint(source).get(_PATCHES) if os.path.isfile(source) else None
            if stem is not None and _PATCHES in self.net.state_dict():
                kwargs.update(patch_size=stem.shape[-1])
        name = self.model_name if kwargs else source
        own = {k: v for k, v in self._net_kwargs.items() if kwargs or k != 'patch_size'}
        return self._create(name, **{**own, 'pretrained': True, **kwargs}).state_dict()

    def _load_backbone(self, path: str, prefix: str) -> None:
        """Weights of `net`, and of the norms of the levels that both have, from the checkpoint of a whole model.

        Raises:
            FileNotFoundError: no such file.
            RuntimeError: a damaged file, one with nothing under the prefix, or keys that do not match.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f'init_cfg: there is no checkpoint {path}')
        state, prefix = pretrained.read_checkpoint(path), prefix.rstrip('.') + '.'
        given = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}
        if not given:
            raise RuntimeError(f'{path} has no weights under prefix={prefix!r}; its keys begin with '
                               + ', '.join(sorted({k.partition(".")[0] for k in state})))
        _rename_published(self, given, '')
        self._load_net({k[4:]: v for k, v in given.items() if k.startswith('net.')}, path)
        own = self.norms.state_dict()
        self.norms.load_state_dict({k: given.get(f'norms.{k}', v) for k, v in own.items()})

    def _load_net(self, given: Dict[str, Tensor], source: str) -> None:
        """All weights of `net`. Raises RuntimeError that names keys that do not match."""
        own, part = self.net.state_dict(), 'blocks' if isinstance(self.net, Vim) else 'stages'
        last = len(self._stages(self.net))
        unread = [k for k in given if (m := re.match(rf'{part}\.(\d+)\.', k)) and int(m[1]) >= last]
        if unread and part == 'stages':  # without the stages that no level needs, and the norm after them
            unread += [k for k in given if k.startswith('norm.')]
        given = {k: v for k, v in given.items() if k not in unread}
        stem, want = given.get(_PATCHES), own.get(_PATCHES)
        if stem is not None and want is not None and stem.shape[:2] == want.shape[:2] and stem.shape != want.shape:
            given[_PATCHES] = resample_patch_embed(stem, list(want.shape[-2:]))
            print_log(f'{source}: patches of {tuple(stem.shape[-2:])} pixels resampled to {tuple(want.shape[-2:])}',
                      'current')
        problems = key_problems(*({k: tuple(v.shape) for k, v in state.items()} for state in (own, given)))
        if problems:
            raise RuntimeError(f'{source} holds no weights of {self.model_name}; its keys do not match.\n  '
                               + '\n  '.join(problems))
        self.net.load_state_dict(given, strict=True)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        maps = self.net.forward_intermediates(x, indices=list(self.out_indices), stop_early=True,
                                              intermediates_only=True)
        # The maps are views of NHWC memory. mmcv's RoIAlign reads its input's memory as NCHW, and convolutions pass
        # such strides on to it.
        outs = tuple(norm(x).contiguous() for norm, x in zip(self.norms.values(), maps))
        norms = [p for p in self.norms.parameters() if p.requires_grad]
        if not self.training or not torch.is_grad_enabled() or not norms:
            return outs
        return tuple(_WithZeroGradients.apply(x, *norms) for x in outs)

    def _frozen_modules(self) -> Iterator[nn.Module]:
        if self.frozen_stages >= 0:
            yield self.net.patch_embed if isinstance(self.net, Vim) else self.net.stem
        for i in range(self.frozen_stages):
            yield self._stages(self.net)[i]
            if str(i) in self.norms:
                yield self.norms[str(i)]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(False)
        if isinstance(self.net, Vim):
            self.net.cls_token.requires_grad_(self.frozen_stages < 0)
            self.net.pos_embed.requires_grad_(self.frozen_stages < 0)

    def train(self, mode: bool = True) -> 'MambaBackbone':
        super().train(mode)
        if mode:
            for module in self._frozen_modules():
                module.eval()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self


ViM2 = MambaBackbone
_PATCHES = 'stem.conv.weight'  # of a stem of patches


class _WithZeroGradients(torch.autograd.Function):
    """The first argument; the others get a gradient of zero, beside those that they have.

    For the norms of levels that a neck does not read: DistributedDataParallel waits for every parameter's gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *params: Tensor) -> Tensor:
        ctx.save_for_backward(*params)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return (grad, *map(torch.zeros_like, ctx.saved_tensors))


def _rename_published(
        module: MambaBackbone, state_dict: Dict[str, Tensor], prefix: str, *args: Any,
) -> None:
    """A `load_state_dict` pre-hook: what VMamba's own code has trained as a backbone, with its levels' norms."""
    given = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
    if not isinstance(module.net, VMamba) or not is_vmamba(given):
        return
    for key in given:
        del state_dict[prefix + key]
    for key, value in upgrade_state_dict(rename_vmamba(given)).items():
        level = re.fullmatch(r'outnorm(\d+)\.(weight|bias)', key)
        state_dict[prefix + (f'norms.{level[1]}.{level[2]}' if level else f'net.{key}')] = value
    for key, value in module.net.norm.state_dict().items():  # which nothing reads, and a backbone's file has not
        state_dict.setdefault(f'{prefix}net.norm.{key}', value)


def _build_norm(cfg: Optional[Dict[str, Any]], channels: int) -> nn.Module:
    if cfg is None:
        return nn.Identity()
    cfg = dict(cfg)
    if cfg.get('type') != 'LN':
        from mmcv.cnn import build_norm_layer
        return build_norm_layer(cfg, channels)[1]
    cfg.pop('type')
    trained = cfg.pop('requires_grad', True)
    return LayerNorm2d(channels, **{'eps': 1e-5, **cfg}).requires_grad_(trained)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(name=['MambaOptimWrapperConstructor', 'ViM2OptimWrapperConstructor'])
class MambaOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with the model's own rules for a backbone of this package.

    `paramwise_cfg=dict(layer_decay=r)`: the learning rate of a mixer or block (with the average that it reads) is r
    times that of the one after it; the last one's is r times the base rate, which norms of levels, neck and heads
    have. The groups are those of the timm model's `group_matcher`. Default: 1, the base rate for all.

    Weights in the timm model's `no_weight_decay` (A_log, D, step sizes' biases, averaging scalars, norms, biases) and
    the levels' norms are not decayed, whatever `layer_decay` is.

    `custom_keys` act on the backbone as well, on top of that: of the keys that stand in a parameter's name the longest
    one counts, `lr_mult` and `decay_mult` multiply, what else it has is the group's (mmengine's rules).

    Everything outside the backbone obeys the other keys of `paramwise_cfg`, which are mmengine's (`bias_lr_mult`,
    `bias_decay_mult`, …) and do not act inside it. `norm_decay_mult` is 0 by default: norms of necks and heads are not
    decayed, as the frameworks' configs of Swin have it.

    Raises:
        ValueError: an unknown key, a layer_decay out of range, no lr, no such backbone in the model.
    """

    def __init__(self, optim_wrapper_cfg: Dict[str, Any], paramwise_cfg: Optional[Dict[str, Any]] = None):
        paramwise_cfg = dict(paramwise_cfg or {})
        unknown = [k for k in paramwise_cfg if k not in _PARAMWISE]
        if unknown:
            close = difflib.get_close_matches(unknown[0], _PARAMWISE, n=1)
            raise ValueError(f'paramwise_cfg has the unknown key {unknown[0]!r}: '
                             + (f'did you mean {close[0]!r}?' if close else f'write one of {", ".join(_PARAMWISE)}'))
        paramwise_cfg.setdefault('layer_decay', 1.)  # never empty: add_params is called
        if dict(optim_wrapper_cfg.get('optimizer', {})).get('weight_decay') is not None:
            paramwise_cfg.setdefault('norm_decay_mult', 0.)
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        self.layer_decay = self.paramwise_cfg['layer_decay']
        if not isinstance(self.layer_decay, (int, float)) or not 0 < self.layer_decay <= 1:
            raise ValueError(f'paramwise_cfg.layer_decay must be above 0 and at most 1, got {self.layer_decay!r}')
        if self.base_lr is None:
            raise ValueError("MambaOptimWrapperConstructor needs optimizer.lr, for example optimizer=dict("
                             "type='AdamW', lr=1e-4, weight_decay=0.05)")
        self.num_backbones = 0

    def __call__(self, model: nn.Module):
        self.num_backbones = 0
        wrapper = super().__call__(model)
        if not self.num_backbones:
            raise ValueError("MambaOptimWrapperConstructor found no backbone of type 'MambaBackbone' in it: leave out "
                             '`constructor` for other backbones')
        return wrapper

    def add_params(self, params: List[dict], module: nn.Module, prefix: str = '', is_dcn_module=None) -> None:
        if not isinstance(module, MambaBackbone):
            return super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        self.num_backbones += 1
        net = module.net
        layers = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
        num_layers = 1 + max(layers[n] for n, _ in net.named_parameters() if not n.startswith('norm.'))
        undecayed = net.no_weight_decay()
        rows = [(f'net.{n}', p, layers[n], n in undecayed) for n, p in net.named_parameters()]
        rows += [(f'norms.{n}', p, num_layers, True) for n, p in module.norms.named_parameters()]
        custom_keys = self.paramwise_cfg.get('custom_keys', {})
        by_length = sorted(sorted(custom_keys), key=len, reverse=True)
        groups: Dict[Tuple[int, bool, str], dict] = {}
        for name, p, layer, without_decay in rows:
            if not p.requires_grad:
                continue
            custom = next((k for k in by_length if k in f'{prefix}.{name}'), '')
            if (layer, without_decay, custom) not in groups:
                settings = dict(custom_keys.get(custom, {}))
                lr_mult, decay_mult = settings.pop('lr_mult', 1.), settings.pop('decay_mult', 1.)
                group = dict(params=[], lr=self.base_lr * lr_mult * self.layer_decay ** (num_layers - layer))
                if self.base_wd is not None:
                    group['weight_decay'] = 0. if without_decay else self.base_wd * decay_mult
                groups[layer, without_decay, custom] = dict(group, **settings)
            groups[layer, without_decay, custom]['params'].append(p)
        params.extend(groups[key] for key in sorted(groups))
        return None


ViM2OptimWrapperConstructor = MambaOptimWrapperConstructor
_PARAMWISE = ('layer_decay', 'custom_keys', 'norm_decay_mult', 'bias_lr_mult', 'bias_decay_mult', 'dwconv_decay_mult',
              'flat_decay_mult', 'dcn_offset_lr_mult', 'bypass_duplicate')


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16, which needs no loss scaling; on any device, where AmpOptimWrapper wants a GPU.

    mmcv's operators (RoIAlign, nms) have no bfloat16: what they read is cast back to float32, by hooks on mmcv's layers
    and on mmdet's heads.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._hooked = False

    @contextmanager
    def optim_context(self, model: nn.Module):
        if not self._hooked:
            for module in model.modules():
                source = type(module).__module__
                if source.startswith(('mmcv.ops.', 'mmdet.models.roi_heads.')):
                    module.register_forward_pre_hook(lambda module, args: _float32(args))
                if source.startswith(('mmdet.models.dense_heads.', 'mmdet.models.roi_heads.')):
                    module.register_forward_hook(lambda module, args, output: _float32(output))
            self._hooked = True
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


def _float32(value: Any) -> Any:
    """Every bfloat16 tensor in nested tuples and lists as float32."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_float32, value))
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def scan_flops(inputs: List[Any], outputs: List[Any]) -> int:
    """FLOPs of `vim2::scan` as mmengine counts them: 9 per state update (B, K, L, E, N), and B·K·L·E for D.

    VMamba's formula, so that the figures compare with those of its papers.
    """
    u, A = get_shape(inputs[0]), get_shape(inputs[2])
    updates = math.prod(u) * A[0]
    return updates * (9 * A[2] + 1)


def _baddbmm_flops(inputs: List[Any], outputs: List[Any]) -> int:
    return math.prod(get_shape(inputs[1])) * get_shape(inputs[2])[-1]


# get_model_complexity_info makes its own analyzer from this table, and lets nobody add to it.
complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS['vim2::scan'] = scan_flops
complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault('aten::baddbmm', _baddbmm_flops)
# nor of that for activations, which would call it unsupported beside a count that has it; None is no activation
complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS['vim2::scan'] = None


# mmengine looks for mmseg's configs in a distribution of the name mmsegmentation; the maintained fork has another, and
# mmengine finds it by the module's name, as it does mmdet.
if not is_installed(MODULE2PACKAGE['mmseg']):
    MODULE2PACKAGE['mmseg'] = 'mmseg'


def list_configs() -> List[str]:
    """Names of the configs that come with the package."""
    return sorted(_config_files())


def _config_files() -> Dict[str, Path]:
    package = Path(vim2.__file__).resolve().parent
    files: Dict[str, Path] = {}
    for task in ('detection', 'segmentation'):
        folder = package / 'configs' / task  # in a wheel
        if not folder.is_dir():
            folder = package.parent / task / 'configs'  # in a clone
        files.update((path.stem, path) for path in folder.glob('*.py'))
    return files


def load_config(
        name: Union[str, 'os.PathLike[str]'],
        cfg_options: Optional[Dict[str, Any]] = None,
        data_root: Optional[Union[str, 'os.PathLike[str]']] = None,
) -> Config:
    """A config that comes with the package, by its name, or any other by its path.

    Args:
        name: one of `list_configs()`, with or without '.py', or the path of a config file.
        cfg_options: what to change in it, as mmengine's --cfg-options: dotted keys to values. `data_root` and
            `vis_backends`, which a config repeats where they are used, change there too.
        data_root: the folder of the data; stands in every path that began with the config's own.

    A model's `in_channels='backbone'` (of necks and heads) becomes the channels of the backbone's levels, by the head's
    `in_index` where it has one.

    Raises:
        FileNotFoundError: no such config.
        ValueError: the config uses a name of this module without importing it, where mmdet and mmseg would not find it;
            or it has no data root, or several.
    """
    files, name = _config_files(), str(name)
    stem = name.removesuffix('.py')
    path = Path(name)
    if stem in files:
        path = files[stem]
    elif not path.is_file():
        close = difflib.get_close_matches(Path(stem).name, files, n=3)
        raise FileNotFoundError(f'there is no config {name!r}: ' + (f'did you mean {" or ".join(close)}?' if close else
                                'give the path of a file or one of ' + ', '.join(sorted(files))))
    config, options = Config.fromfile(str(path)), dict(cfg_options or {})
    data_root = options.pop('data_root', None) if data_root is None else data_root
    if data_root is not None:
        _set_data_root(config, os.fspath(data_root), path)
    if options:
        config.merge_from_dict(options)
    if config.get('vis_backends') and config.get('visualizer', {}).get('vis_backends') == [_LOCAL]:
        config.visualizer.vis_backends = config.vis_backends
    if 'backbone' in (config.get('model') or {}):
        _set_channels(config.model)
    used = _types(config.to_dict()) & {'MambaBackbone', 'MambaOptimWrapperConstructor', 'ViM2',
                                       'ViM2OptimWrapperConstructor', 'BFloat16OptimWrapper'}
    imports = (config.get('custom_imports') or {}).get('imports') or []
    if used and 'vim2.openmmlab' not in ([imports] if isinstance(imports, str) else imports):
        raise ValueError(f"{path} uses {', '.join(sorted(used))} without importing it: write "
                         "custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)")
    return config


_LOCAL = dict(type='LocalVisBackend')  # the default of mmdet and mmseg


def _set_data_root(config: Config, root: str, path: Path) -> None:
    roots = {config.data_root} if config.get('data_root') else {
        d.data_root for key in _LOADERS for d in datasets_of(config.get(key)) if d.get('data_root')}
    if len(roots) != 1:
        found = f'several data roots, {", ".join(sorted(roots))}' if roots else 'no data_root'
        raise ValueError(f'{path} has {found}: change each path with --cfg-options')
    old, new = roots.pop().rstrip('/'), root.rstrip('/') or '/'

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            for key in value:
                value[key] = moved(value[key])
        elif isinstance(value, (list, tuple)):
            return type(value)(map(moved, value))
        elif isinstance(value, str) and (value == old or value.startswith(old + '/')):
            return new + value[len(old):]
        return value

    for key, value in config.items():
        config[key] = moved(value)


_LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def datasets_of(config: Any) -> List[ConfigDict]:
    """The configs of data sets in one of a data loader, inside whatever wraps them."""
    if isinstance(config, (list, tuple)):
        return [d for part in config for d in datasets_of(part)]
    if not isinstance(config, dict):
        return []
    inner = [v for k, v in config.items() if k in ('dataset', 'datasets')]
    return datasets_of(inner) if inner else [config]


def _set_channels(model: ConfigDict) -> None:
    """Put the backbone's channels where necks and heads say in_channels='backbone'."""
    asking: List[ConfigDict] = []

    def find(value: Any) -> None:
        if isinstance(value, dict):
            asking.extend([value] if value.get('in_channels') == 'backbone' else [])
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for part in value:
                find(part)

    find(model)
    if not asking:
        return
    backbone = model.backbone.to_dict()
    backbone.update(init_cfg=None, model_kwargs=dict(backbone.get('model_kwargs') or {}, device='meta'))
    channels = MODELS.build(backbone).out_channels
    for part in asking:
        index = part.get('in_index', tuple(range(len(channels))))
        part.in_channels = channels[index] if isinstance(index, int) else [channels[i] for i in index]


def _types(config: Any) -> Set[str]:
    """Everything that stands in the config as a type or a constructor."""
    if isinstance(config, dict):
        own = {v for k, v in config.items() if k in ('type', 'constructor') and isinstance(v, str)}
        return own.union(*map(_types, config.values()))
    if isinstance(config, (list, tuple)):
        return set().union(*map(_types, config))
    return set()
