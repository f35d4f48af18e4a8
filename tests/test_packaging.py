"""What is distributed is complete, and floors stand once."""
import ast
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT, tool_environment


def test_source_distribution_is_complete(tmp_path):
    """Whoever unpacks it can run the tests, build the documentation and use the tools."""
    listed = subprocess.run(['git', '-c', f'safe.directory={ROOT}', 'ls-files'], cwd=ROOT,
                            capture_output=True, text=True)
    files = [f for f in listed.stdout.splitlines() if (ROOT / f).is_file()]
    if listed.returncode or 'setup.py' not in files:
        pytest.skip('needs a clone, whose git knows what belongs to it')
    for file in files:
        (tmp_path / 'clone' / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / 'clone' / file)
    code = f'from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path / 'clone', capture_output=True, text=True,
                          env=tool_environment())
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob('*.tar.gz')
    with tarfile.open(archive) as tar:
        packed = {name.partition('/')[2] for name in tar.getnames()}
        information = tar.extractfile(next(n for n in tar.getnames() if n.count('/') == 1 and n.endswith('PKG-INFO')))
        metadata = information.read().decode()
    assert not set(files) - packed, sorted(set(files) - packed)
    assert 'License-Expression: Apache-2.0' in metadata and 'Author: the vim2 authors' in metadata
    assert 'Project-URL: Paper, https://arxiv.org/abs/2403.19888' in metadata and 'Typing :: Typed' in metadata


def test_the_floors_are_those_that_are_tested():
    setup = (ROOT / 'setup.py').read_text(encoding='utf-8')
    required = ast.literal_eval(re.search(r'install_requires=(\[.*?\])', setup, re.S)[1])
    tested = dict(re.findall(r'^(\S+)==(\S+)$', (ROOT / 'constraints-floor.txt').read_text(encoding='utf-8'), re.M))
    for requirement in required:
        name, floor = requirement.split('>=')
        assert tested[name].startswith(floor), (requirement, tested[name])
    extras = re.findall(r"'(matplotlib|pillow|pyyaml|tqdm|pandas)>=([\d.]+)'", setup)
    for name, floor in extras:
        version = next(v for n, v in tested.items() if n.lower() == name)
        assert version.split('.')[:2] >= floor.split('.')[:2], (name, floor, version)
