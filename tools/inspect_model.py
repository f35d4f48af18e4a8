#!/usr/bin/env python
"""Pictures of what a ViM2 selects in an image: step sizes, attention, weighted averages, effective receptive field.

    python tools/inspect_model.py --out pictures
    python tools/inspect_model.py *.jpg --model local-dir:output/train/RUN/model --img-size 224 --format pdf

A step size (Δ) says how much of a token a scan writes into its state and how much of the state it forgets: near 0 the
token is passed over, large ones reset the state. A scan is linear in what it reads once Δ, B and C are known, so that
it has an attention: what each token adds to the output at one place. Both are computed from the scans' own arguments,
recorded while the model runs. The receptive field is the norm of the derivative of the features at the centre of a
stage's output with respect to each pixel, a mean over the images, beside that of a network with random weights.
"""
import argparse
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

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


# ----------------------------------------------------------------------------------------------------- measurements

class Mixer(NamedTuple):
    """Where a mixer sits: `block` counts from 0 among all mixers of its stage, which is how it is labelled from 1."""
    stage: int
    block: int


class Scan(NamedTuple):
    """What a scan of a map was called with: step sizes after softplus (B, K, E, H, W), A (K, E, N), B and C
    (B, K, 1, N, H, W) and the K directions, 0 to 3 in the order of `_MAP_DIRECTIONS`. One along channels has
    K = H = 1, W channels and E tokens."""
    steps: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    directions: Sequence[int]


class _ScanRecorder(TorchDispatchMode):
    """Keeps what each scan is called with; what it computes stays as it is."""

    def __init__(self):
        super().__init__()
        self.current: Optional[Mixer] = None  # the mixer that was entered last: no scan runs outside of one
        self.scans: Dict[Mixer, List[Scan]] = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.vim2.scan_forward.default, torch.ops.vim2.scan.default):  # the latter in inference mode
            from vim2.ops.low_rank import expand_delta
            u, delta, A, B, C, bias, weight, softplus, directions = (args[i] for i in (0, 1, 2, 3, 4, 7, 8, 9, 10))
            delta = expand_delta(delta, weight, u).detach().float()
            if bias is not None:
                delta = delta + bias.float()[:, :, None, None]
            self.scans[self.current].append(Scan(
                F.softplus(delta) if softplus else delta, *(v.detach().float() for v in (A, B, C)), directions))
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_scans(model: torch.nn.Module):
    """Inside, every forward pass adds to the dict that this gives: for each mixer its scans in the order of the
    calls."""
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
            yield recorder.scans
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def token_scans(model: torch.nn.Module, image: torch.Tensor) -> Dict[Mixer, Scan]:
    """What the token mixers' scans of an image (1, C, H, W) are called with."""
    from vim2.layers import SelectiveTokenMixer
    with recorded_scans(model) as scans:
        model.forward_features(image)
    return {m: recorded[0] for m, recorded in scans.items()
            if isinstance(model.stages[m.stage].blocks[m.block].mixer, SelectiveTokenMixer)}


def mean_steps(scan: Scan) -> np.ndarray:
    """Of the first image, (K, H, W): the mean over the inner channels, at each token's own place."""
    return scan.steps[0].mean(1).cpu().numpy()


@torch.no_grad()
def attention(scan: Scan, y: int, x: int) -> np.ndarray:
    """What each token adds to the output of the first image's scans at (y, x), by direction, (K, H, W).

    The mean over the inner channels of |Σ_n C_n(t) exp(A_n Σ_{s<r≤t} Δ(r)) Δ(s) B_n(s)|, by which y(t) depends on u(s).
    """
    _, _, channels, height, width = scan.steps.shape
    out = torch.zeros(len(scan.directions), height * width)
    for k, direction in enumerate(scan.directions):
        order = torch.arange(height * width).view(height, width)
        order = (order.T if direction % 2 else order).reshape(-1)
        order = order.flip(0) if direction >= 2 else order
        order = order[:int((order == y * width + x).nonzero()) + 1].to(scan.steps.device)
        steps, B, C = (v.flatten(1)[:, order] for v in (scan.steps[0, k], scan.B[0, k, 0], scan.C[0, k, 0]))
        between = steps.sum(1, keepdim=True) - steps.cumsum(1)
        weights = torch.zeros_like(steps)
        for n in range(scan.A.shape[2]):
            weights += (scan.A[k, :, n, None] * between).exp() * steps * B[n] * C[n, -1]
        out[k, order.cpu()] = weights.abs().mean(0).cpu()
    return out.view(-1, height, width).numpy()


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


def receptive_fields(model: torch.nn.Module, images: torch.Tensor, directions: int = 8) -> List[ReceptiveField]:
    """Of the centre of each stage's output, the mean over the images (B, C, H, W).

    The usual gradient of the *sum* of a place's features is blind to all that passes through a LayerNorm, whose outputs
    have a constant sum. So it is the norm of the Jacobian, estimated from its products with that many orthonormal
    directions, drawn from a fixed seed: exact for a stage with no more channels.
    """
    norms: Dict[int, List[np.ndarray]] = defaultdict(list)
    for image in images.detach().split(1):
        image, generator = image.clone().requires_grad_(), torch.Generator().manual_seed(0)
        with torch.enable_grad():
            for stage, feature in enumerate(model.forward_intermediates(image, intermediates_only=True)):
                d, y, x = feature.shape[1], feature.shape[2] // 2, feature.shape[3] // 2
                basis = torch.linalg.qr(torch.randn(d, min(directions, d), generator=generator))[0].T
                square = torch.zeros(image.shape[2:], dtype=torch.float64)
                for direction in basis.to(feature):
                    gradient, = torch.autograd.grad(feature[0, :, y, x] @ direction, image, retain_graph=True)
                    square += gradient[0].cpu().double().square().sum(0) * d / len(basis)
                norms[stage].append(square.sqrt().numpy())
    out = []
    for stage, info in enumerate(model.feature_info):
        norm = np.mean(norms[stage], axis=0)
        center = tuple(_place(model, stage, -(-n // info['reduction']) // 2) for n in images.shape[2:])
        out.append(ReceptiveField(norm, center, tuple(_side(norm, center, t) for t in (0.5, 0.9))))
    return out


def _place(model: torch.nn.Module, stage: int, index: int) -> float:
    """Where in the image, in pixels, the middle of what a place of a stage's output is computed from is."""
    from vim2.models.hierarchy import ConvDownsample, ConvStem
    middle = float(index)  # of the pixel or token with that index
    for i in range(stage, 0, -1):  # patches begin at their index times their side; convolutions lie around it
        middle = 2 * middle + (0. if isinstance(model.stages[i].downsample, ConvDownsample) else 0.5)
    side = model.stem.patch_size
    return side * middle + (0. if isinstance(model.stem, ConvStem) else (side - 1) / 2) + 0.5


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


def _maps(title: str, pixels: np.ndarray, rows: Dict[Mixer, np.ndarray], columns: Sequence[str], norm, label: str,
          places: Optional[Dict[Mixer, Tuple[float, float]]] = None):
    """One row per mixer, a map (H, W) per column over the image in gray, all on one scale; a cross at a place (y, x) in
    pixels."""
    height, width = pixels.shape[:2]
    figure = _figure(2.2 * (len(columns) + 1) + 0.9, (2. * height / width + 0.35) * len(rows) + 0.6, title)
    axes = figure.subplots(len(rows), len(columns) + 1, squeeze=False)
    for i, (row, (mixer, maps)) in enumerate(zip(axes, rows.items())):
        _picture(row[0], pixels, f'image, {width} × {height} px' if i == 0 else '')
        row[0].set_ylabel(f'stage {mixer.stage + 1}, mixer {mixer.block + 1}\n{maps.shape[2]} × {maps.shape[1]} tokens',
                          fontsize=9)
        for ax, values, column in zip(row[1:], maps, columns):
            ax.imshow(pixels.mean(2), cmap='gray', vmin=0, vmax=1)
            shown = ax.imshow(values, cmap='inferno', norm=norm, alpha=0.7, interpolation='nearest',
                              extent=(-0.5, width - 0.5, height - 0.5, -0.5))
            ax.set(xticks=[], yticks=[])
            if i == 0:
                ax.set_title(column, fontsize=9)
            if places:
                y, x = places[mixer]
                ax.plot(x - 0.5, y - 0.5, '+', color='cyan', markersize=9)
    figure.colorbar(shown, ax=list(axes[:, 1:].flat), label=label, shrink=0.9, pad=0.01)
    return figure


def plot_tokens(name: str, pixels: np.ndarray, chosen: Dict[Mixer, np.ndarray]):
    """Step sizes over the image: one logarithmic scale for all, so that mixers and directions compare."""
    from matplotlib.colors import LogNorm
    every = np.concatenate([m.ravel() for m in chosen.values()])
    return _maps(f'{name}: step size Δ of each token, mean over the inner channels', pixels, chosen, _MAP_DIRECTIONS,
                 LogNorm(every.min(), every.max()), 'Δ')


def plot_attention(name: str, pixels: np.ndarray, chosen: Dict[Mixer, np.ndarray],
                   places: Dict[Mixer, Tuple[float, float]]):
    """What each token adds at the cross, by direction and in all: shares of the mixer's largest, logarithmic."""
    from matplotlib.colors import LogNorm
    rows = {}
    for mixer, maps in chosen.items():
        maps = np.concatenate([maps, maps.sum(0, keepdims=True)])
        rows[mixer] = (maps / max(maps.max(), np.finfo(float).tiny)).clip(1e-4, 1)
    return _maps(f'{name}: what each token adds to the scans at the cross', pixels, rows,
                 [*_MAP_DIRECTIONS, 'all four'], LogNorm(1e-4, 1), "share of the mixer's largest", places)


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


def plot_receptive_fields(name: str, pixels: np.ndarray, rows: Dict[str, Sequence[ReceptiveField]], count: int = 1):
    """A row for each network and a logarithmic map per stage, with the square that holds half of the sum."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    height, width = pixels.shape[:2]
    columns = len(next(iter(rows.values())))
    figure = _figure(2.3 * (columns + 1) + 0.9, (2.2 * height / width + 0.5) * len(rows) + 0.6,
                     f"{name}: effective receptive field of the centre of each stage's output"
                     + (f', mean of {count} images' if count > 1 else ''))
    axes = figure.subplots(len(rows), columns + 1, squeeze=False)
    for i, (line, (label, fields)) in enumerate(zip(axes, rows.items())):
        _picture(line[0], pixels, f'{"first " if count > 1 else ""}image, {width} × {height} px' if i == 0 else '')
        line[0].set_ylabel(label, fontsize=9)
        for stage, (ax, field) in enumerate(zip(line[1:], fields)):
            share = field.norm / max(field.norm.max(), np.finfo(float).tiny)
            shown = ax.imshow(share.clip(1e-4, 1), norm=LogNorm(1e-4, 1), cmap='inferno', interpolation='nearest')
            ax.set_title(f'stage {stage + 1}\n50 % in {field.sides[0]} px, 90 % in {field.sides[1]} px', fontsize=9)
            ax.set(xticks=[], yticks=[])
            y, x = field.center
            ax.add_patch(Rectangle((x - 0.5 - field.sides[0] / 2, y - 0.5 - field.sides[0] / 2), field.sides[0],
                                   field.sides[0], fill=False, edgecolor='cyan', linewidth=1))
            ax.set_xlim(-0.5, width - 0.5)
            ax.set_ylim(height - 0.5, -0.5)
    figure.colorbar(shown, ax=list(axes[:, 1:].flat), label='|∂ features / ∂ pixel| / largest', shrink=0.9, pad=0.01)
    return figure


# ------------------------------------------------------------------------------------------------------------- tool

def choose(measured: Dict[Mixer, Any], index: int) -> Dict[Mixer, Any]:
    """The `index`-th mixer of each stage, negative from the last; stages that have no such mixer are left out."""
    stages: Dict[int, List[Mixer]] = defaultdict(list)
    for mixer in sorted(measured):
        stages[mixer.stage].append(mixer)
    return {mixers[index]: measured[mixers[index]] for mixers in stages.values() if -len(mixers) <= index < len(mixers)}


def get_parser() -> argparse.ArgumentParser:
    description, epilog = __doc__.split('\n\n')[0], __doc__.strip().rsplit('\n\n', 1)[-1]
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=common.HelpFormatter)
    parser.add_argument('images', nargs='*', default=[str(_CHELSEA)], metavar='IMAGE',
                        help='picture files or http(s) URLs (default: the cat in tools/assets); of several, the '
                             'receptive field is the mean, and the first is shown')
    common.add_model_arguments(parser)
    parser.add_argument('--random-weights', action='store_true',
                        help='look at the model as it is initialised, instead of pretrained weights')
    parser.add_argument('--seed', type=int, default=0, metavar='N',
                        help='of random weights, and of those beside which the receptive field is shown')
    parser.add_argument('--device', metavar='NAME', help="cuda, cpu, … (default: the machine's accelerator, else cpu)")
    g = parser.add_argument_group('output')
    g.add_argument('-o', '--out', default='inspect_output', metavar='DIR', help='folder of the pictures')
    g.add_argument('--format', choices=('png', 'pdf', 'svg'), default='png', help='of the pictures')
    g.add_argument('--title', metavar='TEXT', help="in place of the pictures' titles; '' for none")
    g.add_argument('--mixer', type=int, default=-1, metavar='N',
                   help='which token mixer of each stage is shown: 0 the first, -1 the last')
    g.add_argument('--place', type=float, nargs=2, default=(0.5, 0.5), metavar=('Y', 'X'),
                   help="whose attention is shown, in parts of the image's height and width")
    g.add_argument('--json', action='store_true', help='print what the pictures show as JSON')
    g.add_argument('--timeout', type=float, default=20, metavar='S', help='seconds to wait for a URL')
    return parser


def load(args: argparse.Namespace, random: bool = False) -> torch.nn.Module:
    """The model of the options; with `random` as it is initialised."""
    from vim2.models import VisionMambaMixer
    if args.random_weights and args.checkpoint:
        raise UserError('--random-weights and --checkpoint exclude each other')
    if args.random_weights or random:
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
    pictures = []
    for source in args.images:
        try:
            pictures.append(read_picture(source, args.timeout))
        except Unreadable as e:
            raise UserError(f'{source}: {e}') from None
    model = load(args).to(device)
    config = common.data_config(args, model)
    transform = create_transform(
        config['input_size'], is_training=False, interpolation=config['interpolation'], mean=config['mean'],
        std=config['std'], crop_pct=config['crop_pct'], crop_mode=config['crop_mode'])
    images = torch.stack([transform(picture) for picture in pictures])
    mean, std = (torch.tensor(config[k]).view(-1, 1, 1) for k in ('mean', 'std'))
    pixels = (images[0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    images = images.to(device)

    scans = token_scans(model, images[:1])
    chosen = choose(scans, args.mixer)
    attended, places = {}, {}
    for mixer, scan in chosen.items():
        size = scan.steps.shape[-2:]
        y, x = (min(int(n * part), n - 1) for n, part in zip(size, args.place))
        attended[mixer] = attention(scan, y, x)
        places[mixer] = tuple((at + 0.5) * total / n for at, total, n in zip((y, x), pixels.shape[:2], size))
    matrices = average_matrices(model)
    fields = {'random weights' if args.random_weights else 'trained': receptive_fields(model, images)}
    if not args.random_weights:
        fields['random weights'] = receptive_fields(load(args, random=True).to(device), images)

    name = args.model + (', random weights' if args.random_weights else '')
    figures, missing = {}, []
    for file, what, present, plot in (
            ('token_step_sizes', 'selective token mixer', chosen,
             lambda: plot_tokens(name, pixels, {m: mean_steps(scan) for m, scan in chosen.items()})),
            ('token_attention', 'selective token mixer', chosen,
             lambda: plot_attention(name, pixels, attended, places)),
            ('averages', 'weighted average', any(m.size for m in matrices),
             lambda: plot_averages(name, model, matrices)),
            ('receptive_field', '', True, lambda: plot_receptive_fields(name, pixels, fields, len(images)))):
        if present:
            figures[file] = plot()
            if args.title is not None:
                figures[file].suptitle(args.title, fontsize=11)
        else:
            missing.append(f'no picture {file}.{args.format}: the model has no {what}'
                           + (f' {args.mixer} in any stage' if 'mixer' in what and args.mixer not in (0, -1) else ''))

    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, figure in figures.items():
            common.write_atomic(out / f'{file}.{args.format}', lambda tmp, f=figure: f.savefig(tmp, format=args.format))
    except OSError as e:
        raise UserError(f'cannot write to {out}: {common.one_line(e)}') from None

    if args.json:
        trained, *others = fields.values()
        common.print_json(dict(
            model=args.model, checkpoint=args.checkpoint, random_weights=args.random_weights, images=args.images,
            img_size=list(config['input_size'][-2:]),
            pictures=[str(out / f'{file}.{args.format}') for file in figures], missing=missing,
            token_step_sizes=[dict(stage=m.stage, mixer=m.block, mean=mean_steps(scan).mean((1, 2)).tolist())
                              for m, scan in sorted(scans.items())],
            averages=[[[w for w in row.tolist() if w == w] for row in m] for m in matrices],
            receptive_field=[dict(stage=i, half=f.sides[0], nine_tenths=f.sides[1], **(
                dict(random_half=others[0][i].sides[0], random_nine_tenths=others[0][i].sides[1]) if others else {}))
                             for i, f in enumerate(trained)]))
        return
    for file in figures:
        print(out / f'{file}.{args.format}')
    for line in missing:
        print(line)


if __name__ == '__main__':
    common.run(main)
