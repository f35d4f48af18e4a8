"""Cheap parts of a layer that are computed again in the backward pass instead of being kept for it."""
from typing import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ['recomputed']


def recomputed(fn: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """fn(*args), of which autograd keeps the arguments only: for elementwise work, which costs less than its memory.

    Compiled, exported and traced graphs get fn's operators as they are: their compilers decide what to keep.

    Args:
        fn: without side effects and without random numbers. What it computes last (a matrix product, say) is not
            computed again: PyTorch stops as soon as it has everything that the backward reads.
        args: its inputs.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing() and all(
            isinstance(a, Tensor) for a in args):  # torch.fx traces with proxies
        return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    return fn(*args)
