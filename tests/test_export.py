"""Files of models: they hold what the model computes, at other sizes too, and run without vim2 where they say so."""
import importlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import colored_image, jpeg, tool_environment, write_npz
from safetensors.torch import save_file

from vim2.export import check_shapes, example_inputs, export, quantize_linears
from vim2.layers import SelectiveTokenMixer
from vim2.models import TSM2, VisionMambaMixer
from vim2.ops.loop import scan_loop

onnxruntime = pytest.importorskip('onnxruntime', reason='ONNX needs onnx, onnxscript and onnxruntime')
NO_VIM2 = 'import sys; sys.modules["vim2"] = None\n'  # whatever imports it fails


def vision(**kwargs):
    """One token mixer of four directions, one channel mixer, both kinds of down-sampling padded."""
    torch.manual_seed(0)
    return VisionMambaMixer(**dict(dict(
        num_classes=5, dims=(8, 16), token_depths=(1, 0), channel_depths=(0, 1), d_state=4, token_grid=4,
        channel_expand=2.), **kwargs)).eval()


def forecaster(**kwargs):
    torch.manual_seed(0)
    model = TSM2(3, lookback=40, horizon=12, d_model=16, d_state=4, **kwargs).eval()
    torch.nn.init.normal_(model.head.weight)  # of zeros it would hide everything before it
    return model


def run(code, *args, cwd=None):
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], cwd=cwd, capture_output=True,
                          text=True, env=tool_environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('groups, size, rank, options', [
    ((1, 1), (4, 5), 2, {}), ((1, 1), (3, 1), None, dict(constant=True)), ((2, 6), (1, 7), None, dict(gate=True)),
    ((1, 1), (1, 1), 1, {}), ((6, 2), (2, 6), None, dict(bias=False, softplus=False))], ids=str)
@pytest.mark.parametrize('directions', [[0, 1, 2, 3], [2], [1, 0]], ids=str)
def test_loop_is_the_operator(groups, size, rank, options, directions):
    torch.manual_seed(0)
    B, E, N, K = 2, 6, 3, len(directions)
    position = (1, 1) if options.get('constant') else size
    args = (torch.randn(B, E, *size), torch.rand(B, K, rank or E, *size), -4 * torch.rand(K, E, N),
            torch.randn(B, K, groups[0], N, *position), torch.randn(B, K, groups[1], N, *size), torch.randn(K, E),
            torch.randn(B, E, *size) if options.get('gate') else None,
            torch.randn(K, E) if options.get('bias', True) else None, torch.rand(K, E, rank) if rank else None,
            options.get('softplus', True), directions, True)
    for got, expected in zip(scan_loop(*args), torch.ops.vim2.scan(*args, 'reference')):
        torch.testing.assert_close(got, expected)


@pytest.fixture(scope='module')
def onnx_file(tmp_path_factory):
    """A small ViM2 as ONNX, and the model."""
    model = vision()
    done = export(model, tmp_path_factory.mktemp('onnx') / 'vision.onnx', size=(48, 40))
    assert [shape for shape, _ in done.checks] == [(1, 3, 48, 40), (2, 3, 25, 28), (3, 3, 65, 33)]
    assert done.inputs == ['image'] and done.outputs == ['logits'] and done.bytes == done.path.stat().st_size
    return done.path, model


def test_onnx_in_a_process_without_vim2(onnx_file, tmp_path):
    path, model = onnx_file
    inputs = [torch.randn(batch, 3, *size) for batch in (1, 4) for size in ((64, 64), (35, 90), (120, 33))]
    np.savez(tmp_path / 'inputs.npz', *[x.numpy() for x in inputs])
    run(NO_VIM2 + 'sys.modules["torch"] = None\n'
        'import numpy as np, onnxruntime\n'
        's = onnxruntime.InferenceSession(sys.argv[1])\n'
        'np.savez("out.npz", *[s.run(None, {"image": x})[0] for x in np.load("inputs.npz").values()])', path,
        cwd=tmp_path)
    outputs = list(np.load(tmp_path / 'out.npz').values())
    assert len(outputs) == len(inputs)
    for x, y in zip(inputs, outputs):
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=0, atol=1e-4)


def test_onnx_loops_with_scan(onnx_file):
    """A graph whose size does not depend on the images', and no loop that ONNX Runtime is slow with."""
    onnx = importlib.import_module('onnx')
    model = onnx.load(onnx_file[0])
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count('Scan') == 1 + 2  # the token mixer's four directions are one loop, the channel mixer has two
    assert 'Loop' not in kinds and len(kinds) < 1000
    assert model.opset_import[0].version >= 18
    assert b'stack_trace' not in onnx_file[0].read_bytes()  # nothing of the machine that wrote it
    body = [attribute.g for node in model.graph.node for attribute in node.attribute if attribute.name == 'body'][0]
    assert sorted(n.op_type for n in body.node if n.op_type not in ('Identity', 'Transpose')) == [
        'Add', 'Exp', 'MatMul', 'Mul', 'Mul', 'Mul']


def test_int8(onnx_file, tmp_path):
    """Every Linear, nothing else, and the same class as before."""
    onnx = importlib.import_module('onnx')
    path, model = onnx_file
    linears = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    assert quantize_linears(path, tmp_path / 'int8.onnx') >= linears
    stored = onnx.load(tmp_path / 'int8.onnx').graph.initializer
    assert sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2 for t in stored) >= linears
    x = torch.randn(4, 3, 64, 64)
    got, = onnxruntime.InferenceSession(tmp_path / 'int8.onnx').run(None, {'image': x.numpy()})
    with torch.no_grad():
        expected = model(x)
    error = float((torch.from_numpy(got) - expected).abs().max() / expected.abs().max())
    assert 0 < error < 0.1 and [p.name for p in tmp_path.iterdir()] == ['int8.onnx']


def test_torch_onnx_export_works_as_it_is(tmp_path):
    """Without our tool, and with parameters that require gradients."""
    model = forecaster()
    assert all(p.requires_grad for p in model.parameters())
    program = torch.onnx.export(model, example_inputs(model), dynamo=True, verbose=False)
    program.save(tmp_path / 'forecaster.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'forecaster.onnx')
    x, = example_inputs(model, seed=3)
    got, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=0, atol=1e-4)


def test_pooling_with_free_sizes(tmp_path):
    """The checks of three sizes, odd ones among them, are `export`'s own; here, that its files are of free sizes."""
    model = vision(stem='pool', downsample='pool', patch_size=2, conv_depths=(1, 0), token_depths=0)
    done = export(model, tmp_path / 'pooled.pt2', 'torch', size=(24, 20))
    assert len({shape for shape, _ in done.checks}) == 3
    x = torch.randn(4, 3, 37, 26)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(done.path).module()(x), model(x), rtol=0, atol=1e-5)


def test_onnx_of_torchscript_names_the_way_that_works(tmp_path):
    model = forecaster()
    with pytest.raises(RuntimeError, match='leave dynamo at True.*tools/export.py'):
        torch.onnx.export(model, example_inputs(model), tmp_path / 'x.onnx', dynamo=False)
    assert not torch.onnx.is_in_onnx_export()
    model(*example_inputs(model))  # and the model is as it was


@pytest.mark.parametrize('format, without_vim2, kwargs', [
    ('torch', False, dict(static_dim=2, past_dim=1)), ('portable', True, {})], ids=['torch', 'portable'])
def test_program(format, without_vim2, kwargs, tmp_path):
    model = forecaster(**kwargs)
    done = export(model, tmp_path / 'forecaster.pt2', format)
    assert done.inputs == ['x', 'static', 'past'][:3 if kwargs else 1] and done.outputs == ['forecast']
    inputs = example_inputs(model, 4, seed=9)
    torch.save(inputs, tmp_path / 'inputs.pt')
    run((NO_VIM2 if without_vim2 else 'import sys, vim2\n') +
        'import torch\n'
        'model = torch.export.load(sys.argv[1]).module()\n'
        'torch.save(model(*torch.load("inputs.pt")), "out.pt")', done.path, cwd=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / 'out.pt').detach(), model(*inputs), rtol=1e-4, atol=1e-4)


def test_compiled_by_aotinductor(tmp_path):
    """A program of the kernel's, compiled, in a process that has only imported vim2."""
    if not (shutil.which('g++') or shutil.which('clang++')):
        pytest.skip('AOTInductor needs a C++ compiler')
    torch.manual_seed(0)
    mixer = SelectiveTokenMixer(8).eval()
    x = torch.randn(2, 5, 4, 8)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(torch.export.export(mixer, (x,)), package_path=f'{tmp_path}/mixer.pt2')
        torch.save(x, tmp_path / 'x.pt')
        run('import sys, torch, vim2.ops\n'
            'run = torch._inductor.aoti_load_package("mixer.pt2")\n'
            'torch.save(run(torch.load("x.pt")), "out.pt")', cwd=tmp_path)
        torch.testing.assert_close(torch.load(tmp_path / 'out.pt'), mixer(x), rtol=1e-4, atol=1e-5)


def test_a_file_that_is_wrong_does_not_appear(tmp_path, monkeypatch):
    path = tmp_path / 'model.pt'
    path.write_text('the one before')
    module = importlib.import_module('vim2.export')
    broken = vision()
    with torch.no_grad():
        broken.head.fc.bias += 0.01
    with monkeypatch.context() as patch:
        patch.setitem(module._WRITERS, 'torchscript', lambda model, *args: module._write_torchscript(broken, *args))
        with pytest.raises(RuntimeError, match=r'shape \(1, 3, 48, 40\): relative error 1\.0e-02'):
            export(vision(), path, 'torchscript', size=(48, 40))
    assert [p.name for p in tmp_path.iterdir()] == ['model.pt'] and path.read_text() == 'the one before'
    export(vision().train(), path, 'torchscript', size=(48, 40))
    assert path.read_bytes()[:2] == b'PK'


@pytest.mark.parametrize('options, message', [
    (dict(format='tflite'), 'format must be one of onnx, torch, portable, torchscript'),
    (dict(opset=17), 'opset must be 18 or newer, got 17'),
    (dict(size=(8, 64)), '8x64 pixels cannot stand for all sizes: give a size of at least 9'),
])
def test_errors(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(vision(), tmp_path / 'model', **options)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'onnxscript' else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"ONNX needs onnxscript: pip install 'vim2\[export\]'"):
        export(forecaster(), tmp_path / 'model.onnx')


def test_sizes_of_the_checks():
    assert check_shapes(vision(), size=(224, 192)) == [(1, (224, 192)), (2, (113, 104)), (3, (241, 185))]
    assert check_shapes(vision(), False, (32, 32)) == [(1, (32, 32))] * 3
    assert check_shapes(forecaster()) == [(1, None), (2, None), (5, None)]


def test_tool(tool, tmp_path):
    path = tmp_path / 'model.pt'
    result = tool('export', 'test_vim2', '--random-weights', '--format', 'torchscript', '--output', path, '--json')
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report['bytes'] == path.stat().st_size and [c['shape'][0] for c in report['checks']] == [1, 2, 3]
    scripted = torch.jit.load(path)
    assert scripted(torch.zeros(2, 3, 40, 50)).shape == (2, 1000)


def test_benchmark(onnx_file):
    path, model = onnx_file
    times = importlib.import_module('export').benchmark(model, [path], (48, 40), rounds=1)
    assert list(times) == ['PyTorch', str(path)] and min(times.values()) > 0


def test_accuracies(onnx_file, tmp_path):
    """The model's, and each file's own."""
    tool = importlib.import_module('export')
    rng = np.random.default_rng(0)
    labels = np.arange(11) % 5
    write_npz(tmp_path / 'test.npz', [jpeg(colored_image(y, rng, (40, 48))) for y in labels], labels, tuple('abcde'))
    quantize_linears(onnx_file[0], tmp_path / 'int8.onnx')
    model = vision()
    model.pretrained_cfg = dict(input_size=(3, 48, 40), crop_pct=1.)
    args = tool.get_parser().parse_args(['vision', '--dataset', 'npz', '--data-dir', str(tmp_path), '--split', 'test'])
    dataset = tool.open_dataset(model, args)
    with torch.no_grad():
        model.head.fc.bias[0] += 100.  # one class whatever comes, which the files do not know
        images = torch.cat([x for x, _ in tool.data.eval_loader(
            dataset, tool.common.data_config(args, model), batch_size=11, device=torch.device('cpu'), workers=0)])
    files = [onnx_file[0], tmp_path / 'int8.onnx']
    got = tool.accuracies(model, files, dataset, args)
    assert list(got) == ['PyTorch', *map(str, files)] and got['PyTorch'] == pytest.approx(100 * 3 / 11)
    for file in files:
        logits, = onnxruntime.InferenceSession(file).run(None, {'image': images.numpy()})
        assert got[str(file)] == pytest.approx(100 * (logits.argmax(1) == labels).mean())


def test_tool_exports_forecasters(tool, tmp_path):
    result = tool('export', 'tsm2.ETTh1-96', '--format', 'torch', '--output', tmp_path / 'ett.pt2')
    assert result.code == 0, result.err
    assert 'x -> forecast' in result.out and result.out.count('checked at') == 3


@pytest.mark.parametrize('args, message', [
    (('nothing',), 'nothing'),
    (('vim2_tiny',), 'vim2_tiny'),  # has no weights: the message of the loader
    (('tsm2.ETTh1-96', '--num-classes', '3'), 'are for names of timm'),
    (('test_vim2', '--random-weights', '--output', 'no/folder/x.onnx'), 'there is no folder'),
    (('test_vim2', '--format', 'torch', '--int8', 'x.onnx'), '--int8 is for --format onnx, not torch'),
    (('test_vim2', '--format', 'torch', '--data-dir', 'x'), '--data-dir is for --format onnx, not torch'),
    (('tsm2.ETTh1-96', '--data-dir', 'x'), 'a data set of images, and tsm2.ETTh1-96 reads none'),
    (('test_vim2', '--random-weights', '--img-size', '16'), '16x16 pixels cannot stand for all sizes'),
])
def test_tool_errors(args, message, tool):
    result = tool('export', *args)
    assert result.code == 2 and message in result.err and result.err.count('\n') == 1, result


def test_validate_refuses_files(tool, onnx_file, tmp_path):
    """None, a part of one, and one of other classes: the file's count, not the model's."""
    rng = np.random.default_rng(0)
    labels = np.arange(8) % 4
    write_npz(tmp_path / 'test.npz', [jpeg(colored_image(y, rng, (48, 40))) for y in labels], labels)
    options = ('--model', 'test_vim2', '--checkpoint', tmp_path / 'test_vim2.safetensors', '--num-classes', '4',
               '--dataset', 'npz', '--data-dir', tmp_path, '--split', 'test', '--workers', '0', '--device', 'cpu')
    save_file(timm.create_model('test_vim2', num_classes=4).state_dict(), tmp_path / 'test_vim2.safetensors')
    (tmp_path / 'cut.onnx').write_bytes(onnx_file[0].read_bytes()[:999])
    for file, message in ((tmp_path / 'nothing.onnx', 'nothing.onnx'), (tmp_path / 'cut.onnx', 'cut.onnx'),
                          (onnx_file[0], 'has 4 classes (red, green, blue, …), the model has 5 outputs')):
        result = tool('validate', *options, '--onnx', file)
        assert result.code == 2 and message in result.err and result.err.count('\n') == 1, result.err


def test_validate_goes_by_what_a_file_says(tool, tmp_path):
    """Classes by name and preprocessing are the file's; fixed sizes that do not fit are one line."""
    rng = np.random.default_rng(0)
    labels = np.arange(9) % 3
    write_npz(tmp_path / 'test.npz', [jpeg(colored_image(y, rng, (32, 32))) for y in labels], labels,
              ('red', 'green', 'blue'))
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=3, img_size=32).eval()
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), crop_pct=1.0,
                                label_names=['blue', 'red', 'green'])
    export(model, tmp_path / 'x.onnx', dynamic=False)
    save_file(timm.create_model('test_vit', num_classes=3).state_dict(), tmp_path / 'other.safetensors')
    options = ('--model', 'test_vit', '--checkpoint', tmp_path / 'other.safetensors', '--num-classes', 3, '--dataset',
               'npz', '--data-dir', tmp_path, '--split', 'test', '--workers', 0, '--device', 'cpu',
               '--onnx', tmp_path / 'x.onnx')
    result = tool('validate', *options, '--batch-size', 1, '--json')
    assert result.code == 0, result.err
    reader = importlib.import_module('_datasets').open_to_measure(
        importlib.import_module('validate').get_parser().parse_args(list(map(str, options))))
    x = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in reader]) / 255
    cfg = model.pretrained_cfg
    x = (x - torch.tensor(cfg['mean']).view(3, 1, 1)) / torch.tensor(cfg['std']).view(3, 1, 1)
    own = torch.tensor([1, 2, 0])[torch.from_numpy(labels)]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(x), own)
    assert json.loads(result.out)['loss'] == pytest.approx(float(loss), abs=1e-4)
    for more in (('--batch-size', 3), ('--batch-size', 1, '--img-size', 64)):
        result = tool('validate', *options, *more)
        assert result.code == 2 and result.err.count('\n') == 1, result.err
        assert 'takes image of 1 x 3 x 32 x 32, not of' in result.err and '--batch-size and --img-size' in result.err
