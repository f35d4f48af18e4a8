"""What the CPU backend is made of, for this machine and for one without AVX-512."""
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from numba import njit

from vim2.ops import simd

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
