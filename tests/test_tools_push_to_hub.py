"""tools/push_to_hub.py, against a server that speaks the Hub's protocol."""
import json
import pickle
import re
import subprocess
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import hub_environment, tool_environment
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load_file, save_file

import _sources
import push_to_hub
import vim2
from _common import UserError
from vim2.models import TSM2

REPO = 'org/model'
CLASSES = ['red', 'green', 'blue', 'gray']


@pytest.fixture(scope='module')
def run_folder(npz_dir, tmp_path_factory):
    """A short run of tools/train.py, with a moving average."""
    import train
    out = tmp_path_factory.mktemp('train')
    argv = ['train.py', '--model', 'test_vim2', '--dataset', 'npz', '--data-dir', str(npz_dir), '--val-split', 'test',
            '--img-size', '32', '-b', '32', '--epochs', '2', '--warmup-epochs', '0', '-j', '0', '--lr', '3e-3',
            '--model-ema', '--model-ema-decay', '0.9', '--mean', '0.4', '0.4', '0.4', '--output', str(out),
            '--experiment', 'run', '--device', 'cpu']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', argv)
        train.main()
    return out / 'run'


@pytest.fixture
def token(hub, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    return hub


def measured(npz_dir):
    return '--dataset', 'npz', '--data-dir', npz_dir, '--split', 'test', '-j', 0, '--data-name', 'colors'


def images(model):
    return torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def same(a, b, x=None):
    x = images(a) if x is None else x
    return torch.equal(a.eval()(x), b.eval()(x))


def card_of(text):
    return ModelCard(text, ignore_metadata_errors=False)


# ------------------------------------------------------------------------------------------- runs of tools/train.py

def test_push_and_use_in_other_processes(run_folder, npz_dir, tmp_path, tool, tool_process, root, hub):
    """The whole way in processes of their own: push, and run the card's own example from a fresh cache."""
    done = tool_process('push_to_hub', run_folder, '--repo', REPO, *measured(npz_dir), '--json', cwd=tmp_path,
                        **hub_environment(hub, tmp_path / 'home', **{'HF_TOKEN': 'hf_owner'}))
    assert done.code == 0, done.err
    report = json.loads(done.out)
    head = hub.repos[REPO].refs['main']
    assert report['pushed'] == dict(repo=REPO, commit=head, url=f'{hub.url}/{REPO}/commit/{head}', pull_request=None)
    files = hub.repos[REPO].commits[head].files
    assert sorted(files) == ['README.md', 'config.json', 'model.safetensors'] and files['model.safetensors'].lfs
    card = files['README.md'].data.decode()
    assert card == report['card']
    # the metrics are those of tools/validate.py, not of anybody's keyboard
    validated = tool('validate', '--model', f'local-dir:{run_folder / "model"}', *measured(npz_dir)[:-2], '--json')
    for key, value in json.loads(validated.out).items():
        if key in ('top1', 'top5', 'loss', 'count'):
            assert report['result'][key] == value
    # the example of the card prints what tools/predict.py says about the same picture
    code = re.search(r'^```python\n(.*?)^```$', card, re.M | re.S)[1]
    assert 'import timm, torch, vim2' in code
    picture = root / 'tools' / 'assets' / 'chelsea.jpg'
    (tmp_path / 'photo.jpg').write_bytes(picture.read_bytes())
    hub.requests.clear()
    example = subprocess.run(
        [sys.executable, '-c', code + "torch.save(model(torch.ones(1, 3, 32, 32)), 'logits.pt')"], cwd=tmp_path,
        capture_output=True, text=True,
        env=tool_environment(**hub_environment(hub, tmp_path / 'fresh')))
    assert example.returncode == 0, example.stderr
    predicted = tool('predict', picture, '--model', f'local-dir:{run_folder / "model"}', '--topk', 4, '--json')
    assert [line.split() for line in example.stdout.splitlines()] == [
        [p['label'], f'{p["probability"]:.1%}'] for p in json.loads(predicted.out)['results'][0]['predictions']]
    trained = timm.create_model(f'local-dir:{run_folder / "model"}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / 'logits.pt', weights_only=True), trained(torch.ones(1, 3, 32, 32)))
    assert len(hub.seen('/objects/', 'GET')) == 1
    # and the printed entry is one that the manifest takes
    path = tmp_path / 'manifest.json'
    path.write_text(json.dumps(dict(format=1, weights={'test_vim2.colors': report['manifest_entry']})))
    entry, = vim2.pretrained.read_manifest(path).values()
    assert entry.revision == head and entry.sha256 == files['model.safetensors'].lfs
    assert entry.config['label_names'] == CLASSES and entry.config['mean'] == [0.4, 0.4, 0.4]


def test_card(run_folder, npz_dir, tool, tmp_path):
    out = tmp_path / 'folder'
    result = tool('push_to_hub', run_folder, '--repo', REPO, '--dry-run', '--out', out, *measured(npz_dir))
    assert result.code == 0, result.err
    text = (out / 'README.md').read_text()
    assert result.out == f'{text}\nwritten: {out}\n'
    card = card_of(text)
    assert card.data.pipeline_tag == 'image-classification' and card.data.library_name == 'timm'
    assert card.data.license == 'apache-2.0' and {'vim2', 'image-classification'} <= set(card.data.tags)
    assert card.data.datasets == ['colors'] and card.data.model_name == 'model'
    top1, top5 = card.data.eval_results
    assert (top1.metric_type, top1.dataset_name, top1.dataset_split) == ('accuracy', 'colors', 'test')
    row = re.search(r'^\| colors, split `test` \| 50 \| 32x32 \| ([\d.]+) % \| ([\d.]+) % \|', text, re.M)
    assert float(row[1]) == pytest.approx(100 * top1.metric_value) and float(row[2]) == 100 * top5.metric_value
    for what in ('- **Parameters:** 0.04 M', '- **Classes:** 4: red, green, blue, gray', 'mean (0.4, 0.4, 0.4)',
                 'Trained on colors.', '2 epochs, moving average of the weights.', '@article{behrouz2024mambamixer',
                 'python tools/validate.py --model hf-hub:org/model --dataset npz --data-dir DATA --split test'):
        assert what in text, what
    assert str(npz_dir) not in text and str(tmp_path) not in text  # nothing of this machine
    sums = dict(re.findall(r'^\| `(\S+)` \| [\d,]+ \| `(\w{64})` \|$', text, re.M))
    assert sums == {n: vim2.pretrained.sha256(out / n) for n in ('config.json', 'model.safetensors')}


def test_training_command_is_the_run(run_folder):
    """Parsed again it gives the run's options, but for those of one machine."""
    import train
    options = yaml.safe_load((run_folder / 'args.yaml').read_text())
    command = _sources.training_command(options)
    args = vars(train.get_parser().parse_args(command.split()[2:]))
    free = {*_sources._NOT_IN_COMMAND, 'data_dir'}
    assert {k: v for k, v in args.items() if k not in free} == {k: v for k, v in options.items() if k not in free}
    assert args['data_dir'] == 'DATA'


def test_training_command_of_a_recipe(root):
    import train
    recipe = root / 'tools' / 'recipes' / 'cifar10_nano.yaml'
    parser = train.get_parser()
    train.common.apply_defaults(parser, train.common.read_recipe(str(recipe)), 'recipe')
    args = parser.parse_args(['--config', str(recipe), '--data-dir', '/home/somebody/data', '--epochs', '3',
                              '--no-model-ema', '--no-aug', '--initial-checkpoint', '/home/somebody/start.pth',
                              '--model-kwargs', 'd_state=8', 'token_mixer=mlp'])
    command = _sources.training_command(vars(args))
    assert command == ('python tools/train.py --config tools/recipes/cifar10_nano.yaml --data-dir DATA '
                       '--initial-checkpoint start.pth --model-kwargs d_state=8 token_mixer=mlp --epochs 3 --no-aug '
                       '--no-model-ema')


@pytest.mark.parametrize('name, ema, epochs', [
    ('last.pth.tar', True, 2), ('last.pth.tar', False, 2), ('best.pth.tar', True, None)])
def test_training_checkpoint(run_folder, tmp_path, tool, name, ema, epochs):
    """The averaged weights, or the plain ones; the preprocessing of the training."""
    result = tool('push_to_hub', run_folder / name, '--repo', REPO, '--dry-run', '--out', tmp_path / 'out',
                  *(() if ema else ('--no-ema',)))
    assert result.code == 0, result.err
    saved = torch.load(run_folder / name, weights_only=True)
    weights = load_file(tmp_path / 'out' / 'model.safetensors')
    for key, value in saved['state_dict_ema' if ema else 'state_dict'].items():
        assert torch.equal(weights[key], value), key
    model = vim2.hub.load(tmp_path / 'out')
    assert model.pretrained_cfg['mean'] == [0.4, 0.4, 0.4] and tuple(model.pretrained_cfg['input_size']) == (3, 32, 32)
    assert model.pretrained_cfg['label_names'] == CLASSES
    assert f'{epochs or saved["progress"]["epoch"]} of 2 epochs' + (', moving average' if ema else '.') in result.out
    assert 'No metric was measured when this card was written.' in result.out
    assert card_of(result.out.rpartition('written: ')[0]).data.eval_results is None


def test_unknown_label_names(run_folder, npz_dir, tmp_path, tool):
    """Weights alone do not know them (the architecture's are not theirs); a training state and a data set do."""
    checkpoint = torch.load(run_folder / 'last.pth.tar', weights_only=True)
    known = tmp_path / 'known.pth.tar'
    known.write_bytes((run_folder / 'last.pth.tar').read_bytes())
    result = tool('push_to_hub', known, '--repo', REPO, '--dry-run', '--out', tmp_path / 'known')
    assert result.code == 0 and '- **Classes:** 4: red, green, blue, gray' in result.out
    alone = tmp_path / 'alone.pth.tar'
    torch.save({k: v for k, v in checkpoint.items() if k not in ('label_names', 'checksum')}, alone)
    result = tool('push_to_hub', alone, '--repo', REPO, '--dry-run', '--out', tmp_path / 'a')
    assert result.code == 0 and '- **Classes:** 4\n' in result.out and 'print(int(i),' in result.out
    assert 'label_names' not in (tmp_path / 'a' / 'config.json').read_text()
    result = tool('push_to_hub', alone, '--repo', REPO, '--dry-run', '--out', tmp_path / 'b', *measured(npz_dir))
    assert result.code == 0 and '- **Classes:** 4: red, green, blue, gray' in result.out
    assert json.loads((tmp_path / 'b' / 'config.json').read_text())['label_names'] == CLASSES


def test_branch_private_and_pull_request(token, run_folder, tool):
    hub = token
    push = lambda *more: tool('push_to_hub', run_folder, '--repo', REPO, '--json', *more)
    result = push('--private', '--revision', 'candidate')
    assert result.code == 0, result.err
    repo = hub.repos[REPO]
    assert repo.private and set(repo.refs) == {'main', 'candidate'}
    assert not repo.commits[repo.refs['main']].files
    report = json.loads(result.out)
    assert report['pushed']['commit'] == repo.refs['candidate'] and f'hf-hub:{REPO}@candidate' in report['card']
    assert report['manifest_entry'] is None  # nothing was measured
    trained = vim2.hub.load(run_folder / 'model')
    assert same(trained, vim2.hub.load(REPO, revision='candidate'))
    result = push('--create-pr', '--message', 'Better weights', '--no-ema')
    assert result.code == 0, result.err
    assert json.loads(result.out)['pushed']['pull_request'] == f'{hub.url}/{REPO}/discussions/1'
    assert repo.commits[repo.refs['refs/pr/1']].title == 'Better weights'
    assert not repo.commits[repo.refs['main']].files
    assert same(trained, vim2.hub.load(REPO, revision='refs/pr/1'))  # a folder has one kind of weights


def test_card_of_the_repository(token, run_folder, tool):
    """Replaced, unless it shall stay."""
    hub = token
    assert tool('push_to_hub', run_folder, '--repo', REPO).code == 0
    HfApi().upload_file(path_or_fileobj=b'---\nlicense: mit\n---\nmine', path_in_repo='README.md', repo_id=REPO)
    readme = lambda: hub.repos[REPO].commits[hub.repos[REPO].refs['main']].files['README.md'].data
    assert tool('push_to_hub', run_folder / 'last.pth.tar', '--repo', REPO, '--no-ema', '--keep-card').code == 0
    assert readme().endswith(b'mine')
    assert tool('push_to_hub', run_folder, '--repo', REPO).code == 0
    assert b'ViM2 image classifier' in readme()


# ------------------------------------------------------------------------------------------------------ what is refused

@pytest.mark.parametrize('change, message', [
    (lambda state: {k: v + 1e-6 * (k == 'norm.weight') for k, v in state.items()}, 'weights differ in norm.weight'),
    (lambda state: {k: v.half() for k, v in state.items()}, 'weights differ in stem.conv.weight, .* in all'),
    (lambda state: {k: v for k, v in state.items() if k != 'norm.bias'}, 'cannot be loaded: .*missing: norm.bias'),
])
def test_reload_must_be_bit_equal(token, run_folder, tool, tmp_path, monkeypatch, change, message):
    """Whatever goes wrong in writing: nothing is pushed, nothing is left."""
    import safetensors.torch
    real = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, 'save_file', lambda state, path: real(change(state), path))
    out = tmp_path / 'parent' / 'out'
    result = tool('push_to_hub', run_folder, '--repo', REPO, '--out', out)
    assert result.code == 2 and re.search(message, result.err), result.err
    assert result.err.count('\n') == 1
    assert not token.seen('/api/') and REPO not in token.repos
    assert list(out.parent.iterdir()) == []


def test_logits_must_be_bit_equal(token, tool, tmp_path, monkeypatch):
    """A configuration that does not say all: the weights are the same, what they compute is not."""
    real = push_to_hub.write_model

    def write(source, folder, license):
        real(source, folder, license)
        path = folder / 'config.json'
        config = json.loads(path.read_text())
        config['model_args'] = dict(config.get('model_args', {}), global_pool='max')
        path.write_text(json.dumps(config))

    monkeypatch.setattr(push_to_hub, 'write_model', write)
    save_file(timm.create_model('test_vim2', num_classes=4).state_dict(), tmp_path / 'w.safetensors')
    result = tool('push_to_hub', tmp_path / 'w.safetensors', '--model', 'test_vim2', '--repo', REPO)
    assert result.code == 2 and 'the reloaded model gives other outputs, by up to' in result.err
    assert not token.seen('/api/')


def test_weights_that_are_not_finite(token, tool, tmp_path):
    state = timm.create_model('test_vim2', num_classes=4).state_dict()
    state['norm.weight'][3] = float('nan')
    save_file(state, tmp_path / 'w.safetensors')
    result = tool('push_to_hub', tmp_path / 'w.safetensors', '--model', 'test_vim2', '--repo', REPO)
    assert result.code == 2 and 'has weights that are not finite: norm.weight' in result.err and not token.seen('/api/')


@pytest.mark.parametrize('args, message', [
    (('{run}', '--repo', 'model'), '--repo must be ORG/NAME'),
    (('{run}', '--repo', '../model'), 'cannot push to ../model|--repo ../model: .*[Rr]epo id'),
    (('{tmp}/nothing', '--repo', REPO), 'does not exist'),
    (('{tmp}', '--repo', REPO), 'has no config.json'),
    (('{tmp}/w.safetensors', '--repo', REPO), 'does not say of which model its weights are: pass --model'),
    (('{tmp}/w.safetensors', '--repo', REPO, '--model', 'test_vimm2'), 'unknown model .*did you mean test_vim2'),
    (('{tmp}/w.safetensors', '--repo', REPO, '--model', 'vim2_nano_patch2_32'), 'does not fit vim2_nano_patch2_32'),
    (('{tmp}/text.pth', '--repo', REPO), 'cannot read the checkpoint: .*text.pth'),
    (('{run}', '--repo', REPO, '--dry-run', '--out', '{tmp}'), 'exists already: nothing is overwritten'),
    (('{run}', '--repo', REPO, '--dataset', 'npz', '--data-dir', '{npz}', '--split', 'test'), 'pass --data-name'),
    (('{run}', '--repo', REPO, '--dataset', 'npz', '--data-dir', '{tmp}', '--data-name', 'x'), 'no .npz file in'),
    (('{run}', '--repo', REPO, '--series', 'x.csv', '--data-name', 'x'), 'is no forecaster'),
    (('{run}', '--repo', REPO, '--batch-size', '0'), '--batch-size must be at least 1'),
    (('{run}', '--repo', 'stranger/model'), 'the Hub refused to take stranger/model.*403.*check --token'),
    (('{run}', '--repo', REPO, '--token', 'hf_wrong'), 'refused.*Invalid credentials.*check --token'),
])
def test_mistakes(token, run_folder, npz_dir, tool, tmp_path, args, message):
    save_file(timm.create_model('test_vim2', num_classes=4).state_dict(), tmp_path / 'w.safetensors')
    (tmp_path / 'text.pth').write_text('no checkpoint')
    result = tool('push_to_hub', *(a.format(run=run_folder, tmp=tmp_path, npz=npz_dir) for a in args))
    assert result.code == 2 and re.search(message, result.err), result.err
    assert result.err.count('\n') == 1 and REPO not in token.repos


def test_licence_must_be_known(tmp_path, tool):
    model = timm.create_model('test_vim2', num_classes=4)
    from timm.models._hub import save_for_hf
    folder = tmp_path / 'converted'
    save_for_hf(model, str(folder), model_config=dict(pretrained_cfg=dict(license=None, notes=['converted from X'])),
                safe_serialization=True)
    result = tool('push_to_hub', folder, '--repo', REPO, '--dry-run', '--out', tmp_path / 'out')
    assert result.code == 2 and 'under which licence its weights are: pass --license' in result.err
    result = tool('push_to_hub', folder, '--repo', REPO, '--dry-run', '--out', tmp_path / 'out', '--license', 'mit')
    assert result.code == 0 and 'license: mit' in result.out and 'Converted from X.' in result.out
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']['license'] == 'mit'


def test_other_bytes_on_the_hub(token, run_folder, tool, monkeypatch):
    """The server says that it has something else."""
    real = HfApi.get_paths_info

    def lying(self, *args, **kwargs):
        info = real(self, *args, **kwargs)
        info[0].lfs.sha256 = '0' * 64
        return info

    monkeypatch.setattr(HfApi, 'get_paths_info', lying)
    result = tool('push_to_hub', run_folder, '--repo', REPO)
    assert result.code == 2 and 'the Hub holds other bytes' in result.err


def test_upload_that_fails(token, run_folder, tool):
    """No commit without its weights."""
    token.fail('/lfs/verify', 500, times=99, method='POST')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('time.sleep', lambda seconds: None)
        result = tool('push_to_hub', run_folder, '--repo', REPO)
    assert result.code == 2 and 'cannot push to org/model' in result.err
    repo = token.repos[REPO]
    assert not repo.commits[repo.refs['main']].files


def test_server_without_xet(token, run_folder, tool, monkeypatch):
    """The client uploads by Xet wherever hf_xet is installed; the error says how to do without."""
    pytest.importorskip('hf_xet', reason='huggingface_hub speaks Xet by hf_xet')
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    result = tool('push_to_hub', run_folder, '--repo', REPO)
    assert result.code == 2 and 'takes files with HF_HUB_DISABLE_XET=1' in result.err
    assert not token.repos[REPO].commits[token.repos[REPO].refs['main']].files


def test_other_models_of_timm(tool, tmp_path):
    """What tools/train.py trains besides ours."""
    model = timm.create_model('test_vit', num_classes=3)
    save_file(model.state_dict(), tmp_path / 'w.safetensors')
    result = tool('push_to_hub', tmp_path / 'w.safetensors', '--model', 'test_vit', '--repo', REPO, '--dry-run',
                  '--out', tmp_path / 'out')
    assert result.code == 0, result.err
    assert 'import timm, torch\n' in result.out and 'vim2' not in result.out and 'A `test_vit` image' in result.out


# ----------------------------------------------------------------------------------------------------------- OpenMMLab

CONFIG = '''
default_scope = 'mmdet'
custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)
model = dict(
    type='MaskRCNN',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[127.5, 51., 102.0], std=[51, 25.5, 76.5],
                           bgr_to_rgb=True, size=(96, 64)),
    backbone=dict(type='ViM2', model_name='test_vim2', drop_path_rate=0.2, model_kwargs=dict(d_state=3),
                  init_cfg=dict(type='Pretrained', checkpoint='hf-hub:org/base@main')),
    neck=dict(type='FPN', in_channels=[8, 16, 24, 32]))
train_dataloader = dict(dataset=dict(type='RepeatDataset', dataset=dict(type='CocoDataset', data_root='data/coco/')))
'''


class HistoryBuffer:
    """As mmengine has it: an array of numbers, and methods by name, which pickle as calls of getattr."""

    def __init__(self):
        self._log_history = np.array([1., 2.])
        self._count_history = np.array([1, 1])
        self.statistics_methods = dict(min=HistoryBuffer.min)

    def min(self):
        raise AssertionError('nothing of it is called')

    def __setstate__(self, state):
        raise AssertionError('nothing of it is restored')


@pytest.fixture
def mmengine_checkpoint(tmp_path, monkeypatch):
    """A detector's checkpoint as mmengine's runner writes it; and the backbone in it."""
    module = types.ModuleType('mmengine.logging.history_buffer')
    HistoryBuffer.__module__ = module.__name__
    module.HistoryBuffer = HistoryBuffer
    for name in ('mmengine', 'mmengine.logging'):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(6)
    net = timm.create_model('test_vim2', num_classes=0, d_state=3).eval()
    state = OrderedDict((f'backbone.net.{k}', v) for k, v in net.state_dict().items())
    state.update({'backbone.norms.0.weight': torch.ones(8), 'neck.lateral_convs.0.conv.weight': torch.ones(4, 8, 1, 1)})
    optimizer = torch.optim.AdamW(net.parameters())

    def save(path, state=state, config=CONFIG, **more):
        checkpoint = dict(
            meta=dict(epoch=12, iter=100, cfg=config, seed=1, experiment_name='x', time='now', mmengine_version='0',
                      dataset_meta=dict(classes=('cat', 'dog'), palette=[(1, 2, 3)])),
            state_dict=state, optimizer=optimizer.state_dict(),
            message_hub=dict(log_scalars=OrderedDict({'train/loss': HistoryBuffer()}),
                             runtime_info=OrderedDict(iter=100, loss=np.float64(0.5)), resumed_keys=OrderedDict()),
            **more)
        torch.save(checkpoint, tmp_path / path)
        return tmp_path / path

    return save, state, net


def test_openmmlab_backbone(mmengine_checkpoint, tool, tmp_path):
    save, state, net = mmengine_checkpoint
    path = save('epoch_12.pth')
    code = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    assert {'mmengine.logging.history_buffer.HistoryBuffer', 'builtins.getattr'} <= set(code)
    log = tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('{"loss": 1.5, "step": 12}\n{"coco/bbox_mAP": 0.3125, "coco/segm_mAP": 0.25, "step": 12}\n'
                   '{"coco/bbox_mAP": 0.9, "step": 11}\n')
    arguments = ('push_to_hub', path, '--repo', REPO, '--dry-run', '--out', tmp_path / 'out')
    result = tool(*arguments)
    assert result.code == 2 and 'was trained on COCO 2017, whose terms do not allow every use: pass --license' in \
        result.err
    result = tool(*arguments, '--license', 'cc-by-nc-4.0')
    assert result.code == 0, result.err
    model = vim2.hub.load(tmp_path / 'out')
    assert model.num_classes == 0 and same(net, model)
    cfg = model.pretrained_cfg  # of the run, not of the architecture
    assert tuple(cfg['mean']) == (0.5, 0.2, 0.4) and tuple(cfg['std']) == (0.2, 0.1, 0.3)
    assert tuple(cfg['input_size']) == (3, 96, 64) and cfg['license'] == 'cc-by-nc-4.0'
    assert load_file(tmp_path / 'out' / 'model.safetensors').keys() == net.state_dict().keys()
    card = card_of(result.out.rpartition('written: ')[0])
    assert card.data.pipeline_tag == 'image-feature-extraction'
    assert card.data.base_model == 'org/base' and card.data.license == 'cc-by-nc-4.0'
    for what in ('trained with MMDetection, 12 epochs, from `org/base@main`.', 'It has no classifier',
                 'features_only=True', 'Trained on COCO 2017.', '| data | box AP | mask AP |',
                 '| COCO 2017, validation | 31.25 | 25.00 |', 'mean (0.5, 0.2, 0.4), std (0.2, 0.1, 0.3)'):
        assert what in result.out, what
    features = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, features_only=True)
    assert len(features.eval()(images(net))) == 4


def test_openmmlab_mistakes(mmengine_checkpoint, tool, tmp_path):
    save, state, net = mmengine_checkpoint
    push = lambda path, *more: tool('push_to_hub', path, '--repo', REPO, '--dry-run', '--out', tmp_path / 'out',
                                    '--license', 'mit', *more)
    result = push(save('bgr.pth', config=CONFIG.replace('bgr_to_rgb=True', 'bgr_to_rgb=False')))
    assert result.code == 2 and 'reads images as BGR' in result.err
    result = push(save('raw.pth', config=re.sub('data_preprocessor=dict.*?size=.*?\\),', '', CONFIG, flags=re.S)))
    assert result.code == 2 and 'has no data_preprocessor' in result.err
    result = push(save('odd.pth', config=CONFIG.replace('51, 25.5, 76.5', '51, 0, 76.5')))
    assert result.code == 2 and 'std of the preprocessing must be' in result.err
    silent = save('silent.pth', config='')
    result = push(silent)
    assert result.code == 2 and 'does not say which model its backbone is: pass --model' in result.err
    assert push(silent, '--model', 'test_vim2', '--model-kwargs', 'd_state=3').code == 0
    (tmp_path / 'out').rename(tmp_path / 'done')
    result = push(silent, '--model', 'test_vim2')
    assert result.code == 2 and 'does not fit test_vim2: other shapes' in result.err
    result = push(save('a.pth'), '--model', 'vim2_tiny')
    assert result.code == 2 and 'was trained with test_vim2, not vim2_tiny' in result.err
    result = push(save('b.pth', state={k: v for k, v in state.items() if 'stages.3' not in k}))
    assert result.code == 2 and 'holds 3 of the 4 stages of test_vim2' in result.err
    result = push(save('c.pth'), '--dataset', 'npz', '--data-dir', 'x', '--data-name', 'x')
    assert result.code == 2 and 'is no image classifier' in result.err

    class Evil:
        def __reduce__(self):
            return (tmp_path / 'pwned').write_text, ('executed',)

    result = push(save('evil.pth', more=Evil()))
    assert result.code == 2 and 'could execute code' in result.err and 'pathlib' in result.err
    (tmp_path / 'bare.pth').write_bytes(pickle.dumps(Evil()))
    result = push(tmp_path / 'bare.pth')
    assert result.code == 2 and 'cannot read the checkpoint' in result.err
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize('text, expected', [
    (CONFIG, ('test_vim2', dict(d_state=3))),
    ("model = dict(backbone=dict(type='MambaBackbone', model_name='test_vmamba'))", ('test_vmamba', {})),
    ("model = {'backbone': {'type': 'mmdet.ViM2', 'model_name': 'vim2_tiny.x', 'in_channels': 1}}",
     ('vim2_tiny', dict(in_chans=1))),
    ("model = dict(backbone=dict(type='ViM2'))", ('vim2_tiny', {})),
    ("model = dict(backbone=dict(type='ResNet', model_name='vim2_tiny'))", (None, {})),
    ('model = dict(backbone=__import__("os").system("touch x"))', (None, {})), ('not python (', (None, {}))])
def test_backbone_of_a_configuration(text, expected):
    assert _sources.backbone_of(_sources.read_config(text)) == expected


# ---------------------------------------------------------------------------------------------------------- forecasters

@pytest.fixture(scope='module')
def forecast_folder(tmp_path_factory):
    """What tools/forecast.py leaves: model/ with the weights, their configuration, and forecaster.json."""
    folder = tmp_path_factory.mktemp('forecast') / 'run'
    torch.manual_seed(7)
    model = TSM2(num_variates=3, lookback=32, horizon=8, d_model=8, static_dim=2, future_dim=1, past_dim=2)
    model.save_pretrained(folder / 'model')
    (folder / 'model' / 'forecaster.json').write_text(json.dumps(dict(
        format=1, columns=['HUFL', 'HULL', 'OT'], freq='h', scaler=dict(mean=[0, 1, 2], std=[1, 1, 1]),
        info=dict(split='ett-hour', seed=0, training=dict(epochs=3, lr=0.001), val_mse=0.3, epoch=2))))
    return folder


def test_forecaster(token, forecast_folder, tool, tmp_path):
    result = tool('push_to_hub', forecast_folder, '--repo', REPO, '--data-name', 'ETTh1', '--out', tmp_path / 'out',
                  '--json')
    assert result.code == 0, result.err
    report = json.loads(result.out)
    files = token.repos[REPO].commits[report['pushed']['commit']].files
    assert sorted(files) == ['README.md', 'config.json', 'forecaster.json', 'model.safetensors']
    assert json.loads(files['forecaster.json'].data) == json.loads(
        (forecast_folder / 'model' / 'forecaster.json').read_text())
    original = TSM2.from_pretrained(forecast_folder / 'model')
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, *s, generator=generator) for s in ((32, 3), (3, 2), (3, 8, 1), (3, 32, 2))]
    with torch.no_grad():
        for model in (TSM2.from_pretrained(REPO), vim2.hub.load(REPO)):
            assert torch.equal(model(*inputs), original(*inputs))
    card = card_of(report['card'])
    assert card.data.pipeline_tag == 'time-series-forecasting' and card.data.library_name == 'vim2'
    for what in ('- **Look-back:** 32 steps', '- **Variates:** 3: HUFL, HULL, OT', 'split `ett-hour`, seed 0', 'ETTh1',
                 "vim2.hub.load('org/model')", 'epochs 3, lr 0.001', 'No metric was measured'):
        assert what in report['card'], what
    code = re.search(r'^```python\n(.*?)^```$', report['card'], re.M | re.S)[1]
    exec(code, {})  # noqa: S102  the card's example, against the server


def test_forecaster_mistakes(forecast_folder, tool, tmp_path):
    result = tool('push_to_hub', forecast_folder, '--repo', REPO, '--series', 'x.csv')
    assert result.code == 2 and 'pass --data-name' in result.err
    bare = tmp_path / 'bare'
    TSM2(num_variates=3, lookback=32, horizon=8, d_model=8).save_pretrained(bare)
    result = tool('push_to_hub', bare, '--repo', REPO, '--series', 'x.csv', '--data-name', 'x')
    assert result.code == 2 and 'has no forecaster.json' in result.err
    result = tool('push_to_hub', bare, '--repo', REPO, '--dataset', 'npz', '--data-dir', 'x', '--data-name', 'x')
    assert result.code == 2 and 'is no image classifier' in result.err


def test_measured_forecaster(tool, tmp_path):
    """The errors in the card are those of `tools/forecast.py evaluate`."""
    pd = pytest.importorskip('pandas', reason='tools/forecast.py needs pandas')
    rng = np.random.default_rng(0)
    values = np.sin(np.arange(400)[:, None] / [3, 5]) + 0.1 * rng.standard_normal((400, 2))
    series = tmp_path / 'waves.csv'
    pd.DataFrame(values, pd.date_range('2024-01-01', periods=400, freq='h', name='date'), ['a', 'b']).to_csv(series)
    run = tmp_path / 'run'
    done = tool('forecast', 'fit', series, '--lookback', 32, '--horizon', 8, '--epochs', 1, '--steps', 4,
                '--model-kwargs', 'd_model=8', '--output', run, '--device', 'cpu')
    assert done.code == 0, done.err
    evaluated = tool('forecast', 'evaluate', series, '--model', run / 'model', '--json', '--device', 'cpu')
    result = tool('push_to_hub', run, '--repo', REPO, '--dry-run', '--out', tmp_path / 'out', '--series', series,
                  '--data-name', 'waves', '--device', 'cpu', '--json')
    assert result.code == 0, result.err
    report, expected = json.loads(result.out), json.loads(evaluated.out[evaluated.out.index('{'):])
    assert {k: report['result'][k] for k in ('mse', 'mae', 'windows')} == {
        k: expected[k] for k in ('mse', 'mae', 'windows')}
    assert f'| {expected["mse"]:.4f} | {expected["mae"]:.4f} |' in report['card']


def test_measuring_does_not_change_the_folder(run_folder, npz_dir):
    """The measured model is the reloaded one."""
    parser = push_to_hub.get_parser()
    args = parser.parse_args([str(run_folder), '--repo', REPO, *map(str, measured(npz_dir)), '--device', 'cpu'])
    source = push_to_hub.read_source(args)
    before = {k: v.clone() for k, v in source.model.state_dict().items()}
    push_to_hub.measure(source.model, args, push_to_hub.open_data(args, source))
    assert all(torch.equal(before[k], v) for k, v in source.model.state_dict().items())
    with pytest.raises(UserError, match='has 4 classes'):
        source.model.num_classes, source.label_names = 5, None
        push_to_hub.open_data(args, source)
