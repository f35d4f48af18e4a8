#!/usr/bin/env python
"""Classify pictures: files, folders or URLs in, the most probable labels out.

    python tools/predict.py photo.jpg
    python tools/predict.py holiday_photos/ https://example.org/cat.jpg --topk 3 --json
    python tools/predict.py photo.jpg --model local-dir:output/train/RUN/model --annotate annotated

A picture that cannot be read is named on stderr, skipped and counted; results are printed as they come. The exit code
is 0 if at least one picture was classified, 1 if none could be read or an annotated one could not be written, 2 for a
mistake on the command line.
"""
import argparse
import http.client
import io
import json
import os
import socket
import stat
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from timm.data import CustomDatasetInfo, ImageNetInfo, create_transform, infer_imagenet_subset
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

import _common as common
import _images
from _common import UserError

_MAX_DOWNLOAD = 64 * 2 ** 20  # bytes
_MAX_FILE = 2 ** 30  # bytes
_MAX_SHOWN = 4096  # pixels, the longer side of an annotated picture


class Unreadable(Exception):
    """A source that gives no picture, with the reason."""


class Prediction(NamedTuple):
    index: int
    label: str
    probability: float


class Picture(NamedTuple):
    """What is kept of a picture until its batch is full: a 144-megapixel one takes 432 MB."""
    source: str
    width: int
    height: int
    tensor: torch.Tensor  # as the model reads it
    shown: Optional[Image.Image]  # to annotate, of at most _MAX_SHOWN pixels a side


# ------------------------------------------------------------------------------------------------------- sources

def is_url(source: str) -> bool:
    return source.lower().startswith(('http://', 'https://'))


def find_sources(inputs: Sequence[str]) -> Iterator[Tuple[str, Optional[str]]]:
    """Each picture's path or URL, or a source with the reason why there is none."""
    extensions = get_img_extensions(as_set=True)
    for item in inputs:
        if is_url(item) or os.path.lexists(item) and not os.path.isdir(item):
            yield item, None
        elif os.path.isdir(item):
            unreadable: List[OSError] = []
            found = sorted((os.path.join(folder, f) for folder, _, files in os.walk(item, onerror=unreadable.append)
                            for f in files if os.path.splitext(f)[1].lower() in extensions), key=natural_key)
            for e in unreadable:
                yield str(e.filename), f'folder cannot be read: {e.strerror}'
            if not found and not unreadable:
                yield item, f'no picture in this folder (looked for {", ".join(sorted(extensions))})'
            for path in found:
                yield path, None
        else:
            yield item, 'no such file or folder'


def _watched(base, sockets: List[socket.socket]):
    """A connection class that notes its socket."""
    class Connection(base):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)
    return Connection


class _Http(urllib.request.HTTPHandler):
    def __init__(self, sockets: List[socket.socket]):
        super().__init__()
        self.connection = _watched(http.client.HTTPConnection, sockets)

    def http_open(self, request):
        return self.do_open(self.connection, request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, sockets: List[socket.socket]):
        super().__init__()
        self.connection = _watched(http.client.HTTPSConnection, sockets)

    def https_open(self, request):
        return self.do_open(self.connection, request)


def download(url: str, timeout: float) -> bytes:
    """The bytes at a URL, all of them within `timeout` seconds.

    A timeout of sockets alone would be one of each read: a server that sends a byte now and then never meets it. So a
    timer closes the connection, wherever it is.
    """
    sockets: List[socket.socket] = []
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        for s in sockets:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed already
                pass

    def problem(text: str) -> Unreadable:
        return Unreadable(f'no answer within {timeout:g} s' if expired.is_set() else text)

    timer = threading.Timer(timeout, expire)
    timer.daemon = True
    timer.start()
    try:
        request = urllib.request.Request(url, headers={'User-Agent': 'vim2-predict'})
        with urllib.request.build_opener(_Http(sockets), _Https(sockets)).open(request, timeout=timeout) as response:
            raw = response.read(_MAX_DOWNLOAD + 1)
            length = response.headers.get('Content-Length')
    except urllib.error.HTTPError as e:
        raise problem(f'HTTP {e.code} {e.reason}') from None
    except TimeoutError:
        raise Unreadable(f'no answer within {timeout:g} s') from None
    except urllib.error.URLError as e:
        if isinstance(e.reason, TimeoutError):
            raise Unreadable(f'no answer within {timeout:g} s') from None
        raise problem(f'cannot be fetched: {common.one_line(e.reason) if e.reason else e}') from None
    except (OSError, ValueError, EOFError) as e:  # a connection that breaks off, a malformed address
        raise problem(f'cannot be fetched: {common.one_line(e)}') from None
    except Exception as e:  # http.client has its own hierarchy (bad status lines, incomplete reads)
        raise problem(f'cannot be fetched: {type(e).__name__}: {common.one_line(e)}') from None
    finally:
        timer.cancel()
    if len(raw) > _MAX_DOWNLOAD:
        raise Unreadable(f'larger than {_MAX_DOWNLOAD >> 20} MiB')
    if expired.is_set() or length is not None and length.isdigit() and int(length) != len(raw):
        raise problem(f'connection broke off after {len(raw)} of {length} bytes')
    return raw


def _check_file(path: str) -> None:
    """Only a regular file is opened: a pipe would wait for ever."""
    try:
        info = os.stat(path)
    except (OSError, ValueError) as e:
        raise Unreadable(f'cannot be read: {getattr(e, "strerror", None) or e}') from None
    if not stat.S_ISREG(info.st_mode):
        raise Unreadable('no regular file, but a pipe, socket or device')
    if info.st_size > _MAX_FILE:
        raise Unreadable(f'larger than {_MAX_FILE >> 30} GiB')


def read_picture(source: str, timeout: float) -> Image.Image:
    """An upright RGB picture, transparency on white, 16-bit values scaled."""
    try:
        if is_url(source):
            file = io.BytesIO(download(source, timeout))
        else:
            _check_file(source)
            file = source
        with _images.open_image(file) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith('I;16') or image.mode == 'I':
                values = np.asarray(image).astype(np.int64)
                image = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            if image.mode == 'RGB':
                image.load()
                return image.copy() if image.readonly else image
            return image.convert('RGB')
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable('not a picture in a format that Pillow knows') from None
    except (Image.DecompressionBombError, _images.TooLarge) as e:
        raise Unreadable(f'too large: {common.one_line(e, 160)}') from None
    except Exception as e:  # PIL's decoders raise many types
        raise Unreadable(f'damaged picture: {common.one_line(e, 160)}') from None


# -------------------------------------------------------------------------------------------------------- labels

def read_labels(path: str, num_classes: int) -> CustomDatasetInfo:
    """Names from a text file (one per line) or JSON (list, or mapping of index to name)."""
    try:
        text = Path(path).read_text(encoding='utf-8')
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if path.endswith('.json'):
            names = json.loads(text)
            if isinstance(names, dict):  # JSON has no integer keys
                names = [name for _, name in sorted((int(index), name) for index, name in names.items())]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError('expected names, one for each class')
    except OSError as e:
        raise UserError(f'cannot read the labels {path}: {e.strerror}') from None
    except (ValueError, TypeError) as e:
        raise UserError(f'{path} holds no labels: {common.one_line(e)}') from None
    if len(names) != num_classes:
        raise UserError(f'{path} names {len(names)} classes, the model has {num_classes}')
    return CustomDatasetInfo(names)


def label_function(model: torch.nn.Module, labels: Optional[str]) -> Callable[[int], str]:
    """From class index to label: --labels, else the model's own names, else ImageNet's by the number of classes."""
    if labels:
        return read_labels(labels, model.num_classes).index_to_description
    names, descriptions = common.class_names(model), model.pretrained_cfg.get('label_descriptions')
    if names:
        if descriptions and not (isinstance(descriptions, dict) and all(
                isinstance(descriptions.get(n), str) for n in names)):
            raise UserError('label_descriptions of the model must have a text for each of its label_names')
        return CustomDatasetInfo(names, descriptions or None).index_to_description
    subset = infer_imagenet_subset(model)
    if subset:
        return ImageNetInfo(subset).index_to_description
    return lambda index: f'class {index}'


# ---------------------------------------------------------------------------------------------------- classifier

class Classifier:
    """A timm model with its preprocessing and labels; pictures in, predictions out."""

    def __init__(self, model: torch.nn.Module, label: Callable[[int], str], config: Dict, device: torch.device,
                 autocast):
        self.model = model.eval().to(device)
        self.label = label
        self.device = device
        self.autocast = autocast
        self.transform = create_transform(
            config['input_size'], is_training=False, interpolation=config['interpolation'], mean=config['mean'],
            std=config['std'], crop_pct=config['crop_pct'], crop_mode=config['crop_mode'])

    def read(self, source: str, timeout: float, shown: bool) -> Picture:
        """Read and transform a picture; with `shown` a copy to annotate is kept."""
        image = read_picture(source, timeout)
        try:
            tensor = self.transform(image)
            factor = -(-max(image.size) // _MAX_SHOWN)
            copy = (image.reduce(factor) if factor > 1 else image) if shown else None
        except (MemoryError, ValueError, OSError) as e:
            raise Unreadable(f'cannot be resized: {common.one_line(e)}') from None
        return Picture(source, image.width, image.height, tensor, copy)

    @torch.inference_mode()
    def __call__(self, tensors: Sequence[torch.Tensor], topk: int) -> List[List[Prediction]]:
        """The predictions of pictures as `transform` gives them; none where the model's values are not finite."""
        with self.autocast():
            output = self.model(torch.stack(list(tensors)).to(self.device)).float()
        probabilities, indices = output.softmax(-1).topk(min(topk, output.shape[-1]))
        return [[Prediction(i, self.label(i), p) for i, p in zip(row_i, row_p)] if finite else []
                for row_i, row_p, finite in zip(indices.tolist(), probabilities.tolist(),
                                                output.isfinite().all(-1).tolist())]


# -------------------------------------------------------------------------------------------------------- output

def _fit(text: str, font, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + '…') > width:
        text = text[:-1]
    return text + '…'


def annotate(image: Image.Image, predictions: Sequence[Prediction]) -> Image.Image:
    """The picture above a panel with a bar per label, at least 360 pixels wide. Small pictures are enlarged."""
    scale = max(1, min(-(-360 // image.width), 2048 // image.height))
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    width = max(image.width, 360)
    size = max(16, width // 26)
    font = ImageFont.load_default(size)
    pad, row = size * 3 // 4, size * 7 // 4
    panel = Image.new('RGB', (width, row * len(predictions) + pad), (24, 26, 31))
    draw = ImageDraw.Draw(panel)
    number = font.getlength('100.0 %')
    label_width = (width - 4 * pad - number) * 0.5
    bar_left, bar_right = 2 * pad + label_width, width - 2 * pad - number
    for k, p in enumerate(predictions):
        top = pad // 2 + k * row
        middle = top + row / 2
        color = (255, 255, 255) if k == 0 else (176, 182, 194)
        draw.text((pad, middle), _fit(p.label, font, label_width), fill=color, font=font, anchor='lm')
        box = (bar_left, middle - size * 0.35, bar_right, middle + size * 0.35)
        draw.rectangle(box, fill=(52, 56, 66))
        if p.probability * (bar_right - bar_left) >= 1:
            draw.rectangle((bar_left, box[1], bar_left + p.probability * (bar_right - bar_left), box[3]),
                           fill=(86, 156, 255) if k == 0 else (92, 108, 138))
        draw.text((width - pad, middle), f'{100 * p.probability:.1f} %', fill=color, font=font, anchor='rm')
    out = Image.new('RGB', (width, image.height + panel.height), (24, 26, 31))
    out.paste(image, ((width - image.width) // 2, 0))
    out.paste(panel, (0, image.height))
    return out


def annotated_path(folder: Path, source: str, taken: set) -> Path:
    """A file name in `folder` after the source that no other source of this call has."""
    name = urllib.parse.urlsplit(source).path.rstrip('/') if is_url(source) else source
    name = os.path.basename(name)
    stem = ''.join(c if c.isalnum() or c in '._-' else '_' for c in os.path.splitext(name)[0]).lstrip('.') or 'picture'
    n, path = 1, folder / f'{stem}.png'
    while path in taken:
        n += 1
        path = folder / f'{stem}-{n}.png'
    taken.add(path)
    return path


class Report:
    """Results on standard output as they come, as a table or as the parts of one JSON object."""

    def __init__(self, as_json: bool, **about):
        self.as_json = as_json
        self.count = 0
        self.skipped: List[Dict[str, str]] = []
        if as_json:
            head = ''.join(f'\n  {json.dumps(k)}: {json.dumps(v)},' for k, v in about.items())
            print(f'{{{head}\n  "results": [', end='', flush=True)

    def add(self, picture: Picture, predictions: Sequence[Prediction], annotated: Optional[Path]) -> None:
        if self.as_json:
            result = dict(source=picture.source, width=picture.width, height=picture.height,
                          predictions=[p._asdict() for p in predictions],
                          **({} if annotated is None else dict(annotated=str(annotated))))
            print((',' if self.count else '') + f'\n    {json.dumps(result)}', end='', flush=True)
        else:
            print(f'{picture.source} ({picture.width} x {picture.height} px)')
            width = max(len(p.label) for p in predictions)
            for k, p in enumerate(predictions):
                bar = '#' * round(30 * p.probability)
                print(f'  {k + 1:>2}  {p.label:<{width}}  {100 * p.probability:5.1f} %  {bar}'.rstrip())
            if annotated is not None:
                print(f'  annotated picture: {annotated}')
            sys.stdout.flush()
        self.count += 1

    def skip(self, source: str, why: str) -> None:
        print(f'skipped {source}: {why}', file=sys.stderr)
        self.skipped.append(dict(source=source, error=why))

    def end(self) -> None:
        if self.as_json:
            print(f'\n  ],\n  "skipped": {json.dumps(self.skipped)}\n}}', flush=True)
        if self.skipped:
            print(f'{self.count} classified, {len(self.skipped)} skipped', file=sys.stderr)


def get_parser() -> argparse.ArgumentParser:
    description, rule = __doc__.split('\n\n')[0], __doc__.strip().rsplit('\n\n', 1)[-1]
    parser = argparse.ArgumentParser(description=description, epilog=rule, formatter_class=common.HelpFormatter)
    parser.add_argument('inputs', nargs='+', metavar='INPUT',
                        help='picture files, folders (with subfolders) or http(s) URLs')
    common.add_model_arguments(parser)
    g = parser.add_argument_group('precision and hardware')
    common.add_precision_arguments(g)
    g.add_argument('-b', '--batch-size', type=int, default=16, metavar='N', help='pictures per batch')
    g = parser.add_argument_group('input and output')
    g.add_argument('-k', '--topk', type=int, default=5, metavar='N', help='labels per picture')
    g.add_argument('--labels', metavar='FILE',
                   help="class names, one per line, or .json (default: the model's own, else ImageNet's where the "
                        "number of classes is one of ImageNet's)")
    g.add_argument('--json', action='store_true', help='print JSON')
    g.add_argument('--annotate', metavar='DIR', help='save each picture with its labels to this folder, as PNG')
    g.add_argument('--timeout', type=float, default=20, metavar='S', help='seconds to wait for a URL')
    return parser


def main() -> int:
    args = get_parser().parse_args()
    common.at_least(args, 1, 'topk', 'batch_size', 'num_classes')
    if args.timeout <= 0:
        raise UserError(f'--timeout must be positive, got {args.timeout}')
    device = common.check_device(args.device or common.default_device())
    common.image_size(args.img_size)
    folder = Path(args.annotate) if args.annotate else None
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f'cannot create the folder {folder}: {e.strerror}') from None

    model = common.trained_model(args)
    config = common.data_config(args, model)
    classify = Classifier(model, label_function(model, args.labels), config, device,
                          common.autocast(device, args.amp, args.amp_dtype))

    sources = list(find_sources(args.inputs))
    taken, unwritten = set(), 0
    report = Report(args.json, model=args.model, checkpoint=args.checkpoint,
                    img_size=list(config['input_size'][-2:]), device=str(device))

    def finish(batch: List[Picture]) -> None:
        nonlocal unwritten
        for picture, predictions in zip(batch, classify([p.tensor for p in batch], args.topk)):
            if not predictions:
                report.skip(picture.source, 'the model gives values that are not finite')
                continue
            path = None
            if picture.shown is not None:
                path = annotated_path(folder, picture.source, taken)
                drawn = annotate(picture.shown, predictions)
                try:
                    common.write_atomic(path, lambda tmp, d=drawn: d.save(tmp, 'PNG'))
                except UserError as e:
                    print(e, file=sys.stderr)
                    path, unwritten = None, unwritten + 1
            report.add(picture, predictions, path)

    batch: List[Picture] = []
    # where the results scroll by they are the progress
    quiet = not args.json or len(sources) < 2
    try:
        for source, problem in common.progress(sources, desc='classify', unit='picture', disable=quiet):
            try:
                if problem is not None:
                    raise Unreadable(problem)
                batch.append(classify.read(source, args.timeout, shown=folder is not None))
            except Unreadable as e:
                report.skip(source, str(e))
            if len(batch) == args.batch_size:
                finish(batch)
                batch = []
        if batch:
            finish(batch)
    finally:
        report.end()
    return 0 if report.count and not unwritten else 1


if __name__ == '__main__':
    common.run(main)
