"""Every registered model, after timm's own tests/test_models.py, and what is particular to ViM2."""
import functools
import re
import subprocess
import sys

import pytest
import timm
import torch
from timm.layers import DropPath, set_scriptable
from timm.models import create_feature_extractor, group_parameters
from timm.models.swin_transformer import PatchMerging as SwinPatchMerging
from timm.optim import create_optimizer_v2
from torch import nn

import vim2
from vim2.models import VisionMambaMixer
from vim2.models.vim2 import PatchMerging

if hasattr(torch._C, '_jit_set_profiling_executor'):
    # The legacy executor is too slow to compile large models for unit tests, and fusion would not show anything here.
    torch._C._jit_set_profiling_executor(True)
    torch._C._jit_set_profiling_mode(False)

MODELS = timm.list_models('*vim2*')
IMAGENET_MODELS = ['vim2_base', 'vim2_mlp_tiny', 'vim2_small', 'vim2_tiny']
NANO = 'vim2_nano_patch2_32'
MICRO = 'vim2_micro_patch4_64'
SIZE = 64  # of inputs where the size is not the point

every_model = pytest.mark.parametrize('name', MODELS)


@functools.lru_cache(maxsize=None)
def cached(name):
    """A model in evaluation mode, for tests that do not change it."""
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def images(model, batch=1, size=None):
    channels, height, width = model.pretrained_cfg['input_size']
    height, width = size or (height, width)
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


def num_stages(name):
    return len(cached(name).stages)


def num_params(name):
    return sum(p.numel() for p in cached(name).parameters())


def test_registered():
    assert MODELS == sorted(['test_vim2', *IMAGENET_MODELS, MICRO, NANO])
    assert timm.list_models(module='vim2') == MODELS
    assert timm.list_models('*vim2*', pretrained=True) == [f'{MICRO}.tiny_imagenet', f'{NANO}.cifar10']
    assert re.fullmatch(r'\d+\.\d+\.\d+\S*', vim2.__version__)


def test_import_is_light(root):
    """What `import vim2` adds to torch and timm: no compiler and no framework."""
    code = ('import sys, torch, timm; before = set(sys.modules); import vim2; '
            'print(*sorted({m.split(".")[0] for m in set(sys.modules) - before}))')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                         cwd=root).stdout.split()
    assert 'vim2' in out
    assert not [m for m in out if m.startswith(('triton', 'mm', 'onnx', 'tools', 'PIL'))]


@pytest.mark.parametrize('name,low,high', [
    ('vim2_tiny', 23.5e6, 24.5e6), ('vim2_small', 43e6 * 0.97, 43e6 * 1.03), ('vim2_base', 74e6 * 0.97, 74e6 * 1.03),
    ('vim2_mlp_tiny', 27.5e6, 28.5e6), (NANO, 1e6, 2e6), (MICRO, 4e6, 5e6), ('test_vim2', 0, 0.2e6)])
def test_num_params(name, low, high):
    assert low <= num_params(name) <= high


# --- forward, backward, sizes ---------------------------------------------------------------------------------------

@every_model
def test_forward(name):
    model = cached(name)
    with torch.no_grad():
        out = model(images(model))
    assert out.shape == (1, model.num_classes)
    assert out.isfinite().all()
    assert out.std() > 0


@every_model
def test_backward(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=42).train()
    out = model(images(model, 2, (SIZE, SIZE)))
    assert out.shape == (2, 42)
    assert out.isfinite().all()
    out.square().sum().backward()
    for n, p in model.named_parameters():
        assert p.grad is not None, f'no gradient for {n}'
        assert p.grad.isfinite().all(), n
        assert p.grad.abs().max() > 0, f'a zero gradient for {n}'


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (96, 96), (128, 128), (224, 224), (256, 192), (333, 217),
                                  (384, 384)])
def test_sizes(size):
    """One state dict at every size; maps of a stage are rounded up, and what follows does not depend on the batch."""
    model = cached('test_vim2')
    x = images(model, 2, size)
    with torch.no_grad():
        features, stages = model.forward_intermediates(x)
        both, one = model(x), model(x[1:])
    for stage, reduction in zip(stages, (4, 8, 16, 32)):
        assert stage.shape[2:] == (-(-size[0] // reduction), -(-size[1] // reduction))
    assert features.shape == stages[-1].shape
    assert both.isfinite().all()
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', IMAGENET_MODELS + [NANO, MICRO])
@pytest.mark.parametrize('size', [(96, 96), (75, 122)])
def test_sizes_of_named_models(name, size):
    model = cached(name)
    with torch.no_grad():
        out = model(images(model, 1, size))
    assert out.shape == (1, model.num_classes) and out.isfinite().all()


def test_padding_is_zeros():
    """An odd size is what the same image with zeros to the right and below is, in the stem and in the merging."""
    stem, merge = cached('test_vim2').stem, cached('test_vim2').stages[1].downsample
    x = torch.randn(1, 3, 33, 38)
    torch.testing.assert_close(stem(x), stem(nn.functional.pad(x, (0, 2, 0, 3))))
    y = torch.randn(1, 5, 7, 8)
    torch.testing.assert_close(merge(y), merge(nn.functional.pad(y, (0, 0, 0, 1, 0, 1))))


@pytest.mark.parametrize('size', [(6, 8), (7, 5)])
def test_patch_merging_is_swins(size):
    merge = PatchMerging(5, 12)
    swin = SwinPatchMerging(5, 12)
    swin.load_state_dict(merge.state_dict())
    x = torch.randn(2, *size, 5)
    assert torch.equal(merge(x), swin(x))


@every_model
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    torch.manual_seed(0)
    model = timm.create_model(name).train()  # batch normalisation is another function in evaluation
    x = images(model, 2, (SIZE, SIZE))
    with torch.no_grad():
        expected = model(x)
    with torch.autocast('cpu', dtype):
        out = model(x)
        loss = out.float().square().sum()
    loss.backward()
    assert out.dtype == dtype and out.isfinite().all()
    assert (out.float() - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_low_precision_parameters():
    model = timm.create_model('test_vim2', dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        out = model(images(model).bfloat16())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@every_model
def test_meta_device(name):
    model = timm.create_model(name, device='meta')
    assert {p.device.type for p in model.parameters()} == {'meta'}
    assert model(images(model, 2, (SIZE, SIZE)).to('meta')).shape == (2, model.num_classes)


@every_model
def test_grad_checkpointing(name):
    torch.manual_seed(0)
    model = timm.create_model(name, drop_path_rate=0.).train()
    x = images(model, 2, (SIZE, SIZE))
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert all(stage.grad_checkpointing is enable for stage in model.stages)
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for n, grad in results[0][1].items():
        torch.testing.assert_close(
            grad, results[1][1][n], rtol=1e-4, atol=1e-5, msg=lambda m, n=n: f'{n}: {m}')


def test_grad_checkpointing_runs_the_mixers_twice():
    model = timm.create_model('test_vim2').train()
    calls = []
    model.stages[0].blocks[0].mixer.register_forward_pre_hook(lambda *args: calls.append(1))
    for enable, expected in ((False, 1), (True, 2)):
        calls.clear()
        model.set_grad_checkpointing(enable)
        model(images(model)).sum().backward()
        assert len(calls) == expected


# --- timm's interface -----------------------------------------------------------------------------------------------

@every_model
def test_default_cfg(name):
    model = timm.create_model(name).eval()
    cfg, state_dict = model.default_cfg, model.state_dict()
    assert cfg['architecture'] == name
    assert cfg['classifier'] + '.weight' in state_dict
    assert cfg['first_conv'] + '.weight' in state_dict
    assert cfg['license'] == 'apache-2.0'
    assert cfg['num_classes'] == model.num_classes
    x = images(model)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (1, model.num_features, *cfg['pool_size'])
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (1, model.head_hidden_size)
        torch.testing.assert_close(pooled, features.mean((2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.forward_head(features), model.get_classifier()(pooled))

        model.reset_classifier(0)
        assert isinstance(model.get_classifier(), nn.Identity) and model.num_classes == 0
        torch.testing.assert_close(model(x), pooled)
        model.reset_classifier(0, '')
        torch.testing.assert_close(model(x), features)
        model.reset_classifier(7, 'max')
        torch.testing.assert_close(model(x), model.get_classifier()(features.amax((2, 3))))
        assert model(x).shape == (1, 7) and model.num_classes == 7


@every_model
def test_constructor_without_head(name):
    x = images(cached(name), 1, (SIZE, SIZE))
    with torch.no_grad():
        pooled = timm.create_model(name, num_classes=0)
        assert pooled(x).shape == (1, pooled.num_features)
        unpooled = timm.create_model(name, num_classes=0, global_pool='')
        assert unpooled(x).shape == unpooled.forward_features(x).shape


@every_model
def test_in_chans(name):
    model = timm.create_model(name, in_chans=1)
    assert model.in_chans == 1
    with torch.no_grad():
        assert model(torch.randn(1, 1, SIZE, SIZE)).shape == (1, model.num_classes)


@every_model
@pytest.mark.parametrize('in_chans', [3, 1])
def test_features_only(name, in_chans):
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, in_chans=in_chans).eval()
    stride = 2 if 'patch2' in name else 4
    assert model.feature_info.reduction() == [stride << i for i in range(num_stages(name))]
    with torch.no_grad():
        outputs = model(torch.randn(2, in_chans, 70, 61))
    for out, channels, reduction in zip(outputs, model.feature_info.channels(), model.feature_info.reduction()):
        assert out.shape == (2, channels, -(-70 // reduction), -(-61 // reduction))
        assert out.isfinite().all()


@pytest.mark.parametrize('indices', [(0, 1, 2, 3), (1, 3), (2,)])
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter', 'fx'])
def test_every_kind_of_feature_extraction_agrees(feature_cls, indices):
    whole = cached('test_vim2')
    model = timm.create_model('test_vim2', features_only=True, out_indices=indices, feature_cls=feature_cls).eval()
    own = {k.replace('stages_', 'stages.'): k for k in model.state_dict()}
    prefix = {'getter': 'model.', 'fx': 'graph_module.', 'hook': ''}.get(feature_cls, '')
    weights = {own[k]: v for k, v in {prefix + k: v for k, v in whole.state_dict().items()}.items() if k in own}
    if feature_cls == 'hook' and not weights:
        weights = {own['body.' + k]: v for k, v in whole.state_dict().items() if 'body.' + k in own}
    model.load_state_dict(weights)
    x = images(whole, 2)
    with torch.no_grad():
        outputs = model(x)
        expected = whole.forward_intermediates(x, indices=list(indices), intermediates_only=True)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    assert len(outputs) == len(expected)
    for out, want in zip(outputs, expected):
        assert torch.equal(out, want)


@every_model
def test_forward_intermediates(name):
    model = cached(name)
    x = images(model, 1, (SIZE, SIZE))
    with torch.no_grad():
        features, stages = model.forward_intermediates(x)
        assert torch.equal(features, model.forward_features(x))
        assert [s.shape[1] for s in stages] == [f['num_chs'] for f in model.feature_info]
        y = model.stem(x)
        for i, stage in enumerate(stages):
            y = model.stages[i](y)
            assert torch.equal(y, stage)
        normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        assert len(normed) == 1 and torch.equal(normed[0], features)
        nhwc = model.forward_intermediates(x, indices=[0, 2], output_fmt='NHWC', intermediates_only=True)
        assert torch.equal(nhwc[0], stages[0].permute(0, 2, 3, 1)) and len(nhwc) == 2
        early, _ = model.forward_intermediates(x, indices=[1], stop_early=True)
        assert torch.equal(early, stages[1])
    with pytest.raises(AssertionError, match='NHWC'):
        model.forward_intermediates(x, output_fmt='NLC')


def test_features_are_channels_last():
    """No transposition is paid for: the features are views of what the blocks work on."""
    model = cached('test_vim2')
    with torch.no_grad():
        features, stages = model.forward_intermediates(images(model, 2))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in [features, *stages])


@every_model
def test_prune_intermediate_layers(name):
    model = timm.create_model(name).eval()
    x = images(model, 1, (SIZE, SIZE))
    with torch.no_grad():
        before = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        assert model.prune_intermediate_layers([0, 2]) == [0, 2]
        after = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(before, after))
        assert len(model.stages) == 3
        assert model.num_features == model.head_hidden_size == model.feature_info[-1]['num_chs'] == before[1].shape[1]
        last = before[1] if num_stages(name) > 3 else model._final_norm(before[1])  # the norm is that of the last stage
        assert torch.equal(model(x), last)
        model.reset_classifier(5, 'avg')
        assert model(x).shape == (1, 5)


def test_prune_keeps_what_it_may():
    model = timm.create_model('test_vim2').eval()
    model.prune_intermediate_layers([3], prune_norm=False, prune_head=False)
    assert isinstance(model.norm, nn.LayerNorm) and model(images(model)).shape == (1, 1000)
    model.prune_intermediate_layers([3], prune_norm=True, prune_head=False)
    assert isinstance(model.norm, nn.Identity) and model(images(model)).shape == (1, 1000)


@every_model
def test_no_weight_decay(name):
    model = cached(name)
    exempt = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    assert exempt <= parameters.keys()
    for n in parameters:
        kept = re.search(r'((in|gate|out|x)_proj|dt_projs|fc\d?|conv(\d|\dd|1d\.\d)?|reduction|head\.fc)[._]weight$', n)
        assert (n in exempt) == (not kept), n
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for g in optimizer.param_groups if g['weight_decay'] for p in g['params']}
    assert decayed == {id(p) for n, p in parameters.items() if n not in exempt}


@every_model
def test_group_matcher(name):
    model = cached(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert all(group == 0 for n, group in groups.items() if n.startswith('stem.'))
    assert groups['head.fc.weight'] == groups['norm.weight'] + 1 == max(groups.values())
    depths = [groups[f'stages.{i}.blocks.{j}.norm.weight']
              for i, stage in enumerate(model.stages) for j in range(len(stage.blocks))]
    assert depths == sorted(set(depths)), 'mixers share a group or are out of order'
    for n, group in groups.items():
        if '.averages.' in n:
            assert group == groups[n.replace('averages', 'blocks').replace('.weight', '.norm.weight')]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse['stages.2.blocks.0.norm.weight'] == coarse['stages.2.downsample.norm.weight']
    create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.9)


def test_drop_path_grows_linearly():
    model = timm.create_model('vim2_tiny', drop_path_rate=0.3, device='meta')
    rates = [block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.
             for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.3 * i / 17 for i in range(18)])


# --- other ways to run a model --------------------------------------------------------------------------------------

@every_model
def test_torchscript(name):
    with set_scriptable(True):
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for size in ((SIZE, SIZE), (41, 70)):
            x = images(model, 1, size)
            torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('feature_cls', ['list', 'getter'])
def test_torchscript_features(feature_cls):
    model = timm.create_model('test_vim2', features_only=True, feature_cls=feature_cls).eval()
    x = torch.randn(1, 3, 70, 61)
    with torch.no_grad():
        for out, want in zip(torch.jit.script(model)(x), model(x)):
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


@every_model
def test_fx_feature_extraction(name):
    """The traced features are bit-equal, and the traced graph serves other sizes."""
    model = cached(name)
    nodes = [f['module'] for f in model.feature_info]
    extractor = create_feature_extractor(model, return_nodes=nodes)
    with torch.no_grad():
        for size in ((SIZE, SIZE), (41, 70)):
            x = images(model, 1, size)
            outputs = extractor(x)
            for node, want in zip(nodes, model.forward_intermediates(x, intermediates_only=True)):
                assert torch.equal(outputs[node], want)


@every_model
def test_fx_backward(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=42).train()
    expected = model(images(model, 2, (SIZE, SIZE)))
    traced = torch.fx.symbolic_trace(model)
    out = traced(images(model, 2, (SIZE, SIZE)))
    assert torch.equal(out, expected)
    out.square().sum().backward()
    for n, p in traced.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), n
    assert {n for n, _ in traced.named_parameters()} == {n for n, _ in model.named_parameters()}


@every_model
def test_export(name):
    model = cached(name)
    x = images(model, 2, (SIZE, SIZE))
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_export_with_dynamic_sizes():
    model = cached('test_vim2')
    batch, height, width = (torch.export.Dim(n, min=lo, max=512) for n, lo in (('b', 1), ('h', 33), ('w', 33)))
    with torch.no_grad():
        program = torch.export.export(
            model, (images(model, 2, (70, 61)),), dynamic_shapes={'x': {0: batch, 2: height, 3: width}})
        for size in ((70, 61), (96, 41), (224, 224)):
            x = images(model, 3, size)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@every_model
def test_compile(name):
    """One graph."""
    model = cached(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    with torch.no_grad():
        x = images(model, 1, (SIZE, SIZE))
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['test_vim2', NANO, MICRO])
def test_compile_backward(name):
    """One graph, forward and backward."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = images(model, 2)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    for n, expected in results[0].items():
        torch.testing.assert_close(
            results[1][n], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=n: f'{n}: {m}')


def test_compile_with_inductor():
    """Generated code, on one stage with every kind of layer: compiling it is what takes the time."""
    torch.manual_seed(0)
    model = VisionMambaMixer(dims=(8,), token_depths=1, channel_depths=1, channel_expand=2., d_state=2).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
