#!/usr/bin/env python
"""Pictures of what a ViM2 selects in an image: step sizes, weighted averages, effective receptive field.

    python tools/inspect_model.py --out pictures
    python tools/inspect_model.py photo.jpg --model local-dir:output/train/RUN/model --img-size 224 --out pictures

A step size (Δ) says how much of a token, or of a channel, a scan writes into its state and how much of the state it
forgets: near 0 the token is passed over, large ones reset the state. They are recorded from the scans' own arguments
while the model runs. The receptive field is the norm of the derivative of the features at the centre of a stage's
output with respect to each pixel.
"""
import argparse
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from timm.data import create_transform
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import _common as common
from _common import UserError
from predict import Unreadable, read_picture

_CHELSEA = Path(__file__).resolve().parent / 'assets' / 'chelsea.jpg'
_MAP_DIRECTIONS = ('row-major →', 'column-major ↓', 'reversed row-major ←', 'reversed column-major ↑')
_CHANNEL_DIRECTIONS = ('upwards →', 'downwards ←')


# ----------------------------------------------------------------------------------------------------- measurements

class Mixer(NamedTuple):
    """Where a mixer sits: `block` counts from 0 among all mixers of its stage, which is how it is labelled from 1."""
    stage: int
    block: int


class _ScanRecorder(TorchDispatchMode):
    """Keeps the step sizes that each scan is called with; what it computes stays as it is."""

    def __init__(self):
        super().__init__()
        self.current: Optional[Mixer] = None  # the mixer that was entered last: no scan runs outside of one
        self.steps: Dict[Mixer, List[torch.Tensor]] = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.vim2.scan_forward.default, torch.ops.vim2.scan.default):  # the latter in inference mode
            from vim2.ops.low_rank import expand_delta
            u, delta, bias, weight, softplus = args[0], args[1], args[7], args[8], args[9]
            delta = expand_delta(delta, weight, u).detach().float()
            if bias is not None:
                delta = delta + bias.float()[:, :, None, None]
            self.steps[self.current].append(F.softplus(delta) if softplus else delta)
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_steps(model: torch.nn.Module):
    """Inside, every forward pass adds to the dict that this gives: for each mixer the step sizes (after softplus) of
    its scans in the order of the calls, each (B, K, E, H, W); a scan along channels has K = H = 1, W channels and E
    tokens."""
    from vim2.layers import SelectiveChannelMixer, SelectiveTokenMixer
    recorder, handles = _ScanRecorder(), []

    def enter(mixer: Mixer):
        def hook(*_):
            recorder.current = mixer
        return hook

    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            if isinstance(block.mixer, (SelectiveTokenMixer, SelectiveChannelMixer)):
                handles.append(block.mixer.register_forward_pre_hook(enter(Mixer(i, j))))
    try:
        with recorder:
            yield recorder.steps
    finally:
        for handle in handles:
            handle.remove()


class Selection(NamedTuple):
    """Step sizes of one image.

    Attributes:
        tokens: of each token mixer, (K, H, W): the mean over its inner channels, at each token's own place.
        channels: of each channel mixer, (K, 3, E): mean, 10th and 90th percentile over the tokens.
    """
    tokens: Dict[Mixer, np.ndarray]
    channels: Dict[Mixer, np.ndarray]


@torch.no_grad()
def selection(model: torch.nn.Module, image: torch.Tensor) -> Selection:
    """What the mixers select in an image (1, C, H, W)."""
    from vim2.layers import SelectiveTokenMixer
    with recorded_steps(model) as steps:
        model.forward_features(image)
    tokens, channels = {}, {}
    for mixer, recorded in steps.items():
        if isinstance(model.stages[mixer.stage].blocks[mixer.block].mixer, SelectiveTokenMixer):
            tokens[mixer] = recorded[0][0].mean(1).cpu().numpy()
        else:
            maps = [r[0, 0, :, 0].cpu().numpy() for r in recorded]  # (tokens, channels) of each direction
            channels[mixer] = np.stack([np.stack([m.mean(0), *np.percentile(m, (10, 90), axis=0)]) for m in maps])
    return Selection(tokens, channels)


def average_matrices(model: torch.nn.Module) -> List[np.ndarray]:
    """For each stage (mixers, mixers): row l has the weights of what mixer l reads, NaN for what comes later."""
    out = []
    for stage in model.stages:
        matrix = np.full((len(stage.averages),) * 2, np.nan)
        for row, average in zip(matrix, stage.averages):
            row[:average.num_inputs] = average.weight.detach().float().cpu().numpy()
        out.append(matrix)
    return out


class ReceptiveField(NamedTuple):
    """The derivative's norm over features and colours, (H, W); the place (y, x) in the image that the features are of;
    and the side in pixels of the square around it that holds half of the sum of the norms, and nine tenths."""
    norm: np.ndarray
    center: Tuple[float, float]
    sides: Tuple[int, int]


def receptive_fields(model: torch.nn.Module, image: torch.Tensor, directions: int = 8) -> List[ReceptiveField]:
    """Of the centre of each stage's output, for an image (1, C, H, W).

    The usual gradient of the *sum* of a place's features is blind to all that passes through a LayerNorm, whose outputs
    have a constant sum. So it is the norm of the Jacobian, estimated from its products with that many orthonormal
    directions, drawn from a fixed seed: exact for a stage with no more channels.
    """
    image = image.detach().clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        features = model.forward_intermediates(image, intermediates_only=True)
        out = []
        for feature, info in zip(features, model.feature_info):
            d, y, x = feature.shape[1], feature.shape[2] // 2, feature.shape[3] // 2
            basis = torch.linalg.qr(torch.randn(d, min(directions, d), generator=generator))[0].T
            square = torch.zeros(image.shape[2:], dtype=torch.float64)
            for direction in basis.to(feature):
                gradient, = torch.autograd.grad(feature[0, :, y, x] @ direction, image, retain_graph=True)
                square += gradient[0].cpu().double().square().sum(0) * d / len(basis)
            norm = square.sqrt().numpy()
            center = ((y + 0.5) * info['reduction'], (x + 0.5) * info['reduction'])
            out.append(ReceptiveField(norm, center, tuple(_side(norm, center, t) for t in (0.5, 0.9))))
    return out


def _side(norm: np.ndarray, center: Tuple[float, float], share: float) -> int:
    """Side of the smallest square around the centre, cut at the image's border, that holds that share of the sum."""
    rows, columns = (np.abs(np.arange(n) + 0.5 - c) for n, c in zip(norm.shape, center))
    distance = np.maximum(rows[:, None], columns[None]).ravel()
    order = np.argsort(distance, kind='stable')
    cumulative = np.cumsum(norm.ravel()[order])
    return int(np.ceil(2 * (distance[order][np.searchsorted(cumulative, share * cumulative[-1])] + 0.5)))


# --------------------------------------------------------------------------------------------------------- pictures

def _figure(width: float, height: float, title: str):
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ModuleNotFoundError:
        raise UserError('the pictures need matplotlib: pip install matplotlib') from None
    figure = Figure(figsize=(width, height), dpi=110, layout='constrained')
    figure.suptitle(title, fontsize=11)
    return figure


def _picture(ax, pixels: np.ndarray, title: str) -> None:
    ax.imshow(pixels, interpolation='nearest')
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])


def _kind(model: torch.nn.Module, mixer: Mixer) -> str:
    from vim2.layers import SelectiveTokenMixer, TokenMlp
    module = model.stages[mixer.stage].blocks[mixer.block].mixer
    return 'token' if isinstance(module, (SelectiveTokenMixer, TokenMlp)) else 'channel'


def plot_tokens(name: str, pixels: np.ndarray, chosen: Dict[Mixer, np.ndarray]):
    """One row per mixer, a map per scan direction, each on its own scale: biases set the directions apart by more than
    what is selected within one."""
    count = max(len(maps) for maps in chosen.values())
    aspect = pixels.shape[0] / pixels.shape[1]
    figure = _figure(2.35 * (count + 1), (1.75 * aspect + 0.4) * len(chosen) + 0.5,
                     f'{name}: step size Δ of each token, mean over the inner channels')
    axes = figure.subplots(len(chosen), count + 1, squeeze=False)
    for i, (row, (mixer, maps)) in enumerate(zip(axes, chosen.items())):
        for ax in row:
            ax.set_axis_off()
        row[0].set_axis_on()
        row[0].set_ylabel(f'stage {mixer.stage + 1}, mixer {mixer.block + 1}\n{maps.shape[2]} × {maps.shape[1]} tokens',
                          fontsize=9)
        if i == 0:
            _picture(row[0], pixels, f'image, {pixels.shape[1]} × {pixels.shape[0]} px')
        else:
            row[0].set(xticks=[], yticks=[])
            row[0].spines[:].set_visible(False)
        for ax, values, direction in zip(row[1:], maps, _MAP_DIRECTIONS):
            ax.set_axis_on()
            shown = ax.imshow(values, cmap='viridis', interpolation='nearest')
            ax.set(xticks=[], yticks=[])
            ax.set_title(direction, fontsize=9)
            bar = figure.colorbar(shown, ax=ax, shrink=0.85, pad=0.02)
            bar.ax.tick_params(labelsize=7)
            bar.ax.locator_params(nbins=4)
            bar.ax.set_title('Δ', fontsize=8)
    return figure


def plot_channels(name: str, chosen: Dict[Mixer, np.ndarray]):
    """One row per mixer: step size over the channels, a line per direction with the spread over the tokens."""
    figure = _figure(9.5, 1.8 * len(chosen) + 0.8,
                     f'{name}: step size Δ of each channel')
    axes = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    for ax, (mixer, directions) in zip(axes, chosen.items()):
        channels = np.arange(directions.shape[2])
        for (mean, low, high), direction, color in zip(directions, _CHANNEL_DIRECTIONS, ('tab:blue', 'tab:orange')):
            ax.fill_between(channels, low, high, color=color, alpha=0.2, linewidth=0)
            ax.plot(channels, mean, color=color, linewidth=0.9, label=direction)
        ax.set_title(f'stage {mixer.stage + 1}, mixer {mixer.block + 1}', fontsize=9)
        ax.set_xlim(0, len(channels) - 1)
        ax.set_ylim(bottom=0)
        ax.set_ylabel('Δ')
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=2, fontsize=9, frameon=False,
                  title='mean over the tokens, and their 10th to 90th percentile', title_fontsize=9)
    axes[-1].set_xlabel('inner channel')
    return figure


def plot_averages(name: str, model: torch.nn.Module, matrices: Sequence[np.ndarray]):
    """A matrix per stage: which earlier outputs each mixer reads, with which weight."""
    largest = max(np.nanmax(np.abs(m)) for m in matrices if m.size)
    cells = [max(len(m), 1) for m in matrices]
    wide = max(cells) > 12
    size = 0.22 if wide else 0.55
    figure = _figure(sum(max(size * n, 1.2) + 0.75 for n in cells) + 1.1, max(size * max(cells), 1.2) + 1.9,
                     f'{name}: weights of the averages that the mixers read')
    axes = figure.subplots(1, len(matrices), squeeze=False, width_ratios=cells)[0]
    for i, (ax, matrix) in enumerate(zip(axes, matrices)):
        ax.set_title(f'stage {i + 1}', fontsize=10)
        labels = [f'{j + 1} {_kind(model, Mixer(i, j))[0].upper()}' for j in range(len(matrix))]
        shown = ax.imshow(matrix, cmap='RdBu_r', vmin=-largest, vmax=largest)
        ax.set_yticks(range(len(matrix)), labels, fontsize=8)
        ax.set_xticks(range(len(matrix)), ['input', *labels[:-1]], rotation=90, fontsize=8)
        if not wide:
            for (l, j), value in np.ndenumerate(matrix):
                if not np.isnan(value):
                    ax.text(j, l, f'{round(value, 2) + 0.:.2f}', ha='center', va='center', fontsize=8,
                            color='white' if abs(value) > 0.6 * largest else 'black')
    axes[0].set_ylabel('mixer that reads')
    figure.supxlabel('output that is read (T: token mixer, C: channel mixer)', fontsize=9)
    figure.colorbar(shown, ax=list(axes), label='weight', shrink=0.8, pad=0.02)
    return figure


def plot_receptive_fields(name: str, pixels: np.ndarray, fields: Sequence[ReceptiveField]):
    """The image and a logarithmic map per stage, with the square that holds half of the sum."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    height, width = pixels.shape[:2]
    figure = _figure(2.3 * (len(fields) + 1) + 0.9, 2.2 * height / width + 1.1,
                     f"{name}: effective receptive field of the centre of each stage's output")
    axes = figure.subplots(1, len(fields) + 1)
    _picture(axes[0], pixels, f'\nimage, {width} × {height} px')
    for i, (ax, field) in enumerate(zip(axes[1:], fields)):
        share = field.norm / max(field.norm.max(), np.finfo(float).tiny)
        shown = ax.imshow(share.clip(1e-4, 1), norm=LogNorm(1e-4, 1), cmap='inferno', interpolation='nearest')
        ax.set_title(f'stage {i + 1}\n50 % in {field.sides[0]} px, 90 % in {field.sides[1]} px', fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
        y, x = field.center
        ax.add_patch(Rectangle((x - 0.5 - field.sides[0] / 2, y - 0.5 - field.sides[0] / 2), field.sides[0],
                               field.sides[0], fill=False, edgecolor='cyan', linewidth=1))
        ax.set_xlim(-0.5, width - 0.5)
        ax.set_ylim(height - 0.5, -0.5)
    figure.colorbar(shown, ax=list(axes[1:]), label='|∂ features / ∂ pixel| / largest', shrink=0.9, pad=0.01)
    return figure


# ------------------------------------------------------------------------------------------------------------- tool

def choose(measured: Dict[Mixer, np.ndarray], index: int) -> Dict[Mixer, np.ndarray]:
    """The `index`-th mixer of each stage, negative from the last; stages that have no such mixer are left out."""
    stages: Dict[int, List[Mixer]] = defaultdict(list)
    for mixer in sorted(measured):
        stages[mixer.stage].append(mixer)
    return {mixers[index]: measured[mixers[index]] for mixers in stages.values() if -len(mixers) <= index < len(mixers)}


def get_parser() -> argparse.ArgumentParser:
    description, epilog = __doc__.split('\n\n')[0], __doc__.strip().rsplit('\n\n', 1)[-1]
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=common.HelpFormatter)
    parser.add_argument('image', nargs='?', default=str(_CHELSEA), metavar='IMAGE',
                        help='picture file or http(s) URL (default: the cat in tools/assets)')
    common.add_model_arguments(parser)
    parser.add_argument('--random-weights', action='store_true',
                        help='look at the model as it is initialised, instead of pretrained weights')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of random weights')
    parser.add_argument('--device', metavar='NAME', help="cuda, cpu, … (default: the machine's accelerator, else cpu)")
    g = parser.add_argument_group('output')
    g.add_argument('-o', '--out', default='inspect_output', metavar='DIR', help='folder of the pictures')
    g.add_argument('--mixer', type=int, default=-1, metavar='N',
                   help='which token mixer, and which channel mixer, of each stage is shown: 0 the first, -1 the last')
    g.add_argument('--json', action='store_true', help='print what the pictures show as JSON')
    g.add_argument('--timeout', type=float, default=20, metavar='S', help='seconds to wait for a URL')
    return parser


def load(args: argparse.Namespace) -> torch.nn.Module:
    from vim2.models import VisionMambaMixer
    if args.random_weights:
        if args.checkpoint:
            raise UserError('--random-weights and --checkpoint exclude each other')
        torch.manual_seed(args.seed)
        kwargs = dict(args.model_kwargs, **({} if args.num_classes is None else {'num_classes': args.num_classes}))
        model = common.create_model(args.model, pretrained=False, **kwargs)
    else:
        model = common.trained_model(args)
    if not isinstance(model, VisionMambaMixer):
        raise UserError(f'{args.model} is no ViM2: it is a {type(model).__name__}')
    return model.eval()


def main() -> None:
    args = get_parser().parse_args()
    common.at_least(args, 0, 'num_classes')
    device = common.check_device(args.device or common.default_device())
    common.image_size(args.img_size)
    common.register_models()
    try:
        picture = read_picture(args.image, args.timeout)
    except Unreadable as e:
        raise UserError(f'{args.image}: {e}') from None
    model = load(args).to(device)
    config = common.data_config(args, model)
    image = create_transform(
        config['input_size'], is_training=False, interpolation=config['interpolation'], mean=config['mean'],
        std=config['std'], crop_pct=config['crop_pct'], crop_mode=config['crop_mode'])(picture).unsqueeze(0)
    mean, std = (torch.tensor(config[k]).view(-1, 1, 1) for k in ('mean', 'std'))
    pixels = (image[0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    image = image.to(device)

    selected = selection(model, image)
    tokens, channels = choose(selected.tokens, args.mixer), choose(selected.channels, args.mixer)
    matrices = average_matrices(model)
    fields = receptive_fields(model, image)

    name = args.model + (', random weights' if args.random_weights else '')
    figures, missing = {}, []
    for file, what, present, plot in (
            ('token_step_sizes', 'selective token mixer', tokens, lambda: plot_tokens(name, pixels, tokens)),
            ('channel_step_sizes', 'selective channel mixer', channels, lambda: plot_channels(name, channels)),
            ('averages', 'weighted average', any(m.size for m in matrices),
             lambda: plot_averages(name, model, matrices)),
            ('receptive_field', '', True, lambda: plot_receptive_fields(name, pixels, fields))):
        if present:
            figures[file] = plot()
        else:
            missing.append(f'no picture {file}.png: the model has no {what}'
                           + (f' {args.mixer} in any stage' if 'mixer' in what and args.mixer not in (0, -1) else ''))

    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, figure in figures.items():
            common.write_atomic(out / f'{file}.png', lambda tmp, f=figure: f.savefig(tmp, format='png'))
    except OSError as e:
        raise UserError(f'cannot write to {out}: {common.one_line(e)}') from None

    if args.json:
        common.print_json(dict(
            model=args.model, checkpoint=args.checkpoint, random_weights=args.random_weights, image=args.image,
            img_size=list(config['input_size'][-2:]),
            pictures=[str(out / f'{file}.png') for file in figures], missing=missing,
            token_step_sizes=[dict(stage=m.stage, mixer=m.block, mean=v.mean((1, 2)).tolist())
                              for m, v in sorted(selected.tokens.items())],
            channel_step_sizes=[dict(stage=m.stage, mixer=m.block, mean=v[:, 0].mean(1).tolist())
                                for m, v in sorted(selected.channels.items())],
            averages=[[[w for w in row.tolist() if w == w] for row in m] for m in matrices],
            receptive_field=[dict(stage=i, half=f.sides[0], nine_tenths=f.sides[1]) for i, f in enumerate(fields)]))
        return
    for file in figures:
        print(out / f'{file}.png')
    for line in missing:
        print(line)


if __name__ == '__main__':
    common.run(main)
