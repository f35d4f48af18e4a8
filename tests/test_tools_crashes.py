"""Tools that die at any of their file operations: what is there afterwards is whole, old or new, or not there."""
import io
import os
import resource
import sys
import traceback

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from test_convert_vmamba import OPTIONS, random_vmamba

import _common as common
import convert_vmamba
import export
import forecast
import push_to_hub
import train
from vim2.export import FORMATS

OPERATIONS = ('replace', 'rename', 'link', 'fsync', 'unlink')


def run_dying_at(number, main, arguments):
    """Run a tool in a forked process that ends, as by SIGKILL, before its file operation `number`; its exit code, 9 if
    it died."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:  # the child: nothing of pytest may run after this
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        count = 0

        def counted(operation):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > number:
                    os._exit(9)
                return operation(*args, **kwargs)
            return call

        for name in OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        torch.set_num_threads(1)
        sys.argv = [main.__module__, *map(str, arguments)]
        sys.stdout = open(1, 'w', closefd=False)
        code = main() or 0
        os._exit(code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def die_everywhere(main, arguments, check, most=80):
    """Die before each file operation in turn; `check` gets whether the tool came to its end."""
    for number in range(most):
        code = run_dying_at(number, main, arguments(number))
        assert code in (0, 9), code
        check(number, code == 0)
        if code == 0:
            assert number > 1
            return
    raise AssertionError(f'more than {most} file operations')


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module', autouse=True)
def registered():
    common.register_models()
    torch.set_num_threads(1)  # before the forks


def whole_or_absent(main, arguments, tmp_path):
    done = []

    def check(number, ended):
        out = tmp_path / f'out{number}'
        if out.exists():
            done.append(contents(out))
        assert out.exists() or not ended

    die_everywhere(main, lambda number: [*arguments, '--out', tmp_path / f'out{number}'], check)
    assert all(d == done[0] for d in done), [set(d) for d in done]


def test_conversion(tmp_path):
    torch.save(random_vmamba(), tmp_path / 'vmamba.pth')
    whole_or_absent(convert_vmamba.main, [tmp_path / 'vmamba.pth', *OPTIONS], tmp_path)


def test_push_to_hub(tmp_path):
    model = timm.create_model('test_vit', num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    whole_or_absent(push_to_hub.main, [tmp_path / 'weights.pth', '--model', 'test_vit', '--license', 'mit', '--repo',
                                       'org/name', '--dry-run'], tmp_path)


def test_export_over_an_older_one(tmp_path):
    """A reader never finds one model's weights with another's classes."""
    models = {}

    def export(number, seed, name):
        torch.manual_seed(seed)
        run = train.Run(str(tmp_path / f'run{number}'), None)
        run.export(timm.create_model('test_vit', num_classes=3), [f'{name} {i}' for i in range(3)], None)

    for seed, name in ((1, 'old'), (2, 'new')):
        (tmp_path / f'run{name}').mkdir()
        export(name, seed, name)
        models[name] = contents(tmp_path / f'run{name}' / 'model')

    def main():
        export(sys.argv[1], 2, 'new')

    def arguments(number):
        (tmp_path / f'run{number}').mkdir()
        export(number, 1, 'old')
        return [number]

    absent = []

    def check(number, ended):
        folder = tmp_path / f'run{number}' / 'model'
        if not folder.exists():
            absent.append(number)
            return
        assert contents(folder) in (([models['new']]) if ended else list(models.values()))

    die_everywhere(main, arguments, check)
    assert len(absent) <= 2  # between the two renames that exchange the folders


def test_exported_files(tmp_path):
    """tools/export.py: the file of before, or a complete one."""
    weights, complete = tmp_path / 'weights.pth', []
    torch.save(timm.create_model('test_vit').state_dict(), weights)

    def arguments(number):
        out = tmp_path / f'{number}.pt2'
        out.write_bytes(b'older')
        return ['test_vit', '--checkpoint', weights, '--static', '--format', 'torch', '--output', out]

    def check(number, ended):
        data = (tmp_path / f'{number}.pt2').read_bytes()
        assert not ended or data != b'older'
        if data != b'older':
            torch.export.load(io.BytesIO(data))
            complete.append(number)

    die_everywhere(export.main, arguments, check)
    assert complete


SERIES = ['--lookback', 32, '--model-kwargs', 'patch_len=8', 'stride=8', 'd_model=8', 'd_state=2', '--steps', 2,
          '--batch-size', 4, '--patience', 0, '--device', 'cpu', '--horizon', 8, '--epochs', 2]


@pytest.fixture(scope='module')
def series(tmp_path_factory):
    path = tmp_path_factory.mktemp('series') / 'x.csv'
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.standard_normal((200, 2)), pd.date_range('2020-01-01', periods=200, freq='h', name='date'),
                         ['a', 'b'])
    frame.to_csv(path)
    return path


def test_forecast_fit_goes_on_to_the_same_model(tmp_path, series, tool):
    whole = tool('forecast', 'fit', series, *SERIES, '--output', tmp_path / 'whole')
    assert whole.code == 0, whole.err
    want = contents(tmp_path / 'whole' / 'model')
    resumed = []

    def check(number, ended):
        if not ended and number % 3:
            return  # each continuation takes as long as the run
        result = tool('forecast', 'fit', series, *SERIES, '--output', tmp_path / f'run{number}', '--resume')
        assert result.code == 0, result.err
        assert contents(tmp_path / f'run{number}' / 'model') == want
        resumed.append(number)

    die_everywhere(forecast.main, lambda number: ['fit', series, *SERIES, '--output', tmp_path / f'run{number}'], check)
    assert len(resumed) > 2


def test_full_disks(tmp_path, tool, series):
    """One line that names the file, exit code 2, nothing left over."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = timm.create_model('test_vit', num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    torch.save(random_vmamba(), tmp_path / 'vmamba.pth')
    before = set(tmp_path.iterdir())
    for name, arguments, limit in (
            ('push_to_hub', (tmp_path / 'weights.pth', '--model', 'test_vit', '--license', 'mit', '--repo', 'org/name',
                             '--dry-run', '--out', tmp_path / 'hub'), 4096),
            ('convert_vmamba', (tmp_path / 'vmamba.pth', *OPTIONS, '--out', tmp_path / 'converted'), 4096),
            *(('export', ('test_vit', '--checkpoint', tmp_path / 'weights.pth', '--num-classes', 3, '--static',
                          '--format', format, '--output', tmp_path / f'out.{format}'), 4096) for format in FORMATS),
            ('forecast', ('fit', series, *SERIES, '--output', tmp_path / 'forecast'), 4096)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            result = tool(name, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        lines = [line for line in result.err.strip().splitlines() if not line.startswith('warning: ')]
        assert result.code == 2 and len(lines) == 1, (name, result.err)
        assert 'File too large' in result.err and 'cannot write' in result.err, result.err
    assert set(tmp_path.iterdir()) - before <= {tmp_path / 'forecast'}  # the run's folder, without a model
    assert {p.name for p in (tmp_path / 'forecast').rglob('*')} <= {'.lock', 'args.json'}
