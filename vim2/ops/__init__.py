"""Selective scans: the public functions, their dispatch, and one module per backend."""
from .scan import available_backends, cross_selective_scan, selective_scan

__all__ = ['available_backends', 'cross_selective_scan', 'selective_scan']
