"""TSM2, the time series MambaMixer

Paper: `MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection`
    - https://arxiv.org/abs/2403.19888

A forecaster of many variates: patches of each variate, selective mixers over the patches (causal) and over the variates
(both ways) in turn, learned weighted averages of all earlier features, a linear head. The mixers are those of ViM2. The
authors published neither code nor weights; docs/forecasting.md lists every decision that the paper leaves open.

Copyright 2025 the vim2 authors. Licensed under the Apache License 2.0.
"""
import os
from pathlib import Path
from typing import Any, Dict, Optional, Set, Tuple, Union

import torch
from huggingface_hub import PyTorchModelHubMixin
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from vim2 import pretrained
from vim2.layers import SelectiveTokenMixer, WeightedAverage

__all__ = ['TSM2', 'InstanceNorm', 'VariateMlp', 'model_arguments']

_FORMAT = 1  # of config.json; files without the field have this one


def model_arguments(config: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments of TSM2 that a config.json holds.

    Raises:
        ValueError: it is none, or of a newer version.
    """
    if not isinstance(config, dict):
        raise ValueError(f'TSM2: config.json must hold an object, it holds a {type(config).__name__}')
    found = config.get('format', 1)
    if found != _FORMAT or isinstance(found, bool):
        raise ValueError(f'TSM2: config.json has format {found!r}, this version of vim2 reads {_FORMAT}')
    return {k: v for k, v in config.items() if k != 'format'}


class InstanceNorm(nn.Module):
    """Reversible instance normalisation (RevIN, Kim et al., ICLR 2022).

    Each variate of each window is centred and scaled by its own statistics over the look-back, and the forecast is
    brought back by the same. The statistics are float32 whatever the dtype, and carry no gradient.
    """

    def __init__(self, num_variates: int, center: str = 'mean', affine: bool = True, eps: float = 1e-5, device=None,
                 dtype=None):
        """
        Args:
            num_variates: number of variates, M.
            center: what is subtracted: 'mean', or 'last' for the last value of the look-back (the reference code's
                `subtract_last`), with which a forecast of zeros repeats it.
            affine: a learned scale and shift per variate.
            eps: added to the variance, in squared units of the series.
        """
        super().__init__()
        if center not in ('mean', 'last'):
            raise ValueError(f"InstanceNorm: center must be 'mean' or 'last', got {center!r}")
        self.center = center
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_variates, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_variates, device=device, dtype=dtype)) if affine else None

    def statistics(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Centre and scale, each (B, 1, M) in float32 (float64 for float64), of x (B, T, M)."""
        x = x.detach()
        x = x if x.dtype == torch.float64 else x.float()
        center = x[:, -1:] if self.center == 'last' else x.mean(1, keepdim=True)
        return center, (x.var(1, keepdim=True, unbiased=False) + self.eps).sqrt()

    def normalize(self, x: Tensor, center: Tensor, scale: Tensor) -> Tensor:
        """(B, T, M) to (B, T, M)."""
        y = ((x - center) / scale).to(x.dtype)
        return y if self.weight is None else y * self.weight + self.bias

    def restore(self, y: Tensor, center: Tensor, scale: Tensor) -> Tensor:
        """The inverse, for a forecast (B, H, M)."""
        if self.weight is not None:
            y = (y - self.bias) / (self.weight + self.eps ** 2)  # as the reference code guards it
        return (y * scale + center).to(y.dtype)

    def extra_repr(self) -> str:
        return f'center={self.center}, affine={self.weight is not None}'


class VariateMlp(nn.Module):
    """A two-layer perceptron over the variates, the same for every feature: TSMixer's feature mixing.

    It stands in for the selective variate mixer in the paper's ablation (TSM2-MLP).
    """

    def __init__(self, num_variates: int, mlp_ratio: float = 4., device=None, dtype=None):
        super().__init__()
        self.mlp = Mlp(num_variates, hidden_features=max(1, int(mlp_ratio * num_variates)), device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, d) to (B, M, d)."""
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


class TimeSeriesBlock(nn.Module):
    """`x + dropout(mixer(norm(x)))` over (B, M, P, d), the mixer along the patches or along the variates.

    The normalisation is over patches and features at once: the 2-D normalisation of TSMixer, over time and features.
    """

    def __init__(self, mixer: nn.Module, along: str, num_patches: int, dim: int, norm: str = 'layer', drop: float = 0.,
                 device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        assert along in ('time', 'variates')
        self.along = along
        self.norm = (nn.LayerNorm((num_patches, dim), **dd) if norm == 'layer' else
                     nn.BatchNorm1d(num_patches * dim, **dd))
        self.mixer = mixer
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        B, M, P, d = x.shape
        if isinstance(self.norm, nn.LayerNorm):
            y = self.norm(x)
        else:
            y = self.norm(x.reshape(B * M, P * d)).reshape(B, M, P, d)
        if self.along == 'time':
            y = self.mixer(y.reshape(B * M, P, d)).reshape(B, M, P, d)
        else:
            y = self.mixer(y.transpose(1, 2).reshape(B * P, M, d)).reshape(B, P, M, d).transpose(1, 2)
        return x + self.drop(y)

    def extra_repr(self) -> str:
        return f'along={self.along}'


class TSM2(
        nn.Module,
        PyTorchModelHubMixin,
        library_name='vim2',
        pipeline_tag='time-series-forecasting',
        license='apache-2.0',
        tags=['mambamixer', 'tsm2'],
        paper_url='https://arxiv.org/abs/2403.19888',
):
    """TSM2: MambaMixer for time series. (B, lookback, M) to (B, horizon, M).

    `save_pretrained`, `from_pretrained` and `push_to_hub` are huggingface_hub's: weights in model.safetensors, these
    constructor arguments in config.json. Loading verifies the weights and refuses pickle files (vim2/pretrained.py);
    keys that do not match are an error unless `strict=False` is given.
    """

    def __init__(
            self,
            num_variates: int,
            lookback: int = 512,
            horizon: int = 96,
            patch_len: int = 16,
            stride: int = 8,
            d_model: int = 32,
            depth: int = 1,
            d_state: int = 16,
            expand: float = 2.,
            static_dim: int = 0,
            future_dim: int = 0,
            future_len: Optional[int] = None,
            past_dim: int = 0,
            variate_mixer: str = 's6',
            mlp_ratio: float = 4.,
            weighted_average: bool = True,
            instance_norm: bool = True,
            center: str = 'mean',
            affine: bool = True,
            norm: str = 'layer',
            drop_rate: float = 0.,
            head_drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            num_variates: number of series that are forecast together, M.
            lookback: number of past steps that are read, T.
            horizon: number of steps that are forecast, H.
            patch_len: steps in a patch.
            stride: steps between the starts of patches. The last patch ends with the look-back; where the stride does
                not divide, the first value is repeated to the left of it.
            d_model: width of a patch's features, d.
            depth: number of pairs of a time mixer and a variate mixer.
            d_state: size of the state of the mixers' scans, N.
            expand: inner width of the mixers over d.
            static_dim: static features of a variate, C_S; 0 for none.
            future_dim: features known for the future, C_Z, at each step and variate; 0 for none.
            future_len: steps for which they are given, T_Z. Default: horizon. Their projection has T_Z * C_Z * T
                weights; what is known of them over the look-back belongs into `past`, at a cost linear in T.
            past_dim: features known over the look-back, C_P, at each step and variate; 0 for none.
            variate_mixer: 's6', or 'mlp' for a perceptron over the variates in its place (TSM2-MLP), or 'none' for no
                mixing of the variates.
            mlp_ratio: hidden width of that perceptron over M.
            weighted_average: each mixer reads a learned average of all earlier outputs; False for the plain chain.
            instance_norm: reversible instance normalisation around the network.
            center, affine: its options, see `InstanceNorm`.
            norm: 2-D normalisation before each mixer, over patches and features: 'layer' or 'batch'.
            drop_rate: dropout of each mixer's output and of the patches' embedding.
            head_drop_rate: dropout before the head.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        for name, value in (('num_variates', num_variates), ('lookback', lookback), ('horizon', horizon),
                            ('patch_len', patch_len), ('stride', stride), ('d_model', d_model), ('depth', depth)):
            if value < 1:
                raise ValueError(f'TSM2: {name} must be at least 1, got {value}')
        if variate_mixer not in ('s6', 'mlp', 'none'):
            raise ValueError(f"TSM2: variate_mixer must be 's6', 'mlp' or 'none', got {variate_mixer!r}")
        if norm not in ('layer', 'batch'):
            raise ValueError(f"TSM2: norm must be 'layer' or 'batch', got {norm!r}")
        self.num_variates = num_variates
        self.lookback = lookback
        self.horizon = horizon
        self.patch_len = patch_len
        self.stride = stride
        self.static_dim = static_dim
        self.future_dim = future_dim
        self.future_len = future_len or horizon
        self.past_dim = past_dim
        self.weighted_average = weighted_average
        self.pad = patch_len - lookback if lookback < patch_len else -(lookback - patch_len) % stride
        per_segment = (lookback + self.pad - patch_len) // stride + 1
        self.num_patches = per_segment * (1 + (static_dim > 0) + (future_dim > 0))

        self.instance_norm = InstanceNorm(num_variates, center, affine, **dd) if instance_norm else None
        if future_dim:
            # over the variates, at each future step; without a norm, which would leave only the sign of one feature
            self.future_mixer = SelectiveTokenMixer(
                future_dim, expand=expand, d_state=d_state, ndim=1, num_scans=2, out_norm=False, **dd)
            self.future_proj = nn.Linear(self.future_len * future_dim, lookback, **dd)
        if static_dim:
            self.static_proj = nn.Linear(static_dim, lookback, **dd)
        self.patch_embed = nn.Linear(patch_len, d_model, **dd)
        if past_dim:  # added to the patches of the same steps
            self.past_embed = nn.Linear(patch_len * past_dim, d_model, bias=False, **dd)
        self.embed_drop = nn.Dropout(drop_rate)

        blocks = []
        for _ in range(depth):
            mixer = SelectiveTokenMixer(d_model, expand=expand, d_state=d_state, ndim=1, num_scans=1, **dd)
            blocks.append(TimeSeriesBlock(mixer, 'time', self.num_patches, d_model, norm, drop_rate, **dd))
            if variate_mixer == 'none':
                continue
            if variate_mixer == 's6':
                mixer = SelectiveTokenMixer(d_model, expand=expand, d_state=d_state, ndim=1, num_scans=2, **dd)
            else:
                mixer = VariateMlp(num_variates, mlp_ratio, **dd)
            blocks.append(TimeSeriesBlock(mixer, 'variates', self.num_patches, d_model, norm, drop_rate, **dd))
        self.blocks = nn.ModuleList(blocks)
        # one average per mixer, and one for the head
        self.averages = nn.ModuleList(
            [WeightedAverage(i + 1, **dd) for i in range(len(blocks) + 1)] if weighted_average else [])
        self.head_drop = nn.Dropout(head_drop_rate)
        self.head = nn.Linear(self.num_patches * d_model, horizon, **dd)
        self.blocks.apply(self._init_weights)
        # The first forecast is the centre of the window. A random head adds noise to every step that takes longer to
        # unlearn than there are steps before the network overfits (docs/forecasting.md, Training).
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def save_pretrained(self, save_directory: Union[str, Path], *, config: Optional[Dict[str, Any]] = None,
                        **kwargs: Any) -> Optional[str]:
        """huggingface_hub's; config.json gets the version of the format, too."""
        config = {**(self._hub_mixin_config if config is None else config), 'format': _FORMAT}
        return super().save_pretrained(save_directory, config=config, **kwargs)

    @classmethod
    def _from_pretrained(
            cls, *, model_id: str, revision: Optional[str], cache_dir: Optional[Union[str, Path]], force_download: bool,
            local_files_only: bool, token: Union[bool, str, None], map_location: str = 'cpu', strict: bool = True,
            config: Optional[Dict[str, Any]] = None, **model_kwargs: Any) -> 'TSM2':
        """What `from_pretrained` calls with config.json and the arguments in it."""
        model_arguments(config or {})
        model = cls(**model_kwargs)
        if os.path.isdir(model_id):
            folder = Path(model_id)
            pretrained.check_folder(folder)
            file = folder / pretrained.SAFETENSORS
            pretrained.check_bundled(file)
            if not file.is_file() and (folder / pretrained.PICKLE).is_file():
                file = folder / pretrained.PICKLE
        else:
            with pretrained.access(token, pretrained.pickle_allowed()):
                file, _ = pretrained.fetch_weights(model_id, revision, cache_dir=cache_dir,
                                                   force_download=force_download, local_files_only=local_files_only)
        load = cls._load_as_safetensor if file.suffix == '.safetensors' else cls._load_as_pickle
        return load(model, str(file), map_location, strict).eval()  # huggingface_hub's loaders did not always do it

    @staticmethod
    def _init_weights(m: nn.Module) -> None:
        if isinstance(m, nn.Linear):  # as in ViM2; S6's own parameters are none, and keep Mamba's initialisation
            trunc_normal_(m.weight, std=.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters of the state spaces (A, D, step sizes), norms, biases and averaging scalars."""
        s6 = ('A_logs', 'Ds', 'dt_projs_bias')
        return {n for n, p in self.named_parameters()
                if p.ndim <= 1 or n.endswith('.bias') or '.norm.' in n or n.rpartition('.')[2] in s6}

    def _check(self, x: Tensor, static: Optional[Tensor], future: Optional[Tensor], past: Optional[Tensor]) -> None:
        T, M = self.lookback, self.num_variates
        if x.ndim != 3 or x.shape[1:] != (T, M):
            raise ValueError(f'TSM2: x must be (batch, lookback {T}, variates {M}), got {tuple(x.shape)}')
        for name, value, dim, shape in (
                ('static', static, self.static_dim, (M, self.static_dim)),
                ('future', future, self.future_dim, (M, self.future_len, self.future_dim)),
                ('past', past, self.past_dim, (M, T, self.past_dim))):
            if (value is None) != (dim == 0):
                raise ValueError(f'TSM2: {name} inputs ' + (f'are missing ({name}_dim is {dim})' if value is None else
                                                            f'were given, but {name}_dim is 0'))
            if value is not None and value.shape != (x.shape[0], *shape):
                raise ValueError(f'TSM2: {name} must be {(x.shape[0], *shape)}, got {tuple(value.shape)}')

    def _patches(self, x: Tensor) -> Tensor:
        """(B, M, T) to (B, M, patches, patch_len)."""
        return F.pad(x, (self.pad, 0), mode='replicate').unfold(-1, self.patch_len, self.stride)

    def forward(self, x: Tensor, static: Optional[Tensor] = None, future: Optional[Tensor] = None,
                past: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            x: (B, lookback, M).
            static: (B, M, static_dim), if the model has static inputs.
            future: (B, M, future_len, future_dim), if it has future ones.
            past: (B, M, lookback, past_dim), if it has ones beside the look-back.

        Returns:
            (B, horizon, M), in the units of x.
        """
        self._check(x, static, future, past)
        if self.instance_norm is not None:
            center, scale = self.instance_norm.statistics(x)
            x = self.instance_norm.normalize(x, center, scale)
        patches = self.patch_embed(self._patches(x.transpose(1, 2)))
        if past is not None:
            B, M, T, C = past.shape
            beside = self._patches(past.permute(0, 1, 3, 2).reshape(B, M * C, T)).unflatten(1, (M, C))
            patches = patches + self.past_embed(beside.permute(0, 1, 3, 2, 4).flatten(3))  # (B, M, P, C * patch_len)
        segments = [patches]
        # The paper's input is x || Z_proj || S_proj, 3T long; each part is cut into patches of its own.
        if future is not None:
            B, M, L, C = future.shape
            mixed = future.transpose(1, 2).reshape(B * L, M, C)
            mixed = (mixed + self.future_mixer(mixed)).reshape(B, L, M, C).transpose(1, 2)
            segments.append(self.patch_embed(self._patches(self.future_proj(mixed.flatten(2)))))
        if static is not None:
            segments.append(self.patch_embed(self._patches(self.static_proj(static))))
        x = self.embed_drop(segments[0] if len(segments) == 1 else torch.cat(segments, dim=2))

        ys = [x]
        for i, block in enumerate(self.blocks):
            x = block(self.averages[i](ys) if self.weighted_average else x)
            ys.append(x)
        if self.weighted_average:
            x = self.averages[-1](ys)
        y = self.head(self.head_drop(x.flatten(2))).transpose(1, 2)
        if self.instance_norm is not None:
            y = self.instance_norm.restore(y, center, scale)
        return y
