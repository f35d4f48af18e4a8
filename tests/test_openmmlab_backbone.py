"""ViM2 in MMDetection and MMSegmentation: the backbone, its optimizer, its weights, and every config."""
import copy
import json
import math
import re
import subprocess
import sys

import pytest
import timm
import torch
from conftest import tool_environment
from safetensors.torch import save_file
from timm.models import group_parameters
from torch import nn

pytest.importorskip('mmcv.ops', exc_type=ImportError,
                    reason='OpenMMLab is not installed: python -m vim2.install_openmmlab')

from mmdet.testing import demo_mm_inputs  # noqa: E402
from mmengine.analysis import get_model_complexity_info  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import MODELS, DefaultScope, Registry  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

from vim2.openmmlab import BFloat16OptimWrapper, ViM2, list_configs, load_config  # noqa: E402
from vim2.ops import cross_selective_scan  # noqa: E402

CONFIGS = list_configs()
DETECTION = [n for n in CONFIGS if 'coco' in n]
SEGMENTATION = [n for n in CONFIGS if n not in DETECTION]
BUNDLED = 'vim2_micro_patch4_64.tiny_imagenet'


def backbone(name='test_vim2', **kwargs):
    torch.manual_seed(0)
    return MODELS.build(dict(type='ViM2', model_name=name, **kwargs))


def images(height=64, width=64, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def backward(outs):
    sum((o * o.detach().roll(1, -1)).sum() for o in outs).backward()  # the sum of a normalised map has no gradient


# --- the backbone -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('height, width', [(127, 211), (64, 64), (32, 97)])
@pytest.mark.parametrize('first', [4, 2])
def test_maps(first, height, width):
    model = backbone(model_kwargs=dict(patch_size=first))
    with torch.no_grad():
        outs = model(images(height, width))
    assert isinstance(outs, tuple)
    strides = [first * 2 ** i for i in range(4)]
    assert [tuple(o.shape) for o in outs] == [
        (2, info['num_chs'], math.ceil(height / s), math.ceil(width / s))
        for info, s in zip(model.net.feature_info, strides)]
    assert all(o.is_contiguous() for o in outs)  # mmcv's RoIAlign reads memory as NCHW


def test_maps_are_the_normalised_stages_of_the_timm_model():
    model = backbone().eval()
    reference = timm.create_model('test_vim2', num_classes=0)
    reference.load_state_dict(model.net.state_dict())  # the same names, all of them
    for i, norm in enumerate(model.norms.values()):
        nn.init.constant_(norm.weight, 1.5 + i)
        nn.init.constant_(norm.bias, 0.25)
    with torch.no_grad():
        maps = reference.eval().forward_intermediates(images(), intermediates_only=True)
        for i, (out, x) in enumerate(zip(model(images()), maps)):
            mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
            torch.testing.assert_close(out, (x - mean) / (var + 1e-5).sqrt() * (1.5 + i) + 0.25, atol=2e-5, rtol=1e-4)


def test_out_indices():
    model = backbone(out_indices=(0, 2))
    outs = model(images())
    assert [o.shape[1] for o in outs] == [8, 24] and len(model.net.stages) == 3
    with torch.no_grad():
        every = backbone()(images())
    torch.testing.assert_close(outs[0], every[0]), torch.testing.assert_close(outs[1], every[2])
    backward(outs)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize('options, message', [
    (dict(out_indices=(0, 4)), r'out_indices=\(0, 4\): write .* from 0 to 3.*\(0, 1, 2, 3\)'),
    (dict(out_indices=(2, 0)), 'ascending order'),
    (dict(out_indices=()), 'one or more stages'),
    (dict(out_indices=(-1,)), 'from 0 to 3'),
    (dict(frozen_stages=5), 'frozen_stages=5: write -1 .* at most 4'),
    (dict(model_name='vim2_tinny'), "unknown model 'vim2_tinny': write model_name='vim2_tiny'"),
    (dict(model_name='resnet18'), "unknown model 'resnet18'"),
])
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ViM2(**{'model_name': 'test_vim2', **options})


@pytest.mark.parametrize('stages', [-1, 0, 2])
def test_frozen_stages(stages):
    model = backbone(frozen_stages=stages, drop_path_rate=0.5).train()
    frozen = ['net.stem.'] if stages >= 0 else []
    frozen += [f'{m}.{i}.' for i in range(stages) for m in ('net.stages', 'norms')]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    torch.manual_seed(1)
    for _ in range(3):  # stochastic depth drops a mixer now and then, and one dropped has a gradient of zero
        backward(model(images(batch=4)))
    for n, p in model.named_parameters():
        is_frozen = n.startswith((*frozen, 'net.norm.'))
        assert p.requires_grad != is_frozen and (p.grad is None) == is_frozen, n
    optimizer.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == n.startswith((*frozen, 'net.norm.')), n
    modes = {n: m.training for n, m in model.named_modules() if n.startswith('net.stages.') or n.startswith('net.stem')}
    assert all(training != f'{n}.'.startswith(tuple(frozen)) for n, training in modes.items())
    model.eval()
    assert not any(m.training for m in model.modules())


def test_norm_cfg_and_norm_eval():
    model = backbone(norm_cfg=dict(type='BN'), norm_eval=True).train()
    assert all(type(n) is nn.BatchNorm2d and not n.training for n in model.norms.values()) and model.net.training
    model(images())
    assert all(n.running_mean.abs().sum() == 0 for n in model.norms.values())
    model = backbone(norm_cfg=dict(type='BN')).train()
    model(images())
    assert all(n.training and n.running_mean.abs().sum() > 0 for n in model.norms.values())
    plain = backbone(norm_cfg=None)
    assert not [n for n, _ in plain.named_parameters() if n.startswith('norms.')]


def test_checkpointing_gives_the_same():
    models = [backbone(with_cp=cp).train() for cp in (False, True)]
    assert [m.net.stages[0].grad_checkpointing for m in models] == [False, True]
    outs = [m(images()) for m in models]
    for a, b in zip(*outs):
        torch.testing.assert_close(a, b)
    for o in outs:
        backward(o)
    for a, b in zip(*(m.parameters() for m in models)):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_drop_path_and_channels():
    model = backbone(drop_path_rate=0.3, in_channels=4)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == 'DropPath']
    assert rates and max(rates) == pytest.approx(0.3) and model.net.stem.conv.in_channels == 4


def test_bfloat16():
    model = backbone(BUNDLED.partition('.')[0], out_indices=(0, 1, 2))
    with torch.no_grad():
        full = model(images())
        with torch.autocast('cpu', torch.bfloat16):
            half = model(images())
    for a, b in zip(full, half):
        assert (a - b.float()).square().mean().sqrt() < 0.05 * a.square().mean().sqrt()


def test_every_framework_finds_it():
    """A registry of another scope, as mmpretrain's, falls back to the root."""
    models = Registry('model', scope='some_framework', parent=MODELS)
    assert type(models.build(dict(type='ViM2', model_name='test_vim2'))) is ViM2


# --- weights ----------------------------------------------------------------------------------------------------------

def pretrained(source, name='test_vim2', **kwargs):
    model = backbone(name, init_cfg=dict(type='Pretrained', checkpoint=str(source)), **kwargs)
    model.init_weights()
    return model


@pytest.fixture(scope='module')
def source():
    """A classifier with weights of its own."""
    torch.manual_seed(7)
    model = timm.create_model('test_vim2', num_classes=5)
    for p in model.parameters():
        nn.init.normal_(p)
    return model


def assert_has_weights(model, source):
    state = source.state_dict()
    for k, v in model.net.state_dict().items():
        assert torch.equal(v, state[k]), k


def test_bundled_weights():
    micro = BUNDLED.partition('.')[0]
    for source, levels in ((BUNDLED, (0, 1, 2)), (micro, (0, 1))):
        assert_has_weights(pretrained(source, micro, out_indices=levels), timm.create_model(BUNDLED, pretrained=True))


@pytest.mark.parametrize('kind', ['safetensors', 'train.py', 'local-dir', 'hf-hub'])
def test_weights_of_a_classifier(source, tmp_path, kind):
    from timm.models._hub import save_for_hf
    kwargs = {}
    if kind == 'safetensors':
        place = tmp_path / 'model.safetensors'
        save_file(source.state_dict(), place)
    elif kind == 'train.py':  # timm's CheckpointSaver; the averaged weights are the ones to take
        place = tmp_path / 'best.pth.tar'
        torch.save(dict(epoch=1, arch='test_vim2', state_dict=timm.create_model('test_vim2').state_dict(),
                        state_dict_ema=source.state_dict()), place)
    elif kind == 'local-dir':
        save_for_hf(source, str(tmp_path), safe_serialization=True)
        place = f'local-dir:{tmp_path}'
    else:  # the hub's cache, read without a network
        snapshot = tmp_path / 'models--someone--vim2' / 'snapshots' / ('a' * 40)
        snapshot.mkdir(parents=True)
        (tmp_path / 'models--someone--vim2' / 'refs').mkdir()
        (tmp_path / 'models--someone--vim2' / 'refs' / 'main').write_text('a' * 40)
        save_for_hf(source, str(snapshot), safe_serialization=True)
        place, kwargs = 'hf-hub:someone/vim2', dict(model_kwargs=dict(cache_dir=str(tmp_path)))
    assert_has_weights(pretrained(place, **kwargs), source)
    assert_has_weights(pretrained(place, out_indices=(1, 2), **kwargs), source)


def test_weights_of_another_variant(source, tmp_path):
    from timm.models._hub import save_for_hf
    file = tmp_path / 'model.safetensors'
    save_file(source.state_dict(), file)
    missing = r'.*missing: .*stages\.0\.blocks\.2'
    with pytest.raises(RuntimeError, match=f'(?s){file} is no checkpoint of vim2_tiny{missing}'):
        pretrained(file, 'vim2_tiny')
    save_for_hf(source, str(tmp_path), safe_serialization=True)
    for place in (f'local-dir:{tmp_path}', 'local-dir:' + str(tmp_path)):
        with pytest.raises(RuntimeError, match=f'(?s)holds no weights of vim2_tiny{missing}'):
            pretrained(place, 'vim2_tiny')
    with pytest.raises(RuntimeError, match=r'(?s)holds no weights of test_vim2.*unexpected: .*\n  of another shape: '):
        pretrained(BUNDLED)
    state = {k: v for k, v in source.state_dict().items() if k != 'stages.2.averages.1.weight'}
    save_file(state, tmp_path / 'short.safetensors')
    with pytest.raises(RuntimeError, match=r'missing: stages\.2\.averages\.1\.weight'):
        pretrained(tmp_path / 'short.safetensors')


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no weights file .*none.safetensors'):
        pretrained(tmp_path / 'none.safetensors')
    with pytest.raises(RuntimeError, match='No pretrained weights are published for test_vim2'):
        pretrained('test_vim2')
    model = backbone(init_cfg=dict(type='Pretrained', checkpoint='x.pth', map_location='cuda'))
    with pytest.raises(ValueError, match=r"write init_cfg=dict\(type='Pretrained', checkpoint=SOURCE\).*load_from"):
        model.init_weights()


def detector_of(source, tmp_path, out_indices=(0, 1, 2, 3)):
    """A checkpoint as mmengine's runner writes it, with its log of losses; and the backbone in it."""
    from mmengine.logging import HistoryBuffer
    detector = nn.Module()
    detector.backbone = backbone(out_indices=out_indices)
    detector.backbone.net.load_state_dict(source, strict=False)
    for norm in detector.backbone.norms.values():
        nn.init.normal_(norm.weight)
    detector.neck = nn.Conv2d(8, 4, 1)
    path = tmp_path / 'epoch_3.pth'
    torch.save(dict(meta=dict(epoch=3), state_dict=detector.state_dict(),
                    message_hub=dict(log_scalars={'train/loss': HistoryBuffer([1., 2.], [1, 1])})), path)
    return path, detector.backbone


def test_backbone_of_a_detector(source, tmp_path):
    """With the norms of the levels that both have; the others are as they were made."""
    path, trained = detector_of({k: v for k, v in source.state_dict().items() if 'head' not in k}, tmp_path,
                                out_indices=(1, 3))
    init = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    model = backbone(out_indices=(0, 1, 2, 3), init_cfg=init)
    model.init_weights()
    for k, v in trained.net.state_dict().items():
        assert torch.equal(v, model.net.state_dict()[k]), k
    for i, norm in model.norms.items():
        want = trained.norms[i].weight if i in trained.norms else torch.ones_like(norm.weight)
        assert torch.equal(norm.weight, want)
    fewer = backbone(out_indices=(0, 1), init_cfg=init)
    fewer.init_weights()
    assert torch.equal(fewer.net.stem.conv.weight, trained.net.stem.conv.weight)
    for prefix, message in (('encoder', "no weights under prefix='encoder.'; its keys begin with backbone, neck"),
                            ('neck.', 'keys do not match')):
        with pytest.raises(RuntimeError, match=message):
            backbone(init_cfg=dict(init, prefix=prefix)).init_weights()
    path, _ = detector_of({}, tmp_path, out_indices=(0, 1))
    with pytest.raises(RuntimeError, match=r'keys do not match.\s+missing: stages\.2'):
        backbone(init_cfg=init).init_weights()
    with pytest.raises(FileNotFoundError, match='there is no checkpoint none.pth'):
        backbone(init_cfg=dict(init, checkpoint='none.pth')).init_weights()


@pytest.mark.parametrize('kind', ['file', 'local-dir'])
def test_patches_of_another_size(source, tmp_path, kind, monkeypatch):
    """Resampled so that patches that are enlarged give the same tokens; said in a line."""
    from timm.models._hub import save_for_hf
    said = []
    monkeypatch.setattr(sys.modules[ViM2.__module__], 'print_log', lambda message, *_, **__: said.append(message))
    save_for_hf(source, str(tmp_path), safe_serialization=True)
    place = f'local-dir:{tmp_path}' if kind == 'local-dir' else tmp_path / 'model.safetensors'
    model = pretrained(place, model_kwargs=dict(patch_size=8))
    want = source.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in model.net.state_dict().items() if k != 'stem.conv.weight')
    patches = torch.randn(50, 3, 4, 4)
    large = nn.functional.interpolate(patches, size=(8, 8), mode='bicubic', antialias=True)
    torch.testing.assert_close(model.net.stem.conv(large), source.stem.conv(patches), rtol=1e-3, atol=1e-3)
    assert ['patches of (4, 4) pixels resampled to (8, 8)' in line for line in said] == [True]
    assert_has_weights(pretrained(place), source)


def test_channels_of_necks(tmp_path):
    """`in_channels='backbone'` is what the backbone gives, whatever it is."""
    assert backbone().out_channels == (8, 16, 24, 32) and backbone(out_indices=(1, 3)).out_channels == (16, 32)
    file = tmp_path / 'own.py'
    file.write_text('''
_base_ = ['mmseg::_base_/models/upernet_swin.py', 'mmseg::_base_/default_runtime.py']
custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, type='MambaBackbone', model_name='vim2_base'),
    decode_head=dict(in_channels='backbone'), auxiliary_head=dict(in_channels='backbone'))
''')
    cfg = load_config(file)
    assert cfg.model.decode_head.in_channels == [128, 256, 512, 1024] and cfg.model.auxiliary_head.in_channels == 512
    cfg = load_config(file, {'model.backbone.model_name': 'test_vim2', 'model.backbone.out_indices': (0, 1, 2),
                             'model.decode_head.in_index': [0, 2], 'model.auxiliary_head.in_index': 1})
    assert cfg.model.decode_head.in_channels == [8, 24] and cfg.model.auxiliary_head.in_channels == 16
    name = 'mask-rcnn_vim2-t_fpn_1x_coco'
    assert load_config(name, {'model.neck.in_channels': 'backbone'}).model.neck.in_channels == [96, 192, 384, 768]


def test_a_level_that_nothing_reads(tmp_path):
    """DistributedDataParallel waits for the gradients of all parameters: that of its norm is zero."""
    from torch import distributed
    model = backbone().train()
    reference = backbone().train()
    distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second step is what fails
            model.zero_grad()
            backward(parallel(images())[1:])
    finally:
        distributed.destroy_process_group()
    backward(reference(images())[1:])
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        if name.startswith('norms.0.'):
            assert p.grad is not None and not p.grad.any(), name
        elif p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_other_initialisers():
    model = backbone(init_cfg=dict(type='Constant', layer='LayerNorm', val=3.))
    model.init_weights()
    assert all((m.weight == 3).all() for m in model.net.modules() if type(m) is nn.LayerNorm)


# --- optimizer --------------------------------------------------------------------------------------------------------

class Detector(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = backbone(**kwargs)
        self.head = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))


def groups_of(model, **paramwise):
    wrapper = build_optim_wrapper(model, dict(
        constructor='ViM2OptimWrapperConstructor', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
        **(dict(paramwise_cfg=paramwise) if paramwise else {})))
    names = {p: n for n, p in model.named_parameters()}
    out = {names[p]: (g['lr'], g['weight_decay']) for g in wrapper.optimizer.param_groups for p in g['params']}
    assert sum(len(g['params']) for g in wrapper.optimizer.param_groups) == len(out)
    return out


def test_rates_of_layers():
    model = Detector(frozen_stages=0)
    got = groups_of(model, layer_decay=0.8, norm_decay_mult=0.)
    assert set(got) == {n for n, p in model.named_parameters() if p.requires_grad}
    # Mixers in the order in which they run, each with its average: 2, 1, 3 and 2 of them, and three down-samplings
    order = [[f'stages.{i}.{kind}' for kind in kinds] for i, kinds in (
        *((0, (f'blocks.{j}.', f'averages.{j}.')) for j in range(2)),
        (1, ('downsample.',)), (1, ('blocks.0.', 'averages.0.')),
        (2, ('downsample.',)), *((2, (f'blocks.{j}.', f'averages.{j}.')) for j in range(3)),
        (3, ('downsample.',)), *((3, (f'blocks.{j}.', f'averages.{j}.')) for j in range(2)))]
    net = model.backbone.net
    assert sum(len(s.blocks) for s in net.stages) == 8
    layers = group_parameters(net, net.group_matcher(), reverse=True)
    last = max(i for n, i in layers.items() if n.startswith('stages.'))
    for name, (rate, _) in got.items():
        if name.startswith('backbone.net.'):
            assert rate == pytest.approx(1e-3 * 0.8 ** (1 + last - layers[name[13:]])), name
        else:
            assert rate == 1e-3, name
    rates = [{got[f'backbone.net.{n}'][0] for n, _ in net.named_parameters() if n.startswith(tuple(prefixes))}
             for prefixes in order]
    assert all(len(r) == 1 for r in rates)  # one layer, one rate
    rates = [r.pop() for r in rates]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.8e-3)
    assert len({round(r, 12) for r in rates}) == last  # without the frozen stem


def test_what_is_not_decayed():
    got = groups_of(Detector())
    assert {rate for rate, _ in got.values()} == {1e-3}
    decayed = {n for n, (_, decay) in got.items() if decay}
    assert {decay for _, decay in got.values()} == {0., 0.05}
    for name in got:
        if name.startswith('backbone.'):
            free = re.search(r'A_logs|Ds$|dt_projs_bias|dt_projs_diag|averages|norms?\.|bias$|conv_bias', name)
            assert (name in decayed) == (not free), name
        else:
            assert (name in decayed) == name.startswith('head.0.'), name  # norms of necks and heads, as Swin's configs
    got = groups_of(Detector(), bias_decay_mult=0.)
    assert [n for n, (_, decay) in got.items() if n.startswith('head.') and decay] == ['head.0.weight']
    got = groups_of(Detector(), norm_decay_mult=1.)
    assert got['head.1.weight'][1] == 0.05 and got['backbone.norms.0.weight'][1] == 0.


def test_custom_keys_reach_into_the_backbone():
    """On top of the backbone's own rules; of several keys the longest counts."""
    keys = {'backbone': dict(lr_mult=0.1), 'backbone.net.stages.3': dict(lr_mult=0.5, decay_mult=2.), 'head': dict(
        lr_mult=3.)}
    plain, got = groups_of(Detector(), layer_decay=0.8), groups_of(Detector(), layer_decay=0.8, custom_keys=keys)
    for name, (rate, decay) in got.items():
        lr_mult, decay_mult = (0.5, 2.) if 'stages.3' in name else (0.1, 1.) if 'backbone' in name else (3., 1.)
        assert rate == pytest.approx(lr_mult * plain[name][0]), name
        assert name.startswith('head') or decay == pytest.approx(decay_mult * plain[name][1]), name
    assert {decay for name, (_, decay) in got.items() if 'stages.3' in name} == {0., 0.1}


def test_rates_of_dino():
    """mmdet's: the backbone learns at a tenth."""
    cfg = load_config('dino-4scale_vim2-t_8xb2-12e_coco', {'model.backbone.model_name': 'test_vim2'}).optim_wrapper
    got = groups_of(Detector(), **cfg.paramwise_cfg)
    assert cfg.optimizer.lr == 1e-4 and {rate for n, (rate, _) in got.items() if n.startswith('backbone.')} == {
        1e-3 * 0.1} and got['head.0.weight'][0] == 1e-3


def test_constructor_says_what_is_wrong():
    with pytest.raises(ValueError, match='layer_decay must be above 0'):
        groups_of(Detector(), layer_decay=0)
    for key, message in (('layer_decy', "unknown key 'layer_decy': did you mean 'layer_decay'"),
                         ('num_layers', "unknown key 'num_layers': write one of layer_decay, custom_keys")):
        with pytest.raises(ValueError, match=message):
            groups_of(Detector(), **{key: 1})
    with pytest.raises(ValueError, match="found no backbone of type 'MambaBackbone'"):
        groups_of(nn.Linear(2, 2))


# --- configs ----------------------------------------------------------------------------------------------------------

def test_list_of_configs(root):
    assert len(CONFIGS) == len(DETECTION) + len(SEGMENTATION) == 20
    expected = {f'mask-rcnn_vmamba-t-s1l8_fpn_{schedule}_coco' for schedule in ('1x', 'ms-crop-3x')}
    expected |= {'vmamba-t-s1l8_upernet_8xb2-160k_ade20k-512x512'}
    expected |= {f'mask-rcnn_vim2-{size}_fpn_{schedule}_coco' for size in 'tsb' for schedule in ('1x', 'ms-crop-3x')}
    expected |= {'cascade-mask-rcnn_vim2-t_fpn_1x_coco', 'retinanet_vim2-t_fpn_1x_coco', 'vim2-micro_upernet_camvid',
                 'mask-rcnn_vim2-micro_fpn_coco-tiny'}
    expected |= {f'vim2-{size}_upernet_8xb2-160k_ade20k-512x512' for size in 'tsb'}
    expected |= {'dino-4scale_vim2-t_8xb2-12e_coco', 'vim2-t_segformer_8xb2-160k_ade20k-512x512',
                 'vim2-b_upernet_8xb2-160k_ade20k-640x640', 'vim2-t_upernet_8xb2-80k_cityscapes-512x1024'}
    assert set(CONFIGS) == expected


@pytest.mark.parametrize('name', [n for n in CONFIGS if 'micro' not in n])
def test_settings_of_the_paper(name):
    cfg = load_config(name)
    assert cfg.model.backbone.model_name == {
        'vim2-t': 'vim2_tiny', 'vim2-s': 'vim2_small', 'vim2-b': 'vim2_base', 'vmamba-t-s1l8': 'vmamba_tiny_s1l8'}[
        re.search(r'(vim2-.|vmamba-t-s1l8)_', name)[1]]
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.train_dataloader.batch_size * 8 == 16
    assert cfg.optim_wrapper.constructor in ('ViM2OptimWrapperConstructor', 'MambaOptimWrapperConstructor')
    if 'vmamba' in name:
        assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='vmamba_tiny_s1l8.in1k')
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.type == 'AdamW' and 'momentum' not in optimizer
    assert optimizer.lr == (1e-4 if name in DETECTION else 6e-5)
    if name in DETECTION:
        epochs = 36 if '3x' in name else 12
        assert cfg.train_cfg.max_epochs == epochs and cfg.param_scheduler[-1].end == epochs
        multi_scale = '3x' in name or name.startswith('dino')
        assert ('RandomChoice' in [t.type for t in cfg.train_dataloader.dataset.pipeline]) == multi_scale
    else:
        assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == (80000 if 'cityscapes' in name else 160000)
        sizes = {'512x512': (512, 512), '640x640': (640, 640), '512x1024': (512, 1024)}
        assert cfg.model.data_preprocessor.size == cfg.crop_size == sizes[name.rpartition('-')[2]]
        scales, flips = cfg.tta_pipeline[-1].transforms[:2]
        assert [t.scale_factor for t in scales] == [0.5, 0.75, 1., 1.25, 1.5, 1.75]
        assert [t.prob for t in flips] == [0, 1]


def samples(scope, mask, size=64):
    torch.manual_seed(0)
    if scope == 'mmdet':
        return demo_mm_inputs(2, [[3, size, size], [3, size - 13, size + 11]], num_classes=80, with_mask=mask)
    inputs, data_samples = [], []
    for _ in range(2):
        inputs.append(torch.randint(0, 255, (3, size, size), dtype=torch.uint8))
        sample = SegDataSample(metainfo=dict(img_shape=(size, size), ori_shape=(size, size), pad_shape=(size, size)))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 11, (1, size, size)))
        data_samples.append(sample)
    return dict(inputs=inputs, data_samples=data_samples)


def exercise(cfg, scope):
    """Build a model, train it for a step and predict. Returns its numbers of parameters by part."""
    torch.manual_seed(0)
    if 'roi_head' in cfg:  # fewer regions: a thousand of them take most of the time, and say nothing more
        for rpn in (cfg.train_cfg.rpn_proposal, cfg.test_cfg.rpn):
            rpn.max_per_img = 60
        rcnn = cfg.train_cfg.rcnn
        for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
            stage.sampler.num = 32
        cfg.test_cfg.rcnn.max_per_img = 10
    with DefaultScope.overwrite_default_scope(scope):
        model = revert_sync_batchnorm(MODELS.build(cfg)).train()
        if cfg.type == 'DINO':
            model.init_weights()  # until then its level embeddings are whatever the memory held
        # DINO chooses 900 places, and a small image has fewer
        data = samples(scope, mask='mask' in str(cfg.get('roi_head', '')), size=256 if cfg.type == 'DINO' else 64)
        inputs = model.data_preprocessor(copy.deepcopy(data), True)
        loss, _ = model.parse_losses(model(**inputs, mode='loss'))
        assert loss.isfinite()
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, missing
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        trained = any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.net.stem.parameters())
        assert trained == (cfg.backbone.get('frozen_stages', -1) < 0)
        model.eval()
        with torch.no_grad():
            results = model.test_step(data)
        for result, image in zip(results, data['inputs']):
            height, width = image.shape[1:]
            if scope == 'mmdet':
                found = result.pred_instances
                assert len(found.bboxes) == len(found.scores) == len(found.labels) and found.bboxes.isfinite().all()
                if 'masks' in found:
                    assert tuple(found.masks.shape) == (len(found.bboxes), height, width)
            else:
                assert result.pred_sem_seg.data.shape == (1, height, width)
                assert result.seg_logits.data.shape[0] == cfg.decode_head.num_classes
    return {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}


EXERCISED = {}


def parameters(name):
    """Of a config's model, after it was exercised; once for configs that differ in the schedule only."""
    cfg = load_config(name)
    if cfg.model.data_preprocessor.get('size'):
        cfg.model.data_preprocessor.size = (64, 64)
    key = repr(cfg.model.to_dict())
    if key not in EXERCISED:
        EXERCISED[key] = exercise(cfg.model, cfg.default_scope)
    return EXERCISED[key]


@pytest.mark.parametrize('name', CONFIGS)
def test_config_trains_and_predicts(name):
    parts = parameters(name)
    assert parts['backbone'] > 1e6
    total = sum(parts.values())
    if name.startswith('mask-rcnn_vim2-s'):
        assert abs(total / 62e6 - 1) < 0.03  # the paper's
    if name.startswith('vim2-s_upernet'):
        assert abs((total - parts['auxiliary_head']) / 75e6 - 1) < 0.03
    if name.startswith('mask-rcnn_vim2-t'):  # as far from the paper's 39 M as the backbone is from its 20 M
        assert abs(total - 39e6 - (24.04e6 - 20e6)) < 1e6


@pytest.mark.parametrize('folder', ['detection', 'segmentation'])
def test_parameters_in_the_readme(root, folder):
    text = (root / folder / 'README.md').read_text(encoding='utf-8')
    rows = dict(re.findall(r'^\| `([\w-]+)` \| ([\d.]+) M', text, re.M))
    assert set(rows) == set(DETECTION if folder == 'detection' else SEGMENTATION)
    for name, millions in rows.items():
        assert abs(sum(parameters(name).values()) / 1e6 - float(millions)) <= 0.006, name


def test_loading_by_name(tmp_path):
    name = 'retinanet_vim2-t_fpn_1x_coco'
    assert load_config(name).model.to_dict() == load_config(name + '.py').model.to_dict()
    assert load_config(load_config(name).filename).model.backbone.type == 'ViM2'
    changed = load_config(name, {'model.backbone.with_cp': True, 'train_cfg.max_epochs': 3})
    assert changed.model.backbone.with_cp is True and changed.train_cfg.max_epochs == 3
    with pytest.raises(FileNotFoundError, match="no config 'retinanet_vim2-t': did you mean .*retinanet_vim2-t_fpn"):
        load_config('retinanet_vim2-t')
    with pytest.raises(FileNotFoundError, match='give the path of a file or one of cascade-mask'):
        load_config('zzz')


@pytest.mark.parametrize('name', [  # one of each data set and way of naming its files
    'mask-rcnn_vim2-t_fpn_ms-crop-3x_coco', 'mask-rcnn_vim2-micro_fpn_coco-tiny', 'vim2-micro_upernet_camvid',
    'vim2-t_segformer_8xb2-160k_ade20k-512x512', 'vim2-t_upernet_8xb2-80k_cityscapes-512x1024'])
def test_data_root(name, tmp_path, monkeypatch):
    """Wherever the config's own stands: loaders, evaluators; by the argument and by the option."""
    monkeypatch.delenv('COCO_TINY_ROOT', raising=False)
    monkeypatch.delenv('CAMVID_ROOT', raising=False)
    before, cfg = load_config(name), load_config(name, data_root=tmp_path)
    text, old = before.pretty_text, before.data_root.rstrip('/')
    assert text.count(old) >= 4 and old not in cfg.pretty_text
    assert cfg.pretty_text.count(str(tmp_path)) == text.count(old)
    assert cfg.train_dataloader.dataset.get('data_root', str(tmp_path)).rstrip('/') == str(tmp_path)
    assert cfg.pretty_text == load_config(name, {'data_root': str(tmp_path)}).pretty_text


def test_data_root_of_a_config_of_ones_own(tmp_path):
    start = "train_dataloader = dict(dataset=dict(type='A', data_root='one/'))\n"
    files = {n: tmp_path / f'{n}.py' for n in ('one', 'two', 'none')}
    files['one'].write_text(start + "val_evaluator = dict(ann_file='one/b.json', other='onefold/c')\n")
    files['two'].write_text(start + "val_dataloader = dict(dataset=dict(dataset=dict(type='A', data_root='two')))\n")
    files['none'].write_text("model = dict(a='data/x')\n")
    cfg = load_config(files['one'], data_root='/x')
    assert cfg.train_dataloader.dataset.data_root == '/x/'
    assert cfg.val_evaluator == dict(ann_file='/x/b.json', other='onefold/c')
    for file, message in (('two', 'several data roots, one/, two: change each path'), ('none', 'has no data root')):
        with pytest.raises(ValueError, match=message.replace('no data root', 'no data_root')):
            load_config(files[file], data_root='/x')


def test_a_list_of_vis_backends_counts(tmp_path):
    """Though the configs of mmdet and mmseg have copied the default into the visualizer by then."""
    name, both = 'retinanet_vim2-t_fpn_1x_coco', [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    assert load_config(name, {'vis_backends': both}).visualizer.vis_backends == both
    file = tmp_path / 'own.py'
    file.write_text(f'_base_ = {load_config(name).filename!r}\nvis_backends = {both!r}\n')
    assert load_config(file).visualizer.vis_backends == both


def test_config_without_the_import(tmp_path):
    file = tmp_path / 'own.py'
    file.write_text("model = dict(type='RetinaNet', backbone=dict(type='ViM2', model_name='vim2_tiny'))\n")
    with pytest.raises(ValueError, match=r"own.py uses ViM2 without importing it: write custom_imports = dict\("
                                         r"imports=\['vim2.openmmlab'\]"):
        load_config(file)
    file.write_text("custom_imports = dict(imports=['vim2.openmmlab'])\n" + file.read_text())
    assert load_config(file).model.backbone.model_name == 'vim2_tiny'


def test_configs_are_in_the_wheel(root, tmp_path):
    """Every config loads by name, with its bases, from an unpacked wheel in a process that sees no clone."""
    import shutil
    source = tmp_path / 'source'
    shutil.copytree(root, source, ignore=shutil.ignore_patterns('.*', 'build', '*.egg-info', 'output', '__pycache__'))
    done = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--disable-pip-version-check', '--no-deps',
                           '--no-build-isolation', '-w', str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    wheel, = tmp_path.glob('vim2-*.whl')
    shutil.unpack_archive(wheel, tmp_path / 'unpacked', 'zip')
    code = ('import vim2\nfrom vim2.openmmlab import list_configs, load_config\nprint(vim2.__file__)\n'
            'for name in list_configs():\n    cfg = load_config(name)\n'
            "    print(name, cfg.model.backbone.model_name, cfg.filename)")
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=tmp_path,
                          env=tool_environment(PYTHONPATH=str(tmp_path / 'unpacked')))
    assert done.returncode == 0, done.stderr
    first, *rows = [line for line in done.stdout.splitlines() if 'mmengine' not in line]
    assert first.startswith(str(tmp_path / 'unpacked'))
    assert [row.split()[0] for row in rows] == CONFIGS
    assert all(row.split()[2].startswith(str(tmp_path / 'unpacked' / 'vim2' / 'configs')) for row in rows)


def test_without_mmengine(tmp_path):
    """`import vim2` works, and vim2.openmmlab says what is missing."""
    code = ('import sys\nclass Absent:\n    def find_spec(self, name, path=None, target=None):\n'
            '        if name.partition(".")[0] in ("mmengine", "mmcv", "mmdet", "mmseg"):\n'
            '            raise ModuleNotFoundError(f"No module named {name!r}", name=name)\n'
            'sys.meta_path.insert(0, Absent())\n'
            'import timm, vim2\nassert timm.is_model("vim2_tiny")\n'
            'try:\n    import vim2.openmmlab\nexcept ModuleNotFoundError as e:\n    print(e)\n')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=tool_environment())
    assert done.returncode == 0, done.stderr
    assert "vim2.openmmlab needs mmengine: `pip install 'vim2[openmmlab]'`" in done.stdout


# --- precision, complexity --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['mask-rcnn_vim2-micro_fpn_coco-tiny', 'vim2-micro_upernet_camvid'])
def test_training_in_bfloat16(name):
    cfg = load_config(name, {'model.backbone.init_cfg': None, 'model.backbone.frozen_stages': -1})
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.manual_seed(0)
        model = MODELS.build(cfg.model).train()
        wrapper = build_optim_wrapper(model, dict(type='BFloat16OptimWrapper', optimizer=dict(type='SGD', lr=1e-3)))
        assert type(wrapper) is BFloat16OptimWrapper
        seen = []
        model.backbone.net.stages[0].blocks[0].mixer.out_proj.register_forward_hook(
            lambda m, args, out: seen.append(out.dtype))
        stem = next(model.backbone.net.stem.parameters())
        before = stem.detach().clone()
        losses = model.train_step(samples(cfg.default_scope, mask=True), wrapper)
        assert seen == [torch.bfloat16] and losses['loss'].isfinite()
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
        assert not torch.equal(stem, before)


class Scan(nn.Module):
    def forward(self, x):
        batch, channels, height, width = x.shape
        delta = x[:, None].expand(batch, 4, channels, height, width).abs()
        B = x[:, None, :3].expand(batch, 4, 3, height, width)
        A = -torch.ones(4, channels, 3)
        return cross_selective_scan(x, delta, A, B, B, torch.ones(4, channels))


def test_the_scan_is_in_the_flops():
    info = get_model_complexity_info(Scan(), inputs=(torch.randn(1, 8, 6, 5),), show_table=False, show_arch=False)
    assert info['flops'] == 4 * 8 * 6 * 5 * (9 * 3 + 1)


@pytest.mark.parametrize('name', ['mask-rcnn_vim2-micro_fpn_coco-tiny', 'vim2-micro_upernet_camvid'])
def test_complexity(tool, name):
    result = tool('test_openmmlab', name, '--complexity', 64, 96, '--json')
    assert result.code == 0, result.err
    assert 'operator vim2::scan' not in result.out + result.err  # which is in the count
    info = json.loads(result.out.splitlines()[-1])
    assert info['params'] == sum(parameters(name).values()) == sum(info['params_of'].values())
    smaller = json.loads(tool('test_openmmlab', name, '--complexity', 64, 64, '--json').out.splitlines()[-1])
    assert smaller['flops'] < info['flops'] < 2.5 * smaller['flops']

