"""Data sets of the tools, and their classes.

Any data set that timm's `create_dataset` reads, plus `npz`, one file per split with the images as concatenated encoded
bytes, and `csv`, one list of paths and labels per split. A split is what its name says, or an error; classes are
matched by name, between splits and between a model and its data; an image that cannot be read is named.
"""
import argparse
import csv
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.dataset import ImageDataset
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torchvision.datasets import ImageFolder

from _common import UserError, one_line, progress
from _images import NpzImages, open_image, parse_split, physical_memory, transformed

_REMOTE_PREFIXES = ('hfds', 'hfids', 'tfds')  # these may live in a cache or on a hub, not at --data-dir
_STREAMING_PREFIXES = ('hfids', 'tfds', 'wds')
_TRAIN_NAMES = ('train', 'training')  # timm's synonyms of a split
_EVAL_NAMES = ('val', 'valid', 'validation', 'eval', 'evaluation')
_BY_TRAIN_FLAG = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')  # torchvision's train=True
_MAX_SKIPPED = 10  # unreadable training images in a row
_logger = logging.getLogger(__name__)


class Images(torch.utils.data.Dataset):
    """The images of a timm reader or of a torchvision data set; errors name the image.

    Args:
        dataset: timm's `ImageDataset`, or torchvision's.
        strict: An unreadable image is an error: right for a measurement, where another image would be counted twice.
            Else, right for a long training, it is named in a warning and the next one is taken, up to ten in a row.
        part: these images only, by index.
    """

    def __init__(self, dataset, strict: bool, part: slice = slice(None)):
        self.dataset = dataset
        self.strict = strict
        self.indices = range(len(dataset))[part]
        self.reader = getattr(dataset, 'reader', None)
        self.transform = None
        self.target_transform = None

    def __len__(self) -> int:
        return len(self.indices)

    def _read(self, row: int) -> Tuple[Image.Image, Any]:
        index = self.indices[row]
        try:
            if self.reader is None:
                return self.dataset[index]
            file, target = self.reader[index][:2]
            with file, open_image(file) as image:
                return image.convert('RGB'), target
        except Exception as e:  # readers and PIL raise many types
            raise UserError(f'cannot read {self.describe(row)}: {one_line(e, 160)}') from None

    def __getitem__(self, row: int):
        failed = []
        while True:
            try:
                image, target = self._read(row)
                break
            except UserError as e:
                if self.strict:
                    raise
                failed.append(row)
                if len(failed) == min(_MAX_SKIPPED, len(self)):
                    raise UserError(f'{e}; {len(failed)} training images in a row cannot be read: '
                                    f'{", ".join(map(self._name, failed))}') from None
                _logger.warning('%s; the next one is taken', e)
                row = (row + 1) % len(self)
        if self.transform is not None:
            image = self.transform(image)
        target = -1 if target is None else target
        if self.target_transform is not None:
            target = transformed(self.target_transform, target, self.describe(row))
        return image, target

    def describe(self, row: int) -> str:
        return f'image {self.indices[row]} ({self._name(row)})'

    def _name(self, row: int) -> str:
        index = self.indices[row]
        if self.reader is None:
            samples = getattr(self.dataset, 'samples', None)
            return str(samples[index][0]) if samples else 'no file name'
        try:
            return self.reader.filename(index)
        except (AttributeError, NotImplementedError, AssertionError):
            return 'no file name'

    def filename(self, row: int, basename: bool = False, absolute: bool = False) -> str:
        return self.reader.filename(self.indices[row], basename, absolute)


class DecodedImages(torch.utils.data.Dataset):
    """The images of another data set, decoded once into memory as uint8: N·H·W·3 bytes, which forked workers share.

    Args:
        dataset: `NpzImages` or `Images`; all images must have one size.
        source: what to call it in errors.
        verbose: show a progress bar while decoding.

    Attributes:
        images: (N, H, W, 3), uint8.
        labels: (N,), as the data set has them.
    """

    def __init__(self, dataset, source: str, verbose: bool = False):
        self.transform = None
        self.target_transform = None
        self.dataset = dataset
        self.classes, self.class_names = class_names(dataset), getattr(dataset, 'class_names', None)
        self.mapped_classes = getattr(dataset, 'mapped_classes', None)
        self.labels = np.empty(len(dataset), np.int64)
        with ThreadPoolExecutor() as pool:  # PIL's decoders release Python's lock
            rows = progress(pool.map(dataset.__getitem__, range(len(dataset))), total=len(dataset),
                            desc=f'decoding {source}', unit='image', disable=not verbose)
            for row, (image, label) in enumerate(rows):
                image = np.asarray(image.convert('RGB'))
                if row == 0:
                    size, memory = len(dataset) * image.nbytes, physical_memory()
                    if memory is not None and size > memory:
                        raise UserError(f'{source}: {len(dataset):,} images of {image.shape[1]}x{image.shape[0]} take '
                                        f'{size / 1e9:.1f} GB decoded, the machine has {memory / 1e9:.1f} GB of '
                                        'memory: leave out --cache-images')
                    self.images = np.empty((len(dataset), *image.shape), np.uint8)
                if image.shape != self.images.shape[1:]:
                    raise UserError(f'{source}: {dataset.describe(row)} is {image.shape[1]}x{image.shape[0]}, earlier '
                                    f'ones are {self.images.shape[2]}x{self.images.shape[1]}: --cache-images needs '
                                    'images of one size')
                self.images[row], self.labels[row] = image, label
        if isinstance(dataset, NpzImages):
            dataset.data = None  # read, and not needed any more

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Tuple[Any, int]:
        image, target = Image.fromarray(self.images[row]), int(self.labels[row])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = transformed(self.target_transform, target, self.dataset.describe(row))
        return image, target

    def targets(self) -> np.ndarray:
        """The labels of all images, as `__getitem__` gives them."""
        if self.target_transform is None:
            return self.labels
        return np.array([transformed(self.target_transform, y, self.dataset.describe(row))
                         for row, y in enumerate(self.labels)])

    def filename(self, row: int, basename: bool = False, absolute: bool = False) -> str:
        return self.dataset.filename(row, basename, absolute)


class FileReader(Reader):
    """A timm reader of a list of files and the names of their classes.

    Classes are in natural order of their names, or as `class_to_idx` has them.
    """

    def __init__(self, root: str, files: Sequence[Tuple[str, str]]):
        super().__init__()
        self.root = root
        names = sorted({label for _, label in files}, key=natural_key)
        self.class_to_idx = {name: i for i, name in enumerate(names)}
        self.samples = [(path, self.class_to_idx[label]) for path, label in files]

    def __getitem__(self, index: int):
        path, target = self.samples[index]
        return open(path, 'rb'), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)


def find_files(root: str, extensions: Sequence[str]) -> List[Tuple[str, str]]:
    """Every image below a folder and its class, the name of the folder that it is in; naturally sorted.

    Links are followed, hidden folders (.NAME) left out. An unreadable folder, one without images, an image that is
    no regular file or stands outside of class folders are errors: each would change what is trained or measured.
    """
    found: List[Tuple[str, str]] = []

    def scan(folder: str, above: Tuple[str, ...]) -> None:
        real = os.path.realpath(folder)
        if real in above:
            raise UserError(f'{folder} is a link to a folder that it is in')
        try:
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda e: e.name)
        except OSError as e:
            raise UserError(f'cannot read the folder {folder}: {e.strerror}') from None
        before = len(found)
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith('.'):
                    scan(entry.path, (*above, real))
            elif os.path.splitext(entry.name)[1].lower() in extensions:
                if not entry.is_file():
                    raise UserError(f'{entry.path} is no regular file (a pipe, a device, or a link to nothing)')
                if not above:
                    raise UserError(f'{entry.path} is an image outside of class folders')
                found.append((entry.path, os.path.basename(folder)))
        if len(found) == before:
            raise UserError(f'the folder {folder} holds no image (looked for {", ".join(sorted(extensions))})')

    scan(root, ())
    return sorted(found, key=lambda f: natural_key(f[0]))


def read_csv(root: str, split: str) -> FileReader:
    """The images that SPLIT.csv in `root` lists: columns `path`, absolute or from `root` on, and `label`, a name."""
    name, part = parse_split(split)
    path = Path(root) / f'{name}.csv'
    if not path.is_file():
        found = ', '.join(sorted(p.stem for p in Path(root).glob('*.csv')))
        raise UserError(f'{path} does not exist' + (f'; splits there: {found}' if found else
                                                    f': no .csv file in {root}'))
    files = []
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:
            reader = csv.DictReader(f)
            if not {'path', 'label'} <= set(reader.fieldnames or ()):
                raise UserError(f'{path} must have columns path and label, it has {", ".join(reader.fieldnames or ())}')
            for row in reader:
                if not row['path'] or not row['label']:
                    raise UserError(f'{path}, line {reader.line_num}: a path and a label are needed')
                files.append((os.path.join(root, row['path']), row['label']))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f'cannot read {path}: {one_line(e)}') from None
    classes = FileReader(root, files)  # a part of the rows has the classes of the whole
    classes.samples = classes.samples[part]
    if not classes.samples:
        raise UserError(f'{path}: split {split!r} holds no image (the file has {len(files)})')
    for file, _ in classes.samples:
        if not os.path.isfile(file):
            raise UserError(f'{path} lists {file}, which is no file')
    return classes


def split_path(root: str, split: str) -> str:
    """Where a split of a folder data set is: ROOT/SPLIT or ROOT/SPLIT.tar, or timm's other names of it; never ROOT.

    The split `.` is ROOT itself, which may be a .tar file as well.
    """
    if split == '.':
        return root
    if not os.path.isdir(root):
        raise UserError(f'{root} is no folder, so it has no split {split}: pass . as the split to take all of it')
    if '[' in split:
        raise UserError(f'split {split!r}: parts of a split are for npz, csv and torch/ data sets')
    synonyms = next((names for names in (_TRAIN_NAMES, _EVAL_NAMES) if split in names), ())
    names = list(dict.fromkeys([split, *synonyms]))
    for name in names:
        for path in (os.path.join(root, name), os.path.join(root, f'{name}.tar')):
            if os.path.exists(path):
                return path
    found = sorted(n for n in os.listdir(root) if os.path.isdir(os.path.join(root, n)) or n.endswith('.tar'))
    raise UserError(f'{root} has no split {" or ".join(names)}; it has '
                    + (', '.join(found[:8]) + (', …' if len(found) > 8 else '') if found else 'no folder')
                    + '. Pass . as the split to take the folder itself')


def is_streaming(dataset) -> bool:
    """A data set that is read in its own order and not by index."""
    return isinstance(dataset, torch.utils.data.IterableDataset)


def class_names(dataset) -> Optional[List[str]]:
    """The class names of a data set, in the order of the labels, where it knows them."""
    mapped = getattr(dataset, 'mapped_classes', None)
    if mapped is not None:
        return mapped
    reader, inner = getattr(dataset, 'reader', None), getattr(dataset, 'dataset', None)
    for source in (reader, inner):
        mapping = getattr(source, 'class_to_idx', None) or getattr(source, 'class_name_to_idx', None)
        if isinstance(mapping, dict) and mapping:
            return _names_by_index(mapping)
    for source in (dataset, inner, reader):
        names = getattr(source, 'classes', None)
        if isinstance(names, (list, tuple)) and names:
            return [str(n[0]) if isinstance(n, (list, tuple)) else str(n) for n in names]
    features = getattr(getattr(reader, 'dataset', None), 'features', None)  # Hugging Face data sets
    names = getattr((features or {}).get(getattr(reader, 'label_key', None)), 'names', None)
    return [str(n) for n in names] if names else None


def class_descriptions(dataset) -> Optional[Dict[str, str]]:
    """How to show the classes, by their names, where a data set says so."""
    names, shown = class_names(dataset), getattr(dataset, 'class_names', None)
    return dict(zip(names, shown)) if names and isinstance(shown, list) and len(shown) == len(names) else None


def _names_by_index(mapping: Dict[str, int]) -> List[str]:
    """The names of classes 0, 1, …; several of one index together, '' for none."""
    names = [''] * (max(mapping.values()) + 1)
    for name, index in mapping.items():
        names[index] = f'{names[index]}, {name}' if names[index] else str(name)
    return names


class Labels:
    """A target transform: labels to a model's classes; one that is none of them is an error."""

    def __init__(self, mapping: Optional[List[int]] = None, num_classes: Optional[int] = None):
        self.mapping = mapping
        self.num_classes = num_classes

    def __call__(self, label: Any) -> int:
        label = int(label)
        limit = self.num_classes if self.mapping is None else len(self.mapping)
        if label < 0 or limit is not None and label >= limit:
            raise UserError(f'label {label}, but there are {limit} classes')
        return label if self.mapping is None else self.mapping[label]


def read_class_map(path: str) -> Dict[str, int]:
    """From class names to indices: a text file with a name a line, or .json with a list of names or a mapping."""
    try:
        text = Path(path).read_text(encoding='utf-8')
        content = json.loads(text) if path.endswith('.json') else [x.strip() for x in text.splitlines() if x.strip()]
    except OSError as e:
        raise UserError(f'cannot read the class map {path}: {e.strerror}') from None
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} is no class map: {one_line(e)}') from None
    if isinstance(content, list):
        if len(set(map(str, content))) < len(content):
            raise UserError(f'{path}: a class comes twice')
        content = {name: i for i, name in enumerate(content)}
    if not isinstance(content, dict) or not content or not all(
            isinstance(k, str) and type(v) is int and 0 <= v < _MOST_CLASSES for k, v in content.items()):
        raise UserError(f'{path} is no class map: expected names, or a mapping of names to indices from 0')
    return content


_MOST_CLASSES = 1 << 20


def _apply_class_map(dataset, mapping: Dict[str, int], path: str, source: str) -> None:
    names = class_names(dataset)
    if names is None:
        raise UserError(f'{source} does not name its classes: --class-map {path} cannot be applied')
    unknown = [n for n in names if n not in mapping]
    if unknown:
        raise UserError(f'{source} has classes that {path} lacks: {_listed(unknown)}')
    dataset.target_transform = Labels([mapping[n] for n in names])
    dataset.mapped_classes = _names_by_index({n: mapping[n] for n in mapping})


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ', '.join(map(str, names[:most])) + (f', … ({len(names)} in all)' if len(names) > most else '')


def match_classes(dataset, num_classes: int, source: str, names: Optional[Sequence[str]] = None,
                  of: str = 'the model', asked: bool = False) -> None:
    """Make a data set's labels those of a model, by the names of classes; refuse it where that cannot be.

    Args:
        dataset: Its target transform is set.
        num_classes: The model's outputs.
        source: What to call the data set in errors.
        names: The model's classes. Without them the data set must have as many as the model has outputs.
        of: What `names` are of, for errors.
        asked: --num-classes was given, so that errors need not recommend it.

    Where a class map gave the labels the model's indices, it is taken at its word.
    """
    theirs, mapping = class_names(dataset), getattr(dataset.target_transform, 'mapping', None)
    if getattr(dataset, 'mapped_classes', None) is not None:
        if len(theirs) > num_classes:
            raise UserError(f'--class-map has indices up to {len(theirs) - 1}, the model has {num_classes} outputs')
    elif theirs is not None and names is not None:
        names = list(names)
        unknown = [n for n in theirs if n not in names]
        if unknown:
            raise UserError(f'{source} has classes that {of} lacks: {_listed(unknown)} ({of} has {_listed(names)}): '
                            '--class-map says which index each has')
        if theirs != names:
            twice = [n for n in theirs if names.count(n) > 1]
            if twice:
                raise UserError(f'{of} has several classes of one name ({_listed(twice)}), in another order than '
                                f'{source}: --class-map says which index each has')
            mapping = [names.index(n) for n in theirs]
    elif theirs is not None and len(theirs) != num_classes:
        raise UserError(f'{source} has {len(theirs)} classes ({", ".join(theirs[:3])}, …), the model has {num_classes} '
                        f'outputs{"" if asked else ": pass --num-classes"}. A data set with a part of the classes, of '
                        'a model that does not name them, needs --class-map')
    dataset.target_transform = Labels(mapping, num_classes)
    labels = getattr(dataset, 'labels', None)
    if mapping is None and labels is not None and int(labels.max()) >= num_classes:
        raise UserError(f'{source}: labels run from {int(labels.min())} to {int(labels.max())}, the model has '
                        f'{num_classes} outputs{"" if asked else ": pass --num-classes"}')


def open_dataset(
        name: str,
        root: Optional[str],
        split: str,
        *,
        is_training: bool = False,
        strict: bool = False,
        class_map: Optional[str] = None,
        download: bool = False,
        cache_images: bool = False,
        input_key: Optional[str] = None,
        target_key: Optional[str] = None,
        num_samples: Optional[int] = None,
        batch_size: int = 1,
        seed: int = 42,
        verbose: bool = False,
):
    """The data set `name` (timm's names, `npz` or `csv`), with errors that name what is missing.

    Args:
        strict: An unreadable image is an error, not a warning (data sets that are read image by image).
        class_map: File, see `read_class_map`; labels are then its indices.
    """
    prefix = name.split('/')[0].lower() if '/' in name else ''
    local = prefix not in _REMOTE_PREFIXES
    if local and not root:
        raise UserError('no data: pass --data-dir')
    if local and not download and prefix != 'wds' and not os.path.exists(root):
        raise UserError(f'data path {root} does not exist')
    mapping = read_class_map(class_map) if class_map else None
    folder = name in ('', 'folder', 'torch/folder', 'torch/image_folder')
    try:
        if name == 'npz':
            dataset = NpzImages(root, split)
        elif name == 'csv':
            dataset = Images(ImageDataset(root, reader=read_csv(root, split)), strict)
        elif folder:
            dataset = Images(_open_folder(name, split_path(root, split), input_key), strict)
        else:
            known = (*_TRAIN_NAMES, *_EVAL_NAMES, 'test')
            part = slice(None)
            if prefix == 'torch':
                split, part = parse_split(split)
            if prefix == 'torch' and name.split('/')[-1].lower() in _BY_TRAIN_FLAG and split not in known:
                raise UserError(f'{name} has no split {split!r}: train or test')
            remote = prefix in (*_REMOTE_PREFIXES, *_STREAMING_PREFIXES)
            dataset = create_dataset(
                name, root=root, split=split, is_training=is_training, class_map=mapping if remote else None,
                download=download, batch_size=batch_size, seed=seed, input_key=input_key, target_key=target_key,
                num_samples=num_samples)
            if not is_streaming(dataset):
                dataset = Images(dataset, strict, part)
                if not len(dataset):
                    raise UserError(f'{name}: the split holds no image')
            if remote and mapping is not None:  # timm has applied it
                dataset.mapped_classes, mapping = _names_by_index(mapping), None
        if cache_images:
            if is_streaming(dataset):
                raise UserError('--cache-images and --data-on-device need a data set that is read by index')
            dataset = DecodedImages(dataset, f'{root or name} ({split})', verbose)
    except UserError:
        raise
    except ImportError as e:
        raise UserError(f'data set {name!r} needs a package that is not installed: {one_line(e)}') from None
    except Exception as e:  # every reader and hub has its own errors; the text says what is wrong
        raise UserError(f'cannot open data set {name or "folder"!r} (path {root}, split {split}): '
                        f'{type(e).__name__}: {one_line(e)}') from e
    if mapping is not None:
        _apply_class_map(dataset, mapping, class_map, f'{root or name} ({split})')
    return dataset


def _open_folder(name: str, path: str, input_key: Optional[str]):
    """A folder of class folders, or a .tar of them, in timm's way or torchvision's."""
    if os.path.isfile(path):
        if name.startswith('torch/') or not path.endswith('.tar'):
            raise UserError(f'{path} is a file: expected a folder of class folders' +
                            ('' if name.startswith('torch/') else ', or a .tar of them'))
        return ImageDataset(path, reader=ReaderImageInTar(path))
    extensions = set(input_key.split(';')) if input_key else get_img_extensions(as_set=True)
    files = find_files(path, extensions)
    if name.startswith('torch/'):
        return ImageFolder(path, loader=_load_rgb)
    return ImageDataset(path, reader=FileReader(path, files))


def _load_rgb(path: str) -> Image.Image:
    with open_image(path) as image:
        return image.convert('RGB')


# --------------------------------------------------------------------------------------------------------- options

def add_dataset_arguments(group, *, train: bool) -> None:
    """The options that `open_dataset` reads."""
    group.add_argument('--data-dir', metavar='DIR', help='folder of the data set')
    group.add_argument('--dataset', default='', metavar='NAME',
                       help="'' for DIR/SPLIT with class folders (or DIR/SPLIT.tar), npz for DIR/SPLIT.npz, csv for "
                            'DIR/SPLIT.csv with columns path and label, torch/cifar10, hfds/USER/NAME, wds/NAME, '
                            'tfds/NAME, … as in timm.data.create_dataset')
    group.add_argument('--dataset-download', action=argparse.BooleanOptionalAction, default=False,
                       help='let torch/… data sets be downloaded to --data-dir')
    if train:
        group.add_argument('--train-split', default='train', metavar='SPLIT',
                           help='training split; npz, csv and torch/ take parts too, such as train[:45000]; . is the '
                                'folder itself')
        group.add_argument('--val-split', default='validation', metavar='SPLIT', help='evaluation split, the same')
    else:
        group.add_argument('--split', default='validation', metavar='SPLIT',
                           help='split; npz, csv and torch/ take parts too, such as train[45000:]; . is the folder '
                                'itself')
    group.add_argument('--class-map', default='', metavar='FILE',
                       help='class index of each class name of the data set: a text file with a name a line, or .json '
                            'with a mapping (default: by name, between splits and as the model names its classes)')
    group.add_argument('--input-key', metavar='KEY', help='key of the image in hfds/, tfds/ and wds/ data sets')
    group.add_argument('--target-key', metavar='KEY', help='key of the label in hfds/, tfds/ and wds/ data sets')
    for name in ('--train-num-samples', '--val-num-samples') if train else ('--num-samples',):
        group.add_argument(name, type=int, metavar='N',
                           help='number of samples of a streaming data set that does not know it (wds/)')
    group.add_argument('--cache-images', action=argparse.BooleanOptionalAction, default=False,
                       help='decode all images, which must have one size, once into memory (N x H x W x 3 bytes)')


def open_to_measure(args: argparse.Namespace, **kwargs: Any):
    """The data set that the options of `add_dataset_arguments(train=False)` name; unreadable images are errors.

    Args:
        kwargs: further arguments of `open_dataset`.
    """
    return open_dataset(
        args.dataset, args.data_dir, args.split, strict=True, class_map=args.class_map, download=args.dataset_download,
        cache_images=args.cache_images, input_key=args.input_key, target_key=args.target_key,
        num_samples=args.num_samples, **kwargs)
