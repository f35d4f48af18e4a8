"""Properties that hold for any input: random shapes, strides, types and groups; any size of image; extreme numbers."""
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vim2  # noqa: F401
from vim2.ops import cross_selective_scan, selective_scan

# the same examples in every run: what fails here fails everywhere
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # relative RMSE


def relative_rmse(a, b):
    a, b = a.double(), b.double()
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30)).item()


def strided(x, layout):
    """The same values in another layout of memory."""
    if layout == 'transposed':
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == 'sliced':
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float('nan'))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == 'outer':
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    return x.contiguous()


LAYOUTS = st.sampled_from(['contiguous', 'transposed', 'sliced', 'outer'])
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])


@st.composite
def scans(draw):
    """Arguments of a sequence scan in float64, their layouts, and the type to run them in."""
    groups = draw(st.integers(1, 3))
    batch, dim, length, states = (draw(st.integers(1, 3)), groups * draw(st.integers(1, 7)), draw(st.integers(1, 70)),
                                  draw(st.integers(1, 20)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    softplus, kinds = draw(st.booleans()), st.sampled_from(['constant', 'varying'])
    B, C = (randn(dim, states) if draw(kinds) == 'constant' else randn(batch, groups, states, length)
            if groups > 1 or draw(st.booleans()) else randn(batch, states, length) for _ in range(2))
    arguments = dict(
        u=randn(batch, dim, length), delta=randn(batch, dim, length) if softplus else 0.2 * randn(
            batch, dim, length).abs(),
        A=-4 * torch.rand(dim, states, generator=g, dtype=torch.float64) - 0.01, B=B, C=C,
        D=randn(dim) if draw(st.booleans()) else None, z=randn(batch, dim, length) if draw(st.booleans()) else None,
        delta_bias=0.5 * randn(dim).abs() if draw(st.booleans()) else None)
    layouts = {k: draw(LAYOUTS) if v is not None and v.ndim > 1 else 'contiguous' for k, v in arguments.items()}
    return arguments, layouts, draw(DTYPES), dict(delta_softplus=softplus, reverse=draw(st.booleans()))


def outputs(scan, arguments, backend, dtype, **kwargs):
    """The result, and the gradient of every argument for an output gradient that is a number of `dtype`."""
    inputs = {k: v.detach().requires_grad_() for k, v in arguments.items() if v is not None}
    y = scan(**{k: inputs.get(k) for k in arguments}, backend=backend, **kwargs)
    g = torch.Generator().manual_seed(0)
    grads = torch.autograd.grad(y, list(inputs.values()), torch.randn(y.shape, generator=g).to(dtype).to(y))
    return {'y': y, **{f'gradient of {k}': v for k, v in zip(inputs, grads)}}


def compare(scan, arguments, layouts, dtype, **kwargs):
    # what rounding the inputs does is no error of the scan; A, D and the bias stay in float32, as in a model
    low = {k: v if v is None else v.to(torch.float32 if k in ('A', 'D', 'delta_bias') else dtype)
           for k, v in arguments.items()}
    got = outputs(scan, {k: v if v is None else strided(v, layouts[k]) for k, v in low.items()}, 'cpu', dtype, **kwargs)
    want = outputs(scan, {k: v if v is None else v.double() for k, v in low.items()}, 'reference', dtype, **kwargs)
    for name, value in want.items():
        assert got[name].isfinite().all() and got[name].shape == value.shape, name
        assert relative_rmse(got[name], value) < TOLERANCE[dtype], (name, relative_rmse(got[name], value))


@PROPERTY
@given(scans())
def test_any_sequence_scan_is_the_reference(case):
    arguments, layouts, dtype, kwargs = case
    compare(selective_scan, arguments, layouts, dtype, **kwargs)


@st.composite
def map_scans(draw):
    batch, dim, height, width, states, directions = (draw(st.integers(1, top)) for top in (2, 9, 9, 9, 17, 4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    arguments = dict(
        x=randn(batch, dim, height, width), delta=randn(batch, directions, dim, height, width),
        A=-4 * torch.rand(directions, dim, states, generator=g, dtype=torch.float64) - 0.01,
        B=randn(batch, directions, states, height, width), C=randn(batch, directions, states, height, width),
        D=randn(directions, dim) if draw(st.booleans()) else None,
        delta_bias=0.5 * randn(directions, dim).abs() if draw(st.booleans()) else None)
    layouts = {k: draw(LAYOUTS) if k in ('x', 'delta', 'B', 'C') else 'contiguous' for k in arguments}
    return arguments, layouts, draw(DTYPES)


@PROPERTY
@given(map_scans())
def test_any_map_scan_is_the_reference(case):
    arguments, layouts, dtype = case
    compare(cross_selective_scan, arguments, layouts, dtype, delta_softplus=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('length', [1, 63, 300])
def test_steps_of_zero_and_of_a_thousand(dtype, length):
    """Nothing enters a state in no time: what is left is D u. In a thousand units of time all of the past is gone."""
    g = torch.Generator().manual_seed(length)
    u, B, C = (torch.randn(2, n, length, generator=g).to(dtype) for n in (6, 5, 5))
    A, D = -torch.rand(6, 5, generator=g) - 0.5, torch.randn(6, generator=g)
    for step in (0., 1e3):
        delta = torch.full_like(u, step)
        result = outputs(selective_scan, dict(u=u, delta=delta, A=A, B=B, C=C, D=D), 'cpu', dtype)
        assert all(v.isfinite().all() for v in result.values()), step
        u64, B64, C64 = u.double(), B.double(), C.double()
        want = D.double()[:, None] * u64 + step * u64 * (B64 * C64).sum(1, keepdim=True)
        assert relative_rmse(result['y'], want) < TOLERANCE[dtype], step


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_activations_of_ten_thousand(dtype):
    """States are of float32: what fits the output's type comes out right, however large the way there."""
    g = torch.Generator().manual_seed(0)
    arguments = dict(u=1e4 * torch.randn(2, 8, 100, generator=g).clamp(-3, 3),
                     delta=torch.randn(2, 8, 100, generator=g),
                     A=-torch.rand(8, 4, generator=g) - 0.5, B=torch.randn(2, 4, 100, generator=g),
                     C=1e-2 * torch.randn(2, 4, 100, generator=g))
    low = {k: v if k == 'A' else v.to(dtype) for k, v in arguments.items()}
    y = selective_scan(**low, delta_softplus=True, backend='cpu')
    want = selective_scan(**{k: v.double() for k, v in low.items()}, delta_softplus=True, backend='reference')
    assert want.abs().max() > 1000 and y.isfinite().all() and relative_rmse(y, want) < TOLERANCE[dtype]


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('test_vim2', num_classes=5).eval()


@torch.inference_mode()
@settings(PROPERTY, max_examples=12)
@given(height=st.integers(32, 200), width=st.integers(32, 200), seed=st.integers(0, 1 << 30))
def test_images_of_any_size(model, height, width, seed):
    """Finite, NCHW at the strides that feature_info says, and each image for itself, bit for bit."""
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    logits, features = model(images), model.forward_intermediates(images, intermediates_only=True)
    assert logits.shape == (2, 5) and logits.isfinite().all()
    for feature, info in zip(features[-len(model.feature_info):], model.feature_info):
        reduction = info['reduction']
        assert feature.shape == (2, info['num_chs'], -(-height // reduction), -(-width // reduction))
    torch.testing.assert_close(model(images[1:]), logits[1:], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize('size', [(32, 32), (65, 97)])
def test_a_nan_pixel_stays_in_its_image(model, size):
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    clean = model(images)
    images[1, 2, size[0] // 2, 5] = float('nan')
    logits = model(images)
    assert logits[1].isnan().all()
    assert torch.equal(logits[[0, 2]], clean[[0, 2]])


@torch.inference_mode()
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_models_take_images_of_ten_thousand(model, dtype):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.autocast('cpu', dtype):
        logits = model(1e4 * images)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.float(), model(1e4 * images), rtol=0.1, atol=0.1)
