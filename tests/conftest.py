"""Fixtures of all tests."""
import importlib
import importlib.metadata
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

os.environ['HF_HUB_OFFLINE'] = '1'  # no test reaches for a network; must be set before the hub is imported

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ('red', 'green', 'blue', 'gray')


def _minor(package: str):
    try:
        return tuple(int(number) for number in importlib.metadata.version(package).split('.')[:2])
    except importlib.metadata.PackageNotFoundError:
        return None


needs_interpreter = pytest.mark.skipif(
    (_minor('triton') or (9, 9)) < (3, 7) and _minor('numpy') >= (2, 4),
    reason="the interpreter of Triton before 3.7 does not run with NumPy 2.4, by a fault of Triton's own")


@pytest.fixture(scope='session')
def root() -> Path:
    return ROOT


@pytest.fixture(scope='session')
def shared_data():
    """A function from a name to the folder of that real data set, beside the checkout; skips where there is none."""

    def find(name: str) -> Path:
        path = ROOT.parent / 'shared' / 'data' / name
        if not path.exists():
            pytest.skip(f'needs the real data set {name}, which is not at {path}')
        return path

    return find


def colored_image(label: int, rng: np.random.Generator, size=(32, 32)) -> Image.Image:
    """Noise with the color of its class: learnable in seconds, and no two alike."""
    pixels = rng.integers(0, 160, (*size[::-1], 3))
    if label < 3:
        pixels[..., label] += 90
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=90)
    return file.getvalue()


def write_npz(path: Path, files, labels, classes=CLASSES, override=None) -> Path:
    """The npz format of tools/_images.py, from encoded images; `override` replaces arrays, or leaves them out."""
    arrays = dict(
        data=np.frombuffer(b''.join(files), np.uint8), offsets=np.cumsum([0, *map(len, files)]).astype(np.int64),
        labels=np.asarray(labels, np.uint8), classes=np.array(classes),
        names=np.array([f'{classes[y]}/{i:04d}.jpg' for i, y in enumerate(labels)]))
    arrays.update(override or {})
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


@pytest.fixture(scope='session')
def npz_dir(tmp_path_factory) -> Path:
    """train.npz with 160 images and test.npz with 50: four classes that differ in color."""
    folder = tmp_path_factory.mktemp('npz')
    rng = np.random.default_rng(0)
    for split, n in (('train', 160), ('test', 50)):
        labels = np.arange(n) % 4
        write_npz(folder / f'{split}.npz', [jpeg(colored_image(y, rng)) for y in labels], labels)
    return folder


@pytest.fixture(scope='session')
def folder_dir(tmp_path_factory) -> Path:
    """train/ and val/ with one folder per class, as ImageNet has it; images of several sizes."""
    folder = tmp_path_factory.mktemp('folder')
    rng = np.random.default_rng(1)
    for split, n in (('train', 40), ('val', 22)):
        for i in range(n):
            label = i % 4
            path = folder / split / CLASSES[label] / f'{i:03d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            colored_image(label, rng, size=(40 + i % 3, 36)).save(path)
    return folder


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run a tool's command line in this process: `tool('validate', '--json', …)`."""

    def run(name: str, *args) -> Result:
        import _common
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, args)])
        capsys.readouterr()
        try:
            _common.run(module.main)
        except SystemExit as e:
            code = e.code or 0
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope='session')
def hub_server():
    """A Hub-compatible server on 127.0.0.1."""
    from hub_server import HubServer
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(hub_server, tmp_path, monkeypatch):
    """The server, empty, and this process's huggingface_hub pointed at it, online, with an empty cache."""
    from huggingface_hub import constants
    hub_server.reset()
    # what the environment variables of these names do, which the client reads when it is imported
    for name, value in dict(ENDPOINT=hub_server.url, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_TELEMETRY=True,
                            HUGGINGFACE_CO_URL_TEMPLATE=hub_server.url + '/{repo_id}/resolve/{revision}/{filename}',
                            HF_HUB_CACHE=str(tmp_path / 'cache'),
                            HF_HUB_DISABLE_XET=True, HF_TOKEN_PATH=str(tmp_path / 'no_token')).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv('HF_TOKEN', raising=False)
    return hub_server


def hub_environment(server, cache, **extra) -> dict:
    """The same for another process."""
    return dict(dict(HF_ENDPOINT=server.url, HF_HUB_OFFLINE='0', HF_HOME=str(cache), HF_HUB_DISABLE_XET='1',
                     HF_TOKEN='', HF_HUB_DISABLE_TELEMETRY='1'), **extra)


def tool_environment(**extra) -> dict:
    return {**os.environ, 'OMP_NUM_THREADS': '1', **extra}


@pytest.fixture
def tool_process(root):
    """Run a tool as a process of its own, from another folder than the repository's."""

    def run(name: str, *args, cwd=None, **env) -> Result:
        done = subprocess.run([sys.executable, str(root / 'tools' / f'{name}.py'), *map(str, args)], text=True,
                              capture_output=True, cwd=cwd, env=tool_environment(**env))
        return Result(done.returncode, done.stdout, done.stderr)

    return run
