"""Images from files of any size and origin, and `npz`, one file of encoded images for each split."""
import io
import math
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any, Dict, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
from PIL import Image

from _common import UserError, one_line

MAX_ASPECT = 200  # its longer side by its shorter: resizing the shorter side to a model's size enlarges the other by it
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # at half the pixels that are an error


class TooLarge(Exception):
    """An image that would cost too much to resize; the text says why."""


def open_image(file: Union[str, IO[bytes]]) -> Image.Image:
    """`Image.open`, with bounds on what decoding and resizing the image would cost.

    Raises:
        TooLarge, or Pillow's DecompressionBombError: says which bound.
        Any of Pillow's many other errors.
    """
    image = Image.open(file)
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise TooLarge(f'{width} x {height} pixels, the limit is {MAX_ASPECT} times as long as wide')
    if image.format == 'EPS':
        raise ValueError('an EPS file is a program, which is not run')
    return image


# --------------------------------------------------------------------------------------------------------------- npz

_SPLIT = re.compile(r'(?P<name>[^\[\]/\\]+?)(\[(?P<start>\d*):(?P<stop>\d*)\])?')
_SMALL = 64 << 20  # bytes
_MOST_COMPRESSED = 200


def parse_split(split: str) -> Tuple[str, slice]:
    """`train[:45000]` as train and a slice."""
    match = _SPLIT.fullmatch(split)
    if not match:
        raise UserError(f'split {split!r}: expected a name such as train, or a part such as train[:45000]')
    return match['name'], slice(*(int(match[k]) if match[k] else None for k in ('start', 'stop')))


def physical_memory() -> Optional[int]:
    """Bytes of the machine, where the system tells."""
    try:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, OSError, ValueError):
        return None


class NpzHeader(NamedTuple):
    shape: Tuple[int, ...]
    dtype: np.dtype
    size: int  # bytes, unpacked
    packed: int


def npz_headers(path: os.PathLike) -> Dict[str, NpzHeader]:
    """What an .npz file says about its arrays; none of them is read."""
    out = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as f:
                version = np.lib.format.read_magic(f)
                if version not in ((1, 0), (2, 0)):
                    raise ValueError(f'{info.filename} has version {version} of the .npy format')
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else \
                    np.lib.format.read_array_header_2_0
                shape, _, dtype = read(f)
            size = max(info.file_size, math.prod(shape) * dtype.itemsize)
            out[info.filename.removesuffix('.npy')] = NpzHeader(shape, dtype, size, info.compress_size)
    return out


class NpzImages(torch.utils.data.Dataset):
    """Encoded images in one .npz file.

    Arrays: `data` uint8, the image files one after another; `offsets` int64 (N + 1), image i is
    `data[offsets[i]:offsets[i + 1]]`; `labels` integer (N), from 0; optionally `classes` str (number of classes), by
    which classes are matched, `class_names` str (the same number), how to show them, `names` str (N), and `format`, the
    number 1.

    Args:
        root: Folder of the .npz files.
        split: `train` for train.npz; `train[:45000]` or `train[45000:]` for a part of it, by index.
    """

    def __init__(self, root: str, split: str):
        self.transform = None
        self.target_transform = None
        name, part = parse_split(split)
        self.path = Path(root) / f'{name}.npz'
        if not self.path.is_file():
            found = ', '.join(sorted(p.stem for p in Path(root).glob('*.npz')))
            raise UserError(f'{self.path} does not exist' + (f'; splits there: {found}' if found else
                                                             f': no .npz file in {root}'))
        arrays = self._read()
        self.data, self.offsets, self.labels = arrays['data'], arrays['offsets'], arrays['labels']
        self.names = arrays.get('names')
        self.classes, self.class_names = (
            None if arrays.get(k) is None else [str(c) for c in arrays[k]] for k in ('classes', 'class_names'))
        self.indices = range(len(self.labels))[part]
        if not len(self.indices):
            raise UserError(f'{self.path}: split {split!r} holds no image (the file has {len(self.labels)})')

    def _read(self) -> dict:
        required, optional = ('data', 'offsets', 'labels'), ('names', 'classes', 'class_names', 'format')
        try:
            headers = npz_headers(self.path)
            missing = [k for k in required if k not in headers]
            if missing:
                raise UserError(f'{self.path} has no array {", ".join(missing)} (it has: {", ".join(headers)})')
            self._check_headers({k: headers[k] for k in (*required, *optional) if k in headers})
            with np.load(self.path, allow_pickle=False) as npz:
                arrays = {k: npz[k] for k in (*required, *optional) if k in headers}
        except UserError:
            raise
        except Exception as e:  # zip, zlib and numpy each have their own errors for a damaged file
            raise UserError(f'cannot read {self.path}: {type(e).__name__}: {one_line(e, 200)}') from None
        data, offsets, labels, classes = (arrays.get(k) for k in ('data', 'offsets', 'labels', 'classes'))
        if 'format' in arrays and arrays['format'].item() != 1:
            raise UserError(f'{self.path} has format {arrays["format"].item()!r}, this tool reads 1')
        offsets = offsets.astype(np.int64)
        if offsets[0] < 0 or (np.diff(offsets) <= 0).any() or offsets[-1] > len(data):
            raise UserError(f'{self.path}: offsets must increase and stay within the {len(data)} bytes of data')
        if len(labels) and labels.min() < 0:
            raise UserError(f'{self.path}: label {labels.min()}, labels count from 0')
        if classes is not None and len(labels) and labels.max() >= len(classes):
            raise UserError(f'{self.path}: label {labels.max()} but only {len(classes)} classes')
        if classes is not None and len(set(classes.tolist())) < len(classes):
            raise UserError(f'{self.path}: classes has a name twice')
        arrays['offsets'] = offsets
        return arrays

    def _check_headers(self, headers: Dict[str, 'NpzHeader']) -> None:
        """Refuse arrays by what the file says about them, before any is read."""
        count = headers['labels'].shape[0] if headers['labels'].shape else 0

        def vector(key: str, kinds: str, want: str, length: Optional[int] = None) -> None:
            header = headers.get(key)
            if header is None or header.dtype.hasobject:  # numpy says what is wrong with objects
                return
            if len(header.shape) != 1 or header.dtype.kind not in kinds or length not in (None, header.shape[0]):
                raise UserError(f'{self.path}: {key} must be {want}, it is {header.dtype} {header.shape}')

        if headers['data'].dtype != np.uint8:
            vector('data', '', 'a uint8 vector')
        vector('data', 'u', 'a uint8 vector')
        vector('labels', 'iu', 'an integer vector')
        vector('offsets', 'iu', 'an integer vector with one element more than labels', count + 1)
        vector('names', 'U', f'a vector of {count} texts, as many names as labels', count)
        vector('classes', 'U', 'a vector of texts')
        if 'class_names' in headers:
            if 'classes' not in headers:
                raise UserError(f'{self.path} has class_names, but no classes')
            vector('class_names', 'U', 'a vector of texts, as many as classes', headers['classes'].shape[0])
        header = headers.get('format')
        if header is not None and (header.shape not in ((), (1,)) or header.dtype.kind not in 'iu'):
            raise UserError(f'{self.path}: format must be a number, it is {header.dtype} {header.shape}')
        memory = physical_memory()
        total = sum(h.size for h in headers.values())
        if memory is not None and total > memory:
            raise UserError(f'{self.path} takes {total / 1e9:.1f} GB, the machine has {memory / 1e9:.1f} GB of memory')
        for key, header in headers.items():
            # deflate shrinks by a thousand at most; image files, which are compressed, hardly at all
            if header.size > _SMALL and header.size > _MOST_COMPRESSED * header.packed:
                raise UserError(f'{self.path}: {key} unpacks from {header.packed:,} to {header.size:,} bytes, which no '
                                'array of images or their labels does: refused')

    def _decode(self, i: int) -> Image.Image:
        raw = self.data[self.offsets[i]:self.offsets[i + 1]].tobytes()
        try:
            with open_image(io.BytesIO(raw)) as image:
                return image.convert('RGB')
        except Exception as e:  # PIL's decoders raise many types
            raise UserError(f'{self.path}: cannot decode {self._describe(i)}: {one_line(e, 160)}') from None

    def _describe(self, i: int) -> str:
        return f'image {i}' + (f' ({self.names[i]})' if self.names is not None else '')

    def describe(self, row: int) -> str:
        return self._describe(self.indices[row])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> Tuple[Any, int]:
        i = self.indices[row]
        image, target = self._decode(i), int(self.labels[i])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = transformed(self.target_transform, target, self._describe(i))
        return image, target

    def filename(self, row: int, basename: bool = False, absolute: bool = False) -> str:
        i = self.indices[row]
        name = str(self.names[i]) if self.names is not None else f'{i:08d}'
        return os.path.basename(name) if basename else name


def transformed(transform, target: Any, what: str) -> Any:
    try:
        return transform(target)
    except UserError as e:
        raise UserError(f'{what} has {e}') from None
