"""Files with absent or odd fields, in every tool that reads them: one line and exit code 2, or a result."""
import copy
import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, colored_image, jpeg, tool_environment, write_npz

import _common as common
import _datasets as datasets
from _common import UserError

ODD = [None, [], 'x', -1, 2 ** 62, float('nan'), {'a': [1]}, [0, 'x']]


def one_line_or_fine(result, *context):
    if result.code not in (0, 1):
        assert result.code == 2 and len(result.err.strip().splitlines()) == 1, (context, result.err)
        assert ': error: ' in result.err and 'Traceback' not in result.err, (context, result.err)
    return result.code


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model as tools/train.py exports it, and a picture."""
    path = tmp_path_factory.mktemp('model')
    torch.manual_seed(0)
    model = timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4).eval()
    timm.models._hub.save_for_hf(
        model, str(path / 'model'), safe_serialization=True, model_args=dict(img_size=32, patch_size=8),
        model_config=dict(label_names=list(CLASSES), label_descriptions={c: f'the color {c}' for c in CLASSES}))
    colored_image(1, np.random.default_rng(0)).save(path / 'a.png')
    return path


def variants(content, *path):
    """The content with a field absent, and as every odd value."""
    for odd in ('absent', *ODD):
        changed = copy.deepcopy(content)
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        if odd == 'absent':
            parent.pop(path[-1], None)
        else:
            parent[path[-1]] = odd
        yield odd, changed


@pytest.mark.parametrize('field', [
    ('architecture',), ('num_classes',), ('label_names',), ('label_descriptions',), ('model_args',),
    ('pretrained_cfg',),
    *(('pretrained_cfg', k) for k in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode',
                                      'num_classes', 'first_conv', 'classifier'))], ids='.'.join)
def test_odd_config_json(folder, tmp_path, tool, field):
    content = json.loads((folder / 'model' / 'config.json').read_text())
    (tmp_path / 'model.safetensors').symlink_to(folder / 'model' / 'model.safetensors')
    for odd, changed in variants(content, *field):
        (tmp_path / 'config.json').write_text(json.dumps(changed))
        one_line_or_fine(tool('predict', folder / 'a.png', '--model', f'local-dir:{tmp_path}'), field, odd)


@pytest.mark.parametrize('text', ['', '[', '[1]', '7', 'null', '{}', '\xff', '[' * 100_000])
@pytest.mark.parametrize('name', ['predict', 'push_to_hub'])
def test_config_json_that_is_none(folder, tmp_path, tool, text, name):
    (tmp_path / 'model.safetensors').symlink_to(folder / 'model' / 'model.safetensors')
    (tmp_path / 'config.json').write_bytes(text.encode('latin-1'))
    arguments = (folder / 'a.png', '--model', f'local-dir:{tmp_path}') if name == 'predict' else (
        tmp_path, '--repo', 'org/name', '--license', 'mit', '--dry-run', '--out', tmp_path / 'out')
    assert one_line_or_fine(tool(name, *arguments), text[:9]) == 2
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('key, value, message', [
    ('mean', [0.5, 0.5], 'mean of the preprocessing must be one number, or one for each of the 3 channels'),
    ('std', [0, 0.5, 0.5], 'std of the preprocessing must be one positive number'),
    ('std', [0.5, 0.5, float('nan')], 'std of the preprocessing must be one positive number'),
    ('input_size', [3, 32, -32], 'input_size of the preprocessing must be channels, height and width'),
    ('interpolation', 'psychic', 'interpolation of the preprocessing must be nearest, bilinear'),
    ('crop_mode', 'sideways', 'crop_mode of the preprocessing must be center, squash or border'),
])
def test_preprocessing_that_would_divide_by_zero_or_fail_is_named(folder, tmp_path, tool, key, value, message):
    content = json.loads((folder / 'model' / 'config.json').read_text())
    content['pretrained_cfg'][key] = value
    (tmp_path / 'config.json').write_text(json.dumps(content))
    (tmp_path / 'model.safetensors').symlink_to(folder / 'model' / 'model.safetensors')
    for name, arguments in (
            ('predict', (folder / 'a.png', '--model', f'local-dir:{tmp_path}')),
            ('push_to_hub', (tmp_path, '--repo', 'org/name', '--license', 'mit', '--dry-run', '--out',
                             tmp_path / 'out'))):
        result = tool(name, *arguments)
        assert one_line_or_fine(result) == 2 and message in result.err, result.err


def test_label_names_that_are_no_text(folder, tmp_path, tool):
    content = json.loads((folder / 'model' / 'config.json').read_text())
    (tmp_path / 'model.safetensors').symlink_to(folder / 'model' / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps({**content, 'label_names': [1, 2, 3, 4]}))
    result = tool('predict', folder / 'a.png', '--model', f'local-dir:{tmp_path}')
    assert result.code == 2 and 'label_names of the model must be a list of texts, it is [1, 2, 3, 4]' in result.err


@pytest.mark.parametrize('name', ['data', 'offsets', 'labels', 'names', 'classes', 'class_names', 'format'])
def test_odd_arrays_of_an_npz(tmp_path, name):
    rng = np.random.default_rng(0)
    files = [jpeg(colored_image(y, rng)) for y in range(4)]
    odd = (np.array(5), np.zeros((2, 2)), np.array([], np.int64), np.array(['a', 'b', 'c', 'd']), np.array([None] * 4),
           np.array([1.5] * 5), np.arange(4) - 1, np.full(5, 2 ** 62), np.array([True] * 4), np.array(b'x'))
    for i, value in enumerate(odd):
        write_npz(tmp_path / f'{i}.npz', files, range(4), override={name: value})
        try:
            dataset = datasets.open_dataset('npz', str(tmp_path), str(i))
            datasets.match_classes(dataset, 4, 'it')
            assert [np.asarray(image).shape for image, _ in (dataset[k] for k in range(4))] == [(32, 32, 3)] * 4
        except UserError as e:
            assert f'{i}.npz' in str(e) or 'it' in str(e)


def odd_checkpoints():
    weights = timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4).state_dict()
    yield from (None, [], 'x')
    for odd in (None, [1], {'a': [1]}):
        for key in ('state_dict', 'model', 'label_names', 'meta'):
            yield {'state_dict': weights, key: odd}
        yield {**weights, 'norm.weight': odd}
        yield {'state_dict': {'backbone.net.stem.conv.weight': odd}, 'meta': odd}
        yield {'state_dict': weights, 'progress': odd, 'args': odd, 'arch': odd}
    yield {'state_dict': {**weights, 'norm.weight': weights['norm.weight'] * float('nan')}}
    yield {'state_dict': {**weights, 'norm.weight': weights['norm.weight'].to_sparse()}}
    yield {1: 2}


@pytest.mark.parametrize('name', ['validate', 'push_to_hub', 'convert_vmamba'])
def test_odd_checkpoints(npz_dir, tmp_path, tool, name):
    model = ('--model', 'test_vit', '--model-kwargs', 'img_size=32', 'patch_size=8')
    path = tmp_path / 'odd.pth'
    arguments = dict(
        validate=(*model, '--num-classes', 4, '--checkpoint', path, '--dataset', 'npz', '--data-dir', npz_dir,
                  '--split', 'test[:2]', '-j', 0),
        push_to_hub=(path, '--repo', 'org/name', '--license', 'mit', '--dry-run', '--out', tmp_path / 'out', *model),
        convert_vmamba=(path, '--model', 'test_vim2', '--out', tmp_path / 'out'))[name]
    codes = []
    for i, checkpoint in enumerate(odd_checkpoints()):
        torch.save(checkpoint, path)
        codes.append(one_line_or_fine(tool(name, *arguments), i, repr(checkpoint)[:80]))
        assert codes[-1] == 2 or name != 'convert_vmamba'
        if (tmp_path / 'out').exists():
            (tmp_path / 'out').rename(tmp_path / f'out{i}')
    assert codes.count(2) > 10


@pytest.mark.parametrize('field', ['columns', 'info', 'scaler', 'format', 'freq'])
def test_odd_forecaster_json(tmp_path, tool, field):
    from vim2.models import TSM2
    model = TSM2(num_variates=2, lookback=32, horizon=8, d_model=8, depth=1)
    model.save_pretrained(tmp_path / 'run')
    content = dict(format=1, columns=['a', 'b'], freq='h', scaler=dict(mean=[0., 0.], std=[1., 1.]), info=dict(
        split='0.7/0.1/0.2', seed=0, epoch=1, training=dict(epochs=2)))
    for odd, changed in variants(content, field):
        (tmp_path / 'run' / 'forecaster.json').write_text(json.dumps(changed))
        one_line_or_fine(tool('push_to_hub', tmp_path / 'run', '--repo', 'org/name', '--license', 'mit', '--dry-run',
                              '--out', tmp_path / f'out{str(odd)[:5]}'), field, odd)


def test_args_yaml_of_a_run_that_is_odd(folder, tmp_path, tool):
    (tmp_path / 'model').symlink_to(folder / 'model')
    for text in ('epochs: x', '- 1', 'model_kwargs: 7', 'img_size: {a: 1}', '{}', 'a: &b [1]\nc: *b', '\x00'):
        (tmp_path / 'args.yaml').write_text(text)
        one_line_or_fine(tool('push_to_hub', tmp_path, '--repo', 'org/name', '--license', 'mit', '--dry-run', '--out',
                              tmp_path / f'out{len(text)}'), text)


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    for error in (MemoryError(), torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')):
        def main(error=error):
            raise error
        with pytest.raises(SystemExit) as stop:
            common.run(main)
        assert stop.value.code == 2 and 'out of memory (' in (text := capsys.readouterr().err) and text.count('\n') == 1


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux has /dev/full')
@pytest.mark.parametrize('options', ['', '--json'])
def test_an_output_that_is_full_or_closed(root, options):
    """One line of words for the first; the second is what cron jobs do."""
    command = f'{sys.executable} {root}/tools/predict.py {root}/tools/assets/chelsea.jpg --model ' \
              f'vim2_nano_patch2_32.cifar10 {options}'
    run = functools.partial(subprocess.run, shell=True, text=True, stderr=subprocess.PIPE, env=tool_environment())
    full = run(f'{command} >/dev/full')
    assert full.returncode == 2, full.stderr
    assert full.stderr == 'predict.py: error: cannot write the output: No space left on device\n'
    closed = run(f'{command} >&-')
    assert (closed.returncode, closed.stderr) == (0, '')


# raises what a read-only file system raises, for root too, whom permissions do not stop; but for a temporary folder,
# where PyTorch makes one of its own when it is imported
READ_ONLY = '''
import os, sys
def read_only(event, args):
    if event == 'open' and args[0] not in ('/dev/null', os.devnull) and not isinstance(args[0], int):
        writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        writes = event in ('os.mkdir', 'os.rename', 'os.remove', 'os.link', 'os.symlink', 'tempfile.mkdtemp',
                           'tempfile.mkstemp', 'sqlite3.connect')
    if writes and not str(args[0]).startswith(os.environ['TMPDIR']):
        raise OSError(30, 'Read-only file system', str(args[0]))
sys.addaudithook(read_only)
'''
EVERYTHING = READ_ONLY + '''
try:
    open('probe', 'w')
except OSError as e:
    assert e.errno == 30
else:
    raise AssertionError('the hook does nothing')
import timm, torch, vim2, vim2.forecasting
import predict, validate
for name in ('test_vim2', 'test_vmamba', 'test_vim', 'vim2_micro_patch4_64.tiny_imagenet'):
    model = timm.create_model(name, pretrained='.' in name)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), name
vim2.models.TSM2(num_variates=2, lookback=32, horizon=8, d_model=8, depth=1)(torch.randn(2, 32, 2)).sum().backward()
model = ['--model', 'local-dir:' + sys.argv[1] + '/model', '--device', 'cpu', '--json']
for tool, arguments in ((predict, [sys.argv[1] + '/a.png']), (
        validate, ['--dataset', 'npz', '--data-dir', '.', '--split', 'test', '-j', '0'])):
    sys.argv[1:] = arguments + model
    assert not tool.main()
'''


def test_everything_runs_where_nothing_can_be_written(root, folder, tmp_path):
    """No home, no cache, a package that is read-only: models train, tools classify and measure."""
    nowhere = {k: '/dev/null/none' for k in ('HOME', 'XDG_CACHE_HOME', 'HF_HOME', 'TORCH_HOME', 'TRITON_CACHE_DIR',
                                             'MPLCONFIGDIR')}
    (tmp_path / 'tmp').mkdir()
    environment = tool_environment(PYTHONPATH=f'{root}:{root / "tools"}', TMPDIR=str(tmp_path / 'tmp'), **nowhere)
    environment.pop('TORCHINDUCTOR_CACHE_DIR', None)
    write_npz(tmp_path / 'test.npz', [jpeg(colored_image(1, np.random.default_rng(0)))] * 3, [1] * 3)
    before = sorted(tmp_path.iterdir())
    done = subprocess.run([sys.executable, '-B', '-c', EVERYTHING, str(folder)], text=True, capture_output=True,
                          cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert '"results"' in done.stdout and '"count": 3' in done.stdout
    assert sorted(tmp_path.iterdir()) == before and not [p for p in (tmp_path / 'tmp').rglob('*') if p.is_file()]
