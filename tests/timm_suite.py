"""What timm's own tests/test_models.py asks of every model, as a class: a family's tests derive from it.

    class TestSomething(TimmModelTests):
        name = 'test_something'
"""
import copy
import functools

import pytest
import timm
import torch
from timm.layers import DropPath, set_scriptable
from timm.models import create_feature_extractor, group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

if hasattr(torch._C, '_jit_set_profiling_executor'):
    # The legacy executor is too slow to compile large models for unit tests, and fusion would not show anything here.
    torch._C._jit_set_profiling_executor(True)
    torch._C._jit_set_profiling_mode(False)


@functools.lru_cache(maxsize=None)
def cached(name):
    """A model in evaluation mode; no test changes it."""
    torch.manual_seed(0)
    return timm.create_model(name).eval()


class TimmModelTests:
    """Attributes that a subclass sets:

    name: the registered model, a small one.
    sizes: image sizes (height, width) beside the default one that it must take.
    reductions: of `feature_info`.
    atol: of results that another order of additions may change.
    """
    name = ''
    sizes = ((32, 32), (33, 47), (96, 64), (333, 217))
    reductions = (4, 8, 16, 32)
    atol = 1e-5

    @pytest.fixture
    def model(self):
        return cached(self.name)

    def images(self, model, batch=2, size=None, channels=None):
        cfg = model.pretrained_cfg['input_size']
        shape = (batch, channels or cfg[0], *(size or cfg[1:]))
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def close(self, a, b, **kwargs):
        torch.testing.assert_close(a, b, **dict(dict(rtol=1e-4, atol=self.atol), **kwargs))

    def test_forward(self, model):
        with torch.no_grad():
            out = model(self.images(model))
            one = model(self.images(model)[1:])
        assert out.shape == (2, model.num_classes) and out.isfinite().all() and out.std() > 0
        self.close(out[1:], one)

    def test_any_size(self, model):
        with torch.no_grad():
            for size in self.sizes:
                x = self.images(model, 1, size)
                features, maps = model.forward_intermediates(x)
                assert torch.equal(features, model.forward_features(x))
                assert model(x).shape == (1, model.num_classes) and model(x).isfinite().all()
                for y, reduction in zip(maps, self.reductions):
                    assert y.shape[2:] == self.map_size(size, reduction), size

    def map_size(self, size, reduction):
        return tuple(-(-s // reduction) for s in size)

    def test_backward(self):
        torch.manual_seed(0)
        model = timm.create_model(self.name, num_classes=42).train()
        out = model(self.images(model))
        assert out.shape == (2, 42)
        out.square().sum().backward()
        for n, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, n

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    def test_autocast(self, model, dtype):
        model = copy.deepcopy(model)
        x = self.images(model)
        with torch.no_grad():
            expected = model(x)
        with torch.autocast('cpu', dtype):
            out = model.train()(x)
        out.float().square().sum().backward()
        assert out.dtype == dtype and out.isfinite().all()
        assert (out.float() - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_low_precision_parameters(self):
        model = timm.create_model(self.name, dtype=torch.bfloat16).eval()
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            out = model(self.images(model).bfloat16())
        assert out.dtype == torch.bfloat16 and out.isfinite().all()

    def test_meta_device(self):
        model = timm.create_model(self.name, device='meta')
        assert {p.device.type for p in model.parameters()} == {'meta'}
        assert model(self.images(model).to('meta')).shape == (2, model.num_classes)

    def test_grad_checkpointing(self, model):
        model = copy.deepcopy(model).train()
        x = self.images(model)
        results = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            kept = 0

            def keep(t):
                nonlocal kept
                kept += t.numel()
                return t

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                out = model(x)
            out.square().sum().backward()
            results.append((out.detach(), {n: p.grad for n, p in model.named_parameters()}, kept))
        self.close(results[0][0], results[1][0])
        for n, grad in results[0][1].items():
            self.close(grad, results[1][1][n], msg=lambda m, n=n: f'{n}: {m}')
        assert results[1][2] < 0.7 * results[0][2]

    def test_default_cfg_and_classifier(self, model):
        model = copy.deepcopy(model)
        cfg, state_dict = model.default_cfg, model.state_dict()
        assert cfg['architecture'] == self.name
        assert cfg['classifier'] + '.weight' in state_dict and cfg['first_conv'] + '.weight' in state_dict
        assert cfg['num_classes'] == model.num_classes
        x = self.images(model)
        with torch.no_grad():
            features = model.forward_features(x)
            pooled = model.forward_head(features, pre_logits=True)
            assert pooled.shape == (2, model.head_hidden_size) == (2, model.num_features)
            self.close(model.forward_head(features), model.get_classifier()(pooled))
            self.close(model.forward_head(features), model(x))
            model.reset_classifier(0)
            assert isinstance(model.get_classifier(), nn.Identity) and model.num_classes == 0
            self.close(model(x), pooled)
            model.reset_classifier(0, '')
            self.close(model(x), features)
            model.reset_classifier(7, 'avg')
            assert model(x).shape == (2, 7) and model.num_classes == 7
            without = timm.create_model(self.name, num_classes=0, global_pool='')
            assert without(x).shape == features.shape
            assert timm.create_model(self.name, num_classes=0)(x).shape == (2, model.num_features)

    @pytest.mark.parametrize('in_chans', [3, 1])
    def test_features_only(self, in_chans):
        model = timm.create_model(self.name, features_only=True, in_chans=in_chans).eval()
        assert tuple(model.feature_info.reduction()) == self.reductions
        size = self.sizes[1]
        with torch.no_grad():
            outputs = model(torch.randn(2, in_chans, *size))
        for out, channels, reduction in zip(outputs, model.feature_info.channels(), self.reductions):
            assert out.shape == (2, channels, *self.map_size(size, reduction)) and out.isfinite().all()

    def test_forward_intermediates(self, model):
        x = self.images(model)
        count = len(model.feature_info)
        with torch.no_grad():
            features, maps = model.forward_intermediates(x)
            assert torch.equal(features, model.forward_features(x)) and len(maps) == count
            assert [y.shape[1] for y in maps] == [f['num_chs'] for f in model.feature_info]
            some = model.forward_intermediates(x, indices=[0, count - 2], intermediates_only=True)
            assert len(some) == 2 and torch.equal(some[0], maps[0]) and torch.equal(some[1], maps[count - 2])
            early, first = model.forward_intermediates(x, indices=[0], stop_early=True)
            assert len(first) == 1 and torch.equal(first[0], maps[0])
            last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
            assert len(last) == 1 and last[0].shape == maps[-1].shape and not torch.equal(last[0], maps[-1])
        with pytest.raises(AssertionError, match='Output format'):
            model.forward_intermediates(x, output_fmt='NLCH')

    def test_prune_intermediate_layers(self, model):
        model = copy.deepcopy(model)
        x = self.images(model)
        with torch.no_grad():
            before = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
            parameters = sum(p.numel() for p in model.parameters())
            assert model.prune_intermediate_layers([0, 1]) == [0, 1]
            after = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
            assert all(torch.equal(a, b) for a, b in zip(before, after))
            assert sum(p.numel() for p in model.parameters()) < parameters
            model.reset_classifier(5, 'avg')
            assert model(x).shape == (2, 5)

    def test_no_weight_decay(self, model):
        exempt, parameters = model.no_weight_decay(), dict(model.named_parameters())
        assert exempt <= parameters.keys()
        optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05)
        decayed = {id(p) for g in optimizer.param_groups if g['weight_decay'] for p in g['params']}
        assert decayed == {id(p) for n, p in parameters.items() if n not in exempt}
        assert any('A_log' in n for n in exempt)
        assert all(parameters[n].ndim >= 2 for n in parameters.keys() - exempt)

    def test_group_matcher(self, model):
        groups = group_parameters(model, model.group_matcher(), reverse=True)
        assert groups.keys() == dict(model.named_parameters()).keys()
        assert groups[model.default_cfg['first_conv'] + '.weight'] == 0
        assert groups[model.default_cfg['classifier'] + '.weight'] == max(groups.values())
        assert len(set(groups.values())) > len(set(
            group_parameters(model, model.group_matcher(coarse=True), reverse=True).values()))
        create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.9)

    def test_drop_path_grows_linearly(self):
        model = timm.create_model(self.name, drop_path_rate=0.3, device='meta')
        rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
        assert rates == sorted(rates) and rates[-1] == pytest.approx(0.3) and rates[0] < 0.2

    def test_torchscript(self):
        with set_scriptable(True):
            torch.manual_seed(0)
            model = timm.create_model(self.name).eval()
        scripted = torch.jit.script(model)
        with torch.no_grad():
            for size in (None, self.sizes[1]):
                x = self.images(model, 1, size)
                self.close(scripted(x), model(x))

    def test_fx_feature_extraction(self, model):
        """The traced features are equal."""
        nodes = [f['module'] for f in model.feature_info]
        extractor = create_feature_extractor(model, return_nodes=nodes)
        x = self.images(model)
        with torch.no_grad():
            outputs = extractor(x)
            for node, want in zip(nodes, self.module_outputs(model, nodes, x)):
                self.close(outputs[node], want)

    def module_outputs(self, model, nodes, x):
        outputs, handles = {}, []
        for node in nodes:
            handles.append(model.get_submodule(node).register_forward_hook(
                lambda module, args, out, node=node: outputs.__setitem__(node, out)))
        model(x)
        for handle in handles:
            handle.remove()
        return [outputs[node] for node in nodes]

    def test_fx_backward(self):
        torch.manual_seed(0)
        model = timm.create_model(self.name, num_classes=42).train()
        expected = model(self.images(model))
        traced = torch.fx.symbolic_trace(model)
        out = traced(self.images(model))
        self.close(out, expected)
        out.square().sum().backward()
        for n, p in traced.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), n

    def test_export(self, model):
        x = self.images(model)
        with torch.no_grad():
            program = torch.export.export(model, (x,))
            self.close(program.module()(x), model(x))

    def test_compile(self, model):
        """One graph, forward and backward."""
        model = copy.deepcopy(model).train()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        results = []
        for run in (model, compiled):
            model.zero_grad()
            out = run(self.images(model))
            out.square().sum().backward()
            results.append((out.detach(), {n: p.grad for n, p in model.named_parameters()}))
        self.close(*(r[0] for r in results))
        for n, expected in results[0][1].items():
            self.close(results[1][1][n], expected, msg=lambda m, n=n: f'{n}: {m}')

    def test_own_file(self, model, tmp_path):
        """Weights saved here are read again, adapted to other classes and channels, and for features."""
        from safetensors.torch import save_file
        path = tmp_path / 'weights.safetensors'
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)

        def load(**kwargs):
            return timm.create_model(self.name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)),
                                     **kwargs).eval()

        x = self.images(model)
        with torch.no_grad():
            assert torch.equal(load()(x), model(x))
            adapted = load(num_classes=5, in_chans=1)
            assert adapted(x[:, :1]).shape == (2, 5)
            first = model.default_cfg['first_conv']
            torch.testing.assert_close(adapted.get_submodule(first).weight,
                                       model.get_submodule(first).weight.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
            for a, b in zip(load(features_only=True)(x), model.forward_intermediates(x, intermediates_only=True)):
                assert torch.equal(a, b)
        save_file(timm.create_model('resnet18').state_dict(), path)
        with pytest.raises(RuntimeError, match=f'is no checkpoint of {self.name}') as error:
            load(num_classes=5)
        assert str(path) in str(error.value) and 'bn1.' in str(error.value)
