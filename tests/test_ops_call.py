"""How the scan is called: compiled graphs and what the environment says."""
import pytest
import torch

from vim2.ops.scan import map_scan


def map_inputs(dim=35, height=5, width=13, states=5, directions=4, rank=None, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    return dict(x=randn(2, dim, height, width), delta=randn(2, directions, rank or dim, height, width) - 2,
                A=-torch.rand(directions, dim, states, generator=g), B=randn(2, directions, states, height, width),
                C=randn(2, directions, states, height, width), D=randn(directions, dim),
                delta_bias=randn(directions, dim), delta_weight=randn(directions, dim, rank) if rank else None)


def results(scan, inputs, **options):
    outs = scan(**inputs, delta_softplus=True, **options)
    return [outs] if isinstance(outs, torch.Tensor) else list(outs)


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
