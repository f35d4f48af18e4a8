"""Loaders of the tools, and where their random numbers come from.

Training batches are a pure function of (seed, epoch, position): the sample order, and the random numbers that each
sample's augmentation sees, do not depend on worker processes or on where a run was interrupted. That is what makes an
exact resume in the middle of an epoch possible.
"""
import atexit
import ctypes
import multiprocessing
import os
import random
import signal
import sys
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_loader, create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torchvision import transforms

from _common import UserError


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


def _init_worker(worker_id: int) -> None:
    """A worker leaves signals to its parent, which ends it in order, and does not outlive it."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole group of processes, by Ctrl-C or slurm
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == 'linux':
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has died meanwhile
            os._exit(0)


def _end_workers_at_exit() -> None:
    """Let no loader process live on, or be waited for, when this one ends: workers ignore multiprocessing's SIGTERM."""
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)


def _end_workers() -> None:
    children = multiprocessing.active_children()
    if children and hasattr(signal, 'SIGCHLD'):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would call their end an error
    for child in children:
        child.kill()


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
    _end_workers_at_exit()
    dataset.transform = transform
    sampler = EpochBatches(len(dataset), batch_size, seed, rank, world_size)
    if not len(sampler):
        raise UserError(f'{len(dataset)} training images make no batch of {batch_size}'
                        + (f' in each of {world_size} processes' if world_size > 1 else '') + ': lower --batch-size')
    loader = torch.utils.data.DataLoader(
        SeededDataset(dataset, seed), batch_sampler=sampler, num_workers=workers, collate_fn=fast_collate,
        pin_memory=pin_memory, persistent_workers=workers > 0, worker_init_fn=_init_worker,
        generator=torch.Generator().manual_seed(seed))
    return PrefetchLoader(loader, mean=tuple(mean), std=tuple(std), channels=channels, device=device), sampler


def streaming_loader(dataset, *, batch_size: int, transform, mean, std, channels: int, device: torch.device,
                     workers: int, seed: int, pin_memory: bool = False) -> PrefetchLoader:
    """Batches of a data set that is read in its own order: a function of `seed_stream`, as far as its reader is."""
    _end_workers_at_exit()
    dataset.transform = transform
    dataset.set_loader_cfg(num_workers=workers)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=batch_size, drop_last=True, num_workers=workers, collate_fn=fast_collate,
        pin_memory=pin_memory, worker_init_fn=_init_worker, generator=torch.Generator().manual_seed(seed))
    return PrefetchLoader(loader, mean=tuple(mean), std=tuple(std), channels=channels, device=device)


def seed_stream(loader: PrefetchLoader, *key: int) -> None:
    """Seed what a streaming loader's augmentation draws from, here and in its workers, before an epoch."""
    seed_everything(*key)
    loader.loader.generator.manual_seed(random.getrandbits(62))


def eval_loader(dataset, data_config: dict, *, batch_size: int, device: torch.device, workers: int,
                distributed: bool = False, pin_memory: bool = False, persistent_workers: bool = False):
    """timm's evaluation loader."""
    _end_workers_at_exit()
    loader = create_loader(
        dataset, input_size=data_config['input_size'], batch_size=batch_size, is_training=False,
        interpolation=data_config['interpolation'], mean=data_config['mean'], std=data_config['std'],
        crop_pct=data_config['crop_pct'], crop_mode=data_config['crop_mode'], num_workers=workers, device=device,
        distributed=distributed, pin_memory=pin_memory, persistent_workers=persistent_workers)
    getattr(loader, 'loader', loader).worker_init_fn = _init_worker  # timm's seeds what evaluation does not draw
    return loader
