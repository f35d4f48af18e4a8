"""VMamba (SS2D networks), and its vanilla weights as a start for ViM2

Paper: `VMamba: Visual State Space Model` - https://arxiv.org/abs/2401.10166
Code and weights: https://github.com/MzeroMiko/VMamba (MIT)

Two generations of one network. v0 ("vanilla", January 2024): S6 of 16 states with a SiLU gate, 4 x 4 patches, 2 x 2
patch merging, no MLP. v2 (March 2024; `s1l8` is expansion 1 with 8 blocks in the third stage): S6 of one state without
a gate, an MLP in each block, overlapping convolutions as stem and down-sampling.

Written from the paper and from the published configurations; the weights are the authors', under their own names
(`layers.0.blocks.0.op.in_proj.weight`), and are renamed when they are loaded. Here a stage begins with its
down-sampling, there it ends with it.

With `channel_depths=0, weighted_average=False` ViM2 *is* VMamba v0, and a ViM2 with channel mixers and averages can
start as that network (`convert_vmamba`): the channel mixers' last projections are set to zero, so that each passes on
its input, and the averages to the plain chain. docs/conversion.md has the table of names.

Copyright 2025 the vim2 authors. Licensed under the Apache License 2.0.
"""
import re
from functools import partial
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, Mlp
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from vim2.layers import S6, SelectiveTokenMixer, upgrade_state_dict
from .hierarchy import ConvDownsample, ConvStem, HierarchicalBackbone, PatchMerging, Stem
from .loading import abridged, create, key_problems, published_cfgs, source_of

__all__ = ['VMamba', 'VMambaConversion', 'convert_vmamba', 'is_vmamba', 'spread_blocks']


class SS2D(nn.Module):
    """VMamba v2's mixer, over a map: `out(norm(S6(silu(conv(in(x))))))`. No gate, no biases but the norm's."""

    def __init__(
            self,
            dim: int,
            expand: float = 1.,
            d_state: int = 1,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: number of channels in and out, d. The rank of the step sizes is ceil(d / 16), whatever `expand` is.
            expand: inner width over d.
            d_state: size of the state of a channel, N.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.inner_dim = int(expand * dim)
        self.in_proj = nn.Linear(dim, self.inner_dim, bias=False, **dd)
        self.conv2d = nn.Conv2d(
            self.inner_dim, self.inner_dim, 3, padding=1, groups=self.inner_dim, bias=False, **dd)
        self.s6 = S6(self.inner_dim, d_state=d_state, dt_rank=(dim + 15) // 16, **dd)
        self.out_norm = nn.LayerNorm(self.inner_dim, **dd)
        self.out_proj = nn.Linear(self.inner_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) to the same."""
        x = self.conv2d(self.in_proj(x).permute(0, 3, 1, 2))  # a view: the layout stays channels-last
        x = self.s6(F.silu(x).permute(0, 2, 3, 1))
        return self.out_proj(self.out_norm(x))


class VMambaBlock(nn.Module):
    """`x + drop_path(mixer(norm(x)))`, and the same with an MLP in v2, over (B, H, W, d)."""

    def __init__(
            self,
            dim: int,
            version: str = 'v2',
            expand: float = 1.,
            d_state: int = 1,
            mlp_ratio: float = 4.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        mixer_layer = SelectiveTokenMixer if version == 'v0' else SS2D
        self.norm = nn.LayerNorm(dim, **dd)
        self.mixer = mixer_layer(dim, expand=expand, d_state=d_state, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        if mlp_ratio > 0.:
            self.norm2 = nn.LayerNorm(dim, **dd)
            self.mlp = Mlp(dim, hidden_features=int(mlp_ratio * dim), **dd)
        else:
            self.norm2 = self.mlp = None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm(x)))
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class VMambaStage(nn.Module):
    """Down-sampling and a chain of blocks. NCHW in and out, NHWC in memory and inside; the permutations are views."""

    def __init__(self, downsample: nn.Module, blocks: List[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x.permute(0, 2, 3, 1))
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x.permute(0, 3, 1, 2)


class VMamba(HierarchicalBackbone):
    """VMamba, for images of any size of at least 32 x 32 pixels."""

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            version: str = 'v2',
            dims: Tuple[int, ...] = (96, 192, 384, 768),
            depths: Tuple[int, ...] = (2, 2, 8, 2),
            expand: float = 1.,
            d_state: int = 1,
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_chans: number of input channels.
            num_classes: number of classes, 0 for no classifier.
            global_pool: 'avg', 'max', 'avgmax', 'catavgmax' or '' (no pooling) before the classifier.
            version: 'v0' (gated mixers, patches, patch merging) or 'v2' (no gate, convolutions as stem and
                down-sampling).
            dims, depths: width and number of blocks of each stage.
            expand: inner width of the mixers over their width.
            d_state: size of the state of the scans, N.
            mlp_ratio: hidden width of the MLPs over their width; 0 for none.
            drop_rate: dropout before the classifier.
            drop_path_rate: stochastic depth rate of the last block, growing linearly from 0 at the first.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if version not in ('v0', 'v2'):
            raise ValueError(f"version must be 'v0' or 'v2', got {version!r}")
        if len(dims) != len(depths):
            raise ValueError(f'dims and depths must have one entry for each stage, got {dims} and {depths}')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_fmt = 'NCHW'
        self.feature_info = []

        stem_layer, downsample_layer = (Stem, PatchMerging) if version == 'v0' else (ConvStem, ConvDownsample)
        self.stem = stem_layer(in_chans, dims[0], **dd)
        block_layer = partial(
            VMambaBlock, version=version, expand=expand, d_state=d_state, mlp_ratio=mlp_ratio, **dd)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths)):
            stages.append(VMambaStage(
                downsample_layer(dims[i - 1], dim, **dd) if i > 0 else nn.Identity(),
                [block_layer(dim, drop_path=next(rates)) for _ in range(depth)]))
            self.feature_info += [dict(num_chs=dim, reduction=4 * 2 ** i, module=f'stages.{i}')]
        self.stages = nn.Sequential(*stages)

        self.num_features = self.head_hidden_size = dims[-1]
        self.norm = nn.LayerNorm(dims[-1], **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)

        self.apply(self._init_weights)


# --------------------------------------------------------------------------------------------------- published weights

_BLOCK = r'layers\.(\d+)\.blocks\.(\d+)\.'
# A published name, and ours. The first releases have `ln_1`, `self_attention`, `patch_embed.proj` and `.norm`, and no
# `classifier.`.
_NAMES = [(re.compile(pattern), ours) for pattern, ours in (
    (_BLOCK + r'(?:ln_1|norm)\.(weight|bias)', r'stages.\1.blocks.\2.norm.\3'),
    (_BLOCK + r'(?:self_attention|op)\.((?:in_proj|out_proj)\.weight|(?:conv2d|out_norm)\.(?:weight|bias))',
     r'stages.\1.blocks.\2.mixer.\3'),
    (_BLOCK + r'(?:self_attention|op)\.(x_proj_weight|dt_projs_weight|dt_projs_bias|A_logs|Ds)',
     r'stages.\1.blocks.\2.mixer.s6.\3'),
    (_BLOCK + r'((?:norm2|mlp\.fc1|mlp\.fc2)\.(?:weight|bias))', r'stages.\1.blocks.\2.\3'),
    (r'layers\.(\d+)\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)', r'stages.NEXT.downsample.\2'),
    (r'layers\.(\d+)\.downsample\.1\.(weight|bias)', r'stages.NEXT.downsample.conv.\2'),
    (r'layers\.(\d+)\.downsample\.3\.(weight|bias)', r'stages.NEXT.downsample.norm.\2'),
    (r'patch_embed\.5\.(weight|bias)', r'stem.conv2.\1'),
    (r'patch_embed\.7\.(weight|bias)', r'stem.norm2.\1'),
    (r'patch_embed\.(?:proj|0)\.(weight|bias)', r'stem.CONV.\1'),
    (r'patch_embed\.(?:norm|2)\.(weight|bias)', r'stem.NORM.\1'),
    (r'(?:classifier\.)?norm\.(weight|bias)', r'norm.\1'),
    (r'(?:classifier\.)?head\.(weight|bias)', r'head.fc.\1'),
)]


def is_vmamba(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a VMamba of any version: classification network or detector's backbone."""
    pattern = re.compile(r'(backbone\.)?layers\.0\.blocks\.0\.(self_attention|op)\.')
    return any(pattern.match(key) for key in keys)


def vmamba_names(keys: Iterable[str]) -> Dict[str, Optional[str]]:
    """Published names of VMamba's parameters, of any version, to those of :class:`VMamba`; None where it has none."""
    keys = list(keys)
    convolutions = any(k.startswith('patch_embed.5.') for k in keys)
    out: Dict[str, Optional[str]] = {}
    for key in keys:
        out[key] = None
        for pattern, ours in _NAMES:
            match = pattern.fullmatch(key)
            if match:
                if 'NEXT' in ours:  # VMamba's stages end with the down-sampling, ours begin with it
                    ours = ours.replace('NEXT', str(int(match[1]) + 1))
                ours = ours.replace('CONV', 'conv1' if convolutions else 'conv')
                ours = ours.replace('NORM', 'norm1' if convolutions else 'norm')
                out[key] = match.expand(ours)
                break
    return out


_OUR_BLOCK = re.compile(r'stages\.(\d+)\.blocks\.(\d+)\.(.+)')
_LEVEL_NORM = re.compile(r'outnorm(\d+)\.(weight|bias)')  # of a detector's or segmenter's backbone
_LINEAR = re.compile(r'.*\.(?:in_proj|out_proj|fc1|fc2|fc)\.weight')


def rename_vmamba(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """A published state dict with the names and shapes of :class:`VMamba`; what it does not have keeps its name.

    Linears that were saved as 1 x 1 convolutions become matrices.
    """
    out = {}
    for key, name in vmamba_names(state_dict).items():
        value = state_dict[key]
        name = name or key
        if value.ndim == 4 and value.shape[2:] == (1, 1) and _LINEAR.fullmatch(name):
            value = value.flatten(1)
        out[name] = value
    return out


def describe_vmamba(state_dict: Dict[str, Tensor]) -> Dict[str, Any]:
    """The arguments of :class:`VMamba` that a renamed state dict is of, as far as its keys and shapes tell."""
    depths: Dict[int, int] = {}
    for key in state_dict:
        match = re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', key)
        if match:
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)

    def shape(name: str) -> Tuple[int, ...]:
        return tuple(state_dict[name].shape) if name in state_dict else ()

    dims = [shape(f'stages.{i}.blocks.0.norm.weight') for i in range(len(depths))]
    out_proj, states = (shape('stages.0.blocks.0.mixer.' + name) for name in ('out_proj.weight', 's6.A_logs'))
    hidden = shape('stages.0.blocks.0.mlp.fc1.weight')
    return dict(
        version='v2' if 'stem.conv2.weight' in state_dict else 'v0',
        dims=tuple(d[0] if d else 0 for d in dims), depths=tuple(depths.get(i, 0) for i in range(len(depths))),
        expand=out_proj[1] / out_proj[0] if len(out_proj) == 2 else 0., d_state=states[1] if len(states) == 2 else 0,
        mlp_ratio=hidden[0] / hidden[1] if hidden else 0.)


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: VMamba) -> Dict[str, Tensor]:
    """The weights of a VMamba, published or saved here, under the model's names; any classifier and input channels.

    Raises:
        RuntimeError: names the file, and the configuration that it is of, or the keys that do not match.
    """
    source, name = source_of(model)
    if is_vmamba(state_dict):
        if any(k.startswith('backbone.') for k in state_dict):  # a detector or segmenter
            state_dict = {k.removeprefix('backbone.'): v for k, v in state_dict.items() if k.startswith('backbone.')}
        # In a backbone the last level's norm stands for the final norm.
        last = f'outnorm{len(model.stages) - 1}.'
        state_dict = rename_vmamba({k.replace(last, 'norm.'): v for k, v in state_dict.items()
                                    if k.startswith(last) or not _LEVEL_NORM.fullmatch(k)})
    state_dict = upgrade_state_dict(state_dict)  # VMamba v0's input projections hold branch and gate
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in state_dict.items()}
    for shapes in (own, given):
        for key in ('head.fc.weight', 'head.fc.bias'):
            shapes.pop(key, None)
        for key in ('stem.conv.weight', 'stem.conv1.weight'):
            if len(shapes.get(key, ())) == 4:
                shapes[key] = (shapes[key][0], 0, *shapes[key][2:])
    problems = key_problems(own, given)
    if problems:
        found = describe_vmamba(state_dict)
        fits = [n for n, args in _ARGUMENTS.items() if args == found]
        if found == describe_vmamba(model.state_dict()):
            why = 'its keys do not match'
        elif fits:
            why = f"it is one of {fits[0]}: timm.create_model('{fits[0]}', …)"
        elif found['dims']:
            why = 'it looks like VMamba(' + ', '.join(f'{k}={v!r}' for k, v in found.items()) + ')'
        else:
            why = 'it holds no VMamba'
        raise RuntimeError(f'{source} is no checkpoint of {name}; {why}.\n  ' + '\n  '.join(problems))
    return state_dict


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    return create(VMamba, variant, pretrained, checkpoint_filter_fn,
                  dict(out_indices=(0, 1, 2, 3), flatten_sequential=True), ema_by_tag=True,
                  **dict(_ARGUMENTS[variant], **kwargs))


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'min_input_size': (3, 32, 32),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1',
        'classifier': 'head.fc',
        'paper_name': 'VMamba: Visual State Space Model',
        'paper_ids': 'arXiv:2401.10166',
        'origin_url': 'https://github.com/MzeroMiko/VMamba',
        'license': 'mit',
        **kwargs,
    }


def _arguments(width: int, third: int, expand: float, version: str = 'v2') -> Dict[str, Any]:
    v2 = version == 'v2'
    return dict(version=version, dims=tuple(width * 2 ** i for i in range(4)), depths=(2, 2, third, 2), expand=expand,
                d_state=1 if v2 else 16, mlp_ratio=4. if v2 else 0.)


_ARGUMENTS = {
    'vmamba_tiny_s1l8': _arguments(96, 8, 1.),
    'vmamba_tiny_s2l5': _arguments(96, 5, 2.),
    'vmamba_small_s1l20': _arguments(96, 20, 1.),
    'vmamba_small_s2l15': _arguments(96, 15, 2.),
    'vmamba_base_s1l20': _arguments(128, 20, 1.),
    'vmamba_base_s2l15': _arguments(128, 15, 2.),
    'vmamba_tiny_v0': _arguments(96, 9, 2., 'v0'),
    'vmamba_small_v0': _arguments(96, 27, 2., 'v0'),
    'vmamba_base_v0': _arguments(128, 27, 2., 'v0'),
    'test_vmamba': dict(version='v2', dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), expand=2., d_state=1, mlp_ratio=4.),
    'test_vmamba_v0': dict(
        version='v0', dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), expand=2., d_state=2, mlp_ratio=0.),
}
_ARCHITECTURES = {
    name: _cfg(**dict(first_conv='stem.conv') if args['version'] == 'v0' else {},
               **dict(input_size=(3, 64, 64), pool_size=(2, 2), license='apache-2.0', origin_url=None)
               if name.startswith('test_') else {})
    for name, args in _ARGUMENTS.items()}
default_cfgs = generate_default_cfgs(published_cfgs(_ARCHITECTURES))


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T[s1l8]: expansion 1, 8 blocks in the third stage."""
    return _create_vmamba('vmamba_tiny_s1l8', pretrained=pretrained, **kwargs)


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T[s2l5]: expansion 2, 5 blocks in the third stage."""
    return _create_vmamba('vmamba_tiny_s2l5', pretrained=pretrained, **kwargs)


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S[s1l20]: expansion 1, 20 blocks in the third stage."""
    return _create_vmamba('vmamba_small_s1l20', pretrained=pretrained, **kwargs)


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S[s2l15]: expansion 2, 15 blocks in the third stage."""
    return _create_vmamba('vmamba_small_s2l15', pretrained=pretrained, **kwargs)


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B[s1l20]: expansion 1, 20 blocks in the third stage."""
    return _create_vmamba('vmamba_base_s1l20', pretrained=pretrained, **kwargs)


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B[s2l15]: expansion 2, 15 blocks in the third stage."""
    return _create_vmamba('vmamba_base_s2l15', pretrained=pretrained, **kwargs)


@register_model
def vmamba_tiny_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla-VMamba-T."""
    return _create_vmamba('vmamba_tiny_v0', pretrained=pretrained, **kwargs)


@register_model
def vmamba_small_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla-VMamba-S."""
    return _create_vmamba('vmamba_small_v0', pretrained=pretrained, **kwargs)


@register_model
def vmamba_base_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla-VMamba-B."""
    return _create_vmamba('vmamba_base_v0', pretrained=pretrained, **kwargs)


@register_model
def test_vmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """A minimal VMamba v2, for fast tests."""
    return _create_vmamba('test_vmamba', pretrained=pretrained, **kwargs)


@register_model
def test_vmamba_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """A minimal VMamba v0, for fast tests."""
    return _create_vmamba('test_vmamba_v0', pretrained=pretrained, **kwargs)


# ------------------------------------------------------------------------------------------------- a start for ViM2

class VMambaConversion(NamedTuple):
    """What `convert_vmamba` made of a checkpoint.

    Attributes:
        state_dict: for the model; everything but what the checkpoint cannot give (`random` below).
        blocks: for each stage, the checkpoint's blocks that its token mixers start as.
        depths: number of blocks in each stage of the checkpoint.
        mapped: the model's key to the checkpoint's.
        initialized: the model's other keys, to how they start: 'identity' (channel mixers that pass on their input),
            'chain' (averages), 'random' (the model's own initialisation: a classifier or norm that is not there).
        unused: the checkpoint's keys that went nowhere, to the reason.
    """
    state_dict: Dict[str, Tensor]
    blocks: List[List[int]]
    depths: List[int]
    mapped: Dict[str, str]
    initialized: Dict[str, str]
    unused: Dict[str, str]


def spread_blocks(have: int, want: int) -> List[int]:
    """`want` of the blocks 0 … have - 1, evenly spread, with the first and the last: (9, 6) gives 0 2 3 5 6 8."""
    if want > have:
        raise ValueError(f'cannot choose {want} of {have} blocks')
    if want < 2:
        return [0] * want
    return [(2 * i * (have - 1) + want - 1) // (2 * (want - 1)) for i in range(want)]


def convert_vmamba(
        state_dict: Dict[str, Tensor],
        model: nn.Module,
        blocks: Optional[Sequence[Sequence[int]]] = None,
) -> VMambaConversion:
    """Weights of a ViM2 that starts as the VMamba of a checkpoint, restricted to some of its blocks.

    Args:
        state_dict: of VMamba's vanilla network, or of a detector or segmenter with it as `backbone.`.
        model: a `VisionMambaMixer`; it gives the names, and the values of what is left at its initialisation. It is
            not changed.
        blocks: for each stage, one block of the checkpoint per token mixer of the model, in the order in which they
            run. Default: evenly spread, `spread_blocks`.

    Raises:
        RuntimeError: this is no VMamba, or not the vanilla one, or of other depths, saying why. Whether shapes match
            is for the caller to check, as `checkpoint_filter_fn` does.
    """
    if not is_vmamba(state_dict):
        raise RuntimeError('the checkpoint holds no VMamba: it has no layers.0.blocks.0.self_attention.* or .op.*')
    unused = {}
    source = {}
    prefix = 'backbone.' if any(k.startswith('backbone.layers.') for k in state_dict) else ''
    for key in state_dict:
        if key.startswith(prefix):
            source[key[len(prefix):]] = key
        else:
            unused[key] = "outside the backbone: the detector's own neck and heads"
    _refuse_newer(source, state_dict)

    tokens = [[j for j, block in enumerate(stage.blocks) if isinstance(block.mixer, SelectiveTokenMixer)]
              for stage in model.stages]
    depths = _source_depths(source)
    blocks = _choose_blocks(depths, [len(t) for t in tokens], blocks)

    out: Dict[str, Tensor] = {}
    mapped: Dict[str, str] = {}
    has_norm = any(k in source for k in ('norm.weight', 'classifier.norm.weight'))
    unknown = []
    names = vmamba_names(source)
    for name, key in source.items():
        targets, why = _targets(name, names[name], tokens, blocks, has_norm)
        if why:
            unused[key] = why
        elif not targets:
            unknown.append(key)
        for target in targets:
            out[target], mapped[target] = state_dict[key], key
    if unknown:
        raise RuntimeError("the checkpoint holds parameters that VMamba's vanilla network does not have: "
                           + abridged(unknown))

    for target in [t for t in out if t.endswith('.mixer.in_proj.weight')]:  # VMamba's holds branch and gate
        mapped[target.replace('in_proj', 'gate_proj')] = mapped[target]
    out = upgrade_state_dict(out)
    initialized = {}
    channel_blocks = tuple(f'stages.{i}.blocks.{j}.' for i, stage in enumerate(model.stages)
                           for j in range(len(stage.blocks)) if j not in tokens[i])
    gives_norm = any(target.startswith('norm.') for target in out)
    for target, value in model.state_dict().items():
        if target in out:
            continue
        if '.averages.' in target:
            out[target], initialized[target] = torch.zeros_like(value), 'chain'
            out[target][-1] = 1.
        elif target.startswith(channel_blocks):
            last = target.endswith(('.mixer.out_proj.weight', '.mixer.fc2.weight', '.mixer.fc2.bias'))
            out[target], initialized[target] = torch.zeros_like(value) if last else value.clone(), 'identity'
        elif target.startswith('norm.') and not gives_norm:
            out[target], initialized[target] = value.clone(), 'random'
        elif target.startswith('head.'):
            # Not given: timm keeps the model's own for another number of classes, and otherwise says it is missing.
            initialized[target] = 'random'
    return VMambaConversion(out, blocks, depths, mapped, initialized, unused)


def _targets(
        key: str, name: Optional[str], tokens: List[List[int]], blocks: List[List[int]], has_norm: bool,
) -> Tuple[List[str], Optional[str]]:
    """The model's keys for one of the checkpoint's, or none and the reason; none without a reason: unknown.

    Args:
        key, name: the checkpoint's, and :class:`VMamba`'s.
    """
    match = _OUR_BLOCK.fullmatch(name or '')
    if match:
        stage, block = int(match[1]), int(match[2])
        places = [tokens[stage][i] for i, chosen in enumerate(blocks[stage]) if chosen == block]
        targets = [f'stages.{stage}.blocks.{place}.{match[3]}' for place in places]
        return targets, None if targets else f'block {block} of stage {stage + 1} was not chosen'
    match = _LEVEL_NORM.fullmatch(key)
    if match:
        if int(match[1]) == len(tokens) - 1 and not has_norm:  # in a backbone it stands for the final norm
            return [f'norm.{match[2]}'], None
        return [], f"the detector's norm of stage {int(match[1]) + 1}'s output"
    return ([name], None) if name else ([], None)


def _refuse_newer(source: Dict[str, str], state_dict: Dict[str, Tensor]) -> None:
    """Raise for VMamba of versions after the vanilla one, whose blocks compute something else, saying what."""
    block = next(k for k in source if re.match(r'layers\.0\.blocks\.0\.(self_attention|op)\.', k))
    mixer = re.match(r'layers\.0\.blocks\.0\.(self_attention|op)\.', block)[0]

    def shape(name: str) -> Tuple[int, ...]:
        return tuple(state_dict[source[name]].shape) if name in source else ()

    why = []
    out_proj, in_proj = shape(mixer + 'out_proj.weight'), shape(mixer + 'in_proj.weight')
    if len(out_proj) > 1 and in_proj and in_proj[0] != 2 * out_proj[1]:
        why.append(f'its mixers have no gate (in_proj has {in_proj[0]} rows, where branch and gate need '
                   f'{2 * out_proj[1]})')
    if any('.mlp.' in k for k in source):
        why.append('its blocks have an MLP')
    if mixer + 'conv2d.weight' in source and mixer + 'conv2d.bias' not in source:
        why.append('its convolution has no bias')
    if any(re.match(r'patch_embed\.[3-9]\.', k) for k in source):
        why.append('its patch embedding is two overlapping convolutions')
    if any(re.match(r'layers\.\d+\.downsample\.\d', k) for k in source):
        why.append('its down-sampling is a convolution, not patch merging')
    if mixer + 'dt_projs_weight' not in source or mixer + 'A_logs' not in source:
        why.append('its scans have other projections')
    if why:
        raise RuntimeError("this is a newer VMamba (v05 or later), whose weights compute something else than ViM2's "
                           "token mixers, which are those of the vanilla version (v0): " + '; '.join(why)
                           + '. Nothing of it can start a ViM2 (docs/conversion.md says why): use it as what it is, '
                             "timm.create_model('vmamba_tiny_s1l8', pretrained=True)")


def _source_depths(source: Dict[str, str]) -> List[int]:
    indices: Dict[int, set] = {}
    for name in source:
        match = re.match(_BLOCK, name)
        if match:
            indices.setdefault(int(match[1]), set()).add(int(match[2]))
    for stage, found in sorted(indices.items()):
        if found != set(range(len(found))):
            raise RuntimeError(f'the checkpoint is incomplete: stage {stage + 1} has only blocks '
                               + ', '.join(map(str, sorted(found))))
    if set(indices) != set(range(len(indices))):
        raise RuntimeError('the checkpoint is incomplete: it has only stages '
                           + ', '.join(str(i + 1) for i in sorted(indices)))
    return [len(indices[i]) for i in range(len(indices))]


def _choose_blocks(
        depths: List[int], wanted: List[int], blocks: Optional[Sequence[Sequence[int]]],
) -> List[List[int]]:
    if len(depths) != len(wanted):
        raise RuntimeError(f'the checkpoint has {len(depths)} stages, the model {len(wanted)}')
    if blocks is None:
        for i, (have, want) in enumerate(zip(depths, wanted)):
            if want > have:
                raise RuntimeError(f'stage {i + 1} of the model has {want} token mixers, the checkpoint only {have}: '
                                   'name a block for each with tools/convert_vmamba.py --blocks, some more than once')
        return [spread_blocks(have, want) for have, want in zip(depths, wanted)]
    if len(blocks) != len(wanted):
        raise RuntimeError(f'blocks are given for {len(blocks)} stages, the model has {len(wanted)}')
    for i, (chosen, have, want) in enumerate(zip(blocks, depths, wanted)):
        if len(chosen) != want:
            raise RuntimeError(f'stage {i + 1} of the model has {want} token mixers, but {len(chosen)} blocks are '
                               'given for it')
        wrong = [b for b in chosen if not 0 <= b < have]
        if wrong:
            raise RuntimeError(f'stage {i + 1} of the checkpoint has blocks 0 to {have - 1}, not {wrong[0]}')
    return [list(chosen) for chosen in blocks]
