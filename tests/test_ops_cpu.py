"""What the CPU backend is made of, for this machine and for one without AVX-512."""
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from numba import njit

from vim2.ops import cpu, cross_selective_scan, scan as scan_module, selective_scan, simd
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


def _low_rank_inputs(kind, dtype):
    """Step sizes' factors for 5 images or sequences of 36 channels, everything that a scan takes with them."""
    g = torch.Generator().manual_seed(7)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    if kind == 'sequence':
        inputs = [randn(5, 40, 36).transpose(1, 2), randn(5, 3, 40), -torch.rand(36, 4, generator=g), randn(5, 4, 40),
                  randn(5, 2, 4, 40), randn(36), randn(5, 36, 40), randn(36), randn(36, 3)]
    else:
        x = randn(5, 6, 7, 36).permute(0, 3, 1, 2)
        inputs = [x if kind == 'map' else x.contiguous(), randn(5, 6, 7, 4, 3).permute(0, 3, 4, 1, 2),
                  -torch.rand(4, 36, 4, generator=g), randn(5, 4, 4, 6, 7), randn(5, 4, 4, 6, 7), randn(4, 36), None,
                  randn(4, 36), randn(4, 36, 3)]
    for i in (0, 1):
        inputs[i] = inputs[i].to(dtype)
    return inputs


def _low_rank_results(kind, inputs):
    """What a scan of factors gives: output, last state if it has one, all gradients, and a call without gradients."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    if kind == 'sequence':
        def scan(x, delta, A, B, C, D, z, bias, weight):
            return selective_scan(x, delta, A, B, C, D, z, bias, True, True, reverse=True, delta_weight=weight)
    else:
        def scan(x, delta, A, B, C, D, z, bias, weight):
            return (cross_selective_scan(x, delta, A, B, C, D, bias, True, delta_weight=weight),)
    results = scan(*leaves)
    g = torch.Generator().manual_seed(8)
    loss = sum((t.float() * torch.randn(t.shape, generator=g)).sum() for t in results)
    given = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(loss, given)
    again = [scan(*inputs) for _ in range(2)][1]  # the second one goes past the dispatcher
    return [t.detach() for t in (*results, *grads)], [t.detach() for t in again]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('kind', ['map', 'map, positions contiguous', 'sequence'])
def test_step_sizes_of_a_few_images_at_a_time(kind, dtype, monkeypatch):
    """However many images' step sizes are formed together, each image's results are those of the whole batch."""
    inputs = _low_rank_inputs(kind, dtype)
    whole, _ = _low_rank_results(kind, inputs)
    one = 36 * (40 if kind == 'sequence' else 42 * 4) * dtype.itemsize
    start, threads, seen = cpu._start, torch.get_num_threads(), []

    def count(name, plan, *args):
        seen.append((name, plan.images.start, plan.images.stop))
        return start(name, plan, *args)

    monkeypatch.setattr(cpu, '_start', count)
    try:
        for images, n in ((1, 1), (2, 1), (2, 2), (1, 4), (1, 7)):
            monkeypatch.setattr(cpu, '_STEP_SIZES', images * one)
            cpu._plans.cache_clear()
            scan_module._calls.clear()
            torch.set_num_threads(n)
            seen.clear()
            few, again = _low_rank_results(kind, inputs)
            forward = [images for name, *images in seen if name == 'forward']
            at_once = images * max(1, n // 2)
            cut = [[first, min(5, first + at_once)] for first in range(0, 5, at_once)]
            assert forward[:len(cut)] == cut and forward[-len(cut):] == cut
            backward = [images for name, *images in seen if name == 'backward']
            assert backward[0][0] == 0 and backward[-1][1] == 5 and len(backward) > (n < 7)
            for a, b in zip(whole, few):
                # products of other shapes may be summed in another order
                torch.testing.assert_close(b, a, rtol=2e-5 if dtype == torch.float32 else 2e-2,
                                           atol=2e-5 * a.abs().max().item() if dtype == torch.float32 else 0.1)
            for a, b in zip(whole, again):
                torch.testing.assert_close(b, a, rtol=2e-5 if dtype == torch.float32 else 2e-2, atol=1e-4)
    finally:
        torch.set_num_threads(threads)
        cpu._plans.cache_clear()
        scan_module._calls.clear()
