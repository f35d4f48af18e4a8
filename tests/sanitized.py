"""Runs tests of the scan with its C++ library under AddressSanitizer and UBSan (make sanitize).

    python tests/sanitized.py [PYTEST ARGUMENTS]      default: tests/test_ops.py tests/test_ops_cpu.py

A copy of the package gets libraries that GCC compiles with both; the sanitizer's runtime is loaded before Python, so
that it watches the memory of torch's tensors too. The first error ends the run with a report.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, Optional

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = 'g++ -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g'


def missing() -> Optional[str]:
    """What keeps the sanitizers from running here, in words."""
    if sys.platform != 'linux':
        return 'the sanitizers are run on Linux'
    if shutil.which('g++') is None:
        return 'needs GCC (apt-get install g++)'
    return None if os.path.isabs(_runtime('libasan.so')) else "needs GCC's AddressSanitizer (libasan)"


def _runtime(name: str) -> str:
    return subprocess.run(['g++', f'-print-file-name={name}'], capture_output=True, text=True).stdout.strip()


def prepare(folder: Path, isa: str) -> Dict[str, str]:
    """Copy the package to `folder` and compile its library there; the environment in which to use it."""
    shutil.copytree(ROOT / 'vim2', folder / 'vim2', ignore=shutil.ignore_patterns('*.so', '__pycache__'))
    code = (f'import sys; sys.path.insert(0, {str(folder / "vim2" / "ops" / "cpu")!r}); import build; '
            'build.FLAGS = [f for f in build.FLAGS if f != "-O3"] + ["-O1"]; '  # at -O3 it takes minutes to compile
            f'build.compile_library({isa!r}, build.FOLDER / {f"scan_{isa}.so"!r}, build.this_platform())')
    subprocess.run([sys.executable, '-c', code], check=True, env=dict(os.environ, CXX=SANITIZE))
    return dict(
        os.environ, PYTHONPATH=str(folder), VIM2_SCAN_ISA=isa, OMP_NUM_THREADS='2',
        LD_PRELOAD=' '.join(_runtime(name) for name in ('libasan.so', 'libubsan.so', 'libstdc++.so')),
        # Python and torch leave memory to the end of the process; the linker's own symbols are not of interest
        ASAN_OPTIONS='detect_leaks=0,abort_on_error=0,exitcode=99', UBSAN_OPTIONS='print_stacktrace=1')


def best_isa() -> str:
    import torch
    capability = torch.backends.cpu.get_cpu_capability()
    return next((isa for isa in ('avx512', 'avx2') if capability.startswith(isa.upper())), 'baseline')


def main() -> int:
    problem = missing()
    if problem:
        print(f'sanitized.py: {problem}', file=sys.stderr)
        return 2
    arguments = sys.argv[1:] or [str(ROOT / 'tests' / name) for name in ('test_ops.py', 'test_ops_cpu.py')]
    with tempfile.TemporaryDirectory() as folder:
        env = prepare(Path(folder), os.environ.get('VIM2_SCAN_ISA') or best_isa())
        # in that folder: Python looks for the package in the working directory first
        return subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-c',
                               str(ROOT / 'pyproject.toml'), *(os.path.abspath(a) if os.path.exists(a) else a
                                                               for a in arguments)], env=env, cwd=folder).returncode


if __name__ == '__main__':
    sys.exit(main())
