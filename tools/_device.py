"""Training whose data and steps stay on the device: for small images, where loaders and launches set the pace.

A GPU takes 10,000 images of 32 x 32 a second through a small network; processes that decode and augment, and Python
that launches a few thousand kernels a step, do not keep up with it.
"""
from typing import Callable, Dict, Iterator, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _common import UserError
from _data import EpochBatches


class DeviceBatches:
    """Augmented batches of images that lie on the device as uint8, all of one size.

    Crop and flip are one bilinear sampling per image; the colours are scaled. Every random number of a batch is a
    function of (seed, epoch, batch), as in `_data.train_loader`.

    Args:
        images: (N, H, W, C), uint8.
        labels: (N,).
        sampler: which images make a batch, see `_data.EpochBatches`.
        seed: of the augmentation.
        size: (H, W) of the batches, not smaller than the images.
        mean, std: per channel, range 0-1.
        device: where the images are kept.
        crop_mode: 'pad' for a shift of up to `padding` pixels, black outside; 'rrc' for boxes of an area within `scale`
            and a ratio of width to height within `ratio`; None for the whole image.
        hflip: probability of a horizontal flip.
        color_jitter: c, for factors within 1 - c and 1 + c on brightness, contrast and saturation; 0 for none.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, sampler: EpochBatches, *, seed: int,
                 size: Sequence[int], mean: Sequence[float], std: Sequence[float], device: torch.device,
                 crop_mode: Optional[str] = None, padding: int = 4, scale: Sequence[float] = (0.08, 1.),
                 ratio: Sequence[float] = (3 / 4, 4 / 3), hflip: float = 0.5, color_jitter: float = 0.):
        if crop_mode not in ('pad', 'rrc', None):
            raise UserError(f"--data-on-device crops by 'pad' or 'rrc', not {crop_mode!r}")
        if images.shape[1] > size[0] or images.shape[2] > size[1]:
            raise UserError(f'--data-on-device does not shrink: the images are {images.shape[2]}x{images.shape[1]}, '
                            f'--img-size asks for {size[1]}x{size[0]}')
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
        self.labels = torch.as_tensor(np.asarray(labels), dtype=torch.int64).to(device)
        self.sampler, self.seed, self.size = sampler, seed, tuple(size)
        self.mean, self.std = ((torch.tensor(v, device=device) * 255).view(1, -1, 1, 1) for v in (mean, std))
        self.crop_mode, self.padding, self.scale, self.ratio = crop_mode, padding, tuple(scale), tuple(ratio)
        self.hflip, self.color_jitter = hflip, color_jitter

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for batch, keys in enumerate(self.sampler, start=self.sampler.start):
            index = torch.tensor([key.index for key in keys]).to(self.images.device)
            rng = np.random.default_rng([self.seed, 1, keys[0].epoch, batch, self.sampler.rank])
            yield self.augmented(self.images[index].float(), rng), self.labels[index]

    def augmented(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Images (B, C, H, W) of 0 to 255 as the network gets them: (B, C, *size), normalised."""
        theta = torch.from_numpy(self.boxes(len(images), images.shape[-2:], rng)).to(images.device)
        grid = F.affine_grid(theta, [len(images), images.shape[1], *self.size], align_corners=False)
        images = F.grid_sample(images, grid, mode='bilinear', padding_mode='zeros' if self.crop_mode == 'pad' else
                               'border', align_corners=False)
        if self.color_jitter:
            factors = rng.uniform(1 - self.color_jitter, 1 + self.color_jitter, (3, len(images), 1, 1, 1))
            brightness, contrast, saturation = torch.from_numpy(factors.astype(np.float32)).to(images.device)
            images = images * brightness
            grey = images.mean(1, keepdim=True)
            images = torch.lerp(grey, images, saturation)
            images = torch.lerp(grey.mean((2, 3), keepdim=True), images, contrast).clamp(0, 255)
        return (images - self.mean) / self.std

    def boxes(self, count: int, size: Sequence[int], rng: np.random.Generator) -> np.ndarray:
        """What each image is sampled at: (B, 2, 3), for `F.affine_grid`."""
        theta = np.zeros((count, 2, 3), np.float32)
        side = np.ones((2, count))  # of the box, over the image's; x, y
        center = np.zeros((2, count))  # -1 to 1
        if self.crop_mode == 'pad':
            center = rng.integers(-self.padding, self.padding + 1, (2, count)) * 2 / np.array(size)[::-1, None]
        elif self.crop_mode == 'rrc':
            area = rng.uniform(*self.scale, count)
            ratio = np.exp(rng.uniform(*np.log(self.ratio), count))
            side = np.minimum([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1)
            center = rng.uniform(-1, 1, (2, count)) * (1 - side)
        flip = np.where(rng.random(count) < self.hflip, -1, 1)
        theta[:, 0, 0], theta[:, 1, 1] = side[0] * flip, side[1]
        theta[:, :, 2] = center.T
        return theta


class GraphedStep:
    """Forward and backward of one batch as a CUDA graph for each shape: one launch instead of thousands.

    The gradients stay where they are: nothing may set them to None in between (`zero_grad(set_to_none=False)`).

    Args:
        model: in training mode whenever this is called.
        criterion: loss of (output, target).
        autocast: makes the context of the forward pass.
        optimizer: of the model's parameters.
        others: the model for images of another (height, width) than `size`, such as one that is not compiled.
            Default: model.
    """
    WARM_UP = 3  # steps outside of a graph first: kernels are compiled, algorithms chosen, gradients allocated

    def __init__(self, model: nn.Module, criterion: nn.Module, autocast: Callable, optimizer: torch.optim.Optimizer,
                 others: Optional[nn.Module] = None, size: Optional[Sequence[int]] = None):
        self.model, self.criterion, self.autocast, self.optimizer = model, criterion, autocast, optimizer
        self.others, self.size = others or model, tuple(size or ())
        self.graphs: Dict[tuple, tuple] = {}

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """The loss, a 0-dim tensor that the next call overwrites; the parameters have their gradients."""
        key = (images.shape, target.shape, target.dtype)
        if key not in self.graphs:
            self.graphs[key] = self._capture(images, target)
        graph, static_images, static_target, loss = self.graphs[key]
        if any(p.grad is not grad for p, grad in self.grads):
            raise RuntimeError('the gradients that the CUDA graph writes were replaced: '
                               'the optimizer would not see them')
        static_images.copy_(images)
        static_target.copy_(target)
        graph.replay()
        return loss

    def _capture(self, images: Tensor, target: Tensor) -> tuple:
        model = self.model if tuple(images.shape[-2:]) == self.size else self.others
        images, target = images.clone(), target.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                self._step(model, images, target)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._step(model, images, target)
        self.grads = [(p, p.grad) for group in self.optimizer.param_groups for p in group['params']]
        return graph, images, target, loss

    def _step(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=False)
        with self.autocast():
            loss = self.criterion(model(images), target)
        loss.backward()
        return loss.detach()
