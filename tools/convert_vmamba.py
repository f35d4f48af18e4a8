#!/usr/bin/env python
"""Start a ViM2 from VMamba's weights: a checkpoint of the vanilla network becomes a folder that timm loads.

    python tools/convert_vmamba.py vssmtiny_dp01_ckpt_epoch_292.pth --model vim2_tiny --out vim2_tiny_vmamba
    python tools/convert_vmamba.py vssmtiny.pth --model vim2_tiny --out DIR --blocks 0,1 0,1 0,1,2,3,7,8 0,1

The folder gives `timm.create_model('local-dir:DIR', pretrained=True)`. The network starts as VMamba restricted to the
chosen blocks: channel mixers pass on their input, averages are the plain chain. Where VMamba has more blocks than the
model has token mixers they are chosen evenly spread, the first and the last among them; --blocks chooses otherwise.
"""
import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Dict, List, Optional

import torch

import _common as common
from _common import UserError


def read_source(path: str, use_ema: bool) -> Dict[str, torch.Tensor]:
    """The weights in a VMamba checkpoint; nothing in the file is executed."""
    from vim2.pretrained import read_checkpoint
    try:
        return read_checkpoint(path, ema=None if use_ema else False)
    except (RuntimeError, FileNotFoundError) as e:
        raise UserError(common.one_line(e, 1000)) from None


def parse_blocks(texts: Optional[List[str]]) -> Optional[List[List[int]]]:
    """`0,1 0,2,3` as [[0, 1], [0, 2, 3]]; '-' is no block."""
    if texts is None:
        return None
    try:
        return [[int(b) for b in text.split(',')] if text != '-' else [] for text in texts]
    except ValueError:
        raise UserError(f"--blocks takes numbers of blocks, with commas between them, for each stage; "
                        f"got {' '.join(texts)!r}") from None


def convert(args: argparse.Namespace, state: Dict[str, torch.Tensor]):
    """The model with the converted weights, and what became of each key."""
    from vim2.models.vim2 import VisionMambaMixer, checkpoint_filter_fn
    from vim2.models.vmamba import convert_vmamba, is_vmamba
    if not is_vmamba(state):
        some = ', '.join(list(state)[:3])
        raise UserError(f'{args.checkpoint} is no VMamba checkpoint: it has no layers.0.blocks.0.self_attention.* or '
                        f'.op.*, but {some} …')
    heads = [len(state[k]) for k in ('head.weight', 'classifier.head.weight') if k in state]
    num_classes = args.num_classes if args.num_classes is not None else heads[0] if heads else 0
    torch.manual_seed(args.seed)  # what the checkpoint does not give
    model = common.create_model(args.model, **{**args.model_kwargs, 'num_classes': num_classes})
    if not isinstance(model, VisionMambaMixer):
        raise UserError(f'{args.model} is no ViM2: it is a {type(model).__name__}')
    try:
        conversion = convert_vmamba(state, model, parse_blocks(args.blocks))
        weights = checkpoint_filter_fn(conversion.state_dict, model)
    except RuntimeError as e:
        raise UserError(f'{args.checkpoint} cannot be converted to {args.model}: {common.one_line(e, 1000)}') from None
    own = {k: v for k, v in model.state_dict().items() if k.startswith('head.')}
    for k, v in own.items():
        if k in weights and weights[k].shape != v.shape:  # another number of classes was asked for
            conversion.unused[conversion.mapped.pop(k)] = f'a classifier of {len(weights[k])} classes, not {len(v)}'
            conversion.initialized[k] = 'random'
            del weights[k]
    model.load_state_dict({**own, **weights}, strict=True)
    return model, conversion


def save(model: torch.nn.Module, out: Path, model_kwargs: Dict, note: str) -> None:
    """The folder, complete or not at all."""
    from timm.models._hub import save_for_hf

    def fill(folder: str) -> None:
        # the licence is the checkpoint's, which the file does not tell
        save_for_hf(model, folder, model_args=model_kwargs or None, safe_serialization=True,
                    model_config=dict(pretrained_cfg=dict(tag='vmamba', notes=[note], license=None)))

    with common.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        common.write_folder(out, fill)


_STARTS = {
    'identity': 'channel mixers, which start as identities',
    'chain': 'averages, which start as the plain chain',
    'random': "the model's own initialisation",
}


def part(key: str) -> str:
    """What a parameter is a row of: `stages.2.blocks.5`, `stages.2.averages`, `stages.2.downsample`, `stem.conv`."""
    names = key.split('.')
    depth = {'stem': 2, 'stages': 4 if 'blocks' in names else 3}.get(names[0], 1)
    return '.'.join(names[:depth])


def source_part(key: str) -> str:
    """The same of VMamba's: `layers.2.blocks.1`, `layers.2.downsample`, `patch_embed.proj`, `classifier.norm`."""
    return re.sub(r'(\.blocks\.\d+|\.downsample|(?<=norm)|(?<=head)|(?<=patch_embed\.\w)|(?<=proj))\..*', r'\1', key)


def print_report(args: argparse.Namespace, model: torch.nn.Module, conversion) -> None:
    parameters = dict(model.named_parameters())
    rows = [('ViM2', 'starts as', 'tensors', 'parameters')]
    given: Dict[tuple, List[str]] = {}
    for key in parameters:
        source = conversion.mapped.get(key)
        text = source_part(source) if source else _STARTS[conversion.initialized[key]]
        given.setdefault((part(key), text), []).append(key)
    for (name, text), keys in given.items():
        rows.append((name, text, str(len(keys)), f'{sum(parameters[k].numel() for k in keys):,}'))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for name, text, tensors, count in rows:
        print(f'{name:<{widths[0]}}  {text:<{widths[1]}}  {tensors:>{widths[2]}}  {count:>{widths[3]}}')
    print()
    for i, (chosen, depth) in enumerate(zip(conversion.blocks, conversion.depths)):
        print(f'stage {i + 1}: blocks {", ".join(map(str, chosen)) or "none"} of the {depth} (from 0)')
    for what, count in Counter(conversion.unused.values()).items():
        print(f'not used: {count} tensors, {what}')
    total = sum(p.numel() for p in parameters.values())
    mapped = sum(parameters[k].numel() for k in conversion.mapped)
    print(f'{mapped / 1e6:.2f} M of {total / 1e6:.2f} M parameters come from {args.checkpoint}')
    print(f"written: {args.out}\n  timm.create_model('local-dir:{args.out}', pretrained=True)")


def get_parser() -> argparse.ArgumentParser:
    description, epilog = __doc__.split('\n\n')[0], __doc__.strip().rsplit('\n\n', 1)[-1]
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=common.HelpFormatter)
    parser.add_argument('checkpoint', metavar='CKPT',
                        help="VMamba's file, .pth or .safetensors: of the classification network, or of a detector or "
                             'segmenter with it as `backbone.`')
    parser.add_argument('-m', '--model', default='vim2_tiny', metavar='NAME', help='timm model name')
    parser.add_argument('-o', '--out', required=True, metavar='DIR', help='folder to write; must not exist')
    parser.add_argument('--blocks', nargs='+', metavar='I,J,…',
                        help='for each stage, which blocks of VMamba (from 0) the token mixers start as, in their '
                             'order; a block may come more than once (default: evenly spread)')
    parser.add_argument('--no-ema', action='store_true',
                        help='take the plain weights where the checkpoint has averaged ones too')
    parser.add_argument('--num-classes', type=int, metavar='N',
                        help="outputs; another number than the checkpoint's gives a new classifier (default: the "
                             "checkpoint's, none for a detector's)")
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=common.KeyValue, metavar='K=V',
                        help='further model arguments')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of what is initialised at random')
    parser.add_argument('--json', action='store_true', help='print the report, key by key, as JSON')
    return parser


def main() -> None:
    args = get_parser().parse_args()
    common.at_least(args, 0, 'num_classes')
    out = Path(args.out)
    if out.exists() or out.is_symlink():
        raise UserError(f'{out} exists already: nothing is overwritten')
    common.register_models()
    model, conversion = convert(args, read_source(args.checkpoint, use_ema=not args.no_ema))
    blocks = ' '.join(','.join(map(str, chosen)) or '-' for chosen in conversion.blocks)
    save(model, out, args.model_kwargs, f'converted from VMamba: {Path(args.checkpoint).name}, blocks {blocks}')
    if args.json:
        common.print_json(dict(
            checkpoint=args.checkpoint, model=args.model, out=str(out), num_classes=model.num_classes,
            blocks=conversion.blocks, source_depths=conversion.depths, mapped=conversion.mapped,
            initialized=conversion.initialized, unused=conversion.unused))
    else:
        print_report(args, model, conversion)


if __name__ == '__main__':
    common.run(main)
