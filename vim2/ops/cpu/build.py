"""Builds the libraries of the CPU scan, one per instruction set: setup.py does so when vim2 is installed.

    python vim2/ops/cpu/build.py [PLATFORM]   beside their sources, for this machine: after each change of a checkout

The compiler is Zig's Clang (`pip install ziglang`), which compiles for every platform on every platform; the
environment variable CXX names another one (GCC 12 or later, Clang 15 or later), for this machine.
"""
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Dict, Optional

FOLDER = Path(__file__).resolve().parent
FLAGS = ('-std=c++17 -O3 -fPIC -shared -fvisibility=hidden -fno-exceptions -fno-rtti -fno-math-errno '
         '-fno-trapping-math -ffp-contract=fast -w').split()

_X86 = {'avx512': 'x86_64_v4', 'avx2': 'x86_64_v3', 'baseline': 'x86_64'}
PLATFORMS = {  # wheels' names of platforms: Zig's target, the suffix of libraries, processor by instruction set
    'manylinux_2_17_x86_64': ('x86_64-linux-gnu.2.17', '.so', _X86),
    'manylinux_2_17_aarch64': ('aarch64-linux-gnu.2.17', '.so', {'neon': 'generic'}),
    'macosx_11_0_arm64': ('aarch64-macos.11.0', '.dylib', {'neon': 'apple_m1'}),
    'win_amd64': ('x86_64-windows-gnu', '.dll', _X86),
}


def version() -> int:
    """A number that the libraries carry: they belong to these sources or are not loaded."""
    sources = (FOLDER / name for name in ('vectors.h', 'scan.cpp'))
    return zlib.crc32(b''.join(source.read_bytes().replace(b'\r\n', b'\n') for source in sources))


def this_platform() -> Optional[str]:
    """The key of PLATFORMS for this machine, or None: libraries then need CXX, and a wheel fits no other machine."""
    return {('linux', 'x86_64'): 'manylinux_2_17_x86_64', ('linux', 'aarch64'): 'manylinux_2_17_aarch64',
            ('darwin', 'arm64'): 'macosx_11_0_arm64', ('win32', 'AMD64'): 'win_amd64',
            }.get((sys.platform, platform.machine()))


def libraries(target: Optional[str]) -> Dict[str, str]:
    """The libraries' file names for a platform, and the instruction set of each."""
    _, suffix, processors = PLATFORMS[target] if target else ('', '.so', {'baseline': None})
    return {f'scan_{isa}{suffix}': isa for isa in processors}


def compile_library(isa: str, output: Path, target: Optional[str], source: Path = FOLDER / 'scan.cpp') -> None:
    """Compile for one instruction set of a platform (a key of PLATFORMS); `output` appears when it is whole.

    Raises:
        SystemExit: there is no compiler, or it failed.
    """
    triple, _, processors = PLATFORMS[target] if target else ('', '.so', {'baseline': None})
    processor = processors[isa]
    if os.environ.get('CXX'):
        if target != this_platform():
            raise SystemExit(f'CXX compiles for this machine alone: unset it to build for {target}')
        march = [f"-march={processor.replace('_', '-')}"] if processor and processor.startswith('x86') else []
        command = shlex.split(os.environ['CXX']) + march
    elif importlib.util.find_spec('ziglang') and target:
        command = [sys.executable, '-m', 'ziglang', 'c++', '-target', triple, f'-mcpu={processor}', '-nostdlib++',
                   '-fno-sanitize=all', '-s']
    else:
        raise SystemExit('no C++ compiler for the CPU scan: pip install ziglang, or name one by CXX (CXX=g++)')
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder, output.name)
        done = subprocess.run([*command, *FLAGS, f'-DVERSION={version()}', f'-I{FOLDER}', str(source), '-o', str(made)])
        if done.returncode:
            raise SystemExit(f'building {output.name} failed: {shlex.join(done.args)}')
        made.replace(output)


if __name__ == '__main__':
    target = sys.argv[1] if len(sys.argv) > 1 else this_platform()
    for name, isa in libraries(target).items():
        compile_library(isa, FOLDER / name, target)
        print(FOLDER / name)
