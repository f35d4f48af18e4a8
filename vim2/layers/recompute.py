"""Cheap parts of a layer that are computed again in the backward pass instead of being kept for it."""
from typing import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

__all__ = ['in_forward_mode', 'recomputed']


def recomputed(fn: Callable[..., Tensor], *args: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """fn(*args), of which autograd keeps the arguments only: for elementwise work, which costs less than its memory.

    Compiled, exported and traced graphs get fn's operators as they are: their compilers decide what to keep. So do
    torch.func's transforms, which keep everything.

    Args:
        fn: without side effects and without random numbers. What it computes last (a matrix product, say) is not
            computed again: PyTorch stops as soon as it has everything that the backward reads.
        args: its inputs.
        modules: those whose parameters fn reads. It reads the same ones when it is computed again, though
            torch.func.functional_call has put others in their place for the length of the forward alone.
    """
    if not (torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing() and all(
            isinstance(a, Tensor) for a in args) and _can_recompute(args[0])):  # torch.fx traces with proxies
        return fn(*args)
    held = _parameters(modules)

    def run(*args: Tensor) -> Tensor:
        if all(p is q for p, q in zip(held, _parameters(modules))):
            return fn(*args)
        reading = _Reading(fn, modules)
        return functional_call(reading, dict(zip([name for name, _ in reading.named_parameters()], held)), args)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def _parameters(modules: Sequence[nn.Module]) -> Sequence[Tensor]:
    return [p for module in modules for p in module.parameters()]


class _Reading(nn.Module):
    """A function as a module that has the modules whose parameters it reads."""

    def __init__(self, fn: Callable[..., Tensor], modules: Sequence[nn.Module]):
        super().__init__()
        self.fn = fn
        self.read = nn.ModuleList(modules)

    def forward(self, *args: Tensor) -> Tensor:
        return self.fn(*args)


def in_forward_mode(t: Tensor) -> bool:
    """Whether forward-mode differentiation is on: outside of it `unpack_dual` returns the very tensor."""
    return forward_ad.unpack_dual(t).primal is not t


def _can_recompute(t: Tensor) -> bool:
    """Whether autograd may keep something else than a tensor: torch.func.grad and its kin forbid it, and torch 2.9's
    checkpoints know no forward mode."""
    if in_forward_mode(t):
        return False
    try:
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            return True
    except RuntimeError:
        return False


def _same(t: Tensor) -> Tensor:
    return t
