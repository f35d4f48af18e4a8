"""Triton backend of the selective scan, for CUDA, ROCm and XPU devices. Importing it does not import triton."""
from .launch import backward, forward, missing, states_shape

__all__ = ['backward', 'forward', 'missing', 'states_shape']
