"""vim2/_files.py: nobody finds half of a file, nothing is replaced that is no file, nothing is left behind."""
import os
import resource
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vim2 import _files

ALONE = f'import runpy; _files = runpy.run_path({_files.__file__!r})'  # without PyTorch, for processes of tests


def names(folder):
    return sorted(os.listdir(folder))


@pytest.fixture
def small_files():
    """No file of this process can grow beyond 64 kB, as on a disk that is full."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_link_is_written_through(tmp_path):
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there' / 'real.csv').write_text('old')
    (tmp_path / 'link.csv').symlink_to('there/real.csv')
    (tmp_path / 'dangling.csv').symlink_to('there/new.csv')
    _files.write_text(tmp_path / 'link.csv', 'new')
    _files.write_text(tmp_path / 'dangling.csv', 'newer')
    assert (tmp_path / 'link.csv').is_symlink() and (tmp_path / 'there' / 'real.csv').read_text() == 'new'
    assert (tmp_path / 'dangling.csv').is_symlink() and (tmp_path / 'there' / 'new.csv').read_text() == 'newer'
    assert names(tmp_path / 'there') == ['new.csv', 'real.csv']


def test_a_device_stays_a_device():
    for device in ('/dev/null', '/dev/full'):
        before = os.stat(device)
        if device == '/dev/null':
            _files.write_text(device, 'x')
        else:
            with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
                _files.write_text(device, 'x' * 100_000)
        after = os.stat(device)
        assert stat.S_ISCHR(after.st_mode) and after.st_rdev == before.st_rdev


def test_a_pipe_gets_the_bytes(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / 'pipe').read_text()))
    reader.start()
    _files.write_text(tmp_path / 'pipe', 'through')
    reader.join(10)
    assert got == ['through'] and stat.S_ISFIFO(os.stat(tmp_path / 'pipe').st_mode) and names(tmp_path) == ['pipe']


@pytest.mark.parametrize('redirect', [True, False])
def test_standard_output(tmp_path, redirect):
    code = f"{ALONE}; _files['write_text']('/dev/stdout', 'rows')"
    out = tmp_path / 'out'
    with open(out, 'wb') as f:
        done = subprocess.run([sys.executable, '-c', code], stdout=f if redirect else subprocess.PIPE,
                              stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert (out.read_bytes() if redirect else done.stdout) == b'rows'


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / 'file'
    _files.write_text(path, 'old')
    for error in (ZeroDivisionError, KeyboardInterrupt):
        def fill(tmp, error=error):
            Path(tmp).write_text('half')
            raise error
        with pytest.raises(error):
            _files.write(path, fill)
        with pytest.raises(error):
            _files.write_folder(tmp_path / 'folder', lambda tmp, f=fill: (os.mkdir(tmp), f(os.path.join(tmp, 'a'))))
    assert path.read_text() == 'old' and names(tmp_path) == ['file']


@pytest.mark.parametrize('kind', ['text', 'torch', 'safetensors', 'folder'])
def test_a_full_disk(tmp_path, small_files, kind):
    path, tensor = tmp_path / 'file', torch.zeros(1 << 16)

    def folder(tmp):
        os.mkdir(tmp)
        save_file(dict(a=tensor), os.path.join(tmp, 'model.safetensors'))

    write = dict(text=lambda: _files.write_text(path, 'x' * 100_000), torch=lambda: _files.write_torch(path, tensor),
                 safetensors=lambda: _files.write(path, lambda tmp: save_file(dict(a=tensor), tmp)),
                 folder=lambda: _files.write_folder(path, folder))[kind]
    with pytest.raises(OSError, match='File too large') as error:
        write()
    assert error.value.filename == str(path) and names(tmp_path) == []


def test_two_writers_of_one_file(tmp_path):
    """Each has a temporary of its own: the last one wins, and neither fails."""
    both, path = threading.Barrier(2), tmp_path / 'file'

    def fill(text, tmp):
        Path(tmp).write_text(text)
        both.wait(10)

    threads = [threading.Thread(target=_files.write, args=(path, lambda tmp, t=text: fill(t, tmp))) for text in 'ab']
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert path.read_text() in 'ab' and names(tmp_path) == ['file']


def test_permissions_stay_and_long_names_work(tmp_path):
    path = tmp_path / ('n' * 250)
    _files.write_text(path, 'a')
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    path.chmod(0o640)
    _files.write_text(path, 'b')
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and path.read_text() == 'b'
    with pytest.raises(IsADirectoryError):
        _files.write_text(tmp_path, 'x')
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/none/file'"):
        _files.write_text(tmp_path / 'none' / 'file', 'x')


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_folders_are_exchanged_whole(tmp_path):
    def fill(text, *files):
        def write(tmp):
            os.mkdir(tmp)
            for file in files:
                Path(tmp, file).write_text(text)
        return write

    path = tmp_path / 'model'
    _files.write_folder(path, fill('1', 'a', 'b'))
    (path / 'README.md').write_text('kept')
    _files.write_folder(path, fill('2', 'a', 'c'))
    assert {f: (path / f).read_text() for f in names(path)} == {'a': '2', 'b': '1', 'c': '2', 'README.md': 'kept'}
    assert names(tmp_path) == ['model']


def test_a_folder_is_one_process_own(tmp_path):
    code = f'''
import sys; {ALONE}
with _files['lock_folder']({str(tmp_path)!r}):
    print("held", flush=True)
    sys.stdin.read()
'''
    other = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b'held\n'
        with pytest.raises(_files.Locked, match=f'in use by process {other.pid} on .* since 2'):
            with _files.lock_folder(tmp_path):
                pass
    finally:
        other.kill()  # not an end in which it could clean up
        other.communicate()
    with _files.lock_folder(tmp_path):
        (tmp_path / '.file.123.tmp').write_text('left by a killed writer')
        (tmp_path / '.folder.123.tmp').mkdir()
        _files.remove_temporaries(tmp_path)
    assert [n for n in names(tmp_path) if n.endswith('.tmp') or 'owner' in n] == []


# ------------------------------------------------------------------------------------------------------------ checksums

def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    state = dict(weights=torch.arange(500.), progress=dict(epoch=3, metric=1.5))
    path = tmp_path / 'last.pth.tar'
    _files.write_torch(path, state)
    whole = path.read_bytes()
    _files.check_torch(path)
    assert torch.equal(torch.load(path, weights_only=True)['weights'], state['weights'])  # anybody's reader
    silent = 0
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.randint(8 * len(whole), (150,), generator=generator).tolist()
    in_the_sum = range(8 * (len(whole) - 73), 8 * len(whole))  # and in its length and its name
    for bit in (*anywhere, *in_the_sum):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(_files.Damaged):
            _files.check_torch(path)
        try:
            silent += not torch.equal(torch.load(path, weights_only=True)['weights'], state['weights'])
        except Exception:
            pass
    assert silent > 20  # what the sum is for


def test_files_of_torch_save_alone_are_checked_too(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(dict(a=torch.arange(500.)), path)
    _files.check_torch(path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(_files.Damaged, match='the sum of its part weights/data/0 is wrong'):
        _files.check_torch(path)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('weights/data.pkl', bytes(100_000))
    with pytest.raises(_files.Damaged, match='it is compressed'):
        _files.check_torch(path)
