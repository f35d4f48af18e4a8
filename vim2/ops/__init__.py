"""Selective scans. `functional` holds the public functions, `operator` the PyTorch operators that they call, `backends`
the choice of who computes them: `reference`, `cpu` or `triton`, of which each imports none of the others."""
from .backends import available_backends
from .functional import cross_selective_scan, selective_scan

__all__ = ['available_backends', 'cross_selective_scan', 'selective_scan']
