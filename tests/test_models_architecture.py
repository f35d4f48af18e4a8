"""What ViM2 is made of: the order of mixers, widths, stems, averages, initialisation."""
import math

import pytest
import timm
import torch
from safetensors.torch import load_file
from test_models import cached, images
from timm.layers import Mlp
from timm.models import group_parameters
from torch import nn

from vim2.layers import SelectiveChannelMixer, SelectiveTokenMixer
from vim2.models import VisionMambaMixer
from vim2.models.vim2 import mixer_order
from vim2.models.vmamba import convert_vmamba


@pytest.mark.parametrize('depths,order', [
    ((2, 1), 'ttc'), ((6, 3), 'ttcttcttc'), ((3, 0), 'ttt'), ((0, 2), 'cc'), ((1, 2), 'tcc'), ((5, 2), 'tttcttc'),
    ((0, 0), '')])
def test_mixer_order(depths, order):
    assert ''.join(kind[0] for kind in mixer_order(*depths)) == order


@pytest.mark.parametrize('name,token,channel', [
    ('vim2_tiny', (2, 2, 6, 2), (1, 1, 3, 1)), ('vim2_small', (2, 2, 18, 2), (1, 1, 9, 1)),
    ('vim2_base', (2, 2, 18, 2), (1, 1, 9, 1)), ('vim2_mlp_tiny', (2, 2, 6, 2), (1, 1, 3, 1))])
def test_table_8(name, token, channel):
    model = timm.create_model(name, device='meta')
    dims = (128, 256, 512, 1024) if name == 'vim2_base' else (96, 192, 384, 768)
    for i, stage in enumerate(model.stages):
        mixers = [block.mixer for block in stage.blocks]
        tokens = [m for m in mixers if isinstance(m, SelectiveTokenMixer)]
        channels = [m for m in mixers if isinstance(m, (SelectiveChannelMixer, Mlp))]
        assert (len(tokens), len(channels)) == (token[i], channel[i]) and len(mixers) == token[i] + channel[i]
        assert not any(isinstance(m, SelectiveTokenMixer) for m in mixers[2::3])
        assert {m.inner_dim for m in tokens} == {2 * dims[i]}
        assert len(stage.averages) == (0 if 'mlp' in name else len(mixers))
        if 'mlp' in name:
            assert {m.fc1.out_features for m in channels} == {4 * dims[i]}
        else:
            assert {m.inner_dim for m in channels} == {dims[i] * (1 if i == 3 else 2)}


def test_stage_reads_a_weighted_average_of_everything_earlier():
    torch.manual_seed(0)
    stage = timm.create_model('test_vim2').stages[2]
    with torch.no_grad():
        for average in stage.averages:
            average.weight.normal_()
        x = torch.randn(2, 16, 6, 6)
        ys = [stage.downsample(x.permute(0, 2, 3, 1))]
        for average, block in zip(stage.averages, stage.blocks):
            y = sum(w * y for w, y in zip(average.weight, ys))
            ys.append(y + block.mixer(block.norm(y)))
        torch.testing.assert_close(stage(x), ys[-1].permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    assert [len(average.weight) for average in stage.averages] == [1, 2, 3]


def test_weighted_average_starts_as_the_plain_chain():
    averaged = cached('test_vim2')
    plain = timm.create_model('test_vim2', weighted_average=False).eval()
    assert not [n for n, _ in plain.named_parameters() if 'averages' in n]
    plain.load_state_dict({n: v for n, v in averaged.state_dict().items() if 'averages' not in n})
    with torch.no_grad():
        torch.testing.assert_close(plain(images(plain)), averaged(images(plain)))


def test_without_averages_and_channel_mixers_it_is_vmamba(shared_data):
    """Logits of VMamba's own code (vanilla blocks, its random weights), by renaming its parameters."""
    tensors = load_file(shared_data('peers') / 'vmamba_vanilla_small.safetensors')
    model = VisionMambaMixer(
        num_classes=10, dims=(16, 32, 64, 128), token_depths=(1, 1, 2, 1), channel_depths=0,
        weighted_average=False).eval()
    weights = {n.removeprefix('state_dict.'): v for n, v in tensors.items() if n.startswith('state_dict.')}
    conversion = convert_vmamba(weights, model)
    assert not conversion.initialized and not conversion.unused
    model.load_state_dict(conversion.state_dict)
    with torch.no_grad():
        torch.testing.assert_close(model(tensors['input']), tensors['logits'], rtol=0, atol=1e-4)


def test_convolutional_blocks_are_mambavisions():
    """`x + bn(conv(gelu(bn(conv(x)))))` before a stage's mixers (arXiv 2407.08083, equation 1), in every way of use."""
    torch.manual_seed(0)
    model = timm.create_model('test_vim2', conv_depths=(2, 0, 1, 0), num_classes=3).train()
    assert [len(stage.convs) for stage in model.stages] == [2, 0, 1, 0]
    assert not any('convs' in n for n in cached('test_vim2').state_dict())
    block, x = model.stages[0].convs[1], torch.randn(2, 5, 7, 8)

    def conv_norm(y, conv):
        y = nn.functional.conv2d(y, conv.weight, padding=1)
        return (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()

    y = conv_norm(nn.functional.gelu(conv_norm(x.permute(0, 3, 1, 2), block.conv1)), block.conv2)
    torch.testing.assert_close(block(x), x + y.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)

    x = torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if '.convs.' in n)
    assert {n for n in model.no_weight_decay() if '.convs.' in n} == {
        n for n, _ in model.named_parameters() if '.convs.' in n and '.norm' in n}
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups['stages.0.convs.0.conv1.weight'] <= groups['stages.0.blocks.0.norm.weight']
    model.eval()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        program = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
        other = timm.create_model('test_vim2', conv_depths=(2, 0, 1, 0), num_classes=3).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize('patch_size', [2, 4])
def test_pooling_stem_and_downsampling(patch_size):
    """`gelu(bn(max_pool(conv(x))))` for every halving, borders of odd sizes included, in every way of use."""
    torch.manual_seed(0)
    model = timm.create_model('test_vim2', stem='pool', downsample='pool', patch_size=patch_size, num_classes=3).train()
    x = torch.randn(2, 3, 37, 64)

    def norm(y):
        return (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()

    def halve(y, layer):
        y = nn.functional.conv2d(y, layer.conv.weight, padding=1)
        y = nn.functional.pad(y, (0, y.shape[3] % 2, 0, y.shape[2] % 2), value=-math.inf)
        return nn.functional.gelu(norm(y.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))))

    y = nn.functional.gelu(norm(nn.functional.conv2d(x, model.stem.conv1.weight, padding=1)))
    assert len(model.stem.pools) == {2: 1, 4: 2}[patch_size]
    for layer in model.stem.pools:
        y = halve(y, layer)
    torch.testing.assert_close(model.stem(x), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.stages[1].downsample(y.permute(0, 2, 3, 1)), halve(y, model.stages[1].downsample).permute(0, 2, 3, 1),
        rtol=1e-4, atol=1e-4)
    features = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(f.shape[2:]) for f in features] == [
        (-(-37 // r), 64 // r) for r in (patch_size << i for i in range(4))]

    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters()
               if 'stem' in n or 'downsample' in n)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        torch.testing.assert_close(
            torch.export.export(model, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
    adapted = timm.create_model('test_vim2', stem='pool', downsample='pool', patch_size=patch_size, in_chans=1)
    assert adapted.stem.conv1.in_channels == 1


@pytest.mark.parametrize('kwargs,match', [
    (dict(stem='pool', patch_size=1), 'patch size of 2 or 4, not 1'),
    (dict(stem='pools'), "stem must be 'patch', 'conv' or 'pool', got 'pools'"), (dict(downsample='max'), 'downsample'),
    (dict(conv_depths=(1, 2)), 'conv_depths'),
    (dict(channel_mixer='conv'), 'channel_mixer'), (dict(token_depths=(1, 2)), 'token_depths'),
    (dict(channel_expand=(1, 2, 1)), 'channel_expand'), (dict(token_scans=5), 'num_scans')])
def test_constructor_rejects(kwargs, match):
    with pytest.raises(ValueError, match=match):
        timm.create_model('test_vim2', device='meta', **kwargs)


def test_initialisation():
    """Linears get .02; the state spaces keep Mamba's initialisation."""
    torch.manual_seed(0)
    model = timm.create_model('vim2_tiny')
    mixer = model.stages[3].blocks[0].mixer
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(mixer.s6.Ds, torch.ones_like(mixer.s6.Ds))
    dt = nn.functional.softplus(mixer.s6.dt_projs_bias)
    assert 0.999e-3 <= dt.min() and dt.max() <= 0.1001
    assert mixer.s6.dt_projs_weight.abs().max().item() == pytest.approx(48 ** -0.5, rel=0.01)
