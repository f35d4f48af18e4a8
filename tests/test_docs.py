"""The documentation: what it says runs as it stands there, and the site has no broken link."""
import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, tool_environment

from _common import register_models

PAGES = sorted(str(p.relative_to(ROOT)) for p in (
    ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), ROOT / 'detection' / 'README.md',
    ROOT / 'segmentation' / 'README.md'))

# Python blocks that need what is not here, and the test that does the same with a stand-in
ELSEWHERE = {
    ('docs/conversion.md', 0): 'test_convert_vmamba.py::test_peer_through_pretrained',
    ('docs/ecosystem.md', 0): 'test_ecosystem.py::test_transformers',
    ('docs/ecosystem.md', 1): 'test_ecosystem.py::test_peft',
    ('docs/ecosystem.md', 2): 'test_ecosystem.py::test_segmentation_models_pytorch',
    ('docs/export.md', 0): 'test_export.py::test_onnx_in_a_process_without_vim2',
    ('docs/export.md', 1): 'test_export.py::test_program',
    ('docs/export.md', 2): 'test_export.py::test_compiled_by_aotinductor',
    ('docs/forecasting.md', 0): 'test_forecasting.py',
    ('docs/forecasting.md', 2): 'test_forecasting_adapters.py',
    ('docs/hub.md', 0): 'test_hub.py',
}
# what a page's blocks begin with, where the page has said it in words
BEFORE = {'docs/conversion.md': 'import timm, vim2\nfrom vim2.models import VisionMambaMixer\n'}
# downloads
INSTEAD = {'docs/models.md': [('pretrained=True', 'pretrained=False')]}
# of OpenMMLab's configs
CONFIGS = {'detection/README.md': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
           'segmentation/README.md': 'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'}


def blocks(page, language):
    return re.findall(rf'^```{language}\n(.*?)^```$', (ROOT / page).read_text(encoding='utf-8'), re.M | re.S)


@pytest.fixture
def folder(tmp_path, folder_dir):
    """A clone as a newcomer has it, with a photograph and folders of pictures."""
    for name in ('tools', 'docs', 'detection', 'segmentation'):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / 'tools' / 'assets' / 'chelsea.jpg', tmp_path / 'photo.jpg')
    shutil.copytree(folder_dir, tmp_path / 'photos')
    (tmp_path / 'classes.json').write_text('{"red": 17, "green": 18, "blue": 19, "gray": 20}')
    return tmp_path


def run_python(code, cwd):
    done = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True, env=tool_environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('page', [p for p in PAGES if blocks(p, 'python') and p not in CONFIGS])
def test_python_blocks(page, folder):
    examples = blocks(page, 'python')
    code = ''.join(e for i, e in enumerate(examples) if (page, i) not in ELSEWHERE)
    for i in range(len(examples)):
        if (page, i) in ELSEWHERE:
            ast.parse(examples[i])
            file, _, test = ELSEWHERE[page, i].partition('::')
            assert f'def {test or "test_"}' in (ROOT / 'tests' / file).read_text(encoding='utf-8')
    for old, new in INSTEAD.get(page, ()):
        assert old in code
        code = code.replace(old, new)
    if code:
        out = run_python(BEFORE.get(page, '') + code, folder)
    if page == 'README.md':
        assert re.fullmatch(r'\w+ cat +\d+\.\d%\n(\S.* +\d+\.\d%\n){4}'
                            r'96 4 .*64, 48\)\n192 8 .*\n384 16 .*\n768 32 .*8, 6\)\n', out), out
    if page == 'docs/classification.md':
        assert out == 'cat\n'


@pytest.mark.parametrize('page', list(CONFIGS))
def test_configs_in_the_readmes(page, tmp_path):
    openmmlab = pytest.importorskip('vim2.openmmlab', reason='needs OpenMMLab', exc_type=ImportError)
    from mmengine.registry import MODELS
    (example,) = blocks(page, 'python')
    (tmp_path / 'config.py').write_text(f'_base_ = {CONFIGS[page]!r}\n{example}')
    config = openmmlab.load_config(str(tmp_path / 'config.py'))
    backbone = MODELS.build(config.model.backbone)
    channels = [info['num_chs'] for info in backbone.net.feature_info]
    assert channels == (config.model.get('neck') or config.model.decode_head).in_channels
    assert config.optim_wrapper.constructor == 'MambaOptimWrapperConstructor'


def commands(page):
    """The command lines of a page: of its bash blocks, and those that are indented."""
    text = (ROOT / page).read_text(encoding='utf-8')
    lines = '\n'.join([*blocks(page, 'bash'), *re.findall(r'^ {4,}(\S.*)$', text, re.M)]).replace('\\\n', ' ')
    return [line for line in lines.splitlines() if re.search(r'(?:^|\s)tools/\w+\.py', line) and line[0] not in '#|'
            and not re.search(r'# [0-9a-f]{7,}$', line)]  # of an earlier commit


@pytest.mark.parametrize('page', [p for p in PAGES if commands(p)])
def test_commands_have_only_real_options(page):
    for command in commands(page):
        words = shlex.split(command, comments=True)
        at = next(i for i, w in enumerate(words) if re.fullmatch(r'tools/\w+\.py', w))
        tool, arguments = words[at], words[at + 1:]
        assert (ROOT / tool).is_file(), command
        module = importlib.import_module(Path(tool).stem)
        if not hasattr(module, 'get_parser'):  # by subcommands: at least the names are there
            source = (ROOT / tool).read_text(encoding='utf-8')
            assert all(f"'{w.partition('=')[0]}'" in source for w in arguments if w.startswith('--')), command
            continue
        arguments = ['1' if w in ('N', 'H', 'W') else w for w in arguments if w != '…']
        if '--' in arguments:  # tools/ablation.py: the rest is for tools/train.py
            arguments, rest = arguments[:arguments.index('--')], arguments[arguments.index('--') + 1:]
            importlib.import_module('train').get_parser().parse_args(rest)
        args = module.get_parser().parse_args(arguments)  # an unknown option ends the test
        config = getattr(args, 'config', None)
        if isinstance(config, str) and config.endswith('.yaml'):
            assert (ROOT / config).exists(), command


@pytest.mark.parametrize('page', PAGES)
def test_named_targets_and_tests_exist(page):
    text = (ROOT / page).read_text(encoding='utf-8')
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.M))
    for target in re.findall(r'(?:^|`)make ([a-z-]+)', text, re.M):
        assert target in targets, f'make {target}'
    for path in re.findall(r'\b(?:tests|tools|detection|segmentation|vim2)/[\w./-]+\.(?:py|yaml|json|jpg|cpp)\b', text):
        if not path.startswith('tools/convert_'):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize('page', ['docs/classification.md', 'docs/fine-tuning.md'])
def test_tutorial(page, folder):
    """Every command, in this order, as it stands there; trainings for one epoch."""
    for command in (c for b in blocks(page, 'bash') for c in b.replace('\\\n', ' ').splitlines() if c[0] != '#'):
        words = shlex.split(command)
        assert words[0] == 'python'
        if words[1] == 'tools/train.py':
            words += ['--epochs', '1', '--warmup-epochs', '0', '--workers', '0', '--device', 'cpu', '--batch-size', '8']
        done = subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True,
                              env=tool_environment())
        assert done.returncode == 0, f'{command}\n{done.stdout}{done.stderr}'
    if page == 'docs/classification.md':
        assert (folder / 'annotated' / 'chelsea.png').stat().st_size > 10_000
    else:
        assert 'red' in json.loads((folder / 'output/train/photos/model/config.json').read_text())['label_names']


@pytest.mark.parametrize('page', ['README.md', 'detection/README.md', 'segmentation/README.md'])
def test_every_option_of_a_readme_is_run_by_a_test(page):
    """But for those of torchrun, slurm and pip."""
    text = (ROOT / page).read_text(encoding='utf-8').replace('\\\n', ' ')
    lines = [re.sub(r'^\s*(srun|torchrun|pip|make) .*?(?= tools/|$)', '', line) for line in text.splitlines()]
    options = set(re.findall(r'(?<![\w-])--[a-z][a-z0-9-]+', '\n'.join(lines)))
    tests = '\n'.join(path.read_text(encoding='utf-8') for path in (ROOT / 'tests').glob('test_*.py')
                      if path.name != 'test_docs.py')
    assert options and not [o for o in sorted(options) if not re.search(rf'{o}(?![\w-])', tests)]


def test_table_of_models():
    register_models()
    rows = re.findall(r'^\| `(\S+)` \| ([\d.]+) M \| (\d+) \|', (ROOT / 'README.md').read_text(encoding='utf-8'), re.M)
    assert {name for name, _, _ in rows} == set(timm.list_models('*vim2*', exclude_filters='vit*'))
    for name, parameters, size in rows:
        with torch.device('meta'):
            model = timm.create_model(name)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert abs(count - float(parameters)) <= 0.5 * 10 ** -len(parameters.partition('.')[2]), (name, count)
        assert model.pretrained_cfg['input_size'][1] == int(size)


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text(encoding='utf-8').splitlines()) <= 120


def test_site(tmp_path):
    """Built strictly: a link to a page, a heading or a docstring that is not there is an error."""
    pytest.importorskip('mkdocs', reason='needs mkdocs-material')
    done = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--site-dir', tmp_path / 'site'],
                          cwd=ROOT, capture_output=True, text=True, env=tool_environment(NO_MKDOCS_2_WARNING='1'))
    assert done.returncode == 0, done.stdout + done.stderr
    site = {p.name: p.read_text(encoding='utf-8') for p in (tmp_path / 'site').glob('*.html')}
    assert {Path(p).name.replace('.md', '.html') for p in PAGES if p.startswith('docs/')} <= set(site)
    assert {'index.html', 'detection.html', 'segmentation.html', 'changelog.html'} <= set(site)
    assert 'vim2_micro_patch4_64.tiny_imagenet' in site['zoo.html'] and 'vmamba_base_s2l15.in1k' in site['zoo.html']
    assert 'selective_scan' in site['api.html'] and 'delta_softplus' in site['api.html']
    for name, text in site.items():  # to be read without a network
        outside = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', text)
        assert not [u for u in outside if 'canonical' not in u], name
        for target in re.findall(r'(?:href|src)="([^":#?]+)(?:#[^"]*)?"', text):
            assert (tmp_path / 'site' / target.lstrip('/')).exists(), f'{name}: {target}'


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
