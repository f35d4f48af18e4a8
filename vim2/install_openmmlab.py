"""Install mmengine, mmdet and mmseg, and mmcv with its compiled operators, for the PyTorch that is installed.

    pip install 'vim2[openmmlab]'
    python -m vim2.install_openmmlab

They are the maintained forks (onedl-*), which keep the import names. mmcv comes without its operators, so its source
is fetched and compiled here, with the C++ standard that PyTorch's headers need; the wheel is kept in a cache by
versions of mmcv, PyTorch, Python and CUDA, and built once. Whatever is in place and works is left as it is.
"""
import argparse
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Dict, Iterator, List, Optional

from filelock import FileLock, Timeout

__all__ = ['Failure', 'main']

MMCV = '2.3.6'
# as setup.py's extra `openmmlab`
REQUIREMENTS = ('onedl-mmengine>=0.10.12', 'onedl-mmdetection>=3.5.1', 'onedl-mmsegmentation>=1.4.2')
BUILD_REQUIREMENTS = ('setuptools>=80', 'wheel', 'packaging>=24.2', 'ninja')
# The other distributions of the same modules: both would write into the same folders.
OTHERS = ('mmengine', 'mmengine-lite', 'mmcv', 'mmcv-lite', 'mmcv-full', 'mmdet', 'mmsegmentation')
CACHE_VARIABLE = 'VIM2_MMCV_CACHE'
SECONDS_PER_FILE = 17  # of one core, measured for a CPU build; CUDA's files take longer
DISK = 1.5e9  # bytes; a CPU build takes 0.4 GB

# nms and roi_align against values worked out by hand. Boxes 1 and 2 overlap by 81 / 119; bilinear interpolation of the
# linear map x + 10 y is exact, so a bin's average is the map at its centre.
PROOF = """
import torch
import mmengine, mmcv, mmdet, mmseg
from mmcv.ops import nms, roi_align
device = {device!r}
boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 11., 11.], [20., 20., 30., 30.]], device=device)
scores = torch.tensor([0.9, 0.8, 0.7], device=device)
kept, indices = nms(boxes, scores, iou_threshold=0.5)
assert indices.tolist() == [0, 2], f'nms keeps boxes {{indices.tolist()}} instead of [0, 2]'
assert torch.allclose(kept[:, 4].cpu(), torch.tensor([0.9, 0.7])), f'nms gives the scores {{kept[:, 4].tolist()}}'
_, indices = nms(boxes, scores, iou_threshold=0.7)
assert indices.tolist() == [0, 1, 2], f'nms keeps boxes {{indices.tolist()}} instead of all three'
y, x = torch.meshgrid(torch.arange(12.), torch.arange(16.), indexing='ij')
maps = (x + 10 * y)[None, None].to(device)
rois = torch.tensor([[0., 2., 1., 10., 9.]], device=device)  # 8 x 8, so bins of 4 x 4 with centres 2 and 6 inside
out = roi_align(maps, rois, (2, 2), 1.0, 2, 'avg', True)[0, 0].cpu()
expected = torch.tensor([[3.5 + 25., 7.5 + 25.], [3.5 + 65., 7.5 + 65.]])
assert torch.allclose(out, expected, atol=1e-4), f'roi_align gives {{out.tolist()}} instead of {{expected.tolist()}}'
print(*(f'{{m.__name__}} {{m.__version__}}' for m in (mmengine, mmcv, mmdet, mmseg)))
"""


class Failure(Exception):
    """What keeps the installation from its end: one line, and exit code 2."""


def _one_line(text: str, limit: int = 400) -> str:
    text = ' '.join(text.split())
    return text if len(text) <= limit else text[:limit - 1] + '…'


def _duration(seconds: float) -> str:
    """`2:03`."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog='python -m vim2.install_openmmlab')
    parser.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto',
                        help='build operators for this; auto: cuda where this PyTorch sees a CUDA device')
    parser.add_argument('--jobs', type=int, metavar='N',
                        help='files compiled at a time (default: one per core, at most one per 2 GB of memory)')
    parser.add_argument('--sdist', metavar='FILE', help=f'source of onedl-mmcv, instead of {MMCV} from the index')
    parser.add_argument('--constraint', '-c', metavar='FILE', help='constraints for pip')
    parser.add_argument('--cache', metavar='DIR',
                        help=f'where built wheels are kept (default: {CACHE_VARIABLE}, else ~/.cache/vim2/mmcv)')
    return parser


# ----------------------------------------------------------------------------------------------------- what is there

def prove(device: str, path: Optional[Path] = None) -> Optional[str]:
    """Run the operators in a process of its own; None if they are right, else the last line of what went wrong.

    `path` is searched for modules first.
    """
    env = dict(os.environ)
    if path:
        env['PYTHONPATH'] = os.pathsep.join([str(path), *filter(None, [env.get('PYTHONPATH')])])
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', PROOF.format(device=device)], env=env, text=True,
                          capture_output=True, cwd=tempfile.gettempdir())  # none of the current folder's modules
    if done.returncode == 0:
        print(f'works on {device}: {done.stdout.strip().splitlines()[-1]}')
        return None
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return lines[-1] if lines else f'ended with {done.returncode}'


def installed(name: str) -> Optional[str]:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_others() -> None:
    found = [name for name in OTHERS if installed(name)]
    if found:
        raise Failure(f'{", ".join(found)}: upstream packages that share folders with the maintained forks, and do '
                        f'not work with this PyTorch; remove them first: pip uninstall {" ".join(found)}')


def pip(*arguments: str, quiet: bool = True, what: str) -> None:
    command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', *arguments]
    if quiet:
        command.insert(4, '-q')
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        if 'No module named pip' in done.stderr:
            raise Failure(f'this Python has no pip: {sys.executable} -m ensurepip')
        lines = [line for line in done.stderr.splitlines() if line.strip() and 'WARNING' not in line]
        raise Failure(f'cannot {what}: pip says: {_one_line(" ".join(lines[-4:]))} (without a '
                        'network, give pip a mirror by PIP_INDEX_URL or PIP_FIND_LINKS)')


def constraints(args: argparse.Namespace) -> List[str]:
    return ['-c', args.constraint] if args.constraint else []


def install_packages(args: argparse.Namespace) -> None:
    """mmengine, mmdet and mmseg, which are Python only, and what they and mmcv import."""
    missing = [r for r in REQUIREMENTS if installed(r.partition('>=')[0]) is None]
    if missing:
        print(f'installing {", ".join(missing)} (about a minute)', flush=True)
        pip('install', *constraints(args), *missing, what=f'install {", ".join(missing)}')


# ------------------------------------------------------------------------------------------------------------- cache

def cache_folder(args: argparse.Namespace) -> Path:
    return Path(args.cache or os.environ.get(CACHE_VARIABLE) or
                Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'vim2' / 'mmcv').expanduser()


def cache_key(version: str, device: str) -> str:
    """Folder of the wheel: all that its binary depends on."""
    import torch
    compiled = {'cpu': 'cpu', 'cuda': f'cuda{torch.version.cuda}'}[device]
    python = f'{sys.implementation.cache_tag}{"t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""}'
    parts = (f'mmcv{version}', f'torch{torch.__version__}', python, compiled, sysconfig.get_platform())
    return '_'.join(re.sub(r'[^\w.+-]', '-', part) for part in parts)


def cached_wheel(folder: Path) -> Optional[Path]:
    wheels = sorted(folder.glob('*.whl'))
    return wheels[0] if wheels else None


@contextmanager
def build_folder(cache: Path) -> Iterator[Path]:
    """A folder to build in, which goes at the end; those that killed builds left are removed first.

    A build holds a lock of the operating system on its folder, which ends with its process. (Process numbers mean
    nothing across containers that share a cache.)
    """
    with FileLock(cache / '.lock'):  # nobody finds the new folder before its lock is held
        for folder in cache.glob('.build-*'):
            stale = FileLock(folder / '.lock')
            try:
                stale.acquire(timeout=0)
            except (Timeout, OSError):
                continue
            shutil.rmtree(folder, ignore_errors=True)
            stale.release()
        work = Path(tempfile.mkdtemp(prefix='.build-', dir=cache))
        lock = FileLock(work / '.lock')
        lock.acquire()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.release()


# ------------------------------------------------------------------------------------------------------------- build

def choose_device(wanted: str) -> str:
    import torch
    if wanted == 'auto':
        return 'cuda' if torch.cuda.is_available() and torch.version.cuda else 'cpu'
    if wanted == 'cuda' and torch.version.cuda is None:
        raise Failure(f'--device cuda: PyTorch {torch.__version__} is built without CUDA; install one with it first')
    return wanted


def check_tools(device: str, cache: Path) -> None:
    """Everything that a build needs, before it begins."""
    compiler = shutil.which(os.environ.get('CXX') or 'c++') or shutil.which('g++') or shutil.which('clang++')
    if compiler is None or (os.environ.get('CXX') and not shutil.which(os.environ['CXX'])):
        raise Failure(f'there is no C++ compiler{" " + os.environ["CXX"] if os.environ.get("CXX") else ""}: install '
                        'one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: '
                        'conda install cxx-compiler), or name it in CXX')
    include = sysconfig.get_path('include')
    if not os.path.isfile(os.path.join(include, 'Python.h')):
        raise Failure(f'the headers of Python are not at {include}: install them (Debian, Ubuntu: apt install '
                        'python3-dev; Fedora: dnf install python3-devel)')
    if device == 'cuda':
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
        if CUDA_HOME is None or not shutil.which('nvcc', path=os.path.join(CUDA_HOME, 'bin')):
            raise Failure(f'no nvcc: install the CUDA toolkit {torch.version.cuda} and name its folder in CUDA_HOME, '
                            'or build for the CPU alone with --device cpu')
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
    except OSError as e:
        raise Failure(f'cannot write to {cache}: {e.strerror or e}: choose another folder with --cache') from None
    if free < DISK:
        raise Failure(f'{free / 1e9:.1f} GB are free at {cache}, the build needs {DISK / 1e9:.1f}: make room, or '
                        'choose another folder with --cache')


def default_jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try:
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES')
    except (ValueError, OSError, AttributeError):
        memory = 4 * 10**9
    return max(1, min(cores, int(memory / 2e9)))


def fetch_source(args: argparse.Namespace, folder: Path) -> Path:
    """The unpacked source of mmcv."""
    archive = args.sdist
    if archive is None:
        print(f'fetching the source of onedl-mmcv {MMCV}', flush=True)
        pip('download', '--no-deps', '--no-build-isolation', '--no-binary', 'onedl-mmcv', '-d', str(folder),
            f'onedl-mmcv=={MMCV}', what=f'fetch the source of onedl-mmcv {MMCV}')
        found = sorted(folder.glob('*.tar.gz'))
        if not found:
            raise Failure(f'pip has no source of onedl-mmcv {MMCV}: give the archive with --sdist')
        archive = found[0]
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder / 'source', filter='data')
    except (OSError, tarfile.TarError) as e:
        raise Failure(f'cannot unpack {archive}: {_one_line(str(e))}') from None
    roots = sorted((folder / 'source').glob('*/setup.py'))
    if len(roots) != 1:
        raise Failure(f'{archive} is no source of mmcv: it has no setup.py')
    return roots[0].parent


def release_standard(source: str) -> str:
    """mmcv's setup.py without the C++ standard that it asks for; PyTorch's BuildExtension then sets its own."""
    return re.sub(r"""(['"])[-/]std[:=]c\+\+\w+\1(,\s*)?""", '', source)


def sources_to_compile(root: Path, device: str) -> int:
    base = root / 'mmcv' / 'ops' / 'csrc' / 'pytorch'
    patterns = ['*.cpp', 'cpu/*.cpp'] + (['cuda/*.cu', 'cuda/*.cpp'] if device == 'cuda' else [])
    return sum(len(list(base.glob(pattern))) for pattern in patterns)


def source_version(root: Path) -> str:
    match = re.search(r'^Version: (\S+)', (root / 'PKG-INFO').read_text(encoding='utf-8'), re.M)
    return match[1] if match else MMCV


def build_environment(device: str, jobs: int) -> Dict[str, str]:
    env = dict(os.environ, MMCV_WITH_OPS='1', MAX_JOBS=str(jobs), FORCE_CUDA='1' if device == 'cuda' else '0')
    if device == 'cpu':
        env['CUDA_VISIBLE_DEVICES'] = ''  # setup.py compiles for CUDA wherever it sees a device
    env['PATH'] = os.pathsep.join([os.path.dirname(sys.executable), env.get('PATH', '')])  # ninja
    return env


def show_progress(root: Path, total: int, done: threading.Event) -> None:
    """A line for every tenth of the files."""
    start, shown = time.monotonic(), 0
    while not done.wait(2):
        count = sum(1 for _ in (root / 'build').rglob('*.o'))
        if count * 10 // total > shown * 10 // total:
            shown, gone = count, time.monotonic() - start
            print(f'compiled {count} of {total} files in {_duration(gone)}, about '
                  f'{_duration(gone / count * (total - count))} left', flush=True)


def compile_wheel(root: Path, out: Path, log: Path, device: str, jobs: int) -> Path:
    total = sources_to_compile(root, device)
    estimate = total * SECONDS_PER_FILE / jobs
    print(f'compiling {total} files of mmcv, {jobs} at a time: about {_duration(estimate)}'
          + (', several times that for CUDA' if device == 'cuda' else '') + f'; log: {log}', flush=True)
    done = threading.Event()
    watcher = threading.Thread(target=show_progress, args=(root, total, done), daemon=True)
    start = time.monotonic()
    with open(log, 'w', encoding='utf-8') as f:
        process = subprocess.Popen(
            [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'wheel', '-v', '--no-deps',
             '--no-build-isolation', '-w', str(out), str(root)],
            stdout=f, stderr=subprocess.STDOUT, env=build_environment(device, jobs), start_new_session=True)
        watcher.start()
        try:
            code = process.wait()
        finally:
            done.set()
            if process.poll() is None:  # interrupted: the compilers go too
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    wheel = cached_wheel(out)
    if code or wheel is None:
        raise Failure(compile_error(log.read_text(encoding='utf-8', errors='replace'), log))
    print(f'compiled in {_duration(time.monotonic() - start)}', flush=True)
    return wheel


def compile_error(text: str, log: Path) -> str:
    """One line for a build that failed, from its log."""
    hints = [
        (r'No space left on device', 'the disk is full: make room, or choose another folder with --cache'),
        (r'Killed signal|internal compiler error: Killed|out of memory|Killed\b',
         'the compiler ran out of memory: try --jobs 1'),
        (r'unrecognized command.line option .?-std=c\+\+|requires C\+\+\d\d|need a C\+\+\d\d compiler|'
         r'You need C\+\+\d\d',
         'the compiler is too old for this PyTorch: install GCC 11 or newer, and name it in CXX'),
        (r'CUDA version .* mismatches|The detected CUDA version', "the CUDA toolkit is not PyTorch's: install the one "
         'that the log names, or build for the CPU alone with --device cpu'),
    ]
    kept = Path(tempfile.gettempdir()) / f'vim2-mmcv-build-{os.getpid()}.log'
    shutil.copyfile(log, kept)
    hint = next((say for pattern, say in hints if re.search(pattern, text)), None)
    if hint is None:
        errors = [line.strip() for line in text.splitlines() if re.search(r'\berror\b', line, re.I)]
        hint = 'the first error: ' + _one_line(errors[0] if errors else 'none in the log', 300)
    return f'mmcv did not compile: {hint} (log: {kept})'


def build(args: argparse.Namespace, cache: Path, device: str) -> Path:
    """Fetch, compile, prove and keep the wheel; the cache gets all of it or nothing."""
    check_tools(device, cache)
    with build_folder(cache) as work:
        pip('install', *constraints(args), *BUILD_REQUIREMENTS, what=f'install {", ".join(BUILD_REQUIREMENTS)}')
        root = fetch_source(args, work)
        setup = root / 'setup.py'
        setup.write_text(release_standard(setup.read_text(encoding='utf-8')), encoding='utf-8')
        wheel = compile_wheel(root, work / 'wheel', work / 'build.log', device, args.jobs or default_jobs())
        shutil.unpack_archive(wheel, work / 'unpacked', 'zip')
        problem = prove(device, work / 'unpacked')
        if problem:
            raise Failure(f'mmcv was compiled, but does not work: {problem}')
        folder = cache / cache_key(source_version(root), device)
        shutil.rmtree(folder, ignore_errors=True)  # without a wheel, or this would not run
        try:
            os.rename(work / 'wheel', folder)
        except OSError:  # another process was as fast
            if cached_wheel(folder) is None:
                raise
        kept = cached_wheel(folder)
        assert kept is not None, f'{folder} holds no wheel'
        return kept


# -------------------------------------------------------------------------------------------------------------- main

def main() -> int:
    """The command line; its exit code."""
    args = get_parser().parse_args()
    try:
        install(args)
    except Failure as e:
        print(f'install_openmmlab: error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('install_openmmlab: interrupted', file=sys.stderr)
        return 130
    return 0


def install(args: argparse.Namespace) -> None:
    if args.jobs is not None and args.jobs < 1:
        raise Failure(f'--jobs must be at least 1, got {args.jobs}')
    for path in (args.sdist, args.constraint):
        if path and not os.path.isfile(path):
            raise Failure(f'there is no file {path}')
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise Failure('PyTorch is not installed: mmcv is compiled for the one that is; pip install torch') from None
    if platform.system() == 'Windows':
        raise Failure('mmcv is not built on Windows here: use WSL')
    device = choose_device(args.device)
    if all(installed(r.partition('>=')[0]) for r in REQUIREMENTS) and prove(device) is None:
        return
    check_others()
    install_packages(args)
    cache = cache_folder(args)
    wheel = cached_wheel(cache / cache_key(MMCV, device)) if args.sdist is None else None
    if wheel:
        print(f'from the cache: {wheel}')
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: what was begun is removed
        wheel = build(args, cache, device)
        print(f'kept in the cache: {wheel}')
    pip('install', '--force-reinstall', '--no-deps', str(wheel), what=f'install {wheel}')
    problem = prove(device)
    if problem:
        raise Failure(f'mmcv from {wheel} does not work here: {problem}; remove its folder to build it anew')


if __name__ == '__main__':
    sys.exit(main())
