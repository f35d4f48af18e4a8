"""Which backend runs these tensors, or why it cannot.

A backend is a module with

    missing(tensors)                    what keeps it from running on these tensors, in words, or None
    forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions, want_last_state, save_states)
                                        out, last states or an empty tensor, saved states or an empty tensor
    backward(grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, directions)
                                        gradients of u to delta_bias, an empty tensor for each that is absent
    states_shape(u, A, B, C)            the shape of the saved states, which are its own business otherwise

on tensors as `operator` describes them. `cpu` also takes `delta_weight`, last, and then returns its gradient, last.
"""
import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import List, Sequence, Set, Tuple, Union

import torch
from torch import Tensor

__all__ = ['BACKEND_ENV', 'available_backends', 'load', 'resolve']

BACKEND_ENV = 'VIM2_SCAN_BACKEND'
_MODULES = {'cpu': 'vim2.ops.cpu', 'triton': 'vim2.ops.triton', 'reference': 'vim2.ops.reference'}
_PREFERRED = {'cpu': 'cpu', 'cuda': 'triton', 'xpu': 'triton'}  # by type of device; ROCm's is 'cuda' too
_warned: Set[Tuple[str, str]] = set()


@functools.lru_cache(maxsize=None)
def load(name: str) -> ModuleType:
    """The module of a backend. None is imported before it is asked for: each loads what others do without."""
    return importlib.import_module(_MODULES[name])


def resolve(backend: str, tensors: Sequence[Tensor]) -> str:
    """The name of the backend to run: the one asked for, or the device's own.

    Args:
        backend: 'reference', 'cpu', 'triton' or 'auto'.
        tensors: the scan's, u, delta, A first, of any kind that has a device, dtypes and shapes.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend that was asked for cannot run on these tensors.

    'auto' falls back to the reference where the device's own backend cannot run, with one warning for each reason.
    """
    if backend != 'auto':
        asked = f'{BACKEND_ENV}={backend}' if os.environ.get(BACKEND_ENV) == backend else f"backend='{backend}'"
        if backend not in _MODULES:
            raise ValueError(f"{asked}: no such backend; choose one of {', '.join(_MODULES)} or auto")
        why = load(backend).missing(tensors)
        if why is not None:
            raise RuntimeError(f'{asked} cannot run here: {why}')
        return backend
    preferred = _PREFERRED.get(tensors[0].device.type, 'reference')
    why = load(preferred).missing(tensors)
    if why is None:
        return preferred
    if (preferred, why) not in _warned:
        _warned.add((preferred, why))
        warnings.warn(f"vim2: the scan backend '{preferred}' cannot run ({why}); using the slow 'reference' instead",
                      RuntimeWarning, stacklevel=2)
    return 'reference'


def available_backends(device: Union[str, torch.device] = 'cpu') -> List[str]:
    """Names of the backends that can run float32 tensors on `device` here, the preferred one first."""
    probe = [torch.empty(0, device=device)]
    return [name for name in _MODULES if load(name).missing(probe) is None]
