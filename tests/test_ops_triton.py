"""The Triton backend, in Triton's interpreter: the op's own suite with this backend, and what only this backend has.

TRITON_INTERPRET must be set before triton is imported, so everything runs in subprocesses. The interpreter is slow:
sizes are small, and the long scans of the op's suite run on fewer steps (tests/interpreted.py); tools/gpu_check.py runs
the suite as it is on a GPU.
"""
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import needs_interpreter

pytest.importorskip('triton')

EXCLUDED = {  # tests of the suite that this backend does not run, and why
    'test_reference_recurrence': 'of the reference alone',
    'test_gradcheck': 'of the reference alone',
    'test_gradcheck_constant_projections_and_map': 'of the reference alone',
    'test_written_out_backward_is_autograd': 'of the reference alone',
    'test_opcheck[reference]': 'of the reference alone',
    'test_opcheck_backward[reference]': 'of the reference alone',
    'test_any_number_of_threads_gives_the_same_bits': "of the CPU backend's threads",
    'test_concurrent_calls': "of the CPU backend's threads; the interpreter is not reentrant",
    'test_peak_memory': "of the CPU backend's memory",
    'test_torchscript': "a script takes the device's own backend, which the interpreter's is not: bits differ",
    'test_light_import': 'of the automatic choice on a CPU; test_a_cpu_tensor_never_imports_triton is its counterpart',
}


CHECK = r'''
import sys
import traceback
import interpreted  # noqa: F401, a faster interpreter
import torch
from vim2.ops.reference import scan_reference, scan_reference_backward
from vim2.ops.triton import launch as scan
from vim2.ops.triton.launch import Plan

index64 = scan._Scan.index64
torch.use_deterministic_algorithms(True)    # memory that nothing wrote holds NaN


def strided(t, layout, channel):
    if layout == 'channels':
        return t.movedim(channel, -1).contiguous().movedim(-1, channel)
    if layout == 'images last':
        return t.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == 'odd':
        wide = t.new_zeros([s + 1 for s in t.shape])
        view = wide[tuple(slice(0, s) for s in t.shape)]
        return view.copy_(t)
    return t.contiguous()


def check(batch, channels, height, width, states, directions, groups=(1, 1), dtype=torch.float32, skip=True, gate=False,
          bias=True, softplus=True, last=False, constant=(False, False), layout='channels', shared_A=False, plan=None,
          wide=None):
    generator = torch.Generator().manual_seed(1)
    K = len(directions)
    scan._Scan.index64 = index64 if wide is None else lambda *tensors: wide

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def positions(const):
        return (1, 1) if const else (height, width)

    delta = randn(batch, K, channels, height, width) * 0.5 - 1
    data = [strided(t.to(dtype), layout, c) if t is not None else None for t, c in (
        (randn(batch, channels, height, width), 1), (delta if softplus else delta.abs(), 2),
        (-2 * torch.rand(K, 1 if shared_A else channels, states, generator=generator, dtype=torch.float64) - 0.1, 1),
        (randn(batch, K, groups[0], states, *positions(constant[0])), 3),
        (randn(batch, K, groups[1], states, *positions(constant[1])), 3),
        (randn(K, channels) if skip else None, 1), (randn(batch, channels, height, width) if gate else None, 1),
        (0.3 * randn(K, channels) if bias else None, 1))]
    if shared_A:
        data[2] = data[2].expand(-1, channels, -1)
    grad_out = strided(randn(batch, channels, height, width).to(dtype), layout, 1)
    grad_last = randn(batch, K, channels, states).float() if last else None
    exact = [None if t is None else t.double() for t in data]
    expected = scan_reference(*exact, softplus, directions)
    expected += scan_reference_backward(grad_out.double(), None if grad_last is None else grad_last.double(), *exact,
                                        softplus, directions)
    out, state, saved = scan.forward(*data, softplus, directions, True, True, plan=plan)
    assert saved.shape == scan.states_shape(data[0], *data[2:5])
    grads = scan.backward(grad_out, grad_last, *data, saved, softplus, directions, plan=plan)
    again = scan.backward(grad_out, grad_last, *data, saved, softplus, directions,
                                 plan=plan) if batch == 1 else grads
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    names = ['out', 'last state'] + ['grad of ' + n for n in ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'bias')]
    for name, actual, want, given in zip(names, (out, state) + grads, expected, [data[0], None] + data):
        if want is None:
            assert actual.numel() == 0
            continue
        error = ((actual.double() - want).norm() / want.norm().clamp(min=1e-30)).item()
        assert error <= (2e-6 if name == 'last state' else tolerance), (name, error)
        if given is not None:
            assert actual.dtype == given.dtype and actual.stride() == torch.empty_like(given).stride(), name
    assert all(torch.equal(a, b) for a, b in zip(grads, again))


for case, sizes in eval(sys.argv[1]).items():
    try:
        check(**sizes)
        print(f'{case}: passed', flush=True)
    except Exception:
        print(f'{case}: {traceback.format_exc()}', flush=True)
'''

CASES = {
    'reversed, 3 states, shared A, nothing optional': dict(
        batch=1, channels=3, height=1, width=19, states=3, directions=[2], shared_A=True, skip=False, bias=False,
        softplus=False),
    'time contiguous, chunked, gated, reversed, odd': dict(
        batch=1, channels=2, height=1, width=35, states=2, directions=[2], layout='time', gate=True, last=True,
        plan='Plan(True, 16)'),
    'four directions in turn': dict(batch=1, channels=3, height=5, width=4, states=2, directions=[0, 1, 2, 3],
                                    plan='Plan(True, 32)', last=True),
    'four directions in turn, two channels a thread, bfloat16': dict(
        batch=1, channels=32, height=3, width=2, states=16, directions=[0, 1, 2, 3], dtype='torch.bfloat16',
        plan='Plan(True, 16)'),
    'four directions apart, chunked': dict(batch=1, channels=3, height=5, width=4, states=2, directions=[0, 1, 2, 3],
                                           plan='Plan(False, 16)', last=True),
    'two directions, gated, apart': dict(batch=1, channels=2, height=2, width=3, states=2, directions=[0, 3], gate=True,
                                         plan='Plan(False, 16)'),
    'two directions, gated, in turn': dict(batch=2, channels=3, height=3, width=4, states=1, directions=[1, 2],
                                           gate=True, plan='Plan(True, 16)'),
    'groups that differ': dict(batch=1, channels=6, height=1, width=5, states=2, directions=[0], groups=(2, 3)),
    'groups wider than a block': dict(batch=1, channels=80, height=1, width=3, states=2, directions=[0], groups=(2, 1)),
    'offsets of 64 bits': dict(batch=1, channels=3, height=3, width=2, states=3, directions=[1, 2], groups=(3, 1),
                               layout='odd', wide=True),
    'many blocks of channels, one state': dict(batch=1, channels=192, height=1, width=2, states=1, directions=[0]),
    'many images': dict(batch=33, channels=2, height=1, width=2, states=1, directions=[0]),
    'constant B, C': dict(batch=2, channels=6, height=1, width=5, states=2, directions=[0], groups=(6, 3),
                          constant=(True, True), gate=True),
    'constant C': dict(batch=2, channels=4, height=1, width=5, states=2, directions=[2], constant=(False, True)),
    'any strides': dict(batch=1, channels=3, height=2, width=3, states=4, directions=[0, 1, 2, 3], layout='odd'),
    'images last': dict(batch=3, channels=3, height=2, width=3, states=2, directions=[0, 1], layout='images last',
                        plan='Plan(False, 16)'),
    'one step': dict(batch=1, channels=2, height=1, width=1, states=1, directions=[0]),
    '8 states': dict(batch=1, channels=2, height=1, width=3, states=8, directions=[0]),
    '20 states': dict(batch=1, channels=2, height=1, width=3, states=20, directions=[0]),
    '64 states': dict(batch=1, channels=2, height=1, width=3, states=64, directions=[0]),
    'float16, 12 states, gate and last state': dict(batch=1, channels=5, height=1, width=11, states=12, directions=[0],
                                                    dtype='torch.float16', gate=True, last=True),
}


def interpreted(*args, cwd=None, **variables):
    environment = dict(os.environ, TRITON_INTERPRET='1', OMP_NUM_THREADS='1', **variables)
    return subprocess.run([sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope='module')
def results(root):
    cases = ', '.join(f'{name!r}: dict(' + ', '.join(
        f'{k}={v if k in ("plan", "dtype") else repr(v)}' for k, v in sizes.items()) + ')' for name,
        sizes in CASES.items())
    return interpreted('-c', CHECK, f'{{{cases}}}', PYTHONPATH=os.pathsep.join(map(str, (root, root / 'tests'))))


@needs_interpreter
@pytest.mark.parametrize('name', list(CASES))
def test_against_the_reference(name, results):
    assert f'{name}: passed' in results.stdout.splitlines(), results.stdout + results.stderr


@needs_interpreter
def test_the_suite_of_the_op(root, tmp_path):
    """Every test of tests/test_ops.py with this backend, but those that `EXCLUDED` names; of products of parameters a
    part (`THINNED` of tests/interpreted.py)."""
    done = interpreted(
        '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'interpreted',
        *(f'--deselect=tests/test_ops.py::{key}' for key in EXCLUDED), 'tests/test_ops.py', cwd=root,
        VIM2_TEST_BACKEND='triton', VIM2_TEST_OUTCOMES=str(tmp_path / 'outcomes.json'),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'inductor'),
        PYTHONPATH=os.pathsep.join(map(str, (root, root / 'tests'))))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    outcomes = json.loads((tmp_path / 'outcomes.json').read_text())
    assert set(outcomes.values()) == {'passed'}, {k: v for k, v in outcomes.items() if v != 'passed'}
    functions = re.findall(r'^def (test_\w+)', (root / 'tests' / 'test_ops.py').read_text(), re.M)
    ran = {name.split('[')[0] for name in outcomes}
    assert ran == {name for name in functions if name not in EXCLUDED} and len(outcomes) > 100
    assert {key.split('[')[0] for key in EXCLUDED} <= set(functions)


def test_a_cpu_tensor_never_imports_triton():
    # Other packages may import triton; this one may not.
    code = ("import builtins, torch\n"
            "original = builtins.__import__\n"
            "def watch(name, globals=None, locals=None, fromlist=(), level=0):\n"
            "    importer = (globals or {}).get('__name__', '')\n"
            "    ours = importer.split('.')[0] == 'vim2'\n"
            "    assert not (ours and level == 0 and name.split('.')[0] == 'triton'), importer\n"
            "    return original(name, globals, locals, fromlist, level)\n"
            "builtins.__import__ = watch\n"
            "from vim2.ops import selective_scan, available_backends\n"
            "x = torch.randn(1, 4, 8); a = -torch.rand(4, 2); b = torch.randn(1, 2, 8)\n"
            "selective_scan(x, x.abs(), a, b, b); print(available_backends('cpu'))\n"
            "try: selective_scan(x, x.abs(), a, b, b, backend='triton')\n"
            "except RuntimeError as e: assert 'TRITON_INTERPRET' in str(e) and \"'cpu'\" in str(e), e\n"
            "else: raise AssertionError('ran')\n")
    environment = {k: v for k, v in os.environ.items() if k not in ('TRITON_INTERPRET', 'VIM2_SCAN_BACKEND')}
    run = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 'triton' not in run.stdout


def test_what_is_missing_is_named():
    import torch

    from vim2.ops.triton import missing
    meta = torch.empty(1, 2, 1, 3, device='meta')
    assert 'float64' in missing([meta.double()])
    assert '64' in missing([meta, meta, torch.empty(1, 2, 65, device='meta')])
    assert missing([meta, meta, torch.empty(1, 2, 64, device='meta')]) is None


def test_plans():
    from vim2.ops.triton.launch import SAVE, WARPS, Plan, make_plan
    processors = 132
    assert make_plan(WARPS * processors, 4, 196, processors) == Plan(True, 208)   # images and channels fill the device
    assert make_plan(WARPS * processors // 2, 4, 196, processors) == Plan(False, 208)
    for directions in (1, 4):                                                     # the scan itself is cut
        plan = make_plan(6, directions, 65536, processors)
        assert plan.chunk < 65536 // 8 and plan.chunk % SAVE == 0 and plan.merge == (directions == 1)
    for args in ((1, 1, 1, 1), (3, 2, 131, 1), (2, 4, 50176, 304)):
        plan = make_plan(*args)
        assert plan.chunk % SAVE == 0 and plan.chunk > 0 and (plan.chunk >= args[2] or args[1] == 1 or not plan.merge)


@pytest.mark.parametrize('triton,numpy,interpret,words', [
    ('3.4.1+git1', '2.3.1', '0', ('3.5', '3.4.1')), ('3.5.0', '2.5.0', '0', None), ('3.6.0', '2.3.5', '1', None),
    ('3.6.0', '2.4.0', '1', ('interpreter', '3.6.0', 'numpy<2.4')), ('3.7.0', '2.4.0', '1', None)])
def test_versions_that_fail_are_named(triton, numpy, interpret, words, monkeypatch):
    import importlib.metadata

    from vim2.ops.triton import launch
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: numpy if name == 'numpy' else triton)
    monkeypatch.setenv('TRITON_INTERPRET', interpret)
    launch._unusable.cache_clear()
    try:
        why = launch.missing([])
        assert why is None if words is None else all(word in why for word in words)
    finally:
        launch._unusable.cache_clear()
