"""Packaging of vim2.

A wheel holds the CPU scan's libraries, for one platform and every Python. VIM2_PLATFORM (a key of PLATFORMS in
vim2/ops/cpu/build.py) builds it for another platform than this machine's: `make wheels`.
"""
import os
import re
import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SCAN = runpy.run_path(str(ROOT / 'vim2/ops/cpu/build.py'))
PLATFORM = os.environ.get('VIM2_PLATFORM')
if PLATFORM and PLATFORM not in SCAN['PLATFORMS']:
    raise SystemExit(f"VIM2_PLATFORM={PLATFORM}: choose one of {', '.join(SCAN['PLATFORMS'])}")
TARGET = PLATFORM or SCAN['this_platform']()
LIBRARIES = SCAN['libraries'](TARGET)  # file name: instruction set


class BuildLibraries(build_ext):
    """The scan's libraries take the place of extension modules, which setuptools knows how to install."""

    def get_ext_filename(self, fullname):
        package, _, name = fullname.rpartition('.')
        return os.path.join(*package.split('.'), next(file for file in LIBRARIES if file.startswith(name + '.')))

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name))
        SCAN['compile_library'](LIBRARIES[output.name], output, TARGET)


class PlatformWheel(bdist_wheel):
    """The libraries know neither Python nor torch."""

    def get_tag(self):
        return 'py3', 'none', PLATFORM or super().get_tag()[2]

EXTRAS = {
    # what tools/*.py import beyond the package itself
    'tools': ['matplotlib>=3.7', 'pillow>=10.1', 'pyyaml>=6.0', 'tqdm>=4.60'],
    # detection and segmentation: the maintained forks, which keep the import names mmengine, mmdet and mmseg; mmcv
    # with its compiled operators must be built, because its wheels come without them: vim2/install_openmmlab.py
    'openmmlab': ['onedl-mmengine>=0.10.12', 'onedl-mmdetection>=3.5.1', 'onedl-mmsegmentation>=1.4.2'],
    'export': ['onnx>=1.19', 'onnxscript>=0.5', 'onnxruntime>=1.22'],
    # what tests/test_ecosystem.py shows these models in
    'ecosystem': ['accelerate>=1.0', 'peft>=0.15', 'pytorch-lightning>=2.4', 'segmentation-models-pytorch>=0.5',
                  'transformers>=4.50'],
    # vim2.forecasting; tools/forecast.py needs `tools` as well
    'forecast': ['pandas>=2.2'],
}
EXTRAS['dev'] = EXTRAS['tools'] + EXTRAS['forecast'] + EXTRAS['export'] + EXTRAS['ecosystem'] + [
    'darts>=0.48', 'neuralforecast>=3.3', 'pyarrow>=15.0', 'pytest>=8.0', 'pytest-xdist>=3.6', 'ruff>=0.9',
    'expecttest>=0.2', 'psutil>=5.9', 'hypothesis>=6.100', 'tensorboard>=2.15', 'wandb>=0.18', 'torchao>=0.14',
    'ziglang>=0.14',  # vim2/ops/cpu/build.py
    'mypy>=1.15', 'setuptools>=77',  # make lint, tests/test_packaging.py
    'mkdocs-material>=9.5', 'mkdocstrings[python]>=0.26']  # make docs

# Folders of configs and where a wheel has them; vim2.openmmlab.load_config finds them in both places.
CONFIGS = {f'vim2.configs.{task}{part}': f'{task}/configs{part.replace(".", "/")}'
           for task in ('detection', 'segmentation') for part in ('', '._base_')}

setup(
    name='vim2',
    version=re.search(r"^__version__ = '(.+)'$", (ROOT / 'vim2/__init__.py').read_text(encoding='utf-8'), re.M)[1],
    description='MambaMixer and Vision MambaMixer (ViM2): timm models on a fused selective scan',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='the vim2 authors',
    license_expression='Apache-2.0',
    license_files=['LICENSE'],
    project_urls={'Paper': 'https://arxiv.org/abs/2403.19888'},
    keywords=['mamba', 'mambamixer', 'selective scan', 'vision backbone', 'timm', 'forecasting'],
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: MacOS',
        'Operating System :: Microsoft :: Windows',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: C++',
        'Programming Language :: Python :: 3',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
    packages=find_packages(include=['vim2', 'vim2.*']) + list(CONFIGS),
    package_dir={'vim2': 'vim2', **CONFIGS},
    ext_modules=[Extension('vim2.ops.cpu.' + Path(file).stem, []) for file in LIBRARIES],
    cmdclass={'build_ext': BuildLibraries, 'bdist_wheel': PlatformWheel},
    options={'build': {'build_base': f'build/{PLATFORM}'}} if PLATFORM else {},
    package_data={'vim2.ops.cpu': ['*.cpp', '*.h'],
                  'vim2': ['py.typed', 'weights/*.safetensors', 'weights/*.json', 'weights/*/*.safetensors',
                           'weights/*/*.json']},
    python_requires='>=3.10',
    # `make test-floor` runs the tests of the package with the lowest of these: constraints-floor.txt.
    install_requires=[
        'torch>=2.9',
        'torchvision>=0.24',
        'timm>=1.0.29',
        'numpy>=1.26',
        'filelock>=3.12',
        'safetensors>=0.4.3',
        'huggingface_hub>=1.20',
    ],
    extras_require=EXTRAS,
)
