"""Other projects' published weights by name: a server plays the release page and the Hub, the client is unmodified."""
import argparse
import hashlib
import io
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import timm
import torch
from conftest import hub_environment
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from test_hub import unpickled
from test_vim import published_names as vim_names
from test_vmamba import published_names as vmamba_names
from timm.models._hub import save_for_hf

import vim2
from vim2 import pretrained

RELEASE = '/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_test_ckpt_epoch_264.pth'
FILE = 'vssm1_test_ckpt_epoch_264.pth'
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def models():
    """A VMamba, its average, and a Vim, all with random weights."""
    torch.manual_seed(5)
    return [timm.create_model(name).eval() for name in ('test_vmamba', 'test_vmamba', 'test_vim')]


def config_node(monkeypatch):
    """What VMamba's training loop saves beside the weights: a yacs CfgNode, of a module that is not there later."""
    module = types.ModuleType('yacs.config')
    module.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config'})
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    node = module.CfgNode(MODEL=module.CfgNode(DEPTHS=[1, 1, 2, 1]))
    node.__dict__['__immutable__'] = True
    return node


def saved(**content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.fixture(scope='module')
def vmamba_file(models):
    """VMamba's checkpoint, with everything that its training loop saves."""
    with pytest.MonkeyPatch.context() as patch:
        optimizer = torch.optim.AdamW(models[0].parameters())
        return saved(
            model=vmamba_names(models[0].state_dict()), model_ema=vmamba_names(models[1].state_dict()),
            optimizer=optimizer.state_dict(), lr_scheduler={'last_epoch': 3}, max_accuracy=82.6, epoch=264,
            scaler={'scale': 65536.}, config=config_node(patch))


@pytest.fixture
def release(hub, vmamba_file, tmp_path, monkeypatch):
    """The address of the file on the release page, and an empty cache of torch.hub's."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    return hub.release(RELEASE, vmamba_file)


def cache(tmp_path):
    folder = tmp_path / 'torch' / 'hub' / 'checkpoints'
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def load(url, name='test_vmamba', tag='in1k', **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(url=url, tag=tag), **kwargs).eval()


@torch.no_grad()
def same(a, b):
    return torch.equal(a(X), b(X))


def test_download_and_cache(hub, release, models, vmamba_file, tmp_path, capfd):
    assert 'yacs' not in sys.modules
    model = load(release)
    assert same(model, models[0]) and cache(tmp_path) == [FILE]
    assert capfd.readouterr().err.count(hashlib.sha256(vmamba_file).hexdigest()) == 1
    requests = len(hub.requests)
    for kwargs in ({}, dict(num_classes=5), dict(in_chans=1), dict(features_only=True)):
        again = load(release, **kwargs)
    assert same(load(release), models[0]) and len(hub.requests) == requests
    assert 'not pinned' not in capfd.readouterr().err  # once
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again(X), models[0].forward_intermediates(X)[1]))
    for m in (model, again):  # the weights are not kept a second time
        assert 'state_dict' not in m.pretrained_cfg or m.pretrained_cfg['state_dict'] is None
        assert m.pretrained_cfg['url'] == release
    # in a place of the user's
    assert same(load(release, cache_dir=str(tmp_path / 'elsewhere')), models[0])
    assert [p.name for p in (tmp_path / 'elsewhere').iterdir()] == [FILE]


def test_averaged_weights(hub, release, models, tmp_path):
    """`model` by default, where VMamba's author put the best weights; `_ema` for the other, or an error."""
    assert not same(load(release), models[1]) and same(load(release, tag='in1k_ema'), models[1])
    without = hub.release(RELEASE.replace('vssm1', 'plain'), saved(model=vmamba_names(models[0].state_dict())))
    assert same(load(without), models[0])
    with pytest.raises(RuntimeError, match=r'plain_test_ckpt.* holds no averaged weights, only model'):
        load(without, tag='in1k_ema')
    only = hub.release(RELEASE.replace('vssm1', 'ema'), saved(model_ema=vmamba_names(models[1].state_dict())))
    assert same(load(only, tag='in1k_ema'), models[1])
    with pytest.raises(RuntimeError, match=r'holds no plain weights, only model_ema'):
        load(only)


def test_connection_cut(hub, release, models, vmamba_file, tmp_path, monkeypatch):
    """Resumed after the chunks that came."""
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 1024)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    hub.fail('/objects/', 'cut')
    assert same(load(release), models[0])
    first, second = hub.seen('/objects/', 'GET')
    assert 'Range' not in first.headers
    assert second.headers['Range'] == f'bytes={len(vmamba_file) // 2 // 1024 * 1024}-' and second.status == 206
    assert cache(tmp_path) == [FILE]


def test_connection_cut_for_good(hub, release, models, tmp_path, monkeypatch):
    """An error that says what to do; nothing is left that could be taken for the file."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    hub.fail('/objects/', 'cut', times=99)
    with pytest.raises(RuntimeError, match=r'cannot download http.*vssm1_test.*put it at .*/checkpoints/vssm1_test'):
        load(release)
    assert cache(tmp_path) == []
    hub.faults.clear()
    assert same(load(release), models[0])


@pytest.mark.parametrize('status', [404, 500])
def test_server_refuses(hub, release, tmp_path, status):
    hub.fail('/releases/', status, times=99)
    with pytest.raises(RuntimeError, match=f'cannot download .*{status}'):
        load(release)
    assert cache(tmp_path) == []


def test_offline(hub, release, models, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match=f'{FILE} is not in the cache and HF_HUB_OFFLINE forbids.*put it at'):
        load(release)
    assert not hub.requests
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    load(release)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert same(load(release), models[0])


@pytest.mark.parametrize('damage', [
    lambda b: b[:len(b) // 2], lambda b: b[:-50], lambda b: b'', lambda b: b'<html>' * 9],
                         ids=['half', 'end', 'empty', 'html'])
def test_damaged_file(hub, release, vmamba_file, models, tmp_path, damage):
    """On the server, in the cache, and given by hand."""
    broken = hub.release(RELEASE.replace('vssm1', 'broken'), damage(vmamba_file))
    with pytest.raises(RuntimeError, match=r'test_vmamba: .*broken_test.*not a readable .*\(corrupt or truncated'):
        load(broken)
    load(release)
    path = tmp_path / 'torch' / 'hub' / 'checkpoints' / FILE
    path.write_bytes(damage(vmamba_file))
    for kwargs in (dict(url=release), dict(file=str(path))):
        with pytest.raises(RuntimeError, match=rf'{FILE} is not a readable .*\(corrupt or truncated'):
            timm.create_model('test_vmamba', pretrained=True, pretrained_cfg_overlay=kwargs)


def test_pickle_that_would_execute_code(hub, release, models, tmp_path):
    evil = saved(model=vmamba_names(models[0].state_dict()), hook=unpickled(tmp_path / 'pwned'))
    with pytest.raises(RuntimeError, match='holds Python objects besides tensors .*could execute code, so it is ref'):
        load(hub.release(RELEASE.replace('vssm1', 'evil'), evil))
    assert not (tmp_path / 'pwned').exists()
    torch.load(io.BytesIO(evil), weights_only=False)
    assert (tmp_path / 'pwned').exists(), 'the file does hold code'


def test_file_by_hand(release, models, vmamba_file, tmp_path):
    (tmp_path / 'mine.pth').write_bytes(vmamba_file)
    torch.save(vmamba_names(models[0].state_dict()), tmp_path / 'bare.pth')
    torch.save({'model': {f'module.{k}': v for k, v in vmamba_names(models[0].state_dict()).items()}},
               tmp_path / 'parallel.pth')
    for name in ('mine.pth', 'bare.pth', 'parallel.pth'):
        overlay = dict(file=str(tmp_path / name))
        assert same(timm.create_model('test_vmamba', pretrained=True, pretrained_cfg_overlay=overlay).eval(), models[0])
    overlay = dict(file=str(tmp_path / 'mine.pth'), tag='mine_ema')
    assert same(timm.create_model('test_vmamba', pretrained=True, pretrained_cfg_overlay=overlay).eval(), models[1])


def test_checkpoint_of_another_configuration(hub, release):
    """Named, with the configuration that it fits."""
    small = vmamba_names(timm.create_model('vmamba_tiny_s2l5').state_dict())
    url = hub.release(RELEASE.replace('vssm1', 'other'), saved(model={k: v.half() for k, v in small.items()}))
    with pytest.raises(RuntimeError, match=r'/other_test\S* is no checkpoint of vmamba_tiny_s1l8; it is one of '
                                           r'vmamba_tiny_s2l5: timm.create_model'):
        load(url, 'vmamba_tiny_s1l8')
    with pytest.raises(RuntimeError, match='is no checkpoint of test_vmamba; it is one of vmamba_tiny_s2l5'):
        load(url)
    loaded = load(url, 'vmamba_tiny_s2l5').state_dict()
    expected = small['layers.2.blocks.4.mlp.fc1.weight'].half().float()
    assert torch.equal(loaded['stages.2.blocks.4.mlp.fc1.weight'], expected)


# --- the Hub: Vim ---------------------------------------------------------------------------------------------------

@pytest.fixture
def vim_repo(hub, models, monkeypatch):
    """A repository as hustvl's: the file alone, no configuration. Listed in the manifest, not pinned."""
    content = saved(model=vim_names(models[2].state_dict()), epoch=299, args=argparse.Namespace(model='vim', lr=1e-3))
    commit = hub.commit('hustvl/Vim-test', {'vim_test.pth': content})
    entry = pretrained.Weights(
        name='test_vim.in1k', file='vim_test.pth', sha256='not pinned', license='apache-2.0', data='ImageNet-1k',
        metric=dict(name='top-1', value=76.1, unit='%', on='x'), repo='hustvl/Vim-test')
    monkeypatch.setattr(pretrained, 'manifest', lambda: {entry.name: entry})
    cfg = dict(timm.get_pretrained_cfg('test_vim').to_dict(), **entry.pretrained_cfg(), tag='in1k')
    return commit, content, lambda **kwargs: timm.create_model(
        'test_vim', pretrained=True, pretrained_cfg=dict(cfg, **kwargs.pop('cfg', {})), **kwargs).eval()


def test_vim_from_the_hub(hub, vim_repo, models, capfd, monkeypatch):
    commit, content, create = vim_repo
    assert same(create(), models[2])
    err = capfd.readouterr().err
    assert hashlib.sha256(content).hexdigest() in err and f'hustvl/Vim-test@{commit}' in err
    assert create(num_classes=3, in_chans=1) and create(features_only=True)
    assert 'not pinned' not in capfd.readouterr().err
    with pytest.raises(RuntimeError, match='holds no averaged weights, only model'):
        create(cfg=dict(tag='in1k_ema'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert same(create(), models[2])


def test_vim_file_that_the_manifest_does_not_list(hub, vim_repo, monkeypatch):
    """Only what is listed may be a pickle."""
    monkeypatch.setattr(pretrained, 'manifest', dict)
    with pytest.raises(RuntimeError, match="names 'vim_test.pth' as its weights.*can execute code"):
        vim_repo[2]()
    assert not hub.seen('vim_test.pth')


def test_vim_with_wrong_bytes(hub, vim_repo, models):
    """The Hub announces a sum of its own."""
    hub.fail('/objects/', 'flip')
    with pytest.raises(RuntimeError, match=r'is not what the Hub \(hustvl/Vim-test\) lists'):
        vim_repo[2]()
    assert same(vim_repo[2](), models[2])


# --- by name --------------------------------------------------------------------------------------------------------

def test_every_published_name():
    """The release's address, the licence and both tags; by name alone the plain weights."""
    names = {w.name: w for w in pretrained.manifest().values() if not w.pinned}
    assert len(names) == 14
    for name, w in names.items():
        cfg, ema = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(name + '_ema')
        assert cfg.license == ('mit' if name.startswith('vmamba') else 'apache-2.0')
        assert timm.get_pretrained_cfg(w.architecture).tag == 'in1k'
        if w.url:
            assert re.fullmatch(r'https://github.com/MzeroMiko/VMamba/releases/download/%23v[02]cls/\S+\.pth', cfg.url)
            assert cfg.url == ema.url and cfg.url.endswith('/' + w.file)
        else:
            assert cfg.hf_hub_id.startswith('hustvl/Vim-') and cfg.hf_hub_filename == w.file == ema.hf_hub_filename
        assert name in timm.list_models(pretrained=True)


def test_hub_load(hub, tmp_path, monkeypatch):
    """`vim2.hub.load`: the published names go the same way; a folder of a model of any family is one."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match='vssm_tiny_0230_ckpt_epoch_262.pth is not in the cache'):
        vim2.hub.load('vmamba_tiny_s2l5.in1k')
    with pytest.raises(LocalEntryNotFoundError):
        vim2.hub.load('vim_tiny_patch16_224.in1k')
    for name in ('test_vmamba', 'test_vim'):
        model = timm.create_model(name, num_classes=4).eval()
        save_for_hf(model, str(tmp_path / name), safe_serialization=True)
        assert same(vim2.hub.load(tmp_path / name), model)


def test_table_of_models(root):
    rows = re.findall(r'^\| `(\S+)` \| ([\d,]+) \| ([\d.]+) \| (\S+) \| (.+) \|$',
                      (root / 'docs' / 'models.md').read_text(encoding='utf-8'), re.M)
    listed = {w.name: w for w in pretrained.manifest().values() if not w.pinned}
    assert [row[0] for row in rows] == list(listed)
    for name, parameters, top1, licence, source in rows:
        w = listed[name]
        model = timm.create_model(w.architecture, device='meta')
        assert sum(p.numel() for p in model.parameters()) == int(parameters.replace(',', ''))
        assert float(top1) == w.metric['value'] and licence.lower() == w.license
        assert (w.repo or w.url.split('%23')[1].split('/')[0]) in source


def test_addresses_are_those_of_the_release(shared_data):
    import json
    from test_vmamba import PUBLISHED
    configs = json.loads((shared_data('peers') / 'vmamba_v2_configs.json').read_text())['configs']
    for name, w in ((w.architecture, w) for w in pretrained.manifest().values() if w.url):
        assert w.url == configs[PUBLISHED[name]]['checkpoint_url']
        assert w.metric['value'] == configs[PUBLISHED[name]]['top1']


def test_by_name_in_a_process_of_its_own(hub, tmp_path, root):
    """`timm.create_model(NAME, pretrained=True)` goes to the release's address: here, to a proxy that has none."""
    code = ("import timm, vim2\n"
            "try:\n    timm.create_model('vmamba_tiny_s1l8', pretrained=True)\n"
            "except RuntimeError as e:\n    print(e)")
    done = subprocess.run([sys.executable, '-c', code], cwd=root, text=True, capture_output=True, env={
        **os.environ, **hub_environment(hub, tmp_path / 'hf', HF_HUB_OFFLINE='1'), 'TORCH_HOME': str(tmp_path)})
    assert 'vssm1_tiny_0230s_ckpt_epoch_264.pth is not in the cache and HF_HUB_OFFLINE forbids to download ' \
           'https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/' in done.stdout, done
    assert f'put it at {tmp_path}/hub/checkpoints/vssm1_tiny_0230s' in done.stdout
    assert not list(Path(tmp_path).rglob('*.pth'))
