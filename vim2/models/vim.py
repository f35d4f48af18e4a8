"""Vim, Vision Mamba

Paper: `Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model`
    - https://arxiv.org/abs/2401.09417
Code and weights: https://github.com/hustvl/Vim (Apache-2.0)

A plain sequence of patches with the class token in its middle. Each block scans it forward and backward: one input
projection, and a convolution, projections, A and D of its own for either direction; both are gated and averaged. That
is MambaMixer's token mixer over a sequence of two directions, without its norm, times one half.

Written from the paper and from the published configurations; the weights are the authors', under their own names
(`layers.0.mixer.x_proj_b.weight`), and are renamed when they are loaded.

Copyright 2025 the vim2 authors. Licensed under the Apache License 2.0.
"""
import math
import re
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, _assert, lecun_normal_, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from vim2.layers import SelectiveTokenMixer
from .loading import create, key_problems, published_cfgs, source_of

__all__ = ['Vim']


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


torch.fx.wrap('at_least_float32')  # it looks at the dtype


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32 at least; its result has the weight's dtype."""

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight = at_least_float32(self.weight)
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, self.eps).to(self.weight.dtype)


class PatchEmbed(nn.Module):
    """Patches, which overlap if the stride is smaller; (B, C, H, W) to (B, D, h, w)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, stride: int, device=None, dtype=None):
        super().__init__()
        self.patch_size = patch_size
        self.stride = stride
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=stride, device=device, dtype=dtype)

    def grid(self, height: int, width: int) -> Tuple[int, int]:
        """Rows and columns of patches of an image."""
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    def forward(self, x: Tensor) -> Tensor:
        _assert(x.shape[2] % self.stride == 0, 'the height of images must be a multiple of the stride of the patches')
        _assert(x.shape[3] % self.stride == 0, 'the width of images must be a multiple of the stride of the patches')
        return self.proj(x)


def resample_position_embedding(embedding: Tensor, old: Tuple[int, int], new: Tuple[int, int]) -> Tensor:
    """The position embedding of a grid of patches for another one, bicubic; the class token, in the middle, keeps its.

    Args:
        embedding: (1, h w + 1, D), the class token at h w // 2.
        old, new: rows and columns.

    Returns:
        (1, h' w' + 1, D), the class token at h' w' // 2.
    """
    if old[0] == new[0] and old[1] == new[1]:
        return embedding
    middle, count = old[0] * old[1] // 2, new[0] * new[1]
    grid = torch.cat([embedding[:, :middle], embedding[:, middle + 1:]], dim=1)
    grid = grid.reshape(1, old[0], old[1], -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=[new[0], new[1]], mode='bicubic', antialias=True, align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, count, -1).to(embedding.dtype)
    return torch.cat([grid[:, :count // 2], embedding[:, middle:middle + 1], grid[:, count // 2:]], dim=1)


torch.fx.wrap('resample_position_embedding')  # it looks at sizes


class VimBlock(nn.Module):
    """`residual += hidden`, then the mixer of its norm; the residual is float32, whatever the mixer computes in."""

    def __init__(
            self,
            dim: int,
            expand: float = 2.,
            d_state: int = 16,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm = RMSNorm(dim, **dd)
        self.mixer = SelectiveTokenMixer(
            dim, expand=expand, d_state=d_state, ndim=1, num_scans=2, out_norm=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, hidden: Tensor, residual: Tensor) -> Tuple[Tensor, Tensor]:
        """Tokens (B, L, D) are the sum of both; so are those that are returned."""
        residual = residual + hidden
        # the mean of the directions: the mixer's last layer is linear, without a bias
        return self.drop_path(self.mixer(self.norm(residual)) * 0.5), residual


class Vim(nn.Module):
    """Vim, for images whose sides are multiples of the stride of its patches."""

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'token',
            img_size: Union[int, Tuple[int, int]] = 224,
            patch_size: int = 16,
            stride: Optional[int] = None,
            embed_dim: int = 192,
            depth: int = 24,
            expand: float = 2.,
            d_state: int = 16,
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_chans: number of input channels.
            num_classes: number of classes, 0 for no classifier.
            global_pool: 'token' (the class token), 'avg' (the mean of the patches) or '' (no pooling).
            img_size: height and width in pixels that the position embedding is for; it is resampled for others.
            patch_size, stride: side and distance of the patches, in pixels. Default of the stride: the patch size.
            embed_dim: width, D.
            depth: number of blocks.
            expand: inner width of the mixers over their width.
            d_state: size of the state of the scans, N.
            drop_rate, pos_drop_rate: dropout before the classifier, and after the position embedding.
            drop_path_rate: stochastic depth rate of the last block, growing linearly from 0 at the first.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if global_pool not in ('token', 'avg', ''):
            raise ValueError(f"global_pool must be 'token', 'avg' or '', got {global_pool!r}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 0  # the class token is in the middle
        self.grad_checkpointing = False
        stride = stride or patch_size
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, stride, **dd)
        self.grid_size = self.patch_embed.grid(height, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid_size[0] * self.grid_size[1] + 1, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates = torch.linspace(0, drop_path_rate, depth, device='cpu').tolist()
        self.blocks = nn.ModuleList([
            VimBlock(embed_dim, expand=expand, d_state=d_state, drop_path=rate, **dd) for rate in rates])
        self.feature_info = [dict(num_chs=embed_dim, reduction=stride, module=f'blocks.{i}') for i in range(depth)]
        self.norm = RMSNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """As Vim; S6's own parameters have Mamba's initialisation."""
        trunc_normal_(self.cls_token, std=.02)
        trunc_normal_(self.pos_embed, std=.02)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for block in self.blocks:
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
            with torch.no_grad():
                block.mixer.out_proj.weight /= math.sqrt(len(self.blocks))
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters of the state spaces (A, D, step sizes' biases), embeddings, norms and biases."""
        return {n for n, p in self.named_parameters()
                if p.ndim <= 1 or n.rpartition('.')[2] in ('A_logs', 'Ds', 'dt_projs_bias', 'cls_token', 'pos_embed')}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Layer groups for layer-wise learning rate decay."""
        return dict(
            stem=r'^cls_token|^pos_embed|^patch_embed',
            blocks=[(r'^blocks\.(\d+)' if not coarse else r'^blocks', None if not coarse else (0,)),
                    (r'^norm', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier by a new one for `num_classes`, 0 for none; change the pooling if it is given."""
        self.num_classes = num_classes
        if global_pool is not None:
            if global_pool not in ('token', 'avg', ''):
                raise ValueError(f"global_pool must be 'token', 'avg' or '', got {global_pool!r}")
            self.global_pool = global_pool
        weight = self.patch_embed.proj.weight
        self.head = nn.Linear(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype) \
            if num_classes > 0 else nn.Identity()

    def _tokens(self, x: Tensor) -> Tuple[Tensor, int, int]:
        """Images (B, C, H, W) to tokens (B, h w + 1, D), the class token at h w // 2; and h and w."""
        x = self.patch_embed(x)
        height, width = x.shape[2], x.shape[3]
        x = x.flatten(2).transpose(1, 2)
        middle = height * width // 2
        x = torch.cat([x[:, :middle], self.cls_token.expand(x.shape[0], -1, -1), x[:, middle:]], dim=1)
        x = x + resample_position_embedding(self.pos_embed, self.grid_size, (height, width))
        return self.pos_drop(x), height, width

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Forward pass that also returns the outputs of blocks.

        Args:
            x: images, (B, C, H, W).
            indices: the last n blocks if an int, all if None, these blocks if a sequence.
            return_prefix_tokens: return (patches, class token (B, 1, D)) for each.
            norm: apply the final norm to each.
            stop_early: do not run blocks after the last one asked for.
            output_fmt: 'NCHW' for maps, 'NLC' for the patches as a sequence; both without the class token.
            intermediates_only: return only the intermediates.

        Returns:
            The intermediates, or (final features as of `forward_features`, intermediates).
        """
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        hidden, height, width = self._tokens(x)
        middle = height * width // 2
        intermediates = []
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            blocks = self.blocks
        else:
            blocks = self.blocks[:max_index + 1]
        hidden, residual = self._start(hidden)
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                hidden, residual = checkpoint(block, hidden, residual)
            else:
                hidden, residual = block(hidden, residual)
            if i in take_indices:
                y = residual + hidden
                y = self.norm(y) if norm else y
                patches = torch.cat([y[:, :middle], y[:, middle + 1:]], dim=1)
                if output_fmt == 'NCHW':
                    patches = patches.transpose(1, 2).reshape(y.shape[0], -1, height, width)
                intermediates.append((patches, y[:, middle:middle + 1]) if return_prefix_tokens else patches)
        if intermediates_only:
            return intermediates
        return self.norm(residual + hidden), intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the blocks after the last one asked for, and what comes after them."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[:max_index + 1]
        self.feature_info = self.feature_info[:max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def _start(self, tokens: Tensor) -> Tuple[Tensor, Tensor]:
        """Hidden state and residual before the first block."""
        return torch.zeros_like(tokens), at_least_float32(tokens)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens, (B, h w + 1, D), the class token at h w // 2."""
        hidden, residual = self._start(self._tokens(x)[0])
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                hidden, residual = checkpoint(block, hidden, residual)
            else:
                hidden, residual = block(hidden, residual)
        return self.norm(residual + hidden)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (B, h w + 1, D) to (B, D), or to themselves without pooling."""
        middle = (x.shape[1] - 1) // 2
        if self.global_pool == 'token':
            return x[:, middle]
        if self.global_pool == 'avg':
            return (x.sum(1) - x[:, middle]) / (x.shape[1] - 1)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# --------------------------------------------------------------------------------------------------- published weights

_MIXER = re.compile(r'layers\.(\d+)\.mixer\.(.+)')
# Ours, and Vim's for the forward and the backward direction.
_PAIRS = {
    's6.x_proj_weight': ('x_proj.weight', 'x_proj_b.weight'),
    's6.dt_projs_weight': ('dt_proj.weight', 'dt_proj_b.weight'),
    's6.dt_projs_bias': ('dt_proj.bias', 'dt_proj_b.bias'), 's6.A_logs': ('A_log', 'A_b_log'), 's6.Ds': ('D', 'D_b')}
_SINGLE = {
    'out_proj.weight': 'out_proj.weight', 'conv1d.weight': 'conv1d.0.weight', 'conv1d.bias': 'conv1d.0.bias',
    'conv1d_b.weight': 'conv1d.1.weight', 'conv1d_b.bias': 'conv1d.1.bias'}


def is_vim(keys: Any) -> bool:
    """Whether these are the keys of a published Vim."""
    return 'layers.0.mixer.A_b_log' in keys


def rename_vim(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """A published state dict with the names and shapes of :class:`Vim`; what it does not have keeps its name."""
    out = {}
    for key, value in state_dict.items():
        match = _MIXER.fullmatch(key)
        if match is None:
            name = re.sub(r'^layers\.(\d+)\.norm\.', r'blocks.\1.norm.', key)
            out[re.sub(r'^norm_f\.', 'norm.', name)] = value
            continue
        theirs, ours = f'layers.{match[1]}.mixer.', f'blocks.{match[1]}.mixer.'
        if match[2] in _SINGLE:
            out[ours + _SINGLE[match[2]]] = value
        elif match[2] == 'in_proj.weight':
            out[ours + 'in_proj.weight'], out[ours + 'gate_proj.weight'] = value.chunk(2)
        else:
            pairs = [(name, pair) for name, pair in _PAIRS.items() if match[2] in pair]
            if pairs and all(theirs + part in state_dict for part in pairs[0][1]):
                name, (first, second) = pairs[0]
                join = torch.cat if name in ('s6.A_logs', 's6.Ds') else torch.stack
                out[ours + name] = join([state_dict[theirs + first], state_dict[theirs + second]])
            else:
                out[key] = value
    return out


def describe_vim(state_dict: Dict[str, Tensor]) -> Dict[str, Any]:
    """The arguments that tell the published configurations apart, of a renamed state dict."""
    blocks = [int(m[1]) for m in (re.match(r'blocks\.(\d+)\.', k) for k in state_dict) if m]
    embedding = state_dict.get('pos_embed')
    patches = embedding.shape[1] - 1 if embedding is not None else 0
    return dict(embed_dim=embedding.shape[2] if embedding is not None else 0, depth=max(blocks, default=-1) + 1,
                patches=patches)


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: Vim) -> Dict[str, Tensor]:
    """The weights of a Vim, published or saved here, under the model's names; any classifier and input channels.

    The position embedding is resampled if the model was made for another `img_size`.

    Raises:
        RuntimeError: names the file, and the configuration that it is of, or the keys that do not match.
    """
    source, name = source_of(model)
    state_dict = rename_vim(state_dict) if is_vim(state_dict) else dict(state_dict)
    found = describe_vim(state_dict)
    native = model.patch_embed.grid(*_native_size(model))
    side = math.isqrt(found['patches'])
    if 'pos_embed' in state_dict and state_dict['pos_embed'].shape != model.pos_embed.shape \
            and native == (side, side) and side * side == found['patches']:
        state_dict['pos_embed'] = resample_position_embedding(state_dict['pos_embed'], native, model.grid_size)
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in state_dict.items()}
    for shapes in (own, given):
        for key in ('head.weight', 'head.bias'):
            shapes.pop(key, None)
        if len(shapes.get('patch_embed.proj.weight', ())) == 4:
            shapes['patch_embed.proj.weight'] = (shapes['patch_embed.proj.weight'][0], 0,
                                                 *shapes['patch_embed.proj.weight'][2:])
    problems = key_problems(own, given)
    if problems:
        fits = [n for n, args in _ARGUMENTS.items() if found == dict(
            embed_dim=args['embed_dim'], depth=args['depth'], patches=_patches(args))]
        if fits and fits[0] != name:
            why = f"it is one of {fits[0]}: timm.create_model('{fits[0]}', …)"
        elif fits or found == describe_vim(model.state_dict()):
            why = 'its keys do not match'
        elif found['depth'] and found['embed_dim']:
            why = 'it looks like a Vim of ' + ', '.join(f'{k} {v}' for k, v in found.items())
        else:
            why = 'it holds no Vim'
        raise RuntimeError(f'{source} is no checkpoint of {name}; {why}.\n  ' + '\n  '.join(problems))
    return state_dict


def _native_size(model: Vim) -> Tuple[int, int]:
    """The image size that the weights of a model's configuration are for."""
    size = getattr(model, 'pretrained_cfg', {}).get('input_size') or (3, 224, 224)
    return size[1], size[2]


def _patches(arguments: Dict[str, Any]) -> int:
    patch = arguments.get('patch_size', 16)
    return ((arguments.get('img_size', 224) - patch) // arguments.get('stride', patch) + 1) ** 2


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> Vim:
    out_indices = kwargs.pop('out_indices', 3)
    return create(Vim, variant, pretrained, checkpoint_filter_fn, dict(out_indices=out_indices, feature_cls='getter'),
                  ema_by_tag=True, **dict(_ARGUMENTS[variant], **kwargs))


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'min_input_size': (3, 32, 32),
        'pool_size': None,
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'paper_name': 'Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model',
        'paper_ids': 'arXiv:2401.09417',
        'origin_url': 'https://github.com/hustvl/Vim',
        'license': 'apache-2.0',
        **kwargs,
    }


_ARGUMENTS = {
    'vim_tiny_patch16_224': dict(embed_dim=192, depth=24),
    'vim_tiny_patch16_stride8_224': dict(embed_dim=192, depth=24, stride=8),
    'vim_small_patch16_224': dict(embed_dim=384, depth=24),
    'vim_small_patch16_stride8_224': dict(embed_dim=384, depth=24, stride=8),
    'vim_base_patch16_224': dict(embed_dim=768, depth=24),
    'test_vim': dict(img_size=64, embed_dim=16, depth=3, d_state=2),
}
default_cfgs = generate_default_cfgs(published_cfgs({
    name: _cfg(**dict(input_size=(3, 64, 64), origin_url=None) if name == 'test_vim' else {}) for name in _ARGUMENTS}))


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti."""
    return _create_vim('vim_tiny_patch16_224', pretrained=pretrained, **kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti+, fine-tuned with overlapping patches."""
    return _create_vim('vim_tiny_patch16_stride8_224', pretrained=pretrained, **kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S."""
    return _create_vim('vim_small_patch16_224', pretrained=pretrained, **kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S+, fine-tuned with overlapping patches."""
    return _create_vim('vim_small_patch16_stride8_224', pretrained=pretrained, **kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B."""
    return _create_vim('vim_base_patch16_224', pretrained=pretrained, **kwargs)


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:
    """A minimal Vim, for fast tests."""
    return _create_vim('test_vim', pretrained=pretrained, **kwargs)
