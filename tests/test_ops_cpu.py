"""What the CPU backend is made of: its vectors, its libraries, and how it cuts the work."""
import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from vim2.ops import cpu, cross_selective_scan, selective_scan
from vim2.ops.cpu import build
from vim2.ops.reference import scan_reference

# What this processor can run, the library that it is given first
ISAS = [isa for isa in build.libraries(build.this_platform()).values()
        if isa in ('baseline', 'neon') or torch.backends.cpu.get_cpu_capability() in (isa.upper(), 'AVX512')]

VECTORS = r'''
#include "vectors.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int lanes() { return LANES; }
#define EACH(name) EXPORT void name##_of(i64 n, const float *x, float *y) { \
    for (i64 i = 0; i < n; i += LANES) store(y + i, name(load(x + i))); }
EACH(exp2) EACH(log1p) EACH(decay_of) EACH(max0)
EXPORT void widened(i64 type, i64 n, const char *x, float *y) {
    for (i64 i = 0; i < n; i += LANES) store(y + i, gather(type, 2, x + 2 * i, LANES));
}
EXPORT void narrowed(i64 type, i64 n, const float *x, char *y) {
    for (i64 i = 0; i < n; i += LANES) scatter(type, 2, y + 2 * i, LANES, load(x + i));
}
EXPORT void transposed(float *x) {
    vf v[LANES];
    for (int i = 0; i < LANES; i++) v[i] = load(x + i * LANES);
    transpose(v);
    for (int i = 0; i < LANES; i++) store(x + i * LANES, v[i]);
}
EXPORT void folded(const float *x, float *y) {
    vf v[4];
    for (int i = 0; i < 4; i++) v[i] = load(x + i * LANES);
    store(y, fold4(v));
}
'''


@pytest.fixture(scope='module', params=ISAS)
def vectors(request, tmp_path_factory):
    """vectors.h as a library for one instruction set."""
    folder = tmp_path_factory.mktemp(request.param)
    source, library = folder / 'vectors.cpp', folder / 'vectors.so'
    source.write_text(VECTORS)
    build.compile_library(request.param, library, build.this_platform(), source)
    return ctypes.CDLL(str(library))


def address(x):
    return ctypes.c_void_p(x.ctypes.data)


def each(vectors, name, x):
    x = np.ascontiguousarray(x, dtype=np.float32)
    y = np.zeros_like(x)
    assert x.size % vectors.lanes() == 0
    getattr(vectors, f'{name}_of')(ctypes.c_int64(x.size), address(x), address(y))
    return y


def test_exp2(vectors):
    for scale in (1e-6, 1e-3, 0.05, 1.0, 30.0, 125.0):
        x = np.random.default_rng(0).uniform(-scale, scale, 1 << 16).astype(np.float32)
        assert np.abs(each(vectors, 'exp2', x) / np.exp2(x.astype(np.float64)) - 1).max() < 2.5e-7
    x = -np.random.default_rng(1).uniform(1e-3, 1 / 64, 1 << 18).astype(np.float32)
    # A slow decay: what is off in one direction adds up over the steps of a scan.
    assert abs((each(vectors, 'exp2', x) - np.exp2(x.astype(np.float64))).mean() / x.mean()) < 1e-6
    special = np.array([0, -0., -126, -1e4, -3e38, -np.inf, 200, 1e6, 3e38, np.inf] + 6 * [np.nan], dtype=np.float32)
    special[-1:].view(np.uint32)[:] = 0x7fc0ffff  # a NaN that says more
    result = each(vectors, 'exp2', special)
    assert (result[:2] == 1).all() and result[2] == 2.0 ** -126 and (result[3:6] == 0).all()
    assert (result[6:10] == np.inf).all() and np.isnan(result[10:]).all()


def test_softplus_parts(vectors):
    x = -np.random.default_rng(0).uniform(0, 80, 1 << 16).astype(np.float32)
    for sign in (1, -1):
        assert np.abs(each(vectors, 'decay_of', sign * x) / np.exp(x.astype(np.float64)) - 1).max() < 1e-5
    assert (each(vectors, 'decay_of', np.full(16, -np.inf)) == 0).all()  # a masked step
    e = np.concatenate([np.random.default_rng(1).uniform(0, 1, 1 << 16), 10.0 ** -np.linspace(0, 37, 1 << 10)])
    e = e.astype(np.float32)
    assert np.abs(each(vectors, 'log1p', e) / np.log1p(e.astype(np.float64)) - 1).max() < 6e-7
    x = np.array([-1, 1, np.nan, 0] * 4, dtype=np.float32)
    np.testing.assert_equal(each(vectors, 'max0', x), np.array([0, 1, np.nan, 0] * 4, dtype=np.float32))


@pytest.mark.parametrize('number,dtype', [(1, torch.bfloat16), (2, torch.float16)])
def test_narrow_types(vectors, number, dtype):
    """Every number of 16 bits is widened as PyTorch widens it; rounding is PyTorch's, at every tie and either side."""
    every = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int16).view(dtype)
    wide = np.zeros(2 ** 16, dtype=np.float32)
    vectors.widened(ctypes.c_int64(number), ctypes.c_int64(wide.size), ctypes.c_void_p(every.data_ptr()), address(wide))
    torch.testing.assert_close(torch.from_numpy(wide), every.float(), rtol=0, atol=0, equal_nan=True)
    finite = every[every.isfinite()].float().sort().values
    ties = (finite[1:] + finite[:-1]) / 2
    x = torch.cat([every.float(), ties, ties.nextafter(torch.tensor(1e30)), ties.nextafter(torch.tensor(-1e30)),
                   torch.tensor([65519.9, 65520.0, 3.4e38, -3.4e38, 1e-45, -1e-45, 1e-8])])
    x = torch.cat([x, torch.zeros(-len(x) % 16)])
    narrow = torch.zeros(len(x), dtype=dtype)
    vectors.narrowed(ctypes.c_int64(number), ctypes.c_int64(len(x)), ctypes.c_void_p(x.data_ptr()),
                     ctypes.c_void_p(narrow.data_ptr()))
    torch.testing.assert_close(narrow, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert (narrow.signbit() == x.signbit())[~x.isnan()].all()


def test_shuffles(vectors):
    lanes = vectors.lanes()
    x = np.arange(lanes * lanes, dtype=np.float32).reshape(lanes, lanes)
    y = x.copy()
    vectors.transposed(address(y))
    assert (y == x.T).all()
    folded = np.zeros(lanes, dtype=np.float32)
    vectors.folded(address(x), address(folded))
    assert (folded.reshape(-1, 4).sum(0) == x[:4].sum(1)).all()


# A few of tests/test_ops.py for what differs from one instruction set to another. The whole file:
# for isa in avx512 avx2 baseline; do VIM2_SCAN_ISA=$isa python -m pytest tests/test_ops.py; done
CASES = ('test_sequence[100-4-all]', 'test_sequence[1000-1-reverse]', 'test_sequence[63-16-groups]',
         'test_sequence[100-3-bias]', 'test_map[4-shape3]', 'test_sequence_half[None-dtype0]', 'test_extreme_values',
         'test_sequence_expanded', 'test_map_strides[_channels_last]', 'test_deterministic')


@pytest.mark.parametrize('isa', ISAS[1:])
def test_other_instruction_sets(root, isa):
    environment = dict(os.environ, VIM2_SCAN_ISA=isa, VIM2_SCAN_BACKEND='cpu', PYTHONPATH=str(root))
    cases = [f'tests/test_ops.py::{case}' for case in CASES]
    here = ['test_chunk_borders[14-14-True]', 'test_steps_along_memory[False-33]', 'test_steps_along_memory[True-70]',
            'test_step_sizes_of_a_few_images_at_a_time[map-dtype0]',
            'test_step_sizes_of_a_few_images_at_a_time[sequence-dtype1]']
    cases += [f'tests/test_ops_cpu.py::{case}' for case in here]
    script = ('import sys, pytest; from vim2.ops import cpu; assert sys.argv[1] in cpu._library()._name; '
              "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[2:]]))")
    result = subprocess.run([sys.executable, '-c', script, isa, *cases], cwd=root, env=environment, text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f'{len(cases)} passed' in result.stdout


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
    """Tiles are transposed some steps at a time, some twice: nothing beside them may be read or written."""
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


def test_maps_that_are_parts_of_others():
    """Rows further apart than their length, and maps whose height and width are swapped."""
    g = torch.Generator().manual_seed(0)
    large = [torch.randn(*shape, generator=g) for shape in (
        (2, 20, 9, 12), (2, 4, 20, 9, 12), (2, 4, 3, 9, 12), (2, 4, 3, 9, 12))]
    A = -torch.rand(4, 20, 3, generator=g)
    for view in (lambda t: t[..., 1:-2, 3:-1], lambda t: t.transpose(-1, -2), lambda t: t.flip(-1)[..., ::2]):
        x, delta, B, C = map(view, large)
        results = []
        for backend, dtype in (('cpu', torch.float32), ('reference', torch.float64)):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (x, delta, A, B, C)]
            out = cross_selective_scan(*leaves, delta_softplus=True, backend=backend)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for actual, expected in zip(*results):
            assert (actual - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize('change,message', [
    (dict(VIM2_SCAN_ISA='mmx'), 'VIM2_SCAN_ISA=mmx: there is no such library for this machine; choose one of'),
    (dict(gone=True), 'its compiled library .* is not there: install vim2 anew'),
    (dict(version=1), 'its compiled library .* was built from other sources: install vim2 anew'),
])
def test_no_library(monkeypatch, tmp_path, change, message):
    """Asked for, the backend says what is missing; else the reference runs, with one warning that says it."""
    if 'gone' in change:
        monkeypatch.setattr(cpu, '__file__', str(tmp_path / '__init__.py'))
    elif 'version' in change:
        monkeypatch.setattr(build, 'version', lambda: 1)
    else:
        monkeypatch.setenv('VIM2_SCAN_ISA', change['VIM2_SCAN_ISA'])
    monkeypatch.delenv('VIM2_SCAN_BACKEND', raising=False)
    cpu._library.cache_clear()
    u, A, B = torch.ones(1, 2, 3), -torch.ones(2, 4), torch.ones(1, 4, 3)
    try:
        with pytest.raises(RuntimeError, match=f"backend='cpu' cannot run here: {message}"):
            selective_scan(u, u, A, B, B, backend='cpu')
        with pytest.warns(RuntimeWarning, match=message):
            out = selective_scan(u, u, A, B, B)
    finally:
        monkeypatch.undo()
        cpu._library.cache_clear()
    torch.testing.assert_close(out, selective_scan(u, u, A, B, B, backend='cpu'))


def test_the_best_library_is_the_processors(monkeypatch):
    monkeypatch.delenv('VIM2_SCAN_ISA', raising=False)
    assert cpu._instruction_set() == ISAS[0]


def test_no_memory(monkeypatch):
    """A thread that finds no memory for the states takes no job: if none does, that is an error."""
    monkeypatch.setattr(cpu, '_entry', lambda name: lambda address: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(MemoryError, match='the forward of the scan finds no memory'):
            selective_scan(torch.ones(1, 2, 3), torch.ones(1, 2, 3), -torch.ones(2, 4), *2 * [torch.ones(1, 4, 3)],
                           backend='cpu')
    finally:
        torch.set_num_threads(threads)


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
    """What a scan of factors gives: output, last state if it has one, and all gradients."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    x, delta, A, B, C, D, z, bias, weight = leaves
    if kind == 'sequence':
        results = selective_scan(x, delta, A, B, C, D, z, bias, True, True, reverse=True, delta_weight=weight,
                                 backend='cpu')
    else:
        results = (cross_selective_scan(x, delta, A, B, C, D, bias, True, delta_weight=weight, backend='cpu'),)
    g = torch.Generator().manual_seed(8)
    loss = sum((t.float() * torch.randn(t.shape, generator=g)).sum() for t in results)
    grads = torch.autograd.grad(loss, [t for t in leaves if t is not None])
    return [t.detach() for t in (*results, *grads)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('kind', ['map', 'map, positions contiguous', 'sequence'])
def test_step_sizes_of_a_few_images_at_a_time(kind, dtype, monkeypatch):
    """However many images' step sizes are formed together, each image's results are those of the whole batch."""
    inputs = _low_rank_inputs(kind, dtype)
    whole = _low_rank_results(kind, inputs)
    one = 36 * (40 if kind == 'sequence' else 42 * 4) * dtype.itemsize
    run, threads, seen = cpu._run, torch.get_num_threads(), []

    def count(name, tensors, *args):
        seen.append((name, tensors[0].shape[0]))
        return run(name, tensors, *args)

    monkeypatch.setattr(cpu, '_run', count)
    try:
        for images, n in ((1, 1), (2, 1), (2, 2), (1, 4), (1, 7)):
            monkeypatch.setattr(cpu, '_STEP_SIZES', images * one)
            torch.set_num_threads(n)
            seen.clear()
            few = _low_rank_results(kind, inputs)
            at_once = images * max(1, n // 2)
            forward = [size for name, size in seen if name == 'forward']
            assert forward == [min(at_once, 5 - first) for first in range(0, 5, at_once)]
            backward = [size for name, size in seen if name == 'backward']
            assert sum(backward) == 5 and len(backward) > (n < 7)
            for a, b in zip(whole, few):
                # products of other shapes may be summed in another order
                torch.testing.assert_close(b, a, rtol=2e-5 if dtype == torch.float32 else 2e-2,
                                           atol=2e-5 * a.abs().max().item() if dtype == torch.float32 else 0.1)
    finally:
        torch.set_num_threads(threads)
