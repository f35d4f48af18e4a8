"""ViM2, the vision MambaMixer

Paper: `MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection`
    - https://arxiv.org/abs/2403.19888

A hierarchical backbone of selective token mixers (four scans over the map), selective channel mixers (two scans along
the channels) and learned weighted averages of all earlier features of a stage. The authors published neither code nor
weights; docs/design.md lists every decision that the paper leaves open.

Copyright 2025 the vim2 authors. Licensed under the Apache License 2.0.
"""
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple, Type, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, Mlp
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from vim2.layers import SelectiveChannelMixer, SelectiveTokenMixer, TokenMlp, WeightedAverage, upgrade_state_dict
from .hierarchy import (
    ConvBlock, ConvDownsample, ConvStem, HierarchicalBackbone, PatchMerging, PoolDownsample, PoolStem, Stem)
from .loading import create, key_problems, published_cfgs, source_of
from .vmamba import convert_vmamba, is_vmamba

__all__ = ['VisionMambaMixer']


class MixerBlock(nn.Module):
    """`x + drop_path(mixer(norm(x)))`, over (B, H, W, d)."""

    def __init__(
            self,
            dim: int,
            mixer_layer: Callable[..., nn.Module],
            drop_path: float = 0.,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm = norm_layer(dim, **dd)
        self.mixer = mixer_layer(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


def mixer_order(token_depth: int, channel_depth: int) -> List[str]:
    """The mixers of a stage, the channel mixers spread evenly: (6, 3) is token, token, channel, three times over."""
    order = []
    for i in range(token_depth):
        due = (i + 1) * channel_depth // token_depth - i * channel_depth // token_depth
        order += ['token'] + ['channel'] * due
    return order if token_depth else ['channel'] * channel_depth


class VisionMambaMixerStage(nn.Module):
    """Down-sampling and a chain of mixers, each of which reads a weighted average of everything earlier in the stage.

    NCHW in and out, so that every way of taking features gives NCHW; NHWC in memory and inside, where Linear,
    LayerNorm and the scan want the channels contiguous. The permutations are views.
    """
    weighted_average: torch.jit.Final[bool]

    def __init__(
            self,
            dim: int,
            out_dim: int,
            mixer_layers: List[Callable[..., nn.Module]],
            downsample: Optional[Callable[..., nn.Module]] = PatchMerging,
            conv_depth: int = 0,
            weighted_average: bool = True,
            drop_path: Optional[List[float]] = None,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim, out_dim: channels in and out; the same without down-sampling.
            mixer_layers: what builds each mixer, from (dim, device=, dtype=).
            downsample: what builds the layer that the stage begins with, None for none.
            conv_depth: number of convolutional blocks before the mixers.
            weighted_average: learned average of all earlier outputs, else the plain chain.
            drop_path: stochastic depth rate of each mixer. Default: none.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.weighted_average = weighted_average
        self.grad_checkpointing = False
        drop_path = drop_path or [0.] * len(mixer_layers)
        if downsample is not None:
            self.downsample = downsample(dim, out_dim, norm_layer=norm_layer, **dd)
        else:
            assert dim == out_dim
            self.downsample = nn.Identity()
        self.convs = nn.Sequential(*[ConvBlock(out_dim, **dd) for _ in range(conv_depth)])
        self.blocks = nn.ModuleList([
            MixerBlock(out_dim, mixer_layer, drop_path=rate, norm_layer=norm_layer, **dd)
            for mixer_layer, rate in zip(mixer_layers, drop_path)])
        self.averages = nn.ModuleList(
            [WeightedAverage(i + 1, **dd) for i in range(len(mixer_layers))] if weighted_average else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(self.downsample(x.permute(0, 2, 3, 1)))
        if self.weighted_average:
            ys = [x]
            for average, block in zip(self.averages, self.blocks):
                x = average(ys)
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x)
                else:
                    x = block(x)
                ys.append(x)
        else:
            for block in self.blocks:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x)
                else:
                    x = block(x)
        return x.permute(0, 3, 1, 2)


def _per_stage(value: Any, num_stages: int, name: str) -> Tuple[Any, ...]:
    value = tuple(value) if isinstance(value, (list, tuple)) else (value,) * num_stages
    if len(value) != num_stages:
        raise ValueError(f'{name} must be one value or {num_stages}, one per stage; got {value}')
    return value


STEMS = {'patch': Stem, 'conv': ConvStem, 'pool': PoolStem}
DOWNSAMPLES = {'merge': PatchMerging, 'conv': ConvDownsample, 'pool': PoolDownsample}


class VisionMambaMixer(HierarchicalBackbone):
    """ViM2: MambaMixer for images, of any size of at least 32 x 32 pixels."""

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            patch_size: int = 4,
            stem: str = 'patch',
            downsample: str = 'merge',
            dims: Tuple[int, ...] = (96, 192, 384, 768),
            token_depths: Tuple[int, ...] = (2, 2, 6, 2),
            channel_depths: Tuple[int, ...] = (1, 1, 3, 1),
            conv_depths: Union[int, Tuple[int, ...]] = 0,
            token_expand: Union[float, Tuple[float, ...]] = 2.,
            channel_expand: Union[float, Tuple[float, ...]] = (2., 2., 2., 1.),
            d_state: int = 16,
            channel_d_state: Optional[int] = None,
            token_grid: int = 7,
            token_scans: int = 4,
            channel_scans: int = 2,
            token_mixer: str = 's6',
            channel_mixer: str = 's6',
            mlp_ratio: float = 4.,
            weighted_average: bool = True,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
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
            patch_size: side and stride of the stem's patches, in pixels.
            stem: 'patch' for non-overlapping patches, 'conv' for two 3 x 3 convolutions, 'pool' for 3 x 3 convolutions
                at full resolution with max pooling and batch normalisation.
            downsample: 'merge' for 2 x 2 patch merging between the stages, 'conv' for a 3 x 3 convolution of stride 2,
                'pool' for a 3 x 3 convolution with max pooling and batch normalisation.
            dims: width of each stage.
            token_depths, channel_depths: number of token and channel mixers in each stage; the channel mixers are
                spread evenly between the token mixers.
            conv_depths: number of convolutional blocks before the mixers, one value or one per stage: MambaVision's
                (arXiv 2407.08083), with batch normalisation. The paper has none.
            token_expand, channel_expand: inner width of the mixers over their width, one value or one per stage.
            d_state: size of the state of the token mixers' scans, N.
            channel_d_state: the same for the channel mixers. Default: d_state.
            token_grid: side of the token grid on which the channel mixers' projections and the token perceptrons act.
            token_scans: number of scan directions of the token mixers, 1 to 4.
            channel_scans: number of scan directions of the channel mixers, 1 or 2.
            token_mixer: 's6', or 'mlp' for a two-layer perceptron over the tokens of the token grid in its place.
            channel_mixer: 's6', or 'mlp' for a two-layer perceptron over the channels in its place. Both 'mlp',
                without weighted averages, is MLP-Mixer: no scan, and no convolution but the stem's.
            mlp_ratio: hidden width of those perceptrons over their width.
            weighted_average: each mixer reads a learned average of all earlier outputs of its stage; False for the
                plain chain, which without channel mixers is VMamba's vanilla network.
            norm_layer: normalisation over the last dimension.
            drop_rate: dropout before the classifier.
            drop_path_rate: stochastic depth rate of the last mixer, growing linearly from 0 at the first.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        num_stages = len(dims)
        for name, value, choices in (
                ('token_mixer', token_mixer, ('s6', 'mlp')), ('channel_mixer', channel_mixer, ('s6', 'mlp')),
                ('stem', stem, tuple(STEMS)), ('downsample', downsample, tuple(DOWNSAMPLES))):
            if value not in choices:
                names = ', '.join(f"'{c}'" for c in choices[:-1])
                raise ValueError(f"{name} must be {names} or '{choices[-1]}', got {value!r}")
        token_depths = _per_stage(token_depths, num_stages, 'token_depths')
        conv_depths = _per_stage(conv_depths, num_stages, 'conv_depths')
        channel_depths = _per_stage(channel_depths, num_stages, 'channel_depths')
        token_expand = _per_stage(token_expand, num_stages, 'token_expand')
        channel_expand = _per_stage(channel_expand, num_stages, 'channel_expand')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_fmt = 'NCHW'
        self.feature_info = []

        self.stem = STEMS[stem](in_chans, dims[0], patch_size=patch_size, norm_layer=norm_layer, **dd)

        orders = [mixer_order(t, c) for t, c in zip(token_depths, channel_depths)]
        num_mixers = sum(len(order) for order in orders)
        rates = [drop_path_rate * i / max(num_mixers - 1, 1) for i in range(num_mixers)]
        stages = []
        prev_dim, reduction, done = dims[0], patch_size, 0
        for i, (dim, order) in enumerate(zip(dims, orders)):
            if token_mixer == 's6':
                token_layer = partial(
                    SelectiveTokenMixer, expand=token_expand[i], d_state=d_state, num_scans=token_scans,
                    norm_layer=norm_layer)
            else:
                token_layer = partial(TokenMlp, mlp_ratio=mlp_ratio, token_grid=token_grid)
            if channel_mixer == 's6':
                channel_layer = partial(
                    SelectiveChannelMixer, expand=channel_expand[i], d_state=channel_d_state or d_state,
                    token_grid=token_grid, num_scans=channel_scans, norm_layer=norm_layer)
            else:
                channel_layer = partial(Mlp, hidden_features=int(mlp_ratio * dim))
            stages.append(VisionMambaMixerStage(
                prev_dim, dim, [token_layer if kind == 'token' else channel_layer for kind in order],
                downsample=DOWNSAMPLES[downsample] if i > 0 else None, conv_depth=conv_depths[i],
                weighted_average=weighted_average, drop_path=rates[done:done + len(order)],
                norm_layer=norm_layer, **dd))
            prev_dim, reduction, done = dim, reduction * (2 if i > 0 else 1), done + len(order)
            self.feature_info += [dict(num_chs=dim, reduction=reduction, module=f'stages.{i}')]
        self.stages = nn.Sequential(*stages)

        self.num_features = self.head_hidden_size = prev_dim
        self.norm = norm_layer(prev_dim, **dd)
        self.head = ClassifierHead(prev_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)

        self.apply(self._init_weights)


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: VisionMambaMixer) -> Dict[str, Tensor]:
    """Check that a checkpoint is one of this architecture, whatever its classifier and number of input channels.

    timm adapts those two, and then loads with strict=False, which would let a checkpoint of anything else pass.
    A checkpoint of version 0.1.0 gets today's names. One of VMamba's vanilla network is converted: the model starts as
    that network, with as many of its blocks, evenly spread, as the model has token mixers (tools/convert_vmamba.py
    lets one choose).

    Raises:
        RuntimeError: names the file and the keys that are missing, unexpected, or of another shape.
    """
    source, name = source_of(model)
    if is_vmamba(state_dict):
        try:
            state_dict = convert_vmamba(state_dict, model).state_dict
        except RuntimeError as e:
            raise RuntimeError(f'{source} cannot be converted to {name}: {e}') from None
    state_dict = upgrade_state_dict(state_dict)
    classifier = ('head.fc.weight', 'head.fc.bias')
    own = {k: tuple(v.shape) for k, v in model.state_dict().items() if k not in classifier}
    given = {k: tuple(v.shape) for k, v in state_dict.items() if k not in classifier}
    for key in ('stem.conv.weight', 'stem.conv1.weight'):
        if key in own and len(given.get(key, ())) == 4:
            given[key] = (given[key][0], own[key][1], *given[key][2:])
    problems = key_problems(own, given)
    if problems:
        raise RuntimeError(f'{source} is no checkpoint of {name}; its keys do not match.\n  ' + '\n  '.join(problems))
    return state_dict


def _create_vim2(variant: str, pretrained: bool = False, **kwargs: Any) -> VisionMambaMixer:
    num_stages = len(kwargs.get('dims', range(4)))
    return create(VisionMambaMixer, variant, pretrained, checkpoint_filter_fn,
                  dict(out_indices=tuple(range(num_stages)), flatten_sequential=True), **kwargs)


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'min_input_size': (3, 32, 32),
        'pool_size': (7, 7),
        'crop_pct': 0.9,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv',
        'classifier': 'head.fc',
        'paper_name': 'MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection',
        'paper_ids': 'arXiv:2403.19888',
        'license': 'apache-2.0',
        **kwargs,
    }


# What the architectures have in common with every set of weights of theirs.
_ARCHITECTURES = {
    'vim2_tiny': _cfg(),
    'vim2_small': _cfg(),
    'vim2_base': _cfg(),
    'vim2_mlp_tiny': _cfg(),
    'vim2_nano_patch2_32': _cfg(
        input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0, first_conv='stem.conv1'),
    'vim2_micro_patch4_64': _cfg(
        input_size=(3, 64, 64), pool_size=(4, 4), crop_pct=1.0, first_conv='stem.conv1'),
    'test_vim2': _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
}


default_cfgs = generate_default_cfgs(published_cfgs(_ARCHITECTURES))


@register_model
def vim2_tiny(pretrained: bool = False, **kwargs: Any) -> VisionMambaMixer:
    """ViM2-T (paper table 8)."""
    model_args = dict(dims=(96, 192, 384, 768), token_depths=(2, 2, 6, 2), channel_depths=(1, 1, 3, 1))
    return _create_vim2('vim2_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_small(pretrained: bool = False, **kwargs: Any) -> VisionMambaMixer:
    """ViM2-S (paper table 8)."""
    model_args = dict(dims=(96, 192, 384, 768), token_depths=(2, 2, 18, 2), channel_depths=(1, 1, 9, 1))
    return _create_vim2('vim2_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_base(pretrained: bool = False, **kwargs: Any) -> VisionMambaMixer:
    """ViM2-B (paper table 8)."""
    model_args = dict(dims=(128, 256, 512, 1024), token_depths=(2, 2, 18, 2), channel_depths=(1, 1, 9, 1))
    return _create_vim2('vim2_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_mlp_tiny(pretrained: bool = False, **kwargs: Any) -> VisionMambaMixer:
    """ViM2-MLP: ViM2-T with an MLP in place of each channel mixer, without weighted averaging."""
    model_args = dict(
        dims=(96, 192, 384, 768), token_depths=(2, 2, 6, 2), channel_depths=(1, 1, 3, 1),
        channel_mixer='mlp', weighted_average=False)
    return _create_vim2('vim2_mlp_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_nano_patch2_32(pretrained: bool = False, **kwargs: Any) -> VisionMambaMixer:
    """A small ViM2 for images of 32 x 32: 16 x 16, 8 x 8 and 4 x 4 tokens, convolutions before and between them."""
    model_args = dict(
        patch_size=2, stem='pool', downsample='pool', dims=(64, 192, 256), conv_depths=(1, 1, 0),
        token_depths=(0, 1, 1), channel_depths=(0, 0, 1), token_expand=1., channel_expand=1., d_state=4, token_grid=4)
    return _create_vim2('vim2_nano_patch2_32', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_micro_patch4_64(pretrained: bool = False, **kwargs: Any) -> VisionMambaMixer:
    """A small ViM2 for images of 64 x 64: 16 x 16, 8 x 8 and 4 x 4 tokens, convolutions before and between them."""
    model_args = dict(
        patch_size=4, stem='conv', downsample='conv', dims=(88, 176, 352), token_depths=(2, 4, 2),
        channel_depths=(1, 2, 1), channel_expand=(2., 2., 1.), d_state=4, token_grid=4)
    return _create_vim2('vim2_micro_patch4_64', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_vim2(pretrained: bool = False, **kwargs: Any) -> VisionMambaMixer:
    """A minimal ViM2 with every kind of layer, for fast tests."""
    model_args = dict(
        dims=(8, 16, 24, 32), token_depths=(1, 1, 2, 1), channel_depths=(1, 0, 1, 1), d_state=2, token_grid=2)
    return _create_vim2('test_vim2', pretrained=pretrained, **dict(model_args, **kwargs))
