"""Data sets and loaders of the tools.

Any data set that timm's `create_dataset` reads, plus `npz`: one file per split with the images as concatenated encoded
bytes. Training batches are a pure function of (seed, epoch, position): the sample order, and the random numbers that
each sample's augmentation sees, do not depend on worker processes or on where a run was interrupted. That is
what makes an exact resume in the middle of an epoch possible.
"""
import argparse
import io
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_dataset, create_loader, create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.dataset import ImageDataset
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torchvision import transforms

from _common import UserError, one_line, progress

_REMOTE_PREFIXES = ('hfds', 'hfids', 'tfds')  # these may live in a cache or on a hub, not at --data-dir
_STREAMING_PREFIXES = ('hfids', 'tfds', 'wds')


# --------------------------------------------------------------------------------------------------------------- npz

class NpzImages(torch.utils.data.Dataset):
    """Encoded images in one .npz file.

    Arrays: `data` uint8, the image files one after another; `offsets` int64 (N + 1), image i is
    `data[offsets[i]:offsets[i + 1]]`; `labels` integer (N); optionally `classes` str (number of classes) and
    `names` str (N).

    Args:
        root: Folder of the .npz files.
        split: `train` for train.npz; `train[:45000]` or `train[45000:]` for a part of it, by index.
        cache: Decode every image once into memory as uint8 (all must have one size). Costs N·H·W·3 bytes,
            shared with worker processes that are forked.
        verbose: Show a progress bar while decoding into the cache.
    """

    _SPLIT = re.compile(r'^(?P<name>[^\[\]/\\]+?)(\[(?P<start>\d*):(?P<stop>\d*)\])?$')

    def __init__(self, root: str, split: str, cache: bool = False, verbose: bool = False):
        self.transform = None
        self.target_transform = None
        match = self._SPLIT.match(split)
        if not match:
            raise UserError(f'split {split!r}: expected a name such as train, or a part such as train[:45000]')
        self.path = Path(root) / f'{match["name"]}.npz'
        if not self.path.is_file():
            found = ', '.join(sorted(p.stem for p in Path(root).glob('*.npz')))
            raise UserError(f'{self.path} does not exist' + (f'; splits there: {found}' if found else
                                                             f': no .npz file in {root}'))
        arrays = self._read()
        self.data, self.offsets, self.labels = arrays['data'], arrays['offsets'], arrays['labels']
        self.names, self.classes = arrays.get('names'), arrays.get('classes')
        if self.classes is not None:
            self.classes = [str(c) for c in self.classes]
        start, stop = match['start'], match['stop']
        self.indices = range(len(self.labels))[int(start) if start else None:int(stop) if stop else None]
        if not len(self.indices):
            raise UserError(f'{self.path}: split {split!r} holds no image (the file has {len(self.labels)})')
        self.cache = self._decode_all(verbose) if cache else None

    def _read(self) -> dict:
        required, optional = ('data', 'offsets', 'labels'), ('names', 'classes')
        try:
            with np.load(self.path, allow_pickle=False) as npz:
                missing = [k for k in required if k not in npz.files]
                if missing:
                    raise UserError(f'{self.path} has no array {", ".join(missing)} (it has: {", ".join(npz.files)})')
                arrays = {k: npz[k] for k in (*required, *optional) if k in npz.files}
        except UserError:
            raise
        except Exception as e:  # zip, zlib and numpy each have their own errors for a damaged file
            raise UserError(f'cannot read {self.path}: {type(e).__name__}: {one_line(e, 200)}') from None
        data, offsets, labels = arrays['data'], arrays['offsets'], arrays['labels']
        for key, ok, want in (
                ('data', data.ndim == 1 and data.dtype == np.uint8, 'a uint8 vector'),
                ('offsets', offsets.ndim == 1 and offsets.dtype.kind in 'iu' and len(offsets) == len(labels) + 1,
                 'an integer vector with one element more than labels'),
                ('labels', labels.ndim == 1 and labels.dtype.kind in 'iu', 'an integer vector'),
        ):
            if not ok:
                raise UserError(f'{self.path}: {key} must be {want}, it is {arrays[key].dtype} {arrays[key].shape}')
        offsets = offsets.astype(np.int64)
        if offsets[0] < 0 or (np.diff(offsets) <= 0).any() or offsets[-1] > len(data):
            raise UserError(f'{self.path}: offsets must increase and stay within the {len(data)} bytes of data')
        if 'names' in arrays and len(arrays['names']) != len(labels):
            raise UserError(f'{self.path}: {len(arrays["names"])} names for {len(labels)} labels')
        if 'classes' in arrays and len(labels) and labels.max() >= len(arrays['classes']):
            raise UserError(f'{self.path}: label {labels.max()} but only {len(arrays["classes"])} classes')
        arrays['offsets'] = offsets
        return arrays

    def _decode(self, i: int) -> Image.Image:
        raw = self.data[self.offsets[i]:self.offsets[i + 1]].tobytes()
        try:
            with Image.open(io.BytesIO(raw)) as image:
                return image.convert('RGB')
        except Exception as e:  # PIL's decoders raise many types
            raise UserError(f'{self.path}: cannot decode {self._describe(i)}: {one_line(e, 160)}') from None

    def _describe(self, i: int) -> str:
        return f'image {i}' + (f' ({self.names[i]})' if self.names is not None else '')

    def _decode_all(self, verbose: bool) -> np.ndarray:
        cache = None
        with ThreadPoolExecutor() as pool:  # PIL's decoders release Python's lock
            images = progress(pool.map(lambda i: np.asarray(self._decode(i)), self.indices), total=len(self.indices),
                              desc=f'decoding {self.path.name}', unit='image', disable=not verbose)
            for row, image in enumerate(images):
                if cache is None:
                    cache = np.empty((len(self.indices), *image.shape), np.uint8)
                if image.shape != cache.shape[1:]:
                    raise UserError(f'{self.path}: {self._describe(self.indices[row])} is '
                                    f'{image.shape[1]}x{image.shape[0]}, earlier ones are '
                                    f'{cache.shape[2]}x{cache.shape[1]}: --cache-images needs images of one size')
                cache[row] = image
        self.data = None
        return cache

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> Tuple[Any, int]:
        i = self.indices[row]
        image = self._decode(i) if self.cache is None else Image.fromarray(self.cache[row])
        target = int(self.labels[i])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def filename(self, row: int, basename: bool = False, absolute: bool = False) -> str:
        i = self.indices[row]
        name = str(self.names[i]) if self.names is not None else f'{i:08d}'
        return os.path.basename(name) if basename else name


# -------------------------------------------------------------------------------------------------- any data set

class StrictImages(torch.utils.data.Dataset):
    """A timm `ImageDataset` in which an unreadable image is an error that names it.

    timm logs a warning and takes the next image instead: right for a long training, wrong for a measurement, where
    another image would be counted twice.
    """

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset
        self.reader = dataset.reader
        self.transform = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        try:
            file, target = self.reader[index][:2]
            image = Image.open(file).convert(self.dataset.input_img_mode or 'RGB')
        except Exception as e:  # readers and PIL raise many types
            raise UserError(f'cannot read image {index} ({self._name(index)}): {one_line(e, 160)}') from None
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.dataset.target_transform is not None:
            target = self.dataset.target_transform(target)
        return image, target

    def _name(self, index: int) -> str:
        try:
            return self.dataset.filename(index)
        except (AttributeError, NotImplementedError, AssertionError):
            return 'no file name'


def is_streaming(dataset) -> bool:
    """A data set that is read in its own order and not by index."""
    return isinstance(dataset, torch.utils.data.IterableDataset)


def class_names(dataset) -> Optional[List[str]]:
    """The class names of a data set, in the order of the labels, where it knows them."""
    reader = getattr(dataset, 'reader', None)
    mapping = getattr(reader, 'class_to_idx', None)
    if isinstance(mapping, dict) and mapping:
        names = [''] * (max(mapping.values()) + 1)
        for name, index in mapping.items():
            names[index] = str(name)
        return names
    for source in (dataset, reader):
        names = getattr(source, 'classes', None)
        if isinstance(names, (list, tuple)) and names:
            return [str(n[0]) if isinstance(n, (list, tuple)) else str(n) for n in names]
    features = getattr(getattr(reader, 'dataset', None), 'features', None)  # Hugging Face data sets
    names = getattr((features or {}).get(getattr(reader, 'label_key', None)), 'names', None)
    return [str(n) for n in names] if names else None


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
    """The data set `name` (timm's names, or `npz`), with errors that name what is missing.

    Args:
        strict: An unreadable image is an error, not a warning (data sets that timm reads image by image).
    """
    prefix = name.split('/')[0].lower() if '/' in name else ''
    local = prefix not in _REMOTE_PREFIXES
    if local and not root:
        raise UserError('no data: pass --data-dir')
    if local and not download and prefix != 'wds' and not os.path.exists(root):
        raise UserError(f'data path {root} does not exist')
    if name == 'npz':
        return NpzImages(root, split, cache=cache_images, verbose=verbose)
    if cache_images:
        raise UserError('--cache-images works with --dataset npz only')
    try:
        dataset = create_dataset(
            name, root=root, split=split, is_training=is_training, class_map=class_map or None, download=download,
            batch_size=batch_size, seed=seed, input_key=input_key, target_key=target_key, num_samples=num_samples,
        )
    except ImportError as e:
        raise UserError(f'data set {name!r} needs a package that is not installed: {one_line(e)}') from None
    except Exception as e:  # every reader and hub has its own errors; the text says what is wrong
        raise UserError(f'cannot open data set {name or "folder"!r} (path {root}, split {split}): '
                        f'{type(e).__name__}: {one_line(e)}') from e
    if strict and isinstance(dataset, ImageDataset):
        return StrictImages(dataset)
    return dataset


def check_classes(dataset, num_classes: int, source: str, class_map: Optional[str] = None) -> None:
    """Refuse a data set whose classes cannot be the model's."""
    names = class_names(dataset)
    if names is not None and len(names) != num_classes and not class_map:
        raise UserError(f'{source} has {len(names)} classes ({", ".join(names[:3])}, …), the model has {num_classes} '
                        'outputs: pass --num-classes, or --class-map for a data set with a part of the classes')


# ------------------------------------------------------------------------------------------------- training batches

def seed_everything(*key: int) -> None:
    """Seed Python's, NumPy's and torch's generators from a tuple of non-negative integers."""
    state = np.random.SeedSequence(key).generate_state(8)
    random.seed(int(state[0]) << 32 | int(state[1]))
    np.random.seed(state[2:6])
    torch.manual_seed(int(state[6]) << 31 | int(state[7]) >> 1)


def _seed_sample(*key: int) -> None:
    # as above, without the detour over device generators that torch.manual_seed takes
    state = np.random.SeedSequence(key).generate_state(8)
    random.seed(int(state[0]) << 32 | int(state[1]))
    np.random.seed(state[2:6])
    torch.default_generator.manual_seed(int(state[6]) << 31 | int(state[7]) >> 1)


class SampleKey(NamedTuple):
    epoch: int
    index: int


class SeededDataset(torch.utils.data.Dataset):
    """Seeds the random generators from (seed, epoch, index) before a sample is augmented."""

    def __init__(self, dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey):
        _seed_sample(self.seed, 1, key.epoch, key.index)
        return self.dataset[key.index]


class EpochBatches(torch.utils.data.Sampler):
    """The batches of one epoch for one process, from any batch on.

    The order is a permutation drawn from (seed, epoch). Batch b of all processes together is the same set of samples
    for every number of processes, if batch size x processes is the same. An incomplete last batch is dropped.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Which epoch the next iteration runs, and its first batch."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[List[SampleKey]]:
        order = np.random.default_rng([self.seed, 2, self.epoch]).permutation(self.length)
        step = self.batch_size * self.world_size
        epoch = self.epoch
        for b in range(self.start, len(self)):
            yield [SampleKey(epoch, int(i)) for i in order[b * step + self.rank:(b + 1) * step:self.world_size]]


def _posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """Keep the upper `bits` bits of each channel."""
    if bits >= 8:
        return image
    # Pillow 13 refuses 0 bits, which timm's Posterize asks for at full magnitude; older ones gave this
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


def _augment_ops(transform) -> Iterator[AugmentOp]:
    """Every AutoAugment operation inside a transform."""
    if isinstance(transform, AugmentOp):
        yield transform
    elif isinstance(transform, (list, tuple)):
        for t in transform:
            yield from _augment_ops(t)
    else:
        for name in ('transforms', 'ops', 'policy'):
            yield from _augment_ops(getattr(transform, name, ()))


def train_transform(input_size: Sequence[int], *, crop_mode: Optional[str], crop_padding: int, interpolation: str,
                    **kwargs):
    """timm's training transform, or the same with the padded random crop that is usual for small images.

    Args:
        crop_mode: timm's `rrc`, `rkrc`, `rkrr`, or `pad`: resize the shorter side to the input size, pad by
            `crop_padding` pixels on each side, crop at random (what DeiT does for CIFAR, in the same way).
    """
    transform = create_transform(
        tuple(input_size), is_training=True, use_prefetcher=True, interpolation=interpolation,
        train_crop_mode=None if crop_mode == 'pad' else crop_mode, **kwargs)
    for op in _augment_ops(transform):
        if op.name.startswith('Posterize'):
            op.aug_fn = _posterize
    if crop_mode == 'pad' and not kwargs.get('no_aug'):
        if not isinstance(transform.transforms[0], RandomResizedCropAndInterpolation):
            raise RuntimeError(f'unexpected first transform {transform.transforms[0]}')
        height, width = input_size[-2:]
        resize = 'bicubic' if interpolation == 'random' else interpolation
        transform.transforms[0:1] = [
            transforms.Resize((height, width) if height != width else height, str_to_interp_mode(resize)),
            transforms.RandomCrop((height, width), padding=crop_padding),
        ]
    return transform


def train_loader(
        dataset,
        *,
        batch_size: int,
        transform,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int,
        device: torch.device,
        workers: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
) -> Tuple[PrefetchLoader, EpochBatches]:
    """Normalised float batches on the device, in an order that `EpochBatches` sets; and that sampler."""
    dataset.transform = transform
    sampler = EpochBatches(len(dataset), batch_size, seed, rank, world_size)
    if not len(sampler):
        raise UserError(f'{len(dataset)} training images make no batch of {batch_size}'
                        + (f' in each of {world_size} processes' if world_size > 1 else '') + ': lower --batch-size')
    loader = torch.utils.data.DataLoader(
        SeededDataset(dataset, seed), batch_sampler=sampler, num_workers=workers, collate_fn=fast_collate,
        pin_memory=pin_memory, persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed))
    return PrefetchLoader(loader, mean=tuple(mean), std=tuple(std), channels=channels, device=device), sampler


def streaming_loader(dataset, *, batch_size: int, transform, mean, std, channels: int, device: torch.device,
                     workers: int, seed: int, pin_memory: bool = False) -> PrefetchLoader:
    """Batches of a data set that is read in its own order: a function of `seed_stream`, as far as its reader is."""
    dataset.transform = transform
    dataset.set_loader_cfg(num_workers=workers)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=batch_size, drop_last=True, num_workers=workers, collate_fn=fast_collate,
        pin_memory=pin_memory, generator=torch.Generator().manual_seed(seed))
    return PrefetchLoader(loader, mean=tuple(mean), std=tuple(std), channels=channels, device=device)


def seed_stream(loader: PrefetchLoader, *key: int) -> None:
    """Seed what a streaming loader's augmentation draws from, here and in its workers, before an epoch."""
    seed_everything(*key)
    loader.loader.generator.manual_seed(random.getrandbits(62))


def eval_loader(dataset, data_config: dict, *, batch_size: int, device: torch.device, workers: int,
                distributed: bool = False, pin_memory: bool = False, persistent_workers: bool = False):
    """timm's evaluation loader."""
    return create_loader(
        dataset, input_size=data_config['input_size'], batch_size=batch_size, is_training=False,
        interpolation=data_config['interpolation'], mean=data_config['mean'], std=data_config['std'],
        crop_pct=data_config['crop_pct'], crop_mode=data_config['crop_mode'], num_workers=workers, device=device,
        distributed=distributed, pin_memory=pin_memory, persistent_workers=persistent_workers)


def add_dataset_arguments(group, *, train: bool) -> None:
    """The options that `open_dataset` reads."""
    group.add_argument('--data-dir', metavar='DIR', help='folder of the data set')
    group.add_argument('--dataset', default='', metavar='NAME',
                       help="'' for a folder of class folders (or a .tar), npz, torch/cifar10, hfds/USER/NAME, "
                            "wds/NAME, tfds/NAME, … as in timm.data.create_dataset")
    group.add_argument('--dataset-download', action=argparse.BooleanOptionalAction, default=False,
                       help='let torch/… data sets be downloaded to --data-dir')
    if train:
        group.add_argument('--train-split', default='train', metavar='SPLIT',
                           help='training split; npz takes parts too, such as train[:45000]')
        group.add_argument('--val-split', default='validation', metavar='SPLIT', help='evaluation split')
    else:
        group.add_argument('--split', default='validation', metavar='SPLIT',
                           help='split; npz takes parts too, such as train[45000:]')
    group.add_argument('--class-map', default='', metavar='FILE', help='file that maps folder names to class indices')
    group.add_argument('--input-key', metavar='KEY', help='key of the image in hfds/, tfds/ and wds/ data sets')
    group.add_argument('--target-key', metavar='KEY', help='key of the label in hfds/, tfds/ and wds/ data sets')
    for name in ('--train-num-samples', '--val-num-samples') if train else ('--num-samples',):
        group.add_argument(name, type=int, metavar='N',
                           help='number of samples of a streaming data set that does not know it (wds/)')
    group.add_argument('--cache-images', action=argparse.BooleanOptionalAction, default=False,
                       help='npz: decode all images once into memory (N x H x W x 3 bytes)')
