"""What README.md promises runs as it stands there; and so does the demo, with the bundled weights."""
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from conftest import tool_environment

from _common import register_models



def blocks(root, language):
    return re.findall(rf'^```{language}\n(.*?)^```$', (root / 'README.md').read_text(encoding='utf-8'), re.M | re.S)


@pytest.mark.parametrize('number, expected', [
    (0, r'\A\w+ cat +\d+\.\d%\n(\S.* +\d+\.\d%\n){4}\Z'),  # five labels with probabilities
    (1, r'\A96 4 .*64, 48\)\n192 8 .*\n384 16 .*\n768 32 .*8, 6\)\n\Z'),  # four maps
    (2, r'\A\Z'),
], ids=['classify', 'backbone', 'scan'])
def test_python_examples(root, tmp_path, number, expected):
    examples = blocks(root, 'python')
    assert len(examples) == 3
    shutil.copy(root / 'tools' / 'assets' / 'chelsea.jpg', tmp_path / 'photo.jpg')
    done = subprocess.run([sys.executable, '-c', examples[number]], cwd=tmp_path, capture_output=True, text=True,
                          env=tool_environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(expected, done.stdout), done.stdout


def test_commands_have_only_real_options(root):
    text = '\n'.join(blocks(root, 'bash')).replace('\\\n', ' ')
    commands = [line for line in text.splitlines() if 'tools/' in line and not line.lstrip().startswith('#')]
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command)
        at = next(i for i, w in enumerate(words) if w.startswith('tools/'))
        parser = importlib.import_module(words[at][6:-3]).get_parser()
        args = parser.parse_args(words[at + 1:])  # an unknown option ends the test
        for path in (getattr(args, 'config', None), *getattr(args, 'inputs', ())):
            assert path is None or (root / path).exists(), command


def test_table_of_models(root):
    register_models()
    rows = re.findall(r'^\| `(\S+)` \| ([\d.]+) M \| (\d+) \|', (root / 'README.md').read_text(encoding='utf-8'), re.M)
    assert {name for name, _, _ in rows} == set(timm.list_models('*vim2*', exclude_filters='vit*'))
    for name, parameters, size in rows:
        with torch.device('meta'):
            model = timm.create_model(name)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert abs(count - float(parameters)) <= 0.5 * 10 ** -len(parameters.partition('.')[2]), (name, count)
        assert model.pretrained_cfg['input_size'][1] == int(size)


def test_demo(root, tool, tmp_path):
    makefile = (root / 'Makefile').read_text(encoding='utf-8')
    recipe = re.search(r'^demo:.*\n\t.*?tools/predict.py (.*)$', makefile, re.M)[1].split()
    arguments = [str(root / word) if word.startswith('tools/') else word for word in recipe]
    arguments[arguments.index('demo_output')] = str(tmp_path)
    result = tool('predict', *arguments, '--json')
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report['model'] == 'vim2_micro_patch4_64.tiny_imagenet' and len(report['results']) == 1
    predictions = report['results'][0]['predictions']
    assert len(predictions) == 5 and 'cat' in predictions[0]['label']  # a real photograph of a cat
    assert predictions[0]['probability'] > 0.3
    assert (tmp_path / 'chelsea.png').stat().st_size > 10_000
    table = tool('predict', *arguments)
    assert table.code == 0 and all(p['label'] in table.out for p in predictions)
