"""TSM2: what each mixer may see, shapes of every kind, gradients, inputs beside the series, saving."""
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vim2.layers import SelectiveTokenMixer, WeightedAverage
from vim2.models import TSM2
from vim2.models.tsm2 import InstanceNorm, VariateMlp

SMALL = dict(lookback=48, horizon=12, patch_len=8, stride=8, d_model=8, d_state=4)


def small(num_variates=3, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = TSM2(num_variates, **{**SMALL, **kwargs})
    for m in model.modules():  # away from the small weights of the start, so that nothing is negligible
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=m.in_features ** -0.5)
    return model.eval()


def inputs(model, batch=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    M = model.num_variates
    static = torch.randn(batch, M, model.static_dim, generator=g) if model.static_dim else None
    future = torch.randn(batch, M, model.future_len, model.future_dim, generator=g) if model.future_dim else None
    past = torch.randn(batch, M, model.lookback, model.past_dim, generator=g) if model.past_dim else None
    return torch.randn(batch, model.lookback, M, generator=g), static, future, past


def naive(model, x, static=None, future=None, past=None):
    """The forward pass of the paper's equations, variate by variate and patch by patch."""
    norm = model.instance_norm
    center = x[:, -1:] if norm.center == 'last' else x.mean(1, keepdim=True)
    scale = (x.var(1, keepdim=True, unbiased=False) + norm.eps).sqrt()
    x = (x - center) / scale * norm.weight + norm.bias
    B, T, M = x.shape
    starts = list(range(T - model.patch_len, -1, -model.stride))[::-1]
    # the oldest patch begins with repetitions of the first value
    more = model.stride - starts[0] if starts[0] > 0 else 0

    def cut(part):
        """Patches of (B, M, T)."""
        first = [torch.cat([part[..., :1]] * more + [part], -1)[..., :model.patch_len]] if more else []
        return first + [part[..., s:s + model.patch_len] for s in starts]

    parts = [x.transpose(1, 2)]
    if future is not None:
        mixed = torch.stack([future[:, :, t] + model.future_mixer(future[:, :, t])
                             for t in range(future.shape[2])], dim=2)
        parts.append(model.future_proj(mixed.reshape(B, M, -1)))
    if static is not None:
        parts.append(model.static_proj(static))
    embedded = [[model.patch_embed(p) for p in cut(part)] for part in parts]
    if past is not None:  # beside the patches of the series, each feature's own weights
        for c in range(past.shape[3]):
            weight = model.past_embed.weight.unflatten(1, (-1, model.patch_len))[:, c]
            embedded[0] = [e + F.linear(p, weight) for e, p in zip(embedded[0], cut(past[..., c]))]
    y = torch.stack(sum(embedded, []), dim=2)  # (B, M, P, d)
    ys = [y]
    for i, block in enumerate(model.blocks):
        y = sum(w * v for w, v in zip(model.averages[i].weight, ys))
        z = F.layer_norm(y, y.shape[2:], block.norm.weight, block.norm.bias)
        if block.along == 'time':
            z = torch.stack([block.mixer(z[:, m]) for m in range(M)], dim=1)
        else:
            z = torch.stack([block.mixer(z[:, :, p]) for p in range(z.shape[2])], dim=2)
        ys.append(y + z)
    y = sum(w * v for w, v in zip(model.averages[-1].weight, ys))
    y = torch.stack([model.head(y[:, m].reshape(B, -1)) for m in range(M)], dim=2)
    return (y - norm.bias) / norm.weight * scale + center


@pytest.mark.parametrize('kwargs', [
    {}, dict(stride=5), dict(depth=2, center='last'), dict(static_dim=2), dict(future_dim=1, future_len=20),
    dict(past_dim=2, stride=5), dict(static_dim=1, future_dim=3, past_dim=1, stride=6, variate_mixer='mlp')],
    ids=str)
def test_forward_is_the_equations(kwargs):
    model = small(**kwargs).double()
    with torch.no_grad():
        for average in model.averages:
            average.weight.normal_()
        model.instance_norm.weight.uniform_(0.5, 2)
        model.instance_norm.bias.normal_()
        x, *others = [None if t is None else t.double() for t in inputs(model)]
        actual = model(x, *others)
        assert actual.shape == (2, 12, 3)
        torch.testing.assert_close(actual, naive(model, x, *others), rtol=1e-4, atol=1e-5)


def test_mixers_are_those_of_vim2():
    model = small(depth=2, future_dim=1)
    kinds = [(b.along, type(b.mixer), b.mixer.s6.num_scans) for b in model.blocks]
    assert kinds == [('time', SelectiveTokenMixer, 1), ('variates', SelectiveTokenMixer, 2)] * 2
    assert type(model.future_mixer) is SelectiveTokenMixer and model.future_mixer.s6.num_scans == 2
    assert all(type(a) is WeightedAverage for a in model.averages)


def test_time_mixer_is_causal():
    block = small().blocks[0]
    x = torch.randn(4, 10, 8)
    for t in (1, 4, 9):
        changed = x.clone()
        changed[:, t:] += torch.randn(4, 10 - t, 8)
        a, b = block.mixer(x), block.mixer(changed)
        torch.testing.assert_close(a[:, :t], b[:, :t], rtol=0, atol=1e-6)
        assert (a[:, t:] - b[:, t:]).abs().amax(2).min() > 1e-4  # and every later patch does see the change


def test_variate_mixer_sees_all_variates_and_keeps_patches_apart():
    block = small(5).blocks[1]
    x = torch.randn(2, 5, 6, 8)
    z = block.mixer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 6)).transpose(1, 2)
    for m in range(5):
        changed = x.clone()
        changed[:, m, 2] += torch.randn(2, 8)
        y = block.mixer(changed.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 6)).transpose(1, 2)
        moved = (y - z).abs().amax(3)  # (B, M, P)
        assert moved[:, :, 2].min() > 1e-5
        assert moved[:, :, [0, 1, 3, 4, 5]].max() == 0


def test_permutation_of_the_variates():
    """Reading the variates backwards exchanges the two directions; any other order is another network.

    The time mixer and the head treat every variate alike, so that without mixing of the variates TSM2 commutes with
    every permutation.
    """
    order = torch.tensor([2, 0, 4, 1, 3])
    model = small(5)
    mixer = model.blocks[1].mixer
    x = torch.randn(3, 5, 8)
    before = mixer(x)
    assert (mixer(x[:, order]) - before[:, order]).abs().max() > 1e-3
    with torch.no_grad():
        for name, p in mixer.s6.named_parameters():
            p.copy_(p.unflatten(0, (2, -1)).flip(0).flatten(0, 1) if name in ('A_logs', 'Ds') else p.flip(0))
        a, b = mixer.conv1d
        for p, q in ((a.weight, b.weight), (a.bias, b.bias)):
            saved = p.clone()
            p.copy_(q)
            q.copy_(saved)
    torch.testing.assert_close(mixer(x.flip(1)).flip(1), before, rtol=1e-4, atol=1e-5)

    for kwargs, commutes in ((dict(variate_mixer='none'), True), ({}, False), (dict(variate_mixer='mlp'), False)):
        model = small(5, **kwargs)
        x, *_ = inputs(model)
        difference = (model(x[..., order]) - model(x)[..., order]).abs().max()
        assert difference < 1e-5 if commutes else difference > 1e-3


@pytest.mark.parametrize('num_variates', [1, 321])
def test_one_and_many_variates(num_variates):
    model = small(num_variates)
    x, *_ = inputs(model)
    y = model(x)
    assert y.shape == (2, 12, num_variates) and y.isfinite().all()


@pytest.mark.parametrize('lookback, patch_len, stride, patches', [
    (48, 8, 8, 6), (50, 8, 8, 7), (47, 8, 3, 14), (100, 16, 7, 13), (7, 16, 8, 1), (8, 8, 100, 1), (512, 16, 8, 63)])
def test_any_lookback(lookback, patch_len, stride, patches):
    model = small(lookback=lookback, patch_len=patch_len, stride=stride)
    assert model.num_patches == patches
    x, *_ = inputs(model)
    x.requires_grad_()
    y = model(x)
    assert y.shape == (2, 12, 3)
    y.square().sum().backward()
    assert (x.grad.abs().sum((0, 2)) > 0).all()  # every step of the look-back is read


@pytest.mark.parametrize('kwargs', [
    {}, dict(static_dim=2, future_dim=2, past_dim=2), dict(variate_mixer='mlp', depth=2), dict(norm='batch'),
    dict(weighted_average=False, variate_mixer='none'), dict(instance_norm=False), dict(affine=False, center='last'),
    dict(drop_rate=0.1, head_drop_rate=0.1, future_dim=1)], ids=str)
def test_every_parameter_has_a_gradient(kwargs):
    model = small(depth=kwargs.pop('depth', 1), **kwargs).train()
    (model(*inputs(model)) - torch.randn(2, 12, 3)).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize('how', ['module', 'autocast'])
def test_bfloat16(how):
    model = small(static_dim=1, future_dim=1)
    x, static, future, _ = inputs(model)
    x = x * 3 + 100  # the statistics are float32: a level does not eat the signal
    expected = model(x, static, future)
    if how == 'autocast':
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y = model(x, static, future)
    else:
        expected = model(*(t.bfloat16().float() for t in (x, static, future)))
        model.bfloat16()
        y = model(*(t.bfloat16() for t in (x, static, future)))
        assert y.dtype == torch.bfloat16
    error = (y.float() - expected).std() / (expected - 100).std()
    assert error < (0.1 if how == 'autocast' else 0.2)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('center', ['mean', 'last'])
def test_instance_norm_is_reversible(center):
    norm = InstanceNorm(3, center)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    x = torch.randn(4, 20, 3) * torch.tensor([1., 10., 1e3]) + torch.tensor([0., 5., -1e4])
    center_, scale = norm.statistics(x)
    y = norm.normalize(x, center_, scale)
    plain = (y - norm.bias) / norm.weight
    if center == 'mean':
        torch.testing.assert_close(plain.mean(1), torch.zeros(4, 3), rtol=0, atol=1e-4)
    else:
        assert plain[:, -1].abs().max() < 1e-6
    torch.testing.assert_close(plain.std(1, unbiased=False), torch.ones(4, 3), rtol=1e-4, atol=0)
    torch.testing.assert_close(norm.restore(y, center_, scale), x, rtol=1e-4, atol=1e-3)


def test_level_and_scale_of_a_window_pass_through():
    model = small()
    x, *_ = inputs(model)
    scale, level = torch.tensor([2., 5., 0.5]), torch.tensor([3., -100., 7.])
    torch.testing.assert_close(model(x * scale + level), model(x) * scale + level, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('which', ['static', 'future'])
def test_learns_from_the_auxiliary_input_alone(which):
    """The past is noise; the target is a function of the auxiliary input only."""
    torch.manual_seed(0)
    M, H = 2, 4
    aux = dict(static=dict(static_dim=2), future=dict(future_dim=1))[which]
    losses = {}
    for name, kwargs in (('with', aux), ('without', {})):
        model = TSM2(M, lookback=16, horizon=H, patch_len=8, stride=8, d_model=16, d_state=2, **kwargs)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        g = torch.Generator().manual_seed(1)
        for _ in range(120 if kwargs else 60):
            x = torch.randn(64, 16, M, generator=g)
            if which == 'static':
                a = torch.randn(64, M, 2, generator=g)
                target = (a[..., :1] - 0.5 * a[..., 1:]).transpose(1, 2).expand(-1, H, -1)
            else:
                a = torch.randn(64, M, H, 1, generator=g)
                # the other variate's future counts too: only the mixer over the variates can bring it
                target = (a + 0.5 * a.flip(1)).squeeze(3).transpose(1, 2)
            loss = F.mse_loss(model(x, **({which: a} if kwargs else {})), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses['without'] > 0.9  # both targets have a variance of 1.25, and the past says nothing
    assert losses['with'] < 0.35, losses


def test_starts_as_the_centre_of_the_window():
    """A new model's forecast is the centre, at every step, and every weight learns from the second step on."""
    for center in ('mean', 'last'):
        torch.manual_seed(0)
        model = TSM2(3, **SMALL, center=center)
        x, *_ = inputs(model)
        expected = x[:, -1:] if center == 'last' else x.mean(1, keepdim=True)
        torch.testing.assert_close(model(x), expected.expand(-1, 12, -1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - torch.randn(2, 12, 3)).square().sum().backward()
        optimizer.step()
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize('kwargs', [
    dict(future_dim=1), dict(past_dim=1), dict(static_dim=1), dict(future_dim=3, past_dim=3)], ids=str)
def test_covariates_cost_is_linear_in_the_lookback(kwargs):
    """Their parameters grow by as much from 1,024 to 2,048 steps as twice from 512 to 1,024."""
    def extra(lookback):
        sizes = [sum(p.numel() for p in TSM2(2, lookback, 24, device='meta', **k).parameters()) for k in (kwargs, {})]
        return sizes[0] - sizes[1]

    assert extra(2048) - extra(1024) == 2 * (extra(1024) - extra(512))
    assert extra(4096) < 1_000_000


def test_ablations_by_argument():
    full, mlp, plain, none = (small(**k) for k in (
        {}, dict(variate_mixer='mlp'), dict(weighted_average=False), dict(variate_mixer='none')))
    assert type(mlp.blocks[1].mixer) is VariateMlp and len(none.blocks) == 1
    assert mlp.blocks[1].mixer(torch.randn(2, 3, 8)).shape == (2, 3, 8)
    assert len(plain.averages) == 0 and len(full.averages) == 3
    plain.load_state_dict(full.state_dict(), strict=False)
    x, *_ = inputs(full)
    torch.testing.assert_close(plain(x), full(x))  # the averages start as the plain chain
    with torch.no_grad():
        full.averages[2].weight[0] += 0.5
    assert (plain(x) - full(x)).abs().max() > 1e-3


@pytest.mark.parametrize('kwargs, message', [
    (dict(variate_mixer='conv'), "variate_mixer must be 's6', 'mlp' or 'none', got 'conv'"),
    (dict(norm='group'), "norm must be 'layer' or 'batch', got 'group'"),
    (dict(center='median'), "center must be 'mean' or 'last', got 'median'"),
    (dict(stride=0), 'stride must be at least 1, got 0'),
    (dict(lookback=-3), 'lookback must be at least 1, got -3'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_bad_inputs():
    model = small(static_dim=2)
    x, static, *_ = inputs(model)
    for args, message in (
            ((x[:, 1:], static), r'x must be \(batch, lookback 48, variates 3\), got \(2, 47, 3\)'),
            ((x[..., :2], static), r'got \(2, 48, 2\)'),
            ((x,), r'static inputs are missing \(static_dim is 2\)'),
            ((x, static[:, :2]), r'static must be \(2, 3, 2\), got \(2, 2, 2\)'),
            ((x, static, torch.zeros(2, 3, 12, 1)), 'future inputs were given, but future_dim is 0'),
            ((x, static, None, torch.zeros(2, 3, 48, 1)), 'past inputs were given, but past_dim is 0')):
        with pytest.raises(ValueError, match=message):
            model(*args)


def test_save_and_load(tmp_path):
    model = small(4, stride=5, static_dim=1, center='last')
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    config = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    assert (config['num_variates'], config['lookback'], config['horizon'], config['stride']) == (4, 48, 12, 5)
    assert 'library_name: vim2' in (tmp_path / 'README.md').read_text(encoding='utf-8')
    again = TSM2.from_pretrained(str(tmp_path))
    x, static, *_ = inputs(model)
    assert torch.equal(again(x, static), model(x, static))
    assert config.pop('format') == 1
    (tmp_path / 'config.json').write_text(json.dumps(config))  # as earlier versions wrote it
    assert torch.equal(TSM2.from_pretrained(str(tmp_path))(x, static), model(x, static))
    (tmp_path / 'config.json').write_text(json.dumps(dict(config, format=2)))
    with pytest.raises(ValueError, match='config.json has format 2, this version of vim2 reads 1'):
        TSM2.from_pretrained(str(tmp_path))


def test_no_weight_decay():
    model = small()
    names = model.no_weight_decay()
    assert {'averages.1.weight', 'blocks.0.norm.weight', 'blocks.0.mixer.s6.A_logs', 'blocks.1.mixer.s6.Ds',
            'blocks.0.mixer.s6.dt_projs_bias', 'instance_norm.weight', 'head.bias'} <= names
    assert not names & {'head.weight', 'patch_embed.weight', 'blocks.0.mixer.in_proj.weight'}
    assert names <= {n for n, _ in model.named_parameters()}


def test_loads_in_evaluation_mode(tmp_path, monkeypatch):
    """Also where huggingface_hub leaves it in training mode (1.0 to 1.8), whose dropout makes noise of a forecast."""
    TSM2(2, lookback=16, horizon=4, d_model=8, drop_rate=0.5).save_pretrained(tmp_path)
    plain = TSM2._load_as_safetensor
    monkeypatch.setattr(TSM2, '_load_as_safetensor', lambda *args: plain(*args).train())
    assert not TSM2.from_pretrained(tmp_path).training
