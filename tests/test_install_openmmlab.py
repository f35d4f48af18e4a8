"""vim2.install_openmmlab without its eleven minutes of compiling: patching, caching, and what goes wrong."""
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension
from packaging.version import Version

from vim2 import install_openmmlab as tool_module
from vim2.install_openmmlab import Failure

SETUP = """
extra_compile_args = {'cxx': [], 'nvcc': []}
if windows:
    extra_compile_args['cxx'] = ['/std:c++17']
else:
    extra_compile_args['cxx'] = ['-std=c++17']
extra_compile_args['cxx'] = ['-Wall', '-std=c++17']
extra_compile_args['nvcc'] += ['-std=c++14']
"""


def test_the_standard_is_left_to_pytorch():
    patched = tool_module.release_standard(SETUP)
    assert 'std' not in patched
    values = {}
    exec(patched, {'windows': False}, values)
    assert values['extra_compile_args'] == {'cxx': ['-Wall'], 'nvcc': []}
    assert tool_module.release_standard(patched) == patched
    source = Path(torch.utils.cpp_extension.__file__).read_text(encoding='utf-8')
    assert re.search(r"'c\+\+(17|20|23)'", source)  # BuildExtension sets one where a source asks for none


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        tool_module.get_parser().parse_args(['--help'])
    out = capsys.readouterr().out
    assert end.value.code == 0 and 'python -m vim2.install_openmmlab' in out and '--jobs N' in out


@pytest.fixture
def args(tmp_path):
    return tool_module.get_parser().parse_args(['--cache', str(tmp_path / 'cache'), '--device', 'cpu'])


def test_cache_key():
    key = tool_module.cache_key('2.3.6', 'cpu')
    for part in ('mmcv2.3.6', f'torch{torch.__version__}', sys.implementation.cache_tag, '_cpu_'):
        assert part in key
    assert '/' not in key and ' ' not in key
    assert tool_module.cache_key('2.3.7', 'cpu') != key != tool_module.cache_key('2.3.6', 'cuda')


def test_cache_key_knows_torch(monkeypatch):
    key = tool_module.cache_key('2.3.6', 'cpu')
    monkeypatch.setattr(torch, '__version__', '2.99.0+cpu')
    assert tool_module.cache_key('2.3.6', 'cpu') != key


def test_cache_folder(args, monkeypatch, tmp_path):
    assert tool_module.cache_folder(args) == tmp_path / 'cache'
    args.cache = None
    monkeypatch.setenv('VIM2_MMCV_CACHE', str(tmp_path / 'other'))
    assert tool_module.cache_folder(args) == tmp_path / 'other'
    monkeypatch.delenv('VIM2_MMCV_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert tool_module.cache_folder(args) == tmp_path / 'vim2' / 'mmcv'


def test_requirements_are_those_of_the_extra(root):
    text = (root / 'setup.py').read_text(encoding='utf-8')
    extra = re.search(r"'openmmlab': \[(.*?)\]", text, re.S)[1]
    assert tuple(re.findall(r"'(.*?)'", extra)) == tool_module.REQUIREMENTS
    constraints = (root / 'constraints.txt').read_text(encoding='utf-8')
    for requirement in tool_module.REQUIREMENTS:
        name, _, least = requirement.partition('>=')
        assert Version(re.search(rf'^{name}==(\S+)$', constraints, re.M)[1]) >= Version(least)


def test_jobs(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(8)), raising=False)
    pages = {'SC_PAGE_SIZE': 4096, 'SC_AVPHYS_PAGES': int(7e9 / 4096)}
    monkeypatch.setattr(os, 'sysconf', pages.get)
    assert tool_module.default_jobs() == 3  # two GB each
    pages['SC_AVPHYS_PAGES'] = 1000
    assert tool_module.default_jobs() == 1


# --- a build of a source that takes no time ---

def make_sdist(path, setup, files=None):
    with tarfile.open(path, 'w:gz') as tar:
        for name, text in {'setup.py': setup, 'PKG-INFO': 'Name: onedl-mmcv\nVersion: 9.9.9\n',
                           'mmcv/ops/csrc/pytorch/a.cpp': '', 'mmcv/__init__.py': '', **(files or {})}.items():
            data = text.encode()
            info = tarfile.TarInfo(f'onedl_mmcv-9.9.9/{name}')
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


WHEEL = "from setuptools import setup\nflags = ['-std=c++17']\nassert not flags\n" \
        "setup(name='onedl-mmcv', version='9.9.9', packages=['mmcv'])\n"


@pytest.fixture
def no_packages(monkeypatch):
    """No pip install of build requirements; everything else is real."""
    real = tool_module.pip
    monkeypatch.setattr(tool_module, 'pip', lambda *a, **k: None if a[0] == 'install' else real(*a, **k))


def contents(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.name != '.lock')


def test_wheel_is_proved_and_kept(args, tmp_path, monkeypatch, no_packages, capsys):
    args.sdist = str(make_sdist(tmp_path / 'a.tar.gz', WHEEL))  # asserts that the standard was taken out
    proved = []
    monkeypatch.setattr(tool_module, 'prove', lambda device, path: proved.append(contents(path)))
    cache = tmp_path / 'cache'
    wheel = tool_module.build(args, cache, 'cpu')
    assert wheel.parent == cache / tool_module.cache_key('9.9.9', 'cpu') and wheel.name.startswith('onedl_mmcv-9.9.9')
    assert 'mmcv/__init__.py' in proved[0]
    assert contents(cache) == [wheel.parent.name, f'{wheel.parent.name}/{wheel.name}']
    assert 'compiling 1 files of mmcv' in capsys.readouterr().out


@pytest.mark.parametrize('setup, message', [
    ('raise SystemExit("x.cpp:1:1: error: no such thing")', 'the first error: .*no such thing'),
    ('print("fatal: write failed: No space left on device"); raise SystemExit(1)', 'the disk is full'),
    ('print("c++: fatal error: Killed signal terminated program cc1plus"); raise SystemExit(1)', 'try --jobs 1'),
    ('print("g++: error: unrecognized command-line option ‘-std=c++20’"); raise SystemExit(1)', 'too old'),
])
def test_failed_build_leaves_nothing(args, tmp_path, no_packages, setup, message):
    args.sdist = str(make_sdist(tmp_path / 'a.tar.gz', setup))
    with pytest.raises(Failure, match=f'mmcv did not compile: .*{message}.*log: ') as e:
        tool_module.build(args, tmp_path / 'cache', 'cpu')
    assert contents(tmp_path / 'cache') == []
    log = Path(re.search(r'log: (.*)\)', str(e.value))[1])
    assert log.is_file()
    log.unlink()


def test_wheel_that_does_not_work_is_not_kept(args, tmp_path, no_packages):
    """The real proof, of a wheel without operators."""
    args.sdist = str(make_sdist(tmp_path / 'a.tar.gz', WHEEL))
    with pytest.raises(Failure, match='mmcv was compiled, but does not work: .*Error'):
        tool_module.build(args, tmp_path / 'cache', 'cpu')
    assert contents(tmp_path / 'cache') == []


def test_interrupted_build_leaves_nothing(root, tmp_path):
    """SIGTERM while the compilers run: they end, and the cache is empty."""
    marker = tmp_path / 'pid'
    setup = f"import os, time\nopen({str(marker)!r}, 'w').write(str(os.getpid()))\ntime.sleep(120)\n"
    sdist = make_sdist(tmp_path / 'a.tar.gz', setup)
    code = ('import sys; from vim2 import install_openmmlab as t\n'
            't.installed = lambda name: None\n'
            't.install_packages = lambda args: None\n'
            't.pip = lambda *a, **k: None\n'
            'sys.exit(t.main())\n')
    process = subprocess.Popen(
        [sys.executable, '-c', code, '--device', 'cpu', '--sdist', str(sdist), '--cache', str(tmp_path / 'cache')],
        cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))  # as in a shell's background job
    for _ in range(600):
        if marker.exists() and marker.read_text():
            break
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    assert contents(tmp_path / 'cache')
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130 and 'interrupted' in process.stderr.read()
    assert contents(tmp_path / 'cache') == []
    for _ in range(100):
        try:
            os.kill(int(marker.read_text()), 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail('the compiling process is still there')


def test_stale_folders(tmp_path):
    """What a killed build left goes; a build that lives, in whatever container, keeps its folder."""
    (tmp_path / '.build-left').mkdir()
    with tool_module.build_folder(tmp_path) as mine, tool_module.build_folder(tmp_path) as other:
        assert {p.name for p in tmp_path.glob('.build-*')} == {mine.name, other.name}
        (mine / 'build.log').write_text('going on')
    assert contents(tmp_path) == []


# --- what goes wrong ---

def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(Failure, match=r'no C\+\+ compiler: install one .*apt install g\+\+'):
        tool_module.check_tools('cpu', tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(Failure, match=r'no C\+\+ compiler no-such-compiler'):
        tool_module.check_tools('cpu', tmp_path)


def test_no_headers_of_python(tmp_path, monkeypatch):
    monkeypatch.setattr(tool_module.sysconfig, 'get_path', lambda name: str(tmp_path))
    with pytest.raises(Failure, match='headers of Python are not at .*python3-dev'):
        tool_module.check_tools('cpu', tmp_path)


def test_no_nvcc(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.utils.cpp_extension, 'CUDA_HOME', None)
    with pytest.raises(Failure, match='no nvcc: install the CUDA toolkit .* or build for the CPU alone'):
        tool_module.check_tools('cuda', tmp_path)
    monkeypatch.setattr(torch.version, 'cuda', None)
    with pytest.raises(Failure, match='is built without CUDA'):
        tool_module.choose_device('cuda')
    assert tool_module.choose_device('auto') == 'cpu'


def test_no_room(tmp_path, monkeypatch):
    usage = tool_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tool_module.shutil, 'disk_usage', lambda p: usage._replace(free=5e8))
    with pytest.raises(Failure, match='0.5 GB are free at .* needs 1.5: make room'):
        tool_module.check_tools('cpu', tmp_path / 'cache')
    (tmp_path / 'file').write_text('')
    with pytest.raises(Failure, match='cannot write to .*--cache'):
        tool_module.check_tools('cpu', tmp_path / 'file' / 'cache')


def test_no_network(args, tmp_path, monkeypatch):
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    monkeypatch.setenv('PIP_RETRIES', '0')
    for name in ('PIP_EXTRA_INDEX_URL', 'PIP_FIND_LINKS'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    with pytest.raises(Failure, match='cannot fetch the source of onedl-mmcv .*pip says: .*mirror'):
        tool_module.fetch_source(args, tmp_path)


def test_bad_source(args, tmp_path):
    args.sdist = str(tmp_path / 'a.tar.gz')
    Path(args.sdist).write_text('no archive')
    with pytest.raises(Failure, match='cannot unpack'):
        tool_module.fetch_source(args, tmp_path)


def test_upstream_packages(monkeypatch):
    monkeypatch.setattr(tool_module, 'installed', lambda name: '2.1.0' if name in ('mmcv', 'mmdet') else None)
    with pytest.raises(Failure, match='mmcv, mmdet: upstream packages .* pip uninstall mmcv mmdet'):
        tool_module.check_others()


def test_command_line(tool, tmp_path):
    result = tool('vim2.install_openmmlab', '--sdist', tmp_path / 'none.tar.gz')
    assert result.code == 2 and 'there is no file' in result.err
    result = tool('vim2.install_openmmlab', '--jobs', 0)
    assert result.code == 2 and '--jobs must be at least 1' in result.err


def test_installed_already(tool, tmp_path):
    """Nothing is installed, fetched or written where everything works; and the proof is a proof."""
    pytest.importorskip('mmcv.ops', exc_type=ImportError, reason='OpenMMLab is not installed')
    result = tool('vim2.install_openmmlab', '--cache', tmp_path / 'cache', '--device', 'cpu')
    assert result.code == 0 and result.out.startswith('works on cpu: mmengine ') and result.out.count('\n') == 1
    assert not (tmp_path / 'cache').exists()


def test_from_the_cache(tool, tmp_path, monkeypatch):
    folder = tmp_path / tool_module.cache_key(tool_module.MMCV, 'cpu')
    folder.mkdir()
    (folder / 'onedl_mmcv-2.3.6-any.whl').write_text('')
    calls, proofs = [], iter(['no operators', None])
    monkeypatch.setattr(tool_module, 'pip', lambda *a, **k: calls.append(a))
    monkeypatch.setattr(tool_module, 'prove', lambda device, path=None: next(proofs))
    monkeypatch.setattr(tool_module, 'installed', lambda name: '1' if name.startswith('onedl-') else None)
    result = tool('vim2.install_openmmlab', '--cache', tmp_path, '--device', 'cpu')
    assert result.code == 0, result.err
    assert calls == [('install', '--force-reinstall', '--no-deps', str(folder / 'onedl_mmcv-2.3.6-any.whl'))]
    assert 'from the cache' in result.out


def test_operators_that_compute_something_else_are_found(tmp_path):
    """An mmcv whose nms keeps everything does not pass the proof."""
    pytest.importorskip('mmcv.ops', exc_type=ImportError, reason='OpenMMLab is not installed')
    (tmp_path / 'sitecustomize.py').write_text(
        'import torch, mmcv.ops\n'
        'mmcv.ops.nms = lambda boxes, scores, iou_threshold: (torch.cat([boxes, scores[:, None]], 1), '
        'torch.arange(len(boxes)))\n')
    assert 'nms keeps boxes [0, 1, 2] instead of [0, 2]' in tool_module.prove('cpu', tmp_path)
