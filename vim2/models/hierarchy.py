"""What hierarchical backbones have in common: stem, patch merging, and the interface of a timm model."""
import math
from typing import Any, Dict, List, Optional, Set, Tuple, Type, Union

import torch
from timm.layers import DropPath, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    'ConvBlock', 'ConvDownsample', 'ConvStem', 'HierarchicalBackbone', 'PatchMerging', 'PoolDownsample', 'PoolStem',
    'Stem']


class Stem(nn.Module):
    """Non-overlapping patches and LayerNorm; (B, C, H, W) to (B, d, ceil(H / patch), ceil(W / patch))."""

    def __init__(
            self,
            in_chans: int,
            dim: int,
            patch_size: int = 4,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.patch_size = patch_size
        self.conv = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        _, _, H, W = x.shape
        p = self.patch_size
        h, w = (H + p - 1) // p, (W + p - 1) // p
        x = F.pad(x, (0, w * p - W, 0, h * p - H))
        x = self.conv(x).permute(0, 2, 3, 1)
        return self.norm(x).permute(0, 3, 1, 2)


class ConvStem(nn.Module):
    """Overlapping patches by 3 x 3 convolutions, as VMamba's later versions have them; sizes as :class:`Stem`.

    A convolution, LayerNorm and GELU, and one more convolution with LayerNorm; each of stride 2 while the patch size
    asks for it, the last ones first.
    """

    def __init__(
            self,
            in_chans: int,
            dim: int,
            patch_size: int = 4,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if patch_size not in (1, 2, 4):
            raise ValueError(f'a convolutional stem has a patch size of 1, 2 or 4, not {patch_size}')
        self.patch_size = patch_size
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2 if patch_size == 4 else 1, padding=1, **dd)
        self.norm1 = norm_layer(dim // 2, **dd)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=1 if patch_size == 1 else 2, padding=1, **dd)
        self.norm2 = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x).permute(0, 2, 3, 1))
        x = self.conv2(F.gelu(x).permute(0, 3, 1, 2))
        return self.norm2(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvDownsample(nn.Module):
    """A 3 x 3 convolution of stride 2 and LayerNorm; (B, H, W, d) to (B, ceil(H / 2), ceil(W / 2), out_dim)."""

    def __init__(
            self,
            dim: int,
            out_dim: int,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm = norm_layer(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def _max_pool(x: Tensor) -> Tensor:
    """2 x 2 max pooling; odd sizes are rounded up."""
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():  # ceil_mode, and a pooled channels-last map, would tie free sizes to others
            H, W = x.shape[2:]
            x = F.pad(x.contiguous(), (0, (W + 1) // 2 * 2 - W, 0, (H + 1) // 2 * 2 - H), value=-math.inf)
            return F.max_pool2d(x, 2)
    return F.max_pool2d(x, 2, ceil_mode=True)


class PoolDownsample(nn.Module):
    """A 3 x 3 convolution, 2 x 2 max pooling, batch normalisation and GELU.

    (B, H, W, d) to (B, ceil(H / 2), ceil(W / 2), out_dim). What the fastest trainings on CIFAR-10 have between their
    stages (Jordan, arXiv 2404.00498, section 3): the convolution sees every position, and the pooling picks.
    """

    def __init__(
            self,
            dim: int,
            out_dim: int,
            norm_layer: Optional[Type[nn.Module]] = None,
            device=None,
            dtype=None,
    ):
        """
        Args:
            norm_layer: ignored, the other ways of down-sampling have it.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv = nn.Conv2d(dim, out_dim, 3, padding=1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = _max_pool(self.conv(x.permute(0, 3, 1, 2)))
        return F.gelu(self.norm(x)).permute(0, 2, 3, 1)


class PoolStem(nn.Module):
    """Overlapping patches by 3 x 3 convolutions at full resolution and max pooling; sizes as :class:`Stem`.

    A convolution with batch normalisation and GELU, and a :class:`PoolDownsample` for each halving of the patch size.
    """

    def __init__(
            self,
            in_chans: int,
            dim: int,
            patch_size: int = 4,
            norm_layer: Optional[Type[nn.Module]] = None,
            device=None,
            dtype=None,
    ):
        """
        Args:
            norm_layer: ignored, the other stems have it.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if patch_size not in (2, 4):
            raise ValueError(f'a stem with pooling has a patch size of 2 or 4, not {patch_size}')
        self.patch_size = patch_size
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, padding=1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        dims = [dim // 2] + [dim] * (1 if patch_size == 2 else 2)
        self.pools = nn.Sequential(*[PoolDownsample(d, out, **dd) for d, out in zip(dims, dims[1:])])

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(x.contiguous(memory_format=torch.channels_last))))
        return self.pools(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation around a residual, as MambaVision's first stages have them.

    `x + drop_path(bn(conv(gelu(bn(conv(x))))))`, over (B, H, W, d): MambaVision, arXiv 2407.08083, equation 1. For maps
    of many tokens and few channels, where a convolution reaches several times the arithmetic rate of a scan.
    """

    def __init__(self, dim: int, drop_path: float = 0., device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.norm1(self.conv1(x.permute(0, 3, 1, 2))))  # the permutations are views: channels-last
        return x + self.drop_path(self.norm2(self.conv2(y)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """2x2 patch merging (Swin, VMamba): LayerNorm and Linear over the four neighbours; odd sizes are padded.

    (B, H, W, d) to (B, ceil(H / 2), ceil(W / 2), out_dim).
    """

    def __init__(
            self,
            dim: int,
            out_dim: int,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm = norm_layer(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        h, w = (H + 1) // 2, (W + 1) // 2
        x = F.pad(x, (0, 0, 0, 2 * w - W, 0, 2 * h - H))
        x = x.reshape(B, h, 2, w, 2, C).permute(0, 1, 3, 4, 2, 5).reshape(B, h, w, 4 * C)
        return self.reduction(self.norm(x))


class HierarchicalBackbone(nn.Module):
    """The timm interface of a network of `stem`, `stages` (a Sequential), `norm` and `head` (a ClassifierHead).

    NCHW between the parts. A subclass builds them, and sets `num_classes`, `num_features`, `head_hidden_size` and
    `feature_info`, which has one entry a stage. `norm` is over the last dimension; a stage has `downsample`, `blocks`
    and `grad_checkpointing`.
    """

    def _init_weights(self, m: nn.Module) -> None:
        if isinstance(m, nn.Linear):  # S6's own parameters are none, and keep Mamba's initialisation
            trunc_normal_(m.weight, std=.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters of the state spaces (A, D, step sizes' biases), norms, biases and scalars."""
        return {n for n, p in self.named_parameters()
                if p.ndim <= 1 or n.rpartition('.')[2] in ('A_logs', 'Ds', 'dt_projs_bias')}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Layer groups for layer-wise learning rate decay; a mixer and the average that it reads are one group."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.(?:downsample|convs)', (0,)),
                (r'^stages\.(\d+)\.(?:blocks|averages)\.(\d+)', None),
                (r'^norm', (99999,)),
            ])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each mixer in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier by a new one for `num_classes`, 0 for none; change the pooling if it is given."""
        self.num_classes = num_classes
        self.head.in_features = self.num_features  # fewer after pruning
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Forward pass that also returns the outputs of stages.

        Args:
            x: images, (B, C, H, W).
            indices: the last n stages if an int, all if None, these stages if a sequence.
            norm: apply the final norm to the last stage's output (it is sized for no other).
            stop_early: do not run stages after the last one asked for.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: return only the intermediates.

        Returns:
            The intermediates, or (final features as of `forward_features`, intermediates).
        """
        assert output_fmt in ('NCHW', 'NHWC'), 'Output format must be one of NCHW or NHWC.'
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates = []
        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        i = 0
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                y = self._final_norm(x) if norm and i == last else x
                intermediates.append(y.permute(0, 2, 3, 1) if output_fmt == 'NHWC' else y)
        if intermediates_only:
            return intermediates
        if i == last:
            x = self._final_norm(x)
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the stages after the last one asked for, and what comes after them."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        self.feature_info = self.feature_info[:max_index + 1]
        if prune_norm or prune_end:
            self.norm = nn.Identity()  # sized for the last stage
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def _final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised features of the last stage, (B, dims[-1], H / 32, W / 32) with a stem of stride 4."""
        x = self.stem(x)
        x = self.stages(x)
        return self._final_norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)
