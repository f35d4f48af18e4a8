"""Weights from the Hub, against a server that speaks its protocol to the unmodified huggingface_hub client."""
import hashlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import hub_environment, tool_environment
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError, GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError,
    RevisionNotFoundError)
from hub_server import File
from safetensors.torch import load_file, save, save_file
from timm.models._hub import save_for_hf

import vim2
from vim2 import pretrained
from vim2.layers import upgrade_state_dict
from vim2.models import TSM2

NAME = 'test_vim2'
REPO = 'org/vim2'
WEIGHTS = r'/objects/'  # where the server keeps large files
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(2, 32, 3, generator=torch.Generator().manual_seed(0))


def read_folder(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(3)
    return timm.create_model(NAME, num_classes=4).eval()


@pytest.fixture(scope='module')
def files(model, tmp_path_factory):
    """What a repository of `model` holds."""
    folder = tmp_path_factory.mktemp('model')
    save_for_hf(model, str(folder), model_config=dict(label_names=list('abcd')), safe_serialization=True)
    return read_folder(folder)


@pytest.fixture(scope='module')
def forecaster():
    torch.manual_seed(4)
    return TSM2(num_variates=3, lookback=32, horizon=8, d_model=8).eval()


@pytest.fixture(scope='module')
def forecaster_files(forecaster, tmp_path_factory):
    folder = tmp_path_factory.mktemp('forecaster')
    forecaster.save_pretrained(folder)
    return read_folder(folder)


@pytest.fixture
def repo(hub, files):
    """A public repository with the model; its commit."""
    return hub.commit(REPO, files)


@torch.no_grad()
def same(a, b, x=X):
    a, b = (m.eval()(x) for m in (a, b))
    return all(map(torch.equal, a, b)) if isinstance(a, list) else torch.equal(a, b)


def blobs(cache):
    """Every file of a cache that holds bytes of a download, whole or not."""
    return sorted(p.name for p in Path(cache).rglob('*') if p.is_file() and not p.is_symlink()
                  and {'blobs', 'snapshots'} & set(p.parts))


def config_with(files, **changes):
    return {**files, 'config.json': json.dumps({**json.loads(files['config.json']), **changes}).encode()}


def unpickled(path):
    """A pickle that writes a file when it is read by a reader that executes it."""
    class Evil:
        def __reduce__(self):
            return Path.write_text, (path, 'executed')
    return Evil()


# ------------------------------------------------------------------------------------------------- timm's own ways

def test_hf_hub_name(hub, repo, model, tmp_path):
    loaded = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert same(loaded, model) and loaded.pretrained_cfg['label_names'] == list('abcd')
    assert loaded.pretrained_cfg['hf_hub_id'] == f'{REPO}@{repo}'  # which weights these are, even if the branch moves
    assert len(hub.seen(WEIGHTS, 'GET')) == 1
    hub.requests.clear()
    assert same(timm.create_model(f'hf-hub:{REPO}', pretrained=True), model)
    assert not hub.seen(method='GET') and not hub.seen(WEIGHTS)  # two HEADs ask whether main has moved
    hub.requests.clear()
    assert same(timm.create_model(f'hf-hub:{REPO}@{repo}', pretrained=True), model)
    assert not hub.seen()  # a commit cannot move
    # a cache of its own
    assert same(timm.create_model(f'hf-hub:{REPO}', pretrained=True, cache_dir=tmp_path / 'other'), model)
    assert len(hub.seen(WEIGHTS, 'GET')) == 1 and len(blobs(tmp_path / 'other')) == 2


def test_adaptation(hub, repo, model):
    features = timm.create_model(f'hf-hub:{REPO}', pretrained=True, features_only=True, out_indices=(1, 3)).eval()
    with torch.no_grad():
        expected = model.forward_intermediates(X, indices=[1, 3], intermediates_only=True)
        assert all(map(torch.equal, features(X), expected))
    other = timm.create_model(f'hf-hub:{REPO}', pretrained=True, num_classes=7)
    assert other.head.fc.weight.shape[0] == 7 and torch.equal(other.norm.weight, model.norm.weight)
    assert torch.equal(other.stages[3].blocks[0].mixer.in_proj.weight, model.stages[3].blocks[0].mixer.in_proj.weight)
    gray = timm.create_model(f'hf-hub:{REPO}', pretrained=True, in_chans=1)
    torch.testing.assert_close(gray.stem.conv.weight, model.stem.conv.weight.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_revisions(hub, repo, model, files):
    torch.manual_seed(9)
    newer = timm.create_model(NAME, num_classes=4).eval()
    for ref in ('branch', 'refs/pr/1'):
        hub.commit(REPO, {**files, 'model.safetensors': save(newer.state_dict())}, ref=ref)
        assert same(vim2.hub.load(REPO, revision=ref), newer)
    assert same(timm.create_model(f'hf-hub:{REPO}@branch', pretrained=True), newer)
    assert same(vim2.hub.load(f'{REPO}@branch'), newer) and same(vim2.hub.load(REPO), model)
    with pytest.raises(RevisionNotFoundError):
        timm.create_model(f'hf-hub:{REPO}@nothing', pretrained=True)


def test_main_moves_between_configuration_and_weights(hub, repo, model, files, monkeypatch):
    """hub.load takes both from one commit."""
    real = pretrained.fetch

    def fetch(name, filename, *args):
        result = real(name, filename, *args)
        if filename == 'config.json':
            hub.commit(REPO, {'config.json': b'{}'})
        return result

    monkeypatch.setattr(pretrained, 'fetch', fetch)
    assert same(vim2.hub.load(REPO), model)


def test_private(hub, files, model, monkeypatch):
    hub.commit('org/private', files, private=True)
    name = 'hf-hub:org/private'
    with pytest.raises(RepositoryNotFoundError, match='authenticated'):
        timm.create_model(name, pretrained=True)
    with pytest.raises(RepositoryNotFoundError):
        vim2.hub.load('org/private', token='hf_stranger')
    with pytest.raises(HfHubHTTPError, match='Invalid credentials'):
        vim2.hub.load('org/private', token='hf_of_nobody')
    assert same(vim2.hub.load('org/private', token='hf_reader'), model)
    # the large file was redirected elsewhere, and the token stayed here
    assert hub.seen(WEIGHTS) and not any('Authorization' in r.headers for r in hub.seen(WEIGHTS))
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    assert same(timm.create_model(name, pretrained=True), model)
    assert same(vim2.hub.load('org/private'), model)


def test_gated(hub, files):
    hub.commit('org/gated', files, gated=True)
    for token in (None, 'hf_stranger'):
        with pytest.raises(GatedRepoError, match='restricted|gated'):
            vim2.hub.load('org/gated', token=token)


# ------------------------------------------------------------------------------------- other processes, other caches

# test_vim2 from the package's own list; everything by its names; what they give for the same input
_LOAD = '''
import sys, timm, torch, vim2
from pathlib import Path
from vim2.models import TSM2
site, inputs, out = sys.argv[1:]
assert Path(vim2.__file__).parent.parent == Path(site), vim2.__file__
vision, series = torch.load(inputs, weights_only=True)
models = dict(
    entry=timm.create_model('test_vim2.pushed', pretrained=True),
    default=timm.create_model('test_vim2', pretrained=True),
    listed=vim2.hub.load('test_vim2.pushed'), name=timm.create_model('hf-hub:org/vim2', pretrained=True),
    load=vim2.hub.load('org/vim2'), mixin=TSM2.from_pretrained('org/tsm2'), tsm2=vim2.hub.load('org/tsm2'))
assert [w.name for w in vim2.list_pretrained('test_*')] == ['test_vim2.pushed'], vim2.list_pretrained()
assert timm.list_models('test_vim2*', pretrained=True) == ['test_vim2.pushed']
with torch.inference_mode():
    logits = {k: m.eval()(series if isinstance(m, TSM2) else vision) for k, m in models.items()}
torch.save(logits, out)
'''


def test_push_then_load_in_other_processes(hub, files, model, forecaster, forecaster_files, tmp_path, root):
    """Pushed by the client, listed in a manifest, loaded by name from a fresh cache, and once more offline."""
    api = HfApi(token='hf_owner')
    commits = {}
    for name, content in ((REPO, files), ('org/tsm2', forecaster_files)):
        folder = tmp_path / 'push' / name
        folder.mkdir(parents=True)
        for file, data in content.items():
            (folder / file).write_bytes(data)
        api.create_repo(name)
        commits[name] = api.upload_folder(repo_id=name, folder_path=folder, commit_message='push').oid
    # an installation of vim2 whose manifest has one entry more: nothing else is changed
    site = tmp_path / 'site'
    (site / 'vim2').mkdir(parents=True)
    for path in (root / 'vim2').iterdir():
        if path.suffix == '.py':
            shutil.copy(path, site / 'vim2')
        elif path.name == 'weights':
            shutil.copytree(path, site / 'vim2' / 'weights')
        elif path.name != '__pycache__':
            (site / 'vim2' / path.name).symlink_to(path, target_is_directory=True)
    manifest = site / 'vim2' / 'weights' / 'manifest.json'
    listed = json.loads(manifest.read_text())
    weights = files['model.safetensors']
    listed['weights']['test_vim2.pushed'] = dict(
        repo=REPO, revision=commits[REPO], file='model.safetensors', size=len(weights),
        sha256=api.get_paths_info(REPO, 'model.safetensors')[0].lfs.sha256, license='mit', data='noise', command='none',
        metric=dict(name='top-1', value=25., on='noise'), config=dict(num_classes=4))
    manifest.write_text(json.dumps(listed))
    torch.save((X, SERIES), tmp_path / 'inputs.pt')

    def run(out, **extra):
        command = [sys.executable, '-c', _LOAD, site, tmp_path / 'inputs.pt', tmp_path / out]
        environment = tool_environment(**hub_environment(hub, tmp_path / 'home', **{'PYTHONPATH': str(site), **extra}))
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / out, weights_only=True)

    hub.requests.clear()
    with torch.no_grad():
        expected = {'vision': model(X), 'series': forecaster(SERIES)}
    online = run('online.pt')
    for name, value in online.items():
        assert torch.equal(value, expected['series' if name in ('mixin', 'tsm2') else 'vision']), name
    assert len(hub.seen(WEIGHTS, 'GET')) == 2  # one for each repository, although they were loaded seven times
    hub.requests.clear()
    offline = run('offline.pt', HF_HUB_OFFLINE='1')
    assert all(torch.equal(offline[name], value) for name, value in online.items()) and offline.keys() == online.keys()
    assert not hub.seen()


# ------------------------------------------------------------------------------------------------------------ faults

def test_missing(hub, repo, files):
    with pytest.raises(RepositoryNotFoundError):
        timm.create_model('hf-hub:org/nothing', pretrained=True)
    with pytest.raises(RepositoryNotFoundError):
        vim2.hub.load('org/nothing')
    hub.commit('org/no_config', {'model.safetensors': files['model.safetensors']})
    with pytest.raises(EntryNotFoundError, match='config.json'):
        timm.create_model('hf-hub:org/no_config', pretrained=True)
    with pytest.raises(FileNotFoundError, match='org/no_config is no model of vim2: it has no config.json'):
        vim2.hub.load('org/no_config')
    hub.commit('org/no_weights', {'config.json': files['config.json']})
    for load in LOADERS:
        with pytest.raises(FileNotFoundError, match='org/no_weights.* has no model.safetensors'):
            load('org/no_weights')


def by_timm(name):
    return timm.create_model(f'hf-hub:{name}', pretrained=True)


LOADERS = (by_timm, vim2.hub.load)


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('status', [401, 403])
def test_refused(hub, repo, model, load, status):
    load(REPO)  # the configuration is in the cache
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.fail('resolve/.*model.safetensors', status, times=99)
    with pytest.raises((HfHubHTTPError, LocalEntryNotFoundError)) as error:
        load(REPO)
    chain = f'{error.value} {error.value.__cause__}'
    assert str(status) in chain
    hub.faults.clear()
    assert same(load(REPO), model)


@pytest.mark.parametrize('where', ['resolve/.*model.safetensors', WEIGHTS], ids=['hub', 'storage'])
def test_server_error_then_success(hub, repo, model, where, monkeypatch):
    monkeypatch.setattr(pretrained, '_RETRY_SECONDS', 0.01)
    hub.fail(where, 500, times=2)
    assert same(by_timm(REPO), model)
    assert [r.status for r in hub.seen(where)].count(500) == 2


def test_server_error_for_good(hub, repo, model, monkeypatch):
    monkeypatch.setattr(pretrained, '_RETRY_SECONDS', 0.01)
    hub.fail(WEIGHTS, 503, times=99)
    with pytest.raises(HfHubHTTPError, match='503'):
        by_timm(REPO)
    assert len(blobs(constants.HF_HUB_CACHE)) == 1  # the configuration
    hub.faults.clear()
    assert same(by_timm(REPO), model)


@pytest.mark.parametrize('chunk', [1024, 10_000_000], ids=['resumed', 'restarted'])
def test_connection_cut(hub, repo, model, files, chunk, monkeypatch):
    """Resumed after the chunks that came; nothing of a part is left where files are looked for."""
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', chunk)
    hub.fail(WEIGHTS, 'cut', times=1)
    assert same(by_timm(REPO), model)
    first, second = hub.seen(WEIGHTS, 'GET')
    received = len(files['model.safetensors']) // 2 // chunk * chunk
    assert 'Range' not in first.headers
    assert second.headers.get('Range') == (f'bytes={received}-' if received else None)
    assert second.status == (206 if received else 200)
    assert len(blobs(constants.HF_HUB_CACHE)) == 2


def test_connection_cut_for_good(hub, repo, model, monkeypatch):
    """An error, and no part of the file in the cache; another attempt succeeds."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)  # between the client's six attempts
    hub.fail(WEIGHTS, 'cut', times=99)
    with pytest.raises(Exception, match='peer closed connection|IncompleteRead'):  # of the client's HTTP library
        by_timm(REPO)
    assert len(hub.seen(WEIGHTS, 'GET')) == 6 and len(blobs(constants.HF_HUB_CACHE)) == 1  # the configuration
    hub.faults.clear()
    assert same(by_timm(REPO), model)


def test_process_killed_in_a_download(hub, repo, model, tmp_path):
    """A part of a file that a killed process leaves is never taken for the file."""
    by_timm(REPO)
    folder = Path(constants.HF_HUB_CACHE) / 'models--org--vim2'
    blob = next(p for p in (folder / 'blobs').iterdir() if len(p.name) == 64)
    (folder / 'snapshots' / repo / 'model.safetensors').unlink()
    blob.rename(blob.with_name(f'{blob.name}.deadbeef.incomplete'))
    blob.with_name(f'{blob.name}.deadbeef.incomplete').write_bytes(b'half')
    assert same(by_timm(REPO), model)


@pytest.mark.parametrize('load', LOADERS)
def test_wrong_bytes(hub, repo, model, load):
    """The right number of bytes, one bit of them wrong; in the network, then in the cache."""
    hub.fail(WEIGHTS, 'flip', times=1)
    with pytest.raises(RuntimeError, match=r'safetensors is not what the Hub \(org/vim2\) lists: its SHA-256 is'):
        load(REPO)
    assert len(blobs(constants.HF_HUB_CACHE)) == 1  # the configuration
    assert same(load(REPO), model)
    path = next(Path(constants.HF_HUB_CACHE).rglob('model.safetensors')).resolve()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match='not what the Hub'):
        load(REPO)
    assert same(load(REPO), model)


def entry(repo, commit, data, sha256=None, name='test_vim2.listed'):
    return pretrained.Weights(
        name=name, file='model.safetensors', size=len(data), sha256=sha256 or hashlib.sha256(data).hexdigest(),
        license='mit', data='', metric={}, command='', config=dict(num_classes=4), repo=repo, revision=commit)


def test_bytes_that_the_manifest_does_not_list(hub, files, model, monkeypatch):
    """A repository (or a mirror of it) that serves consistent, but other bytes than were published."""
    listed = hub.commit(REPO, files)
    published = entry(REPO, listed, files['model.safetensors'])
    monkeypatch.setattr(pretrained, 'manifest', lambda: {published.name: published})
    cfg = dict(timm.get_pretrained_cfg(NAME).to_dict(), **published.pretrained_cfg())
    create = lambda **kwargs: timm.create_model(NAME, pretrained=True, pretrained_cfg=cfg, **kwargs)
    assert same(create(), model) and same(vim2.hub.load(published.name), model)
    assert create(features_only=True) and create(num_classes=2, in_chans=1)
    torch.manual_seed(8)
    other = timm.create_model(NAME, num_classes=4)
    data = save(other.state_dict())
    hub.store[hashlib.sha256(data).hexdigest()] = data
    hub.repos[REPO].commits[listed].files['model.safetensors'] = File(data, hashlib.sha256(data).hexdigest())
    shutil.rmtree(constants.HF_HUB_CACHE)
    for load in (create, lambda: vim2.hub.load(published.name), lambda: by_timm(f'{REPO}@{listed}'),
                 lambda: by_timm(REPO)):
        with pytest.raises(RuntimeError, match=r'is not what the manifest of vim2 \(test_vim2.listed\) lists'):
            load()
        assert len(blobs(constants.HF_HUB_CACHE)) <= 1
    # a newer commit of the same repository is none of the manifest's business
    hub.commit(REPO, {**files, 'model.safetensors': data})
    assert same(by_timm(REPO), other)


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('keep', [0, 5, 1000, -100])
def test_truncated_safetensors(hub, files, load, keep):
    hub.commit('org/truncated', {**files, 'model.safetensors': files['model.safetensors'][:keep] or b'x'})
    with pytest.raises(RuntimeError, match=r'org/truncated.*not a readable safetensors file \(corrupt or truncated\)'):
        load('org/truncated')


def test_weights_of_another_architecture(hub, files):
    hub.commit('org/other', {**files, 'model.safetensors': save(torch.nn.Linear(2, 2).state_dict())})
    for load in LOADERS:
        with pytest.raises(RuntimeError, match='org/other.* is no checkpoint of test_vim2'):
            load('org/other')


@pytest.mark.parametrize('changes, message', [
    (dict(architecture='vim3_huge'), "unknown architecture 'vim3_huge'; this version of vim2 has test_vim2, vim2_base"),
    (dict(architecture=['test_vim2']), 'unknown architecture'),
    (dict(architecture='resnet18'), r'is a resnet18 of timm\.models\.resnet, no model of vim2: load it with timm'),
    (dict(model_args=dict(color='red')), r"cannot make a test_vim2 with \{'color': 'red'\}.*unexpected keyword"),
    (dict(pretrained_cfg=dict(color='red')), 'cannot read the pretrained configuration.*color'),
    (dict(pretrained_cfg=dict(hf_hub_filename='../../../x.safetensors')), 'no plain file name'),
    (dict(pretrained_cfg=dict(hf_hub_filename='/etc/x.safetensors')), 'no plain file name'),
    (dict(pretrained_cfg=dict(hf_hub_filename='a\\..\\x.safetensors')), 'no plain file name'),
    (dict(pretrained_cfg=dict(hf_hub_filename='weights.bin')), "names 'weights.bin' as its weights.*can execute code"),
])
def test_bad_configuration(hub, files, changes, message):
    hub.commit('org/bad', config_with(files, **changes))
    with pytest.raises((RuntimeError, ValueError), match=message):
        vim2.hub.load('org/bad')
    if 'architecture' not in changes:
        with pytest.raises((RuntimeError, ValueError, TypeError), match='color' if 'color' in message else message):
            by_timm('org/bad')
    elif changes['architecture'] == 'vim3_huge':
        with pytest.raises(RuntimeError, match='Unknown model .vim3_huge'):
            by_timm('org/bad')
    assert not hub.seen(r'\.\./|etc|weights\.bin')


@pytest.mark.parametrize('text, message', [
    (b'{', 'no JSON'), (b'\xff\xfe', 'no JSON'), (b'[1]', 'must hold an object, it holds a list'),
    (b'{}', "neither timm's key `architecture` nor TSM2's horizon, lookback, num_variates; it has nothing"),
    (b'{"model_type": "bert", "lookback": 3}', 'it has lookback, model_type')])
def test_foreign_configuration(hub, files, tmp_path, text, message):
    hub.commit('org/foreign', {**files, 'config.json': text})
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'config.json').write_bytes(text)
    for source in ('org/foreign', tmp_path / 'model'):
        with pytest.raises(RuntimeError, match=f'{source}.*{message}'):
            vim2.hub.load(source)


def test_configuration_cannot_choose_the_reader(hub, files, model):
    """`custom_load`, `url`, `file` and `state_dict` in a repository's configuration change nothing."""
    cfg = dict(json.loads(files['config.json'])['pretrained_cfg'], custom_load='hf', url='http://127.0.0.1:9/x.pth',
               file='/nowhere', hf_hub_filename='model.safetensors', source='', hf_hub_id='org/elsewhere')
    hub.commit(REPO, config_with(files, pretrained_cfg=cfg))
    for load in LOADERS:
        assert same(load(REPO), model)


# ----------------------------------------------------------------------------------------------------------- pickles

@pytest.mark.parametrize('load', LOADERS)
def test_pickles_are_refused(hub, files, model, tmp_path, monkeypatch, load):
    """Unless the user says so; and then nothing but tensors is read from them."""
    benign, evil = io.BytesIO(), io.BytesIO()
    torch.save(model.state_dict(), benign)
    torch.save({'x': unpickled(tmp_path / 'pwned')}, evil)
    config = {'config.json': files['config.json']}
    hub.commit('org/pickle', {**config, 'pytorch_model.bin': benign.getvalue()})
    hub.commit('org/evil', {**config, 'pytorch_model.bin': evil.getvalue()})
    hub.commit('org/evil_bare', {**config, 'pytorch_model.bin': pickle.dumps(unpickled(tmp_path / 'pwned'))})
    for name in ('org/pickle', 'org/evil', 'org/evil_bare'):
        with pytest.raises(FileNotFoundError, match=f'{name}.* has no model.safetensors.*can execute code.*VIM2_ALLOW'):
            load(name)
    assert not hub.seen(r'pytorch_model\.bin')
    # a pickle under the name of a safetensors file is no safetensors file
    hub.commit('org/disguised', {**config, 'model.safetensors': evil.getvalue()})
    with pytest.raises(RuntimeError, match='not a readable safetensors file'):
        load('org/disguised')
    monkeypatch.setenv('VIM2_ALLOW_PICKLE', '1')
    assert same(load('org/pickle'), model)
    for name in ('org/evil', 'org/evil_bare'):
        with pytest.raises((RuntimeError, pickle.UnpicklingError), match='[Ww]eights_only|weights only'):
            load(name)
    assert not (tmp_path / 'pwned').exists()
    if load is vim2.hub.load:
        monkeypatch.delenv('VIM2_ALLOW_PICKLE')
        assert same(load('org/pickle', allow_pickle=True), model)
        with pytest.raises(FileNotFoundError):  # the permission was for that call
            load('org/pickle')


def test_unpickled_is_armed(tmp_path):
    """The file of the test above does execute code where it is read carelessly."""
    pickle.loads(pickle.dumps(unpickled(tmp_path / 'pwned')))
    assert (tmp_path / 'pwned').read_text() == 'executed'


def test_folders(files, model, forecaster, forecaster_files, tmp_path, monkeypatch):
    folder = tmp_path / 'vim2'
    write(folder, files)
    assert same(vim2.hub.load(folder), model) and same(vim2.hub.load(str(folder), num_classes=4), model)
    assert vim2.hub.load(folder, features_only=True).feature_info.channels() == [8, 16, 24, 32]
    write(tmp_path / 'tsm2', forecaster_files)
    assert same(vim2.hub.load(tmp_path / 'tsm2'), forecaster, SERIES)
    (folder / 'model.safetensors').write_bytes(files['model.safetensors'][:-9])
    for load in (vim2.hub.load, lambda f: timm.create_model(f'local-dir:{f}', pretrained=True)):
        with pytest.raises(RuntimeError, match='corrupt or truncated'):
            load(folder)
    (folder / 'model.safetensors').unlink()
    torch.save(model.state_dict(), folder / 'pytorch_model.bin')
    for load in (vim2.hub.load, lambda f: timm.create_model(f'local-dir:{f}', pretrained=True)):
        with pytest.raises(RuntimeError, match='has no model.safetensors, but pytorch_model.bin.*can execute code'):
            load(folder)
    assert same(vim2.hub.load(folder, allow_pickle=True), model)
    with pytest.raises(ValueError, match='is a folder, which has no revision'):
        vim2.hub.load(folder, revision='main')
    (folder / 'config.json').unlink()
    with pytest.raises(FileNotFoundError, match='has no config.json'):
        vim2.hub.load(folder)
    for name in ('./nothing', str(tmp_path / 'nothing'), tmp_path / 'nothing', 'a/b/c'):
        with pytest.raises(FileNotFoundError, match='there is no folder'):
            vim2.hub.load(name)
    with pytest.raises(ValueError, match='two revisions'):
        vim2.hub.load('org/x@a', revision='b')


def write(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


# -------------------------------------------------------------------------------------------------------------- TSM2

def test_tsm2(hub, forecaster, forecaster_files, files):
    hub.commit('org/tsm2', forecaster_files, private=True)
    loaded = vim2.hub.load('org/tsm2', token='hf_reader')
    assert isinstance(loaded, TSM2) and not loaded.training and same(loaded, forecaster, SERIES)
    hub.requests.clear()
    assert same(TSM2.from_pretrained('org/tsm2', token='hf_reader'), forecaster, SERIES)
    assert not hub.seen(method='GET')
    hub.commit('org/strange', {**forecaster_files, 'config.json': b'{"num_variates": 3, "lookback": {}, "horizon": 8}'})
    with pytest.raises(RuntimeError, match='org/strange.*cannot make a TSM2'):
        vim2.hub.load('org/strange')


@pytest.mark.parametrize('load', [vim2.hub.load, TSM2.from_pretrained], ids=['hub', 'mixin'])
def test_bad_weights_of_tsm2(hub, forecaster, forecaster_files, files, load, tmp_path, monkeypatch):
    hub.commit('org/tsm2', forecaster_files, private=True)
    hub.fail(WEIGHTS, 'flip', times=1)
    with pytest.raises(RuntimeError, match='not what the Hub'):
        load('org/tsm2', token='hf_reader')
    assert same(load('org/tsm2', token='hf_reader'), forecaster, SERIES)
    hub.commit('org/half', {**forecaster_files, 'model.safetensors': forecaster_files['model.safetensors'][:-10]})
    with pytest.raises(RuntimeError, match='corrupt or truncated'):
        load('org/half')
    hub.commit('org/mixed', {**forecaster_files, 'model.safetensors': files['model.safetensors']})
    with pytest.raises(RuntimeError, match='Missing key|[Uu]nexpected'):
        load('org/mixed')
    buffer = io.BytesIO()
    torch.save(forecaster.state_dict(), buffer)
    pickled = {'config.json': forecaster_files['config.json'], 'pytorch_model.bin': buffer.getvalue()}
    hub.commit('org/pickled', pickled)
    write(tmp_path / 'pickled', pickled)
    sources = ('org/pickled', tmp_path / 'pickled')
    for source in sources:
        with pytest.raises((FileNotFoundError, RuntimeError), match='has no model.safetensors.*can execute code'):
            load(source)
    monkeypatch.setenv('VIM2_ALLOW_PICKLE', '1')
    for source in sources:
        assert same(load(source), forecaster, SERIES)
    write(tmp_path / 'empty', {'config.json': forecaster_files['config.json']})
    with pytest.raises(FileNotFoundError, match='model.safetensors'):
        load(tmp_path / 'empty')


# ---------------------------------------------------------------------------------------------------------- manifest

def test_manifest_of_the_package(root):
    """Every entry is complete; every bundled file is listed with its bytes, and no other lies there."""
    entries = pretrained.read_manifest(root / 'vim2' / 'weights' / 'manifest.json')
    bundled = {w.file: w for w in entries.values() if w.path}
    folder = root / 'vim2' / 'weights'
    assert {p.relative_to(folder).as_posix() for p in folder.rglob('*.safetensors')} == set(bundled)
    for w in bundled.values():
        assert w.path.stat().st_size == w.size and pretrained.sha256(w.path) == w.sha256
    assert {w.architecture for w in entries.values()} <= {
        *(n for family in ('vim2', 'vmamba', 'vim') for n in timm.list_models(module=family)), 'tsm2'}
    for w in entries.values():
        assert w.license and w.data and w.metric['on']
        assert w.command.startswith('python tools/') if w.pinned else w.command is None
    table = str(vim2.list_pretrained())
    assert row_of(table, 'vim2_nano_patch2_32.cifar10') == ['3.8 MB', 'apache-2.0', entries[
        'vim2_nano_patch2_32.cifar10'].data, 'top-1 89.48 %', 'the package']
    assert row_of(table, 'vim2_micro_patch4_64.tiny_imagenet') == ['9.1 MB', 'apache-2.0', entries[
        'vim2_micro_patch4_64.tiny_imagenet'].data, 'top-1 53.63 %', 'the package']
    assert len(vim2.list_pretrained('nothing*')) == 0


def test_bundled_forecaster(tmp_path, monkeypatch):
    """By its name, like the others; and compared with the manifest, like the others."""
    name = 'tsm2.ETTh1-96'
    folder = pretrained.WEIGHTS_DIR / name
    model = vim2.hub.load(name)
    assert isinstance(model, TSM2) and not model.training and model.horizon == 96
    weights = upgrade_state_dict(load_file(folder / 'model.safetensors'))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    shutil.copytree(folder, tmp_path / name)
    monkeypatch.setattr(pretrained, 'WEIGHTS_DIR', tmp_path)
    assert vim2.hub.load(name)
    data = bytearray((tmp_path / name / 'model.safetensors').read_bytes())
    data[-1] ^= 1
    (tmp_path / name / 'model.safetensors').write_bytes(data)
    with pytest.raises(RuntimeError, match=r'is not what the manifest of vim2 \(tsm2.ETTh1-96\) lists'):
        vim2.hub.load(name)


def row_of(table, name):
    row = next(line for line in table.splitlines() if line.startswith(name))
    return re.split(r'  +', row)[1:]


@pytest.mark.parametrize('change, message', [
    (dict(sha256='0' * 63), 'x.y: sha256 must be 64'), (dict(sha256='A' * 64), 'sha256 must be 64'),
    (dict(size='3'), "size is '3', no int"), (dict(colour='red'), 'colour is unknown'),
    (dict(file='../x.safetensors'), 'file must be'), (dict(file='x.bin'), 'file must be'),
    (dict(repo='org/x'), 'repo needs a revision'), (dict(revision='0' * 40), 'repo needs a revision'),
    (dict(repo='org/x', revision='main'), 'repo needs a revision'), (dict(metric={}), 'metric needs'),
    (dict(license=None), 'license is None'), (dict(url='https://x/y.pth'), 'what is pinned no url'),
    (dict(sha256='not pinned'), 'either a repo or a url'), (dict(command=None), 'command is None')])
def test_bad_manifest(tmp_path, change, message):
    values = dict(file='x.safetensors', size=1, sha256='0' * 64, license='mit', data='d', command='c',
                  metric=dict(name='n', value=1., on='d'))
    path = tmp_path / 'manifest.json'
    path.write_text(json.dumps(dict(format=1, weights={'x.y': values})))
    assert list(pretrained.read_manifest(path)) == ['x.y']
    path.write_text(json.dumps(dict(format=1, weights={'x.y': {**values, **change}})))
    with pytest.raises(ValueError, match=message):
        pretrained.read_manifest(path)
    path.write_text(json.dumps(dict(format=2, weights={})))
    with pytest.raises(ValueError, match='format 2'):
        pretrained.read_manifest(path)


def test_damaged_bundled_weights(tmp_path, monkeypatch):
    """The files of the package are compared with the manifest at each load, too."""
    name = 'vim2_nano_patch2_32.cifar10'
    data = bytearray((pretrained.WEIGHTS_DIR / f'{name}.safetensors').read_bytes())
    data[-1] ^= 1
    (tmp_path / f'{name}.safetensors').write_bytes(data)
    monkeypatch.setattr(pretrained, 'WEIGHTS_DIR', tmp_path)
    cfg = dict(timm.get_pretrained_cfg(name).to_dict(), file=str(tmp_path / f'{name}.safetensors'))
    with pytest.raises(RuntimeError, match='is not what the manifest of vim2'):
        timm.create_model(name, pretrained=True, pretrained_cfg=cfg)


# ------------------------------------------------------------------------------------------------ the server's honesty

def test_server_rejects_what_the_hub_rejects(hub, repo, files, tmp_path):
    api = HfApi(token='hf_owner')
    api.create_repo('org/new', private=True)
    with pytest.raises(HfHubHTTPError, match='409'):
        api.create_repo('org/new')
    with pytest.raises(HfHubHTTPError, match='403'):
        HfApi(token='hf_reader').create_repo('org/mine')
    with pytest.raises(HfHubHTTPError, match="don't have the rights"):
        HfApi(token='hf_reader').upload_file(path_or_fileobj=b'x', path_in_repo='x.txt', repo_id='org/new')
    with pytest.raises(ValueError, match='Invalid metadata'):
        api.upload_file(path_or_fileobj=b'---\nlicense: [1]\n---\n', path_in_repo='README.md', repo_id='org/new')
    save_file({'x': torch.zeros(3)}, tmp_path / 'x.safetensors')
    hub.fail('/objects/', 500, method='PUT')
    api.upload_file(path_or_fileobj=tmp_path / 'x.safetensors', path_in_repo='x.safetensors', repo_id='org/new')
    assert [r.status for r in hub.seen('/objects/', 'PUT')] == [500, 200]
    assert [r.status for r in hub.seen('lfs/verify')] == [200]
    pull = api.upload_file(path_or_fileobj=b'y', path_in_repo='y.txt', repo_id='org/new', create_pr=True)
    assert pull.pr_revision == 'refs/pr/1'
    assert api.list_repo_files('org/new') == ['x.safetensors']
    assert api.list_repo_files('org/new', revision='refs/pr/1') == ['x.safetensors', 'y.txt']
