"""Between a map of any size and a fixed token grid, as small matrices.

The channel mixer's projections are Linears over the tokens of a channel; they act on a grid of fixed size so that one
set of weights serves every image size. Pooling to the grid and interpolating back are separable and linear: two small
matrix products each, which give the same result on every device, export with dynamic sizes, and are exactly the
identity where the map has the size of the grid.
"""
import torch
from torch import Tensor
from timm.layers import register_notrace_function

__all__ = ['average_pool_matrix', 'interpolate_matrix']


@register_notrace_function  # builds a tensor from a size, which fx cannot trace
def average_pool_matrix(like: Tensor, size: int, grid: int) -> Tensor:
    """Adaptive average pooling of one axis as a matrix: `F.adaptive_avg_pool1d(x, grid) == M @ x`, x of length size.

    Args:
        like: a tensor whose device and dtype the matrix gets.
        size: length of the axis, at least 1. It may be smaller than the grid.
        grid: length of the axis of the grid.

    Returns:
        (grid, size), each row an average of consecutive cells.
    """
    cell = torch.arange(grid, device=like.device).unsqueeze(1)
    j = torch.arange(size, device=like.device)
    # Cell i covers floor(i * size / grid) <= j < ceil((i + 1) * size / grid), in whole numbers.
    covered = torch.logical_and((j + 1) * grid > cell * size, j * grid < (cell + 1) * size).to(torch.float32)
    return (covered / covered.sum(dim=1, keepdim=True)).to(like.dtype)


@register_notrace_function
def interpolate_matrix(like: Tensor, grid: int, size: int) -> Tensor:
    """Linear interpolation of one axis as a matrix: `F.interpolate(x, size, mode='linear') == M @ x`, x of length grid.

    Args:
        like: a tensor whose device and dtype the matrix gets.
        grid: length of the axis of the grid.
        size: length of the axis of the result, at least 1.

    Returns:
        (size, grid); every row sums to 1.
    """
    source = (torch.arange(size, device=like.device, dtype=torch.float32) + 0.5) * grid / size - 0.5
    source = source.clamp(0., float(grid - 1)).unsqueeze(1)
    distance = (source - torch.arange(grid, device=like.device, dtype=torch.float32)).abs()
    return (1. - distance).clamp(min=0.).to(like.dtype)
