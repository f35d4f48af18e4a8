"""The CPU scan's way past PyTorch's dispatcher: the operator's results, and only where nothing asks for the operator.

`_calls` holds what a second call of a kind runs instead of the operator. The tests put something else there: a call
that still succeeds went through the operator.
"""
import threading
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from vim2.ops import cross_selective_scan, selective_scan
from vim2.ops import scan as scan_module
from vim2.ops.scan import map_scan, sequence_scan


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    monkeypatch.delenv('VIM2_SCAN_BACKEND', raising=False)
    monkeypatch.setattr(scan_module, '_calls', {})
    return scan_module._calls


class Taken(Exception):
    """The call did not go through the operator."""


def forbid(calls):
    def taken(*tensors):
        raise Taken
    calls.update(dict.fromkeys(calls, taken))


def channels_last(t):
    """The same values, channels (the second but last two or three dimensions) contiguous."""
    return t.movedim(1 if t.dim() < 5 else 2, -1).contiguous().movedim(-1, 1 if t.dim() < 5 else 2)


def gaps(t):
    return torch.stack([t, torch.full_like(t, float('nan'))], -1)[..., 0]


def map_inputs(dim=35, height=5, width=13, states=5, directions=4, rank=None, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    return dict(x=randn(2, dim, height, width), delta=randn(2, directions, rank or dim, height, width) - 2,
                A=-torch.rand(directions, dim, states, generator=g), B=randn(2, directions, states, height, width),
                C=randn(2, directions, states, height, width), D=randn(directions, dim),
                delta_bias=randn(directions, dim), delta_weight=randn(directions, dim, rank) if rank else None)


def sequence_inputs(dim=36, length=70, states=4, groups=None, constant='', rank=None, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    scanned = (2, states, length) if groups is None else (2, groups, states, length)
    B, C = (randn(dim, states) if name in constant else randn(*scanned) for name in 'BC')
    return dict(u=randn(2, dim, length), delta=randn(2, rank or dim, length) - 2,
                A=-torch.rand(dim, states, generator=g), B=B, C=C, D=randn(dim), z=randn(2, dim, length),
                delta_bias=randn(dim), delta_weight=randn(dim, rank) if rank else None)


CASES = {
    'map': (map_scan, map_inputs()),
    'map, one direction': (map_scan, map_inputs(directions=1)),
    'map, low rank': (map_scan, map_inputs(rank=3)),
    'map, bare': (map_scan, dict(map_inputs(), D=None, delta_bias=None)),
    'map, large': (map_scan, map_inputs(dim=300, height=45, width=50, states=1)),
    'map, 1x1': (map_scan, map_inputs(height=1, width=1)),
    'sequence': (sequence_scan, sequence_inputs()),
    'sequence, groups': (sequence_scan, sequence_inputs(groups=3)),
    'sequence, constant': (sequence_scan, sequence_inputs(constant='BC')),
    'sequence, low rank': (sequence_scan, sequence_inputs(rank=2)),
    'sequence, bare': (sequence_scan, dict(sequence_inputs(), D=None, z=None, delta_bias=None)),
    'sequence, last state': (sequence_scan, dict(sequence_inputs(), return_last_state=True, reverse=True)),
    'sequence, length 1': (sequence_scan, sequence_inputs(length=1)),
}


def apply(fn, inputs):
    return {k: fn(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def results(scan, inputs, **options):
    outs = scan(**inputs, delta_softplus=True, **options)
    return [outs] if isinstance(outs, torch.Tensor) else list(outs)


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape and a.stride() == e.stride() and torch.equal(a, e)


@pytest.mark.parametrize('layout', [None, channels_last, gaps])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('case', CASES)
def test_the_operators_bits(calls, case, dtype, layout):
    scan, inputs = CASES[case]
    inputs = apply(lambda t: (layout or torch.clone)(t.to(dtype)) if t.dim() > 2 else t.to(dtype), inputs)
    expected = results(scan, inputs)
    assert len(calls) == 1
    moved = apply(torch.empty_like, inputs)
    for name, t in moved.items():
        if isinstance(t, torch.Tensor):  # other addresses; the strides of what has gaps are other ones too
            moved[name] = t.copy_(inputs[name]) if t.stride() == inputs[name].stride() else inputs[name]
    assert_same(results(scan, moved), expected)
    assert len(calls) == 1
    forbid(calls)
    with pytest.raises(Taken):
        results(scan, inputs)


def test_mixed_dtypes_and_no_gradients(calls):
    """Parameters under no_grad and inference mode, and leaves without gradients in grad mode, of different dtypes."""
    inputs = apply(torch.nn.Parameter, map_inputs(rank=2))
    inputs['x'] = torch.nn.Parameter(inputs['x'].detach().bfloat16())
    with torch.no_grad():
        expected = results(map_scan, inputs)
        assert_same(results(map_scan, inputs), expected)
    with torch.inference_mode():
        assert_same(results(map_scan, inputs), expected)
        assert results(map_scan, inputs)[0].is_inference()
        new = apply(torch.clone, inputs)
        assert_same(results(map_scan, new), expected)
    detached = apply(torch.Tensor.detach, inputs)
    assert_same(results(map_scan, detached), expected)
    assert len(calls) == 1
    assert not results(map_scan, detached)[0].requires_grad and results(map_scan, inputs)[0].requires_grad


def test_expanded_and_aliased(calls):
    x = torch.randn(1, 20, 6, 6)
    delta = x.unsqueeze(1).expand(1, 4, 20, 6, 6)
    inputs = dict(x=x, delta=delta, A=-torch.rand(1, 1, 4).expand(4, 20, 4), B=delta[:, :, :4], C=delta[:, :, :4],
                  D=torch.ones(1, 1).expand(4, 20))
    expected = results(map_scan, inputs)
    assert_same(results(map_scan, inputs), expected)
    assert len(calls) == 1


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[map_scan, sequence_scan])
def forbidden(request, calls):
    """(scan of its first input, that input, the result): a kind of call that succeeds through the operator only."""
    first, *others = (map_inputs if request.param is map_scan else sequence_inputs)().items()

    def scan(x):
        return results(request.param, {first[0]: x, **dict(others)})[0]

    expected = scan(first[1])
    forbid(calls)
    with pytest.raises(Taken):
        scan(first[1])
    return scan, first[1], expected


def test_dispatch_mode_sees_the_operator(forbidden):
    scan, x, expected = forbidden
    with Seen() as seen:
        assert torch.equal(scan(x), expected)
    assert seen.names.count('vim2::scan') == 1


def test_profiler_sees_the_operator(forbidden):
    scan, x, expected = forbidden
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.equal(scan(x), expected)
    assert 'vim2::scan' in {event.key for event in profile.key_averages()}


def test_gradients(forbidden):
    scan, x, expected = forbidden
    out = scan(x.clone().requires_grad_())
    assert torch.equal(out, expected) and out.grad_fn is not None


@pytest.fixture
def past(monkeypatch):
    """The calls of the backward that went past the operator."""
    taken, function = [], scan_module._scan_backward._init_fn
    operator = torch.ops.vim2.scan_backward

    class Counted:
        @staticmethod
        def _init_fn(*args):
            taken.append(args)
            return function(*args)

    monkeypatch.setattr(scan_module, '_scan_backward', Counted)
    assert torch.ops.vim2.scan_backward is operator
    return taken


@pytest.mark.parametrize('case', CASES)
def test_the_backward_operators_bits(past, case):
    scan, inputs = CASES[case]
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    outs = [t for t in results(scan, dict(inputs, **leaves)) if t.numel()]
    seeds = [torch.randn_like(t) for t in outs]

    def gradients(**options):
        return torch.autograd.grad(outs, list(leaves.values()), seeds, retain_graph=True, **options)

    grads = gradients()
    assert len(past) == 1
    with Seen() as seen:
        assert_same(gradients(), grads)
    assert len(past) == 1 and seen.names.count('vim2::scan_backward') == 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert_same(gradients(), grads)
    assert len(past) == 1 and 'vim2::scan_backward' in {event.key for event in profile.key_averages()}
    assert_same(gradients(create_graph=True), grads)
    assert len(past) == 1


@pytest.mark.parametrize('case', ['map', 'map, low rank', 'sequence, last state'])
def test_backward_under_checkpointing(past, case):
    """Which recomputes what is saved when the backward reads it, and lets it read once."""
    scan, inputs = CASES[case]
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}

    def run():
        return sum(t.square().sum() for t in results(scan, dict(inputs, **leaves)))

    expected = torch.autograd.grad(run(), list(leaves.values()))
    loss = torch.utils.checkpoint.checkpoint(run, use_reentrant=False)
    assert_same(torch.autograd.grad(loss, list(leaves.values())), expected)
    assert len(past) == 2


def test_the_backward_makes_no_gradient_of_saved_states(past):
    """Of what autograd keeps, the states at the chunks' borders are large: nobody differentiates them."""
    inputs = apply(lambda t: t.requires_grad_(), map_inputs())
    out = results(map_scan, inputs)[0]
    received = []
    out.grad_fn.register_prehook(lambda grads: received.append(grads))
    out.sum().backward()
    assert [g is None for g in received[0]] == [False, True, True] and len(past) == 1


def test_forward_mode(forbidden):
    scan, x, expected = forbidden
    with forward_ad.dual_level():
        assert torch.equal(forward_ad.unpack_dual(scan(forward_ad.make_dual(x, x))).primal, expected)


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_graphs_hold_the_operator(forbidden, calls):
    scan, x, expected = forbidden

    class Module(torch.nn.Module):
        def forward(self, x):
            return scan(x)

    programs = [make_fx(scan)(x), make_fx(scan, pre_dispatch=True)(x),
                make_fx(scan, tracing_mode='fake', _allow_non_fake_inputs=True)(x),
                torch.export.export(Module(), (x,), strict=False).module(),
                torch.export.export(Module(), (x,), strict=True).module()]
    for program in programs:
        assert 'vim2.scan' in program.code and torch.equal(program(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the shape checks read sizes
        traced = torch.jit.trace(scan, x, check_trace=False)
    assert 'vim2::scan' in str(traced.graph) and torch.equal(traced(x), expected)
    assert torch.equal(torch.compile(scan, fullgraph=True)(x), expected)
    assert len(calls) == 1


def test_transforms(forbidden):
    scan, x, expected = forbidden
    assert torch.equal(torch.vmap(scan)(torch.stack([x, x]))[1], expected)
    assert torch.equal(torch.func.functionalize(scan)(x), expected)
    with pytest.raises(RuntimeError, match='functorch transforms'):  # what custom operators do not support
        torch.func.grad(lambda t: scan(t).sum())(x)


def test_tensors_that_are_more_than_memory(forbidden, calls):
    """Fake tensors, subclasses, and views that are to be negated when they are read."""
    scan, x, expected = forbidden

    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

        def __init__(self, inner):
            self.inner = inner

        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return func(*[a.inner if isinstance(a, cls) else a for a in args], **(kwargs or {}))

    assert torch.equal(scan(Wrapped(x)), expected)
    imaginary = torch.view_as_real(torch.empty(x.shape, dtype=torch.complex64))
    imaginary[..., 1] = -x
    negative = torch.view_as_complex(imaginary).conj().imag
    assert negative.is_neg() and torch.equal(negative, x)
    positive = torch.view_as_complex(imaginary).imag
    out = scan(positive)
    assert len(calls) == 2 and positive.stride() == negative.stride()
    assert not torch.equal(out, expected) and torch.equal(scan(negative), expected)


def test_autocast(calls):
    """Autocast leaves the operator alone: it changes nothing here either, low rank included."""
    for case in ('map', 'map, low rank', 'sequence, low rank'):
        scan, inputs = CASES[case]
        with torch.autocast('cpu', dtype=torch.bfloat16):
            expected = results(scan, inputs)
            calls.clear()
            results(scan, inputs)
            assert len(calls) == 1
            assert_same(results(scan, inputs), expected)
        assert_same(results(scan, inputs), expected)


def test_environment(monkeypatch, calls):
    inputs = map_inputs()
    expected = results(map_scan, inputs)
    assert_same(results(map_scan, inputs), expected)
    monkeypatch.setenv('VIM2_SCAN_BACKEND', 'fast')
    with pytest.raises(ValueError, match='VIM2_SCAN_BACKEND=fast: no such backend'):
        results(map_scan, inputs)
    assert_same(results(map_scan, inputs, backend='cpu'), expected)
    monkeypatch.setenv('VIM2_SCAN_BACKEND', 'reference')
    reference = results(map_scan, inputs)
    assert not torch.equal(reference[0], expected[0])  # the last bits
    assert_same(results(map_scan, inputs), reference)
    assert_same(results(map_scan, inputs, backend='cpu'), expected)
    monkeypatch.delenv('VIM2_SCAN_BACKEND')
    assert_same(results(map_scan, inputs), expected)
    assert_same(results(map_scan, inputs, backend='reference'), reference)


def test_number_of_threads(monkeypatch):
    from vim2.ops import cpu
    workers = []
    run = cpu._run
    monkeypatch.setattr(cpu, '_run', lambda name, address, n: (workers.append(n), run(name, address, n)))
    inputs = map_inputs(dim=100)
    threads = torch.get_num_threads()
    try:
        for n in (1, 4, 1, 2, 4):
            torch.set_num_threads(n)
            results(map_scan, inputs)
    finally:
        torch.set_num_threads(threads)
    assert workers == [1, 4, 1, 2, 4]


@pytest.mark.parametrize('name,bad,error,message', [
    ('x', lambda t: t[0], ValueError, r'x must be \(batch, channels, height, width\)'),
    ('x', lambda t: t[:, :, :0], ValueError, 'x is empty'),
    ('x', lambda t: t.int(), TypeError, 'x must be of a floating dtype, got torch.int32'),
    ('x', lambda t: None, AttributeError, 'has no attribute'),
    ('x', lambda t: t.numpy(), AttributeError, 'has no attribute'),
    ('delta', lambda t: t[:, :3], ValueError, r'delta must have shape \(2, 4, 35, 5, 13\), got \(2, 3, 35, 5, 13\)'),
    ('delta', lambda t: t.to('meta'), ValueError, 'x is on cpu and delta on meta'),
    ('A', lambda t: t.repeat(2, 1, 1), ValueError, 'A has 8 directions'),
    ('B', lambda t: t.to(torch.complex64), TypeError, 'B is complex'),
    ('C', lambda t: t.flatten(3), ValueError, r'C must have shape \(2, 4, 5, 5, 13\)'),
    ('delta_bias', lambda t: t[0], ValueError, r'delta_bias must have shape \(4, 35\), got \(35,\)'),
    ('delta_softplus', lambda t: 'yes', RuntimeError, "Expected a value of type 'bool'"),
    ('backend', lambda t: 'gpu', ValueError, "backend='gpu': no such backend"),
])
def test_errors_after_a_valid_call(name, bad, error, message):
    inputs = dict(map_inputs(), delta_softplus=True, backend=None)
    for _ in range(2):
        cross_selective_scan(**inputs)
    inputs[name] = bad(inputs[name])
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            cross_selective_scan(**inputs)


def test_low_rank_errors_after_a_valid_call():
    inputs = sequence_inputs(rank=2)
    for _ in range(2):
        selective_scan(**inputs)
    inputs['delta_weight'] = inputs['delta_weight'][1:]
    with pytest.raises(ValueError, match=r'delta_weight must have shape \(36, 2\), got \(35, 2\)'):
        selective_scan(**inputs)


def test_options_are_part_of_the_kind():
    inputs = sequence_inputs()
    inputs.update(delta=inputs['delta'].abs() / 10, delta_bias=None)

    def run():
        return [selective_scan(**inputs, **options) for options in (
            dict(), dict(delta_softplus=True), dict(reverse=True), dict(delta_softplus=True, reverse=True))]
    outs = run()
    assert_same(run(), outs)
    assert all(not torch.equal(outs[i], outs[j]) for i in range(4) for j in range(i))
    softplus = torch.tensor(True)  # PyTorch takes it for a bool
    assert torch.equal(selective_scan(**inputs, delta_softplus=softplus), outs[1])
    softplus.fill_(False)
    assert torch.equal(selective_scan(**inputs, delta_softplus=softplus), outs[0])


def test_number_of_kinds_is_bounded(monkeypatch, calls):
    monkeypatch.setattr(scan_module, '_MOST_CALLS', 3)
    for length in (1, 2, 3, 4, 5, 1, 2):
        inputs = sequence_inputs(length=length)
        expected = results(sequence_scan, inputs)
        assert_same(results(sequence_scan, inputs), expected)
        assert 1 <= len(calls) <= 3


def test_concurrent_calls(monkeypatch, calls):
    """From several Python threads at once, each with inputs of its own, of few kinds, which come and go."""
    monkeypatch.setattr(scan_module, '_MOST_CALLS', 3)
    jobs = [[(scan, make(seed=seed, **sizes)) for sizes in (dict(dim=20), dict(dim=48)) for scan, make in (
        (map_scan, map_inputs), (sequence_scan, sequence_inputs))] for seed in range(4)]
    with Seen():  # through the operator
        expected = [[results(*job) for job in own] for own in jobs]
    assert not calls
    wrong = []

    def work(seed):
        for _ in range(50):
            for job, outs in zip(jobs[seed], expected[seed]):
                if not torch.equal(results(*job)[0], outs[0]):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert calls and not wrong


def test_without_the_internals(monkeypatch, calls):
    """A PyTorch that lacks what this reads of its internals: every call goes through the operator."""
    monkeypatch.delattr(torch._C, '_dispatch_tls_local_include_set')
    plain = scan_module._plain_keys()
    assert plain == (frozenset(), frozenset())
    monkeypatch.setattr(scan_module, '_PLAIN_THREAD', plain[0])
    inputs = map_inputs()
    assert_same(results(map_scan, inputs), results(map_scan, inputs))
    assert not calls


def test_environment_in_compiled_graphs(monkeypatch, tmp_path):
    """A cache of compiled graphs that processes share must not take one backend's graph for another's."""
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    inputs = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in map_inputs().items()}

    def gradients(scan):
        out, = results(scan, inputs)
        return torch.autograd.grad(out.square().sum(), [t for t in inputs.values() if t is not None])

    for backend in ('reference', 'cpu', ''):
        monkeypatch.setenv('VIM2_SCAN_BACKEND', backend)
        torch._dynamo.reset()  # as in a new process
        compiled = torch.compile(map_scan, fullgraph=True)
        for actual, expected in zip(gradients(compiled), gradients(map_scan)):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setenv('VIM2_SCAN_BACKEND', 'fast')
    torch._dynamo.reset()
    with pytest.raises(Exception, match='VIM2_SCAN_BACKEND=fast: no such backend'):
        results(torch.compile(map_scan, fullgraph=True), inputs)
