"""VMamba and Vim as OpenMMLab backbones: needs mmengine only. Whole detectors: test_openmmlab_backbone.py."""
import pytest
import timm
import torch
from test_vim import published_names as vim_names
from test_vmamba import published_names as vmamba_names
from torch import nn

pytest.importorskip('mmengine', reason='mmengine is not installed: pip install mmengine')

from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402
from mmengine.runner.checkpoint import load_checkpoint  # noqa: E402

from vim2.openmmlab import MambaBackbone, ViM2  # noqa: E402

DIMS = (8, 16, 24, 32)


def backbone(name='test_vmamba', **kwargs):
    torch.manual_seed(0)
    return MODELS.build(dict(type='MambaBackbone', model_name=name, **kwargs))


def test_names():
    assert MODELS.get('ViM2') is MODELS.get('MambaBackbone') is MambaBackbone is ViM2
    with pytest.raises(ValueError, match="unknown model 'vmamba_tiny': write model_name='vmamba_tiny_"):
        backbone('vmamba_tiny')
    for family in ('vim2', 'vmamba', 'vim'):
        name = timm.list_models(module=family)[0]
        assert MODELS.build(dict(type='ViM2', model_name=name, out_indices=(0, 1), model_kwargs=dict(device='meta')))


@pytest.mark.parametrize('name', ['test_vmamba', 'test_vmamba_v0'])
def test_maps(name):
    model = backbone(name).eval()
    x = torch.randn(2, 3, 127, 211)
    with torch.no_grad():
        outs, stages = model(x), model.net.forward_intermediates(x, intermediates_only=True)
    assert [o.shape for o in outs] == [s.shape for s in stages] and all(o.is_contiguous() for o in outs)
    for out, stage, dim in zip(outs, stages, DIMS):
        torch.testing.assert_close(out, nn.functional.layer_norm(stage.permute(0, 2, 3, 1), (dim,)).permute(0, 3, 1, 2))


def test_maps_of_vim():
    model = backbone('test_vim', out_indices=(0, 2)).eval()
    with torch.no_grad():
        assert [tuple(o.shape) for o in model(torch.randn(1, 3, 64, 96))] == [(1, 16, 4, 6)] * 2
        pruned = backbone('test_vim', out_indices=(1,))
        assert len(pruned.net.blocks) == 2 and pruned(torch.randn(1, 3, 64, 96))[0].shape == (1, 16, 4, 6)
    with pytest.raises(ValueError, match='one or more stages of test_vim'):
        backbone('test_vim', out_indices=(3,))


@pytest.mark.parametrize('name,stem', [('test_vmamba', ('net.stem.',)), (
    'test_vim', ('net.patch_embed.', 'net.cls_token', 'net.pos_embed'))])
def test_frozen_stages_and_gradients(name, stem):
    indices = (0, 1, 2)
    for frozen in (-1, 0, 1):
        model = backbone(name, frozen_stages=frozen, out_indices=indices, with_cp=True).train()
        outs = model(torch.randn(1, 3, 64, 64))
        sum((o * o.detach().roll(1, -1)).sum() for o in outs).backward()
        part = 'net.blocks.0.' if name == 'test_vim' else 'net.stages.0.'
        for n, p in model.named_parameters():
            free = not (frozen >= 0 and n.startswith(stem) or frozen > 0 and n.startswith((part, 'norms.0.')))
            free = free and not n.startswith('net.norm.')
            assert p.requires_grad == free and (p.grad is not None) == free, n


@pytest.mark.parametrize('name', ['test_vmamba', 'test_vmamba_v0'])
@pytest.mark.parametrize('strict', [False, True])
def test_detector_of_vmambas_own_code(name, strict, tmp_path, capfd):
    """Its keys: the backbone's names, `outnorm0` …; loaded as mmengine loads any checkpoint."""
    torch.manual_seed(3)
    source = timm.create_model(name)
    state = {f'backbone.{k}': v for k, v in vmamba_names(source.state_dict()).items()
             if not k.startswith('classifier.')}
    for i, dim in enumerate(DIMS):
        state.update({f'backbone.outnorm{i}.weight': torch.randn(dim), f'backbone.outnorm{i}.bias': torch.randn(dim)})
    state.update({'neck.weight': torch.randn(4, 8, 1, 1), 'neck.bias': torch.randn(4)})
    torch.save(dict(meta=dict(epoch=12), state_dict=state), tmp_path / 'epoch_12.pth')
    detector = nn.Module()
    detector.backbone = backbone(name)
    detector.neck = nn.Conv2d(8, 4, 1)
    load_checkpoint(detector, str(tmp_path / 'epoch_12.pth'), strict=strict)
    said = capfd.readouterr()
    assert 'unexpected' not in said.out + said.err and 'missing' not in said.out + said.err
    own = source.state_dict()
    for k, v in detector.backbone.net.state_dict().items():
        assert torch.equal(v, own[k]) or k.startswith('norm.'), k
    for i in range(4):
        assert torch.equal(detector.backbone.norms[str(i)].weight, state[f'backbone.outnorm{i}.weight'])
    assert torch.equal(detector.neck.bias, state['neck.bias'])
    # and one of this package's own
    again = backbone(name)
    again.load_state_dict(detector.backbone.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), detector.backbone.state_dict().values()))


def test_detector_with_missing_keys(tmp_path):
    state = vmamba_names(timm.create_model('test_vmamba').state_dict())
    state = {k: v for k, v in state.items() if not k.startswith('classifier.') and 'layers.2.blocks.1.op.Ds' != k}
    with pytest.raises(RuntimeError, match='net.stages.2.blocks.1.mixer.s6.Ds.*norms.0.weight'):
        backbone().load_state_dict(state, strict=True)


@pytest.mark.parametrize('name', ['test_vmamba', 'test_vim'])
@pytest.mark.parametrize('indices', [(0, 1, 2), (0, 1)])
def test_weights_of_a_classifier(name, indices, tmp_path):
    """As the projects publish them, through `init_cfg`."""
    torch.manual_seed(4)
    source = timm.create_model(name)
    names = vim_names if name == 'test_vim' else vmamba_names
    torch.save({'model': names(source.state_dict())}, tmp_path / 'weights.pth')
    model = backbone(name, out_indices=indices, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'weights.pth')))
    model.init_weights()
    own = source.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in model.net.state_dict().items())


@pytest.mark.parametrize('name', ['test_vmamba', 'test_vim'])
@pytest.mark.parametrize('constructor', ['MambaOptimWrapperConstructor', 'ViM2OptimWrapperConstructor'])
def test_rates_of_layers(name, constructor):
    model = nn.Module()
    model.backbone = backbone(name, out_indices=(0, 1, 2))
    wrapper = build_optim_wrapper(model, dict(
        constructor=constructor, optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
        paramwise_cfg=dict(layer_decay=0.5)))
    names = {p: n for n, p in model.named_parameters()}
    rates = {names[p]: (g['lr'], g['weight_decay']) for g in wrapper.optimizer.param_groups for p in g['params']}
    assert set(rates) == {n for n, p in model.named_parameters() if p.requires_grad}
    blocks = 'blocks.{}' if name == 'test_vim' else 'stages.{}.blocks.0'
    order = [rates[f'backbone.net.{blocks.format(i)}.mixer.out_proj.weight'][0] for i in range(3)]
    assert order == sorted(order) and order[2] == pytest.approx(0.5e-3 if name == 'test_vim' else 0.25e-3)
    assert len(set(order)) == 3 and rates['backbone.norms.0.weight'] == (1e-3, 0.)
    exempt = {f'backbone.net.{n}' for n in model.backbone.net.no_weight_decay()}
    assert all((decay == 0.) == (n in exempt or '.norms.' in n) for n, (_, decay) in rates.items())
