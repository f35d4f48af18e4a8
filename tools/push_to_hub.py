#!/usr/bin/env python
"""Publish a trained model on the Hugging Face Hub: safetensors, config.json and a model card with measured results.

    python tools/push_to_hub.py output/train/RUN --repo ORG/NAME --dry-run
    python tools/push_to_hub.py output/train/RUN --repo ORG/NAME --dataset npz --data-dir DIR --split test
    python tools/push_to_hub.py RUN/best.pth.tar --repo ORG/NAME --private --create-pr
    python tools/push_to_hub.py output/forecast/RUN --repo ORG/NAME --series ETTh1.csv --data-name ETTh1
    python tools/push_to_hub.py work_dirs/RUN/epoch_12.pth --repo ORG/NAME

CHECKPOINT is a run folder or a .pth.tar file of tools/train.py, a run folder of tools/forecast.py, a checkpoint of
MMDetection or MMSegmentation (the backbone is taken out of it), a folder with config.json and
model.safetensors, or, with --model, any file of a timm model's weights. Results in the card are measured when it is
written, by the code of tools/validate.py or tools/forecast.py on the data that the options name; without data the card
says that nothing was measured. Nothing is pushed unless the written folder gives, loaded anew, bit for bit what the
checkpoint gives.
"""
import argparse
import contextlib
import io
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

import _common as common
import _data as data
import _datasets as datasets
import validate as validation
from _cards import data_name, make_card, sha256
from _common import UserError
from _sources import Source, is_ours, load_folder, read_source


# ----------------------------------------------------------------------------------------------------- the folder

def write_model(source: Source, folder: Path, license: str) -> None:
    """model.safetensors and config.json, as timm or huggingface_hub's mixin writes them."""
    from timm.models._hub import save_for_hf
    if source.forecaster is not None:
        source.model.save_pretrained(folder)
        if source.forecaster:
            common.write_text(folder / 'forecaster.json', json.dumps(source.forecaster, indent=1) + '\n')
        return
    model_config = dict(pretrained_cfg=dict(license=license))
    if source.label_names:
        model_config['label_names'] = source.label_names
    save_for_hf(source.model, str(folder), model_config=model_config, safe_serialization=True)


def example_inputs(source: Source) -> List[Optional[torch.Tensor]]:
    """Random numbers of the shapes that the model reads."""
    model = source.model
    if source.forecaster is None:
        shapes = [tuple(model.pretrained_cfg['input_size'])]
    else:
        shapes = [(model.lookback, model.num_variates),
                  (model.num_variates, model.static_dim) if model.static_dim else None,
                  (model.num_variates, model.future_len, model.future_dim) if model.future_dim else None,
                  (model.num_variates, model.lookback, model.past_dim) if model.past_dim else None]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, *shape, generator=generator) if shape else None for shape in shapes]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@torch.no_grad()
def check_reload(source: Source, folder: Path) -> torch.nn.Module:
    """The model loaded from the folder; an error unless it gives bit for bit what the checkpoint's gives."""
    model = load_folder(folder)
    ours, theirs = source.model.state_dict(), model.state_dict()
    if list(ours) != list(theirs):
        raise UserError(f'the reloaded model has other parameters: {sorted(set(ours) ^ set(theirs))[:4]}; not pushed')
    different = [k for k, v in ours.items() if not _same_bits(v, theirs[k])]
    if different:
        raise UserError(f'the reloaded weights differ in {common._some(different)}; not pushed')
    inputs = example_inputs(source)
    expected, got = source.model(*inputs), model(*inputs)
    if not expected.isfinite().all():
        raise UserError('the model gives values that are not finite; not pushed')
    if not _same_bits(expected, got):
        raise UserError(f'the reloaded model gives other outputs, by up to {(expected - got).abs().max():.3g}; not '
                        'pushed. Its config.json does not hold all that the model was made with')
    return model


def measure(model: torch.nn.Module, args: argparse.Namespace, dataset) -> Dict[str, Any]:
    """What tools/validate.py measures."""
    device = common.check_device(args.device or common.default_device())
    config = common.data_config(argparse.Namespace(img_size=None), model)
    loader = data.eval_loader(dataset, config, batch_size=args.batch_size, device=device, workers=args.workers)
    result = validation.evaluate(model.to(device), loader, device, common.autocast(device, args.amp, args.amp_dtype))
    model.to('cpu')
    return dict(result, img_size=list(config['input_size'][-2:]), precision=args.amp_dtype if args.amp else 'float32',
                split=args.split)


def measure_forecaster(folder: Path, args: argparse.Namespace) -> Dict[str, Any]:
    """What `tools/forecast.py evaluate` measures with the written folder."""
    import forecast
    forecast.pandas_forecasting()
    words = ['evaluate', args.series, '--model', str(folder), '--part', args.part, '--json']
    if args.device:
        words += ['--device', args.device]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        forecast.evaluate_command(forecast.get_parser().parse_args(words))
    return dict(json.loads(out.getvalue()), split=args.part)


def open_data(args: argparse.Namespace, source: Source):
    """The data set of images to measure with, if there is one; and a check that the options fit the model."""
    images = bool(args.data_dir or args.dataset)
    if (images or args.series) and not data_name(args, source):
        raise UserError('the card needs a name for the data that is measured: pass --data-name')
    if args.series and not source.forecaster:
        raise UserError(f'{args.checkpoint} ' + (
            'has no forecaster.json, which holds the scale of the series: --series cannot be measured'
            if source.forecaster is not None else 'is no forecaster: --series is for those of tools/forecast.py'))
    if not images:
        return None
    if source.task != 'image-classification':
        raise UserError(f'{args.checkpoint} is no image classifier, so tools/validate.py cannot measure it: leave out '
                        '--data-dir and --dataset')
    dataset = datasets.open_to_measure(args, batch_size=args.batch_size)
    datasets.match_classes(dataset, source.model.num_classes, f'{args.data_dir or args.dataset} ({args.split})',
                           source.label_names, of=args.checkpoint)
    names = datasets.class_names(dataset)
    if source.label_names is None and names and len(names) == source.model.num_classes:
        source.label_names = names
    return dataset


# ---------------------------------------------------------------------------------------------------------- the Hub

def push(args: argparse.Namespace, folder: Path) -> Dict[str, Any]:
    """Upload the folder as one commit; what the Hub says about it."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError
    api = HfApi(token=args.token, library_name='vim2')
    try:
        repo = api.create_repo(args.repo, private=args.private or None, exist_ok=True).repo_id
        if args.revision and not args.create_pr:
            api.create_branch(repo, branch=args.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=args.revision, create_pr=args.create_pr or None,
            commit_message=args.message, ignore_patterns=['README.md'] if args.keep_card else None)
        weights, = api.get_paths_info(repo, ['model.safetensors'], revision=commit.oid)
    except HFValidationError as e:
        raise UserError(f'--repo {args.repo}: {common.one_line(e)}') from None
    except HfHubHTTPError as e:
        status = getattr(e.response, 'status_code', None)
        hint = ': check --token (or `hf auth login`), and that it may write to the repository' \
            if status in (401, 403) else ''
        raise UserError(f'the Hub refused to take {args.repo} ({common.one_line(e, 300)}){hint}') from None
    except (OSError, RuntimeError, ValueError) as e:
        hint = ''
        if 'xet' in str(e).lower():
            hint = '. A server without Xet storage (HF_ENDPOINT) takes files with HF_HUB_DISABLE_XET=1'
        raise UserError(f'cannot push to {args.repo}: {common.one_line(e, 300)}{hint}') from None
    if weights.lfs is None or weights.lfs.sha256 != sha256(folder / 'model.safetensors'):
        raise UserError(f'{commit.commit_url}: the Hub holds other bytes of model.safetensors than were sent')
    return dict(repo=repo, commit=commit.oid, url=commit.commit_url, pull_request=commit.pr_url)


def manifest_entry(args, source: Source, folder: Path, result, pushed: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """What vim2/weights/manifest.json needs to list these weights; the keys to be written by hand are missing."""
    if result is None or not is_ours(source.architecture) or pushed['pull_request']:
        return None
    weights, trained_on, config = folder / 'model.safetensors', data_name(args, source), {}
    if source.forecaster is None:
        config = {k: source.model.pretrained_cfg[k] for k in ('num_classes', 'input_size', 'crop_pct', 'mean', 'std')}
        if source.label_names:
            config['label_names'] = source.label_names
        metric = dict(name='top-1', value=round(result['top1'], 2), unit='%',
                      on=f'{trained_on}, {args.split}, {result["count"]:,} images')
    else:
        metric = dict(name='MSE', value=round(result['mse'], 4),
                      on=f'{trained_on}, {args.part}, {result["windows"]:,} windows')
    return dict(
        repo=pushed['repo'], revision=pushed['commit'], file=weights.name, size=weights.stat().st_size,
        sha256=sha256(weights), license=args.license, data=trained_on, command=source.command or '',
        metric=metric, config=config)


def get_parser() -> argparse.ArgumentParser:
    description, epilog = __doc__.split('\n\n')[0], __doc__.strip().rsplit('\n\n', 1)[-1]
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=common.HelpFormatter)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='folder or file, see below')
    g = parser.add_argument_group('repository')
    g.add_argument('--repo', required=True, metavar='ORG/NAME', help='repository; made if there is none')
    g.add_argument('--revision', metavar='BRANCH', help='branch; made if there is none (default: main)')
    g.add_argument('--private', action='store_true', help='make a new repository private')
    g.add_argument('--create-pr', action='store_true', help='propose the commit as a pull request')
    g.add_argument('--token', metavar='TOKEN', help='access token (default: HF_TOKEN, or that of `hf auth login`)')
    g.add_argument('--message', default='Upload model with tools/push_to_hub.py', metavar='TEXT', help='of the commit')
    g.add_argument('--keep-card', action='store_true', help='leave the README.md that the repository has')
    g.add_argument('--dry-run', action='store_true', help='write the folder and print the card; nothing is sent')
    g.add_argument('--out', metavar='DIR', help='folder to write, must not exist (default: a temporary one; with '
                                                '--dry-run output/hub/NAME)')
    g = parser.add_argument_group('model')
    g.add_argument('-m', '--model', metavar='NAME', help='timm model name, where the checkpoint does not tell it')
    g.add_argument('--model-kwargs', nargs='*', default={}, action=common.KeyValue, metavar='K=V',
                   help='further model arguments, where the checkpoint does not tell them')
    g.add_argument('--no-ema', action='store_true',
                   help='take the plain weights where the checkpoint has averaged ones too')
    g = parser.add_argument_group('card')
    g.add_argument('--license', metavar='ID', help="licence of the weights, such as apache-2.0 (default: the model's)")
    g.add_argument('--data-name', metavar='NAME',
                   help='what the model was trained on, such as imagenet-1k (default: as --dataset of the training '
                        'says)')
    g = parser.add_argument_group('measurement (of image classifiers; needs --data-dir or --dataset)')
    datasets.add_dataset_arguments(g, train=False)
    g.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='images per batch')
    g.add_argument('-j', '--workers', type=int, default=2, metavar='N', help='loader processes')
    common.add_precision_arguments(g)
    g = parser.add_argument_group('measurement (of forecasters)')
    g.add_argument('--series', metavar='CSV', help='series as of tools/forecast.py')
    g.add_argument('--part', default='test', choices=('train', 'val', 'test', 'all'), help='part of it to evaluate')
    parser.add_argument('--json', action='store_true', help='print what was done as JSON')
    return parser


# Data under terms that do not allow every use: the weights' licence is for whoever publishes them to choose.
_RESTRICTED = ('ade20k', 'camvid', 'cityscapes', 'coco', 'imagenet', 'lvis', 'tiny-imagenet', 'tiny_imagenet')


def check_license(args: argparse.Namespace, source: Source) -> None:
    if args.license is None:
        data = data_name(args, source) or ''
        if data.lower().startswith(_RESTRICTED):
            raise UserError(f'{args.checkpoint} was trained on {data}, whose terms do not allow every use: pass '
                            '--license, the licence under which you publish the weights, such as cc-by-nc-4.0')
        args.license = getattr(source.model, 'pretrained_cfg', {}).get('license')
        if source.forecaster is not None:
            args.license = source.model._hub_mixin_info.model_card_data.license
        if not args.license:
            raise UserError(f'{args.checkpoint} does not say under which licence its weights are: pass --license, for '
                            'example apache-2.0')


def main() -> None:
    args = get_parser().parse_args()
    common.at_least(args, 1, 'batch_size')
    common.at_least(args, 0, 'workers')
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', args.repo):
        raise UserError(f'--repo must be ORG/NAME, got {args.repo!r}')
    if args.out is None and args.dry_run:
        args.out = os.path.join('output', 'hub', args.repo.partition('/')[2])
    if args.out and os.path.lexists(args.out):
        raise UserError(f'{args.out} exists already: nothing is overwritten')
    common.register_models()
    source = read_source(args)
    check_license(args, source)
    dataset = open_data(args, source)
    parent = Path(args.out).parent if args.out else None
    try:
        if parent:
            parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix='.push_to_hub.', dir=parent))
    except OSError as e:
        raise UserError(f'cannot write {args.out or "a temporary folder"}: {common.one_line(e)}') from None
    try:
        with common.writing(args.out or 'a temporary folder'):
            write_model(source, folder, args.license)
        model = check_reload(source, folder)
        result = None
        if dataset is not None:
            result = measure(model, args, dataset)
        elif args.series:
            result = measure_forecaster(folder, args)
        card = make_card(args, source, folder, result)
        common.write_text(folder / 'README.md', card)
        pushed = None if args.dry_run else push(args, folder)
        entry = manifest_entry(args, source, folder, result, pushed) if pushed else None
        if args.out:
            folder.chmod(0o755)
            os.rename(folder, args.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        common.print_json(dict(repo=args.repo, folder=args.out, pushed=pushed, result=result, manifest_entry=entry,
                               card=card))
        return
    if args.dry_run:
        print(card)
    if args.out:
        print(f'written: {args.out}')
    if pushed:
        print(f'pushed: {pushed["pull_request"] or pushed["url"]}')
        if entry:
            print('entry for vim2/weights/manifest.json, under ARCHITECTURE.TAG:')
            common.print_json(entry)


if __name__ == '__main__':
    common.run(main)
