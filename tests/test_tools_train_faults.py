"""tools/train.py when something goes wrong: what is kept, what is said, and that a resumed run is the same run."""
import os
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest
import timm
import torch
from conftest import tool_environment
from test_tools_train import assert_same_state, interrupted, is_alive, load, options

import _common as common
import _data as data
import train
import validate
from vim2 import _files


def one_line(result, code=2):
    assert result.code == code and len(result.err.strip().splitlines()) == 1, result.err
    return result.err


@pytest.fixture(scope='module')
def whole(npz_dir, tmp_path_factory):
    """The run that nothing disturbs."""
    out = tmp_path_factory.mktemp('whole')
    args, _ = train.parse_args(options(npz_dir, out, '--epochs', 2, '--checkpoint-interval-steps', 1))
    trainer = train.Trainer(args, None)
    trainer.fit()
    trainer.run.release()
    return out / 'run'


def stopped_at(tool, monkeypatch, npz_dir, tmp_path, updates, action, *more):
    """A run in which `action` happens before an update."""

    def act(self, loss, need_update, original=train.Trainer.backward):
        if self.progress.updates == updates:
            action(self)
        original(self, loss, need_update)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, 'backward', act)
        return tool('train', *options(npz_dir, tmp_path, '--epochs', 2, '--checkpoint-interval-steps', 1, *more))


# --------------------------------------------------------------------------------------------------------- checkpoints

def test_a_flipped_byte_is_found_and_the_checkpoint_before_is_named(npz_dir, tmp_path, tool, monkeypatch, whole):
    last = interrupted(npz_dir, tmp_path, tool, monkeypatch)
    good = last.read_bytes()
    damaged = bytearray(good)
    damaged[len(damaged) // 2] ^= 1
    last.write_bytes(damaged)
    error = one_line(tool('train', '--resume', last))
    previous = last.with_name('previous.pth.tar')
    assert 'its SHA-256 sum is not the one' in error and f'The checkpoint before it is {previous}' in error
    assert load(previous)['progress']['updates'] == 6
    # a weights file for the other tools as well
    result = tool('validate', '--model', 'test_vit', '--checkpoint', last, '--data-dir', npz_dir, '--dataset', 'npz',
                  '--split', 'test')
    assert 'its SHA-256 sum is not the one' in one_line(result)
    result = tool('train', '--resume', previous)
    assert result.code == 0, result.err
    assert_same_state(load(whole / 'last.pth.tar'), load(last))


@pytest.mark.parametrize('when', ['before last', 'before best'])
def test_killed_between_the_files_of_a_checkpoint(npz_dir, tmp_path, tool, monkeypatch, whole, when):
    """best.pth.tar is what the log says, whichever file was the last to be written."""
    write, copy = common.write_torch, train.Run.copy

    def kill(*args):
        raise KeyboardInterrupt

    def killed_before_last(path, state):
        (kill if state['progress']['best_epoch'] == 0 and state['progress']['batch'] == 0 else write)(path, state)

    def killed_before_best(self, source, target):
        (kill if target == 'best.pth.tar' else copy)(self, source, target)

    with monkeypatch.context() as patch:
        if when == 'before last':
            patch.setattr(common, 'write_torch', killed_before_last)
        else:
            patch.setattr(train.Run, 'copy', killed_before_best)
        result = tool('train', *options(npz_dir, tmp_path, '--epochs', 2, '--checkpoint-interval-steps', 1))
    last, best = tmp_path / 'run' / 'last.pth.tar', tmp_path / 'run' / 'best.pth.tar'
    assert result.code == 130 and not best.exists()
    result = tool('train', '--resume', last)
    assert result.code == 0, result.err
    assert_same_state(load(whole / 'last.pth.tar'), load(last))
    assert_same_state(load(whole / 'best.pth.tar'), load(best))


def test_a_best_checkpoint_that_is_lost_is_said_to_be(npz_dir, tmp_path, tool, monkeypatch):
    last = interrupted(npz_dir, tmp_path, tool, monkeypatch, updates=15)
    (last.parent / 'best.pth.tar').unlink()
    result = tool('train', '--resume', last)
    assert result.code == 0 and 'the best epoch, 0, is lost (no checkpoint to resume from' in result.out
    assert load(last.parent / 'best.pth.tar')['progress']['best_epoch'] == 1


def test_a_full_disk(npz_dir, tmp_path, tool, monkeypatch):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        result = stopped_at(tool, monkeypatch, npz_dir, tmp_path, 7, lambda trainer: resource.setrlimit(
            resource.RLIMIT_FSIZE, (1 << 16, old[1])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    last = tmp_path / 'run' / 'last.pth.tar'
    assert one_line(result) == (f'train.py: error: cannot write {last}: File too large; {last} is complete, the state '
                                'before\n')
    assert load(last)['progress']['updates'] == 7 and not list(last.parent.glob('.*.tmp'))


@pytest.mark.parametrize('what', ['weights', 'moments'])
def test_numbers_that_are_not_finite_are_never_saved(npz_dir, tmp_path, tool, monkeypatch, what):
    """Though the loss is finite still."""
    def poison(self, loss, need_update, original=train.Trainer.backward):
        original(self, loss, need_update)
        if self.progress.updates == 6:
            if what == 'weights':
                self.model.head.bias.data[0] = float('-inf')  # a class that the model never gives
            else:
                self.optimizer.state[self.model.head.bias]['exp_avg_sq'][0] = float('inf')

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, 'backward', poison)
        result = tool('train', *options(npz_dir, tmp_path, '--epochs', 2, '--checkpoint-interval-steps', 1))
    error = one_line(result)
    assert 'are not finite in epoch 0 by batch 7: ' in error and ('head.bias' in error or 'exp_avg_sq' in error)
    last = tmp_path / 'run' / 'last.pth.tar'
    assert f'{last} is of epoch 0, batch 6' in error and load(last)['progress']['updates'] == 6


ODD = [None, [], {}, 'x', -1, 2 ** 62, float('nan'), [1, 2], {'a': 1}, {1: 2}, torch.zeros(1), True]


@pytest.mark.parametrize('field', ['format', 'arch', 'args', 'epoch', 'progress', 'world_size', 'train_samples',
                                   'label_names', 'state_dict', 'optimizer', 'scheduler'])
def test_odd_fields_of_a_checkpoint_are_one_line(npz_dir, tmp_path, whole, tool, field):
    """Any field absent, or of any other kind: refused in one line, or (what resuming does not need) not missed."""
    state = load(whole / 'last.pth.tar')
    path = tmp_path / 'run' / 'odd.pth.tar'
    path.parent.mkdir()
    for odd in ('absent', *(ODD if field != 'scheduler' else ODD[:4])):
        changed = {k: v for k, v in state.items() if k != field}
        if odd != 'absent':
            changed[field] = odd
        torch.save(changed, path)
        result = tool('train', '--resume', path)
        if result.code:
            error = one_line(result)
            assert 'odd.pth.tar' in error or odd == {}, error
        else:
            assert field in ('epoch', 'label_names', 'scheduler'), (field, odd)


@pytest.mark.parametrize('field', ['epoch', 'batch', 'updates', 'loss_sum', 'samples', 'best_metric', 'best_epoch',
                                   'best_kind'])
def test_odd_progress_is_one_line(tmp_path, whole, tool, field):
    state = load(whole / 'last.pth.tar')
    path = tmp_path / 'run' / 'odd.pth.tar'
    path.parent.mkdir()
    for odd in ODD[1:]:
        torch.save({**state, 'progress': {**state['progress'], field: odd}}, path)
        result = tool('train', '--resume', path)
        if result.code:
            assert 'odd.pth.tar' in one_line(result)
        else:
            assert isinstance(odd, (int, float)), (field, odd)


def test_a_checkpoint_of_another_version_is_refused_in_words(npz_dir, tmp_path, tool):
    """One of 0.1.0, whose mixers had in_proj: its weights are a start, its optimizer state is not."""
    model = ('--model', 'test_vim2', '--img-size', 32, '--model-kwargs')
    result = tool('train', *options(npz_dir, tmp_path, '--epochs', 1, model=model))
    assert result.code == 0, result.err
    last = tmp_path / 'run' / 'last.pth.tar'
    state = load(last)
    old = {}
    for key, value in state['state_dict'].items():
        prefix, _, name = key.rpartition('gate_proj.weight')
        if not name and prefix:
            old[prefix + 'in_proj.weight'] = torch.cat([state['state_dict'][prefix + 'in_proj.weight'], value])
        else:
            old.setdefault(key, value)
    torch.save({**state, 'state_dict': old}, tmp_path / 'old.pth.tar')
    error = one_line(tool('train', '--resume', tmp_path / 'old.pth.tar'))
    assert 'is of version 0.1.0' in error and '--initial-checkpoint starts from its weights' in error
    network = timm.create_model('test_vim2', num_classes=4)
    common.load_weights(network, str(tmp_path / 'old.pth.tar'), 'test_vim2')
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in state['state_dict'].items())


def test_classes_that_changed_under_a_run(npz_dir, tmp_path, tool, monkeypatch):
    last = interrupted(npz_dir, tmp_path, tool, monkeypatch)
    _files.write_torch(last, {**load(last), 'label_names': ['green', 'red', 'blue', 'violet']})
    assert "with other classes than" in (error := one_line(tool('train', '--resume', last)))
    assert "['gray', 'violet']" in error


# ------------------------------------------------------------------------------------------------------------- signals

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_with_a_checkpoint(npz_dir, tmp_path, tool, monkeypatch, whole, number):
    before = signal.getsignal(number)  # of this process: a background job may be started with SIGINT ignored
    result = stopped_at(tool, monkeypatch, npz_dir, tmp_path, 7, lambda trainer: os.kill(os.getpid(), number),
                        '--checkpoint-interval-steps', 0)
    last = tmp_path / 'run' / 'last.pth.tar'
    assert one_line(result, 128 + number) == (
        f'train.py: stopped by {number.name}: continue with --resume {last}\n')
    assert load(last)['progress']['updates'] == 8
    assert signal.getsignal(number) == before
    assert tool('train', '--resume', last).code == 0
    assert_same_state(load(whole / 'last.pth.tar'), load(last))


def test_a_signal_during_evaluation(npz_dir, tmp_path, tool, monkeypatch, whole):
    real = validate.evaluate

    def evaluate(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(validate, 'evaluate', evaluate)
        result = tool('train', *options(npz_dir, tmp_path, '--epochs', 2))
    last = tmp_path / 'run' / 'last.pth.tar'
    assert result.code == 143 and load(last)['progress']['epoch'] == 0 and load(last)['progress']['batch'] == 10
    assert tool('train', '--resume', last).code == 0
    assert_same_state(load(whole / 'last.pth.tar'), load(last))


def test_a_second_signal_ends_at_once(npz_dir, tmp_path, tool, monkeypatch):
    result = stopped_at(tool, monkeypatch, npz_dir, tmp_path, 7, lambda trainer: (
        os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGINT)))
    assert result.code == 130 and 'interrupted' in result.err
    assert load(tmp_path / 'run' / 'last.pth.tar')['progress']['updates'] == 7


def test_workers_ignore_a_signal_to_the_group_and_end_with_their_parent():
    """What they do on signals is their parent's to decide; killed as a parent is here, they go with it."""
    script = f'''
import os, sys, time
sys.path.insert(0, {os.path.dirname(data.__file__)!r})
import _data
_data._init_worker(0)
print(os.getpid(), flush=True)
time.sleep(60)
'''
    code = f'import subprocess, sys, time; subprocess.Popen([sys.executable, "-c", {script!r}]); time.sleep(60)'
    parent = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, env=tool_environment())
    worker = psutil.Process(int(parent.stdout.readline()))
    for number in (signal.SIGTERM, signal.SIGINT):
        worker.send_signal(number)
    time.sleep(0.1)
    assert is_alive(worker)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while is_alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.01)


PROBE = '''
import os, signal, sys
import _common, torch, train
rank = int(os.environ['RANK'])
def act(self, loss, need_update, original=train.Trainer.backward):
    original(self, loss, need_update)
    if rank == 1 and self.progress.updates in (3, 6):
        {action}
train.Trainer.backward = act
_common.run(train.main)
'''


def two_processes(npz_dir, tmp_path, root, action, *more):
    """Two gloo processes, without torchrun, which would end one for the other; in the second something happens."""
    port = 31000 + os.getpid() % 2000
    command = [sys.executable, '-c', PROBE.format(action=action),
               *options(npz_dir, tmp_path, '-b', 8, '--epochs', 2, *more)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                  env=tool_environment(
                                      PYTHONPATH=f'{root}/tools:{root}', RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE='2',
                                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))) for r in range(2)]
    try:
        return [(p.wait(240), p.stderr.read()) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.stderr.close()


def test_a_process_that_dies_ends_the_others_with_a_reason(npz_dir, tmp_path, root):
    (code, error), (died, _) = two_processes(npz_dir, tmp_path, root, 'os._exit(9)')
    assert died == 9 and code == 2, error
    assert 'train.py: error: another process of the run has ended' in error.replace('-c: ', 'train.py: ')
    assert 'Traceback' not in error


def test_a_signal_to_one_process_ends_all_with_a_checkpoint(npz_dir, tmp_path, root):
    results = two_processes(npz_dir, tmp_path, root, 'os.kill(os.getpid(), signal.SIGTERM)')
    assert [code for code, _ in results] == [143, 143], results
    progress = load(tmp_path / 'run' / 'last.pth.tar')['progress']
    assert progress['updates'] in (4, 5) and progress['samples'] == 16 * progress['updates']


def test_processes_with_other_clocks_end_minutes_together(npz_dir, tmp_path, root):
    """One's clock jumps, into the decay and to the end: the same learning rates, and so the same bits, and one end."""
    action = 'self.started -= 900 if self.progress.updates == 3 else 3600'
    save = f'''
def keep(self, original=train.Trainer.take_best):
    torch.save(dict(updates=self.progress.updates, rate=self.top_rate(), **self.model.state_dict()),
               {str(tmp_path)!r} + f'/{{rank}}.pth')
def finish(self, *args, original=train.Trainer.finish_epoch):
    original(self, *args)
    keep(self)
train.Trainer.finish_epoch = finish
'''
    results = two_processes(npz_dir, tmp_path, root, action + save, '--minutes', 30, '--epochs', 100)
    assert [code for code, _ in results] == [0, 0], results
    one, two = (load(tmp_path / f'{rank}.pth') for rank in range(2))
    assert 7 <= one['updates'] <= 9 and one['rate'] < 2e-5
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(two[k])) for k, v in one.items())
