"""The Triton backend, in Triton's interpreter: the op's own suite with this backend, and what only this backend has.

TRITON_INTERPRET must be set before triton is imported, so everything runs in subprocesses. The interpreter is slow:
sizes are small, and the long scans of the op's suite run on fewer steps (tests/interpreted.py); tools/gpu_check.py runs
the suite as it is on a GPU.
"""
import json
import os
import subprocess
import sys

import pytest

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
    'test_light_import': 'of the automatic choice on a CPU; test_a_cpu_tensor_never_imports_triton is its counterpart',
}


def _excluded(name, keys):
    return any(name == key or name.startswith(key + '[') for key in keys)


CHECK = r'''
import sys
import traceback
import interpreted  # noqa: F401, a faster interpreter
import torch
from vim2.ops import triton_scan
from vim2.ops.reference import scan_reference, scan_reference_backward
from vim2.ops.triton_scan import Plan

triton_scan.SAVE, triton_scan.PART = 16, 8  # every level of the backward's recomputation in a few steps
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
          bias=True, softplus=True, last=False, constant=(False, False), layout='channels', shared_A=False, plan=None):
    generator = torch.Generator().manual_seed(1)
    K = len(directions)

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
    out, state, saved = triton_scan.forward(*data, softplus, directions, True, True, plan=plan)
    assert saved.shape == triton_scan.states_shape(data[0], *data[2:5])
    grads = triton_scan.backward(grad_out, grad_last, *data, saved, softplus, directions, plan=plan)
    again = triton_scan.backward(grad_out, grad_last, *data, saved, softplus, directions,
                                 plan=plan) if batch == 1 or plan is not None and plan.group else grads
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
    'odd length, 3 states': dict(batch=1, channels=3, height=1, width=37, states=3, directions=[0]),
    'reversed': dict(batch=1, channels=3, height=1, width=19, states=2, directions=[2], last=True),
    'time contiguous': dict(batch=1, channels=3, height=1, width=16, states=2, directions=[0], layout='time'),
    'time contiguous, chunked, gated, reversed, odd': dict(
        batch=1, channels=2, height=1, width=35, states=2, directions=[2], layout='time', gate=True, last=True,
        plan='Plan(True, 16)'),
    'chunked, the last chunk of 2 steps': dict(batch=1, channels=3, height=1, width=18, states=2, directions=[0],
                                               last=True, plan='Plan(True, 16)'),
    'chunked, odd length': dict(batch=1, channels=3, height=1, width=35, states=2, directions=[0], last=True,
                                plan='Plan(True, 16)'),
    'four directions, added in turn': dict(batch=1, channels=3, height=5, width=7, states=2, directions=[0, 1, 2, 3],
                                           plan='Plan(True, 64)'),
    'four directions apart, chunked': dict(batch=1, channels=3, height=5, width=7, states=2, directions=[0, 1, 2, 3],
                                           plan='Plan(False, 32)', last=True),
    'four directions in lockstep': dict(batch=3, channels=35, height=5, width=7, states=2, directions=[0, 1, 2, 3],
                                        plan='Plan(True, 64, 2, together=2, turns=True)', last=True),
    'three directions in lockstep, gated': dict(batch=2, channels=3, height=3, width=4, states=3, directions=[0, 1, 3],
                                                gate=True, plan='Plan(True, 32, 1, together=1, turns=True)'),
    'two directions in lockstep, any strides, groups': dict(
        batch=1, channels=4, height=3, width=3, states=4, directions=[2, 1], layout='odd', groups=(2, 1), skip=False,
        bias=False, plan='Plan(False, 32, 1, together=2)'),
    'images in groups that do not divide them, gated': dict(
        batch=5, channels=3, height=3, width=4, states=2, directions=[0, 1, 2, 3], gate=True,
        plan='Plan(True, 32, 1, group=2)'),
    'images in groups, chunked, groups of channels': dict(
        batch=3, channels=6, height=5, width=7, states=3, directions=[0, 1, 2, 3], groups=(2, 3), last=True,
        plan='Plan(True, 64, 2, together=1, group=2, back_chunk=32)'),
    'images in groups, several parts of the gradients of B and C': dict(
        batch=3, channels=35, height=5, width=7, states=2, directions=[3, 0], last=True, dtype='torch.float16',
        plan='Plan(False, 64, 1, warps=1, group=2, back_chunk=32)'),
    'one direction in groups, chunked, gated, time contiguous': dict(
        batch=3, channels=3, height=1, width=35, states=2, directions=[2], layout='time', gate=True, last=True,
        plan='Plan(True, 48, group=2, back_chunk=16)'),
    'directions in turn in groups, any strides': dict(
        batch=3, channels=3, height=2, width=3, states=4, directions=[0, 2], layout='odd',
        plan='Plan(True, 32, 2, turns=True, group=2)'),
    'constant B in groups': dict(batch=3, channels=4, height=2, width=3, states=2, directions=[0, 1], groups=(2, 1),
                                 constant=(True, False), plan='Plan(False, 32, group=2)'),
    'groups of images that are not pieces of memory': dict(
        batch=3, channels=3, height=2, width=3, states=2, directions=[0, 1], layout='images last',
        plan='Plan(False, 32, group=2)'),
    'narrow lockstep, ragged channels': dict(
        batch=3, channels=35, height=5, width=7, states=16, directions=[0, 1, 2, 3], last=True,
        plan='Plan(True, 64, 3, together=4, width=16)'),
    'narrow lockstep, 12 states, three directions, gated': dict(
        batch=2, channels=18, height=3, width=5, states=12, directions=[3, 0, 1], gate=True,
        plan='Plan(False, 32, 1, together=1, turns=True, width=16)'),
    'narrow lockstep, one state, any strides, groups': dict(
        batch=2, channels=4, height=5, width=7, states=1, directions=[2, 1], layout='odd', groups=(1, 2), skip=False,
        bias=False, last=True, plan='Plan(False, 64, 1, together=3, width=16)'),
    'narrow lockstep, float16': dict(batch=1, channels=18, height=2, width=5, states=16, directions=[0, 1, 2, 3],
                                     dtype='torch.float16', gate=True, plan='Plan(True, 32, together=2, width=16)'),
    'narrow lockstep, bfloat16': dict(batch=1, channels=16, height=2, width=3, states=8, directions=[0, 1, 2, 3],
                                      dtype='torch.bfloat16', plan='Plan(True, 32, together=1, width=16)'),
    'several images per program': dict(batch=3, channels=2, height=2, width=3, states=2, directions=[1, 3],
                                       plan='Plan(True, 32, 2)'),
    'gated map': dict(batch=1, channels=2, height=2, width=3, states=2, directions=[0, 3], gate=True,
                      plan='Plan(False, 32)'),
    'groups': dict(batch=1, channels=6, height=1, width=5, states=2, directions=[0], groups=(2, 3)),
    'groups wider than a block': dict(batch=1, channels=150, height=1, width=3, states=2, directions=[0], groups=(2,
                                                                                                                  1)),
    'constant B, C': dict(batch=2, channels=6, height=1, width=5, states=2, directions=[0], groups=(6, 3),
                          constant=(True, True), gate=True),
    'constant C': dict(batch=2, channels=4, height=1, width=5, states=2, directions=[2], constant=(False, True)),
    'shared A, nothing optional': dict(batch=2, channels=3, height=1, width=5, states=2, directions=[0], skip=False,
                                       bias=False, softplus=False, shared_A=True),
    'any strides': dict(batch=1, channels=3, height=2, width=3, states=4, directions=[0, 1, 2, 3], layout='odd'),
    'one step': dict(batch=1, channels=2, height=1, width=1, states=1, directions=[0]),
    '64 states': dict(batch=1, channels=2, height=1, width=3, states=64, directions=[0]),
    '20 states': dict(batch=1, channels=2, height=1, width=3, states=20, directions=[0]),
    'float16': dict(batch=1, channels=8, height=1, width=8, states=16, directions=[0], dtype='torch.float16',
                    layout='time'),
    'bfloat16 map': dict(batch=1, channels=8, height=2, width=2, states=16, directions=[0, 1, 2, 3],
                         dtype='torch.bfloat16', plan='Plan(True, 32)'),
    'float16, 12 states, gate and last state': dict(batch=1, channels=5, height=1, width=21, states=12, directions=[0],
                                                    dtype='torch.float16', gate=True, last=True),
}


def interpreted(*args, **variables):
    environment = dict(os.environ, TRITON_INTERPRET='1', OMP_NUM_THREADS='1', **variables)
    return subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope='module')
def results(root):
    cases = ', '.join(f'{name!r}: dict(' + ', '.join(
        f'{k}={v if k in ("plan", "dtype") else repr(v)}' for k, v in sizes.items()) + ')' for name,
        sizes in CASES.items())
    return interpreted('-c', CHECK, f'{{{cases}}}', PYTHONPATH=os.pathsep.join(map(str, (root, root / 'tests'))))


@pytest.mark.parametrize('name', list(CASES))
def test_against_the_reference(name, results):
    assert f'{name}: passed' in results.stdout.splitlines(), results.stdout + results.stderr


def test_the_suite_of_the_op(root, tmp_path):
    """Every parametrised test of tests/test_ops.py with this backend, but those that `EXCLUDED` names."""
    suite = root / 'tests' / 'test_ops.py'
    everything = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '--collect-only', '-p', 'no:cacheprovider', str(suite)], text=True,
        capture_output=True, env={k: v for k, v in os.environ.items() if not k.startswith('VIM2_TEST')}, timeout=600)
    expected = {line.split('::', 1)[1] for line in everything.stdout.splitlines() if '::' in line}
    assert len(expected) > 250 and all(any(_excluded(name, [key]) for name in expected) for key in EXCLUDED)
    # Half of the time goes to one test function with many cases: two processes.
    halves = []
    for i, chosen in enumerate(('test_sequence[', 'not test_sequence[')):
        environment = dict(
            os.environ, TRITON_INTERPRET='1', OMP_NUM_THREADS='1', VIM2_TEST_BACKEND='triton',
            VIM2_TEST_OUTCOMES=str(tmp_path / f'{i}.json'), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'inductor'),
            PYTHONPATH=os.pathsep.join(map(str, (root, root / 'tests'))))
        deselected = [f'--deselect=tests/test_ops.py::{key}' for key in EXCLUDED]  # matches ids, which are relative
        halves.append(subprocess.Popen(
            [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'interpreted', '-k', chosen,
             *deselected, 'tests/test_ops.py'], cwd=root, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True))
    texts = [half.communicate(timeout=1800)[0] for half in halves]
    assert all(half.returncode == 0 for half in halves), '\n'.join(text[-5000:] for text in texts)
    outcomes = {}
    for i in range(2):
        part = json.loads((tmp_path / f'{i}.json').read_text())
        assert not set(part) & set(outcomes)
        outcomes.update(part)
    assert set(outcomes.values()) == {'passed'}, {k: v for k, v in outcomes.items() if v != 'passed'}
    ran = {name.replace('[triton]', '[cpu]') for name in outcomes}
    assert ran == {name for name in expected if not _excluded(name, EXCLUDED)}


def test_a_cpu_tensor_never_imports_triton():
    # Other packages may import triton; this one may not.
    code = ("import builtins, torch\n"
            "original = builtins.__import__\n"
            "def watch(name, globals=None, locals=None, fromlist=(), level=0):\n"
            "    importer = (globals or {}).get('__name__', '')\n"
            "    ours = importer.split('.')[0] == 'vim2'\n"
            "    assert not (ours and (name.startswith('triton.') or name in ('triton', 'triton_kernels'))), importer\n"
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

    from vim2.ops.triton_scan import missing
    meta = torch.empty(1, 2, 1, 3, device='meta')
    assert 'float64' in missing([meta.double()])
    assert '64' in missing([meta, meta, torch.empty(1, 2, 65, device='meta')])
    assert missing([meta, meta, torch.empty(1, 2, 64, device='meta')]) is None


def test_plans():
    from vim2.ops.triton_scan import Device, Plan, make_plan, save_steps
    gpu = Device(132, 50 << 20)
    small = make_plan(128, 4, 768, 196, gpu)                # images and channels alone fill the device
    assert small.merge and small.chunk >= 196
    assert small.together == 2 * 132 and small.turns        # and the maps in flight fit its cache
    middle = make_plan(128, 4, 384, 784, gpu)
    assert middle.together == 2 * 132 and middle.width == 32
    for device in (gpu, Device(108, 40 << 20)):             # maps that fit with fewer channels at a time
        stage = make_plan(128, 4, 192, 3136, device)
        assert stage.together == device.processors and stage.width == 16
    assert not make_plan(128, 4, 192, 3136, gpu, 4).together  # or not at all
    for device in (gpu, Device(108, 40 << 20)):             # the cache holds a few of these: the backward in groups
        for channels, length in ((384, 784), (192, 3136)):
            few = make_plan(128, 4, channels, length, device)
            assert 0 < few.group < 128 and not few.turns and few.back_chunk % save_steps(4) == 0
            # At least a warp, of 16 channels, per multiprocessor; and the parts of the gradient of u fit the cache.
            assert few.group * 4 * channels // 16 * -(-length // few.back_chunk) >= device.processors
            assert few.group * 4 * channels * length * 4 < 0.8 * device.cache
            whole = make_plan(128, 4, channels, length, device, grouped=False)
            assert whole.group == whole.back_chunk == whole.warps == 0 and whole.together == few.together
    assert make_plan(1, 4, 192, 3136, gpu).group == make_plan(128, 1, 192, 3136, gpu).group == 0
    large = make_plan(8, 4, 192, 3136, gpu)
    assert not (large.merge or large.together or large.turns)
    one = make_plan(1, 4, 192, 65536, gpu)                  # one large image: the scan itself is cut
    assert one.chunk < 65536 // 8 and not (one.merge or one.together or one.turns)
    for args in ((1, 1, 1, 1, gpu), (3, 2, 17, 131, Device(1, 1 << 20)), (1, 4, 96, 50176, Device(304, 256 << 20))):
        plan = make_plan(*args)
        assert isinstance(plan, Plan) and plan.chunk % save_steps(args[1]) == 0 and 1 <= plan.batch <= args[0]


def test_no_groups_in_a_trace(monkeypatch):
    """Hundreds of launches would be as many nodes of Inductor's graph."""
    import torch

    from vim2.ops import triton_scan
    monkeypatch.setattr(triton_scan, '_device', lambda device: triton_scan.Device(132, 50 << 20))
    u = torch.empty(128, 384, 28, 28, device='meta')
    plan = triton_scan._plan(u, 4, 16)
    with triton_scan.traced():
        traced = triton_scan._plan(u, 4, 16)
    assert plan.group > 0 and (traced.group, traced.back_chunk, traced.turns) == (0, 0, False)
    assert (traced.merge, traced.chunk, traced.together) == (plan.merge, plan.chunk, plan.together)


def test_autotuning_picks_the_fastest_once(monkeypatch):
    import torch

    from vim2.ops import triton_scan
    monkeypatch.setattr(triton_scan, '_tuned', {})
    monkeypatch.setattr(triton_scan, '_device', lambda device: triton_scan.Device(132, 50 << 20))
    u, A, B = torch.empty(128, 768, 14, 14, device='meta'), torch.empty(4, 768, 16), torch.empty(128, 4, 1, 16, 14, 14)
    tried = []

    def seconds(run, device):
        plan = run()
        tried.append(plan)
        if plan.merge and not plan.together:
            raise torch.OutOfMemoryError
        return 1.0 if plan.together else 0.5

    def choose(u, backward=False):
        return triton_scan.tuned_plan(lambda plan: plan, u, A, B, [0, 1, 2, 3], False, backward, seconds)

    first = choose(u)
    assert len(tried) == 3 and not (first.together or first.merge)
    assert choose(u) == first and choose(u[:100]).together == 0 and len(tried) == 3  # 100 and 128 images share a choice
    assert choose(u[:, :, :7, :7]).chunk == 256 and len(tried) == 6  # but another size is measured anew
    assert all(p.width == 0 for p in tried if not p.together)  # the width of the lockstep is not one of the others
    choose(u, backward=True)
    assert len(tried) == 9 and len({(p.warps, p.turns) for p in tried[6:]}) == 3
    # Where the plan goes in groups, all images at once is tried, with the directions apart and in turn.
    triton_scan.tuned_plan(lambda plan: plan, torch.empty(128, 384, 28, 28, device='meta'), A, B, [0, 1, 2, 3], False,
                           True, seconds)
    assert [(p.group > 0, p.back_chunk > 0, p.turns) for p in tried[9:]] == [
        (True, True, False), (False, False, False), (False, False, True)]
    for plan in (triton_scan.make_plan(8, 1, 2048, 2048, triton_scan.Device(132, 50 << 20)), first):
        for backward in (False, True):
            grid = triton_scan.plan_grid(plan, 2048, 1, 2048, backward)
            assert grid[0] == {} and len(grid) <= 4


def test_where_autotuning_is_off(monkeypatch):
    import torch

    from vim2.ops import triton_scan
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.delenv(triton_scan.AUTOTUNE_ENV, raising=False)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    with torch._subclasses.FakeTensorMode():
        u, small = torch.empty(128, 768, 14, 14, device='cuda'), torch.empty(1, 8, 14, 14, device='cuda')
    assert triton_scan.autotuning(u, 4) and not triton_scan.autotuning(small, 4)
    assert not triton_scan.autotuning(torch.empty(128, 768, 14, 14, device='meta'), 4)
    with triton_scan.traced():
        assert not triton_scan.autotuning(u, 4)
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
        assert not triton_scan.autotuning(u, 4)
    with monkeypatch.context() as m:
        m.setenv(triton_scan.AUTOTUNE_ENV, '0')
        assert not triton_scan.autotuning(u, 4)
    try:
        torch.use_deterministic_algorithms(True)
        assert not triton_scan.autotuning(u, 4)
    finally:
        torch.use_deterministic_algorithms(False)
