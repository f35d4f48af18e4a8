"""What the CPU backend is made of, for this machine and for one without AVX-512."""
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from numba import njit

from vim2.ops import cpu, cross_selective_scan, selective_scan, simd
from vim2.ops.reference import scan_reference

CASES = ('test_sequence[100-4-all]', 'test_sequence[1000-1-reverse]', 'test_sequence[63-16-groups]',
         'test_sequence[100-3-bias]', 'test_map[4-shape3]', 'test_sequence_half[None-dtype0]', 'test_extreme_values')


def _vectorised(name):
    """A function of `simd`, from float32 arrays to a float32 array."""
    op = getattr(simd, name)

    @njit
    def run(count, source, target):
        for i in range(0, 4 * count, simd.VBYTES):
            simd.vstore(target + i, op(simd.vload(source + i)))

    def apply(x):
        x = np.ascontiguousarray(x, dtype=np.float32)
        y = np.zeros_like(x)
        assert x.size % simd.LANES == 0
        run(x.size, x.ctypes.data, y.ctypes.data)
        return y
    return apply


def test_exp2():
    exp2 = _vectorised('vexp2')
    for scale in (1e-6, 1e-3, 0.05, 1.0, 30.0, 125.0):
        x = np.random.default_rng(0).uniform(-scale, scale, 1 << 16).astype(np.float32)
        exact = np.exp2(x.astype(np.float64))
        assert np.abs(exp2(x) / exact - 1).max() < 2.5e-7
    x = -np.random.default_rng(1).uniform(1e-3, 1 / 64, 1 << 18).astype(np.float32)
    # A slow decay: what is off in one direction adds up over the steps of a scan.
    assert abs((exp2(x) - np.exp2(x.astype(np.float64))).mean() / x.mean()) < 1e-6
    special = np.array([0.0, -0.0, -126.0, -1e4, -3e38] + 11 * [np.nan], dtype=np.float32)
    result = exp2(special)
    assert (result[:2] == 1).all() and result[2] == 2.0 ** -126
    assert (0 <= result[3:5]).all() and (result[3:5] < 1.2e-38).all() and np.isnan(result[5:]).all()


def test_softplus_parts():
    x = -np.random.default_rng(0).uniform(0, 100, 1 << 16).astype(np.float32)
    assert np.abs(_vectorised('vexp2_nonpositive')(x) / np.exp2(x.astype(np.float64)) - 1).max() < 2.5e-7
    assert (_vectorised('vexp2_nonpositive')(np.full(simd.LANES, -np.inf)) < 1.2e-38).all()  # a masked step
    e = np.concatenate([np.random.default_rng(1).uniform(0, 1, 1 << 16), 10.0 ** -np.linspace(0, 37, 1 << 10)])
    e = e.astype(np.float32)
    assert np.abs(_vectorised('vlog1p')(e) / np.log1p(e.astype(np.float64)) - 1).max() < 6e-7


def test_chunks():
    """Every step is in one chunk, every chunk has a step: the states' shape and the kernels count on it."""
    chunks = njit(lambda length: cpu._chunks(length))
    for length in range(1, 5000):
        number, most = chunks(length)
        assert number == -(-length // cpu.CHUNK) and most <= cpu.CHUNK
        assert (number - 1) * most < length <= number * most
    assert chunks(14 * 14) == (4, 49) and chunks(28 * 28) == (13, 64)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('height,width', [(1, 64), (5, 13), (1, 79), (8, 10), (14, 14), (1, 452), (3, 171)])
def test_chunk_borders(height, width, channels_last):
    """Whole, cut and equal chunks, of maps whose lines are fetched ahead and of others: outputs and gradients."""
    torch.manual_seed(0)
    dim, states = 40, 5
    shapes = [(2, dim, height, width), (2, 4, dim, height, width), (4, dim, states),
              *2 * [(2, 4, states, height, width)]]
    values = [torch.randn(s, dtype=torch.float64) for s in shapes]
    values[2] = -values[2].abs()
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [v.float().to(dtype).requires_grad_() for v in values]
        given = [t.movedim(-3, -1).contiguous().movedim(-1, -3) if channels_last and t.dim() > 3 else t for t in leaves]
        backend = 'cpu' if dtype == torch.float32 else 'reference'
        out = cross_selective_scan(*given, delta_softplus=True, backend=backend)
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad(out, leaves, seed.to(dtype))])
    for actual, expected in zip(*results):
        assert (actual - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize('length', [16, 17, 31, 33, 63, 70])
@pytest.mark.parametrize('reverse', [False, True])
def test_steps_along_memory(length, reverse):
    """Tiles are transposed 16 steps at a time, some steps twice: nothing beside them may be read or written."""
    wide = torch.full((2, 32, length + 4), float('nan'))
    u = wide[:, :, 2:-2].copy_(torch.randn(2, 32, length))
    delta = torch.full_like(wide, float('nan'))[:, :, 2:-2].copy_(torch.rand(2, 32, length))
    A, B, C = -torch.rand(32, 4), torch.randn(2, 4, length), torch.randn(2, 4, length)
    out = selective_scan(u, delta, A, B, C, reverse=reverse, backend='cpu')
    expected = scan_reference(
        *(t.double() for t in (u.unsqueeze(2), delta[:, None, :, None], A.unsqueeze(0), B[:, None, None, :, None],
                               C[:, None, None, :, None])), None, None, None, False, [2 if reverse else 0])[0]
    assert (out - expected.squeeze(2)).norm() <= 1e-5 * expected.norm()
    assert wide[:, :, :2].isnan().all() and wide[:, :, -2:].isnan().all()


@pytest.mark.parametrize('stride', [1, 3])
def test_fold(stride):
    """Four vectors become four sums, added where they belong and nowhere else."""
    @njit
    def run(source, target, step):
        folded = simd.vfold4(simd.vload(source), simd.vload(source + simd.VBYTES),
                             simd.vload(source + 2 * simd.VBYTES), simd.vload(source + 3 * simd.VBYTES))
        if step == 4:
            simd.add_folded(target, folded)
        else:
            simd.add_folded_strided(target, step, folded)

    x = np.random.default_rng(0).integers(-99, 99, (4, simd.LANES)).astype(np.float32)
    y = np.arange(20, dtype=np.float32)
    expected = y.copy()
    expected[2:2 + 4 * stride:stride] += x.sum(1)
    run(x.ctypes.data, y.ctypes.data + 8, 4 * stride)
    assert (y == expected).all()


@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='AVX-512 is an extension of x86-64')
def test_without_avx512(root, tmp_path):
    """The same kernels compiled for an older processor: other exponentials, half the registers."""
    script = '''
import sys
import pytest
failed = pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]])
from vim2.ops import cpu
for name in ('forward', 'backward'):
    code = cpu._compiled(name)._library.get_asm_str()
    assert 'ymm' in code and 'zmm' not in code, name
sys.exit(failed)
'''
    environment = dict(os.environ, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CPU_NAME='haswell', PYTHONPATH=str(root),
                       NUMBA_CPU_FEATURES='+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2')
    cases = [f'tests/test_ops.py::{case}' for case in CASES]
    here = [f'tests/test_ops_cpu.py::{name}' for name in ('test_exp2', 'test_softplus_parts', 'test_fold')]
    result = subprocess.run([sys.executable, '-c', script, *cases, *here], cwd=root, env=environment, text=True,
                            capture_output=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f'{len(CASES) + 4} passed' in result.stdout
