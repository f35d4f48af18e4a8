"""tools/benchmark.py: every subcommand runs and its figures hang together. Speeds themselves are not asserted."""
import json
import re

import pytest

import benchmark


def test_scan(tool, monkeypatch):
    monkeypatch.setattr(benchmark, 'STAGES', [('small', 32, 5)])
    result = tool('benchmark', 'scan', '--json', '--states', 4, 3, '--batch', 2, '--repeats', 3)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert [(r['states'], r['batch'], r['updates']) for r in report['results']] == [
        (n, 2, 2 * 4 * 25 * 32 * n) for n in (4, 3)]
    for r in report['results']:
        assert r['forward_ms'] > 0 and r['exp_ms'] > 0 and r['backward_ms'] > 0
        assert r['forward_over_exp'] > 0 and r['backward_over_forward'] > 0
        assert r['whole_exp_ms'] > 0 and r['forward_over_whole_exp'] > 0
    assert report['machine']['threads'] >= 1
    for key in ('forward_over_exp', 'forward_over_whole_exp', 'backward_over_forward'):
        assert [w[key] for w in report['worst']] == [r[key] for r in report['results']]


def test_model(tool):
    result = tool('benchmark', 'model', 'test_vim2', 'test_vit', '--json', '--batch-size', 2, '--repeats', 2)
    assert result.code == 0, result.err
    first, last = json.loads(result.out)['results']
    assert (first['model'], last['model']) == ('test_vim2', 'test_vit')
    assert first['img_size'] == 64 and last['img_size'] == 160
    for key in ('speed_vs_last', 'latency_speed_vs_last', 'train_speed_vs_last'):
        assert last[key] == 1 and first[key] > 0
    for r in (first, last):
        assert r['images_per_s'] > 0 and r['train_peak_mb'] >= r['forward_peak_mb'] >= 0
        assert r['train_peak_mb'] > 0  # measured in a process of its own, whose parent holds much more


def test_parts(tool):
    result = tool('benchmark', 'parts', 'test_vim2', '--json', '--batch-size', 1, '--repeats', 1)
    assert result.code == 0, result.err
    forward, train = json.loads(result.out)['results']
    assert (forward['measure'], train['measure']) == ('forward', 'train')
    for r in (forward, train):
        assert r['ms'] == pytest.approx(sum(r['parts_ms'].values()))
        for part in ('scan', 'matrix products', 'convolutions', 'normalisation', 'activations'):
            assert r['parts_ms'][part] > 0, part
    assert train['parts_ms']['optimizer'] > 0 == forward['parts_ms']['optimizer']


def test_scaling(tool, tmp_path):
    path = tmp_path / 'scaling.png'
    result = tool('benchmark', 'scaling', 'test_vim2', '--sizes', 64, 96, '--repeats', 1, '--plot', path)
    assert result.code == 0, result.err
    assert '64 px' in result.out and '96 px' in result.out and path.read_bytes().startswith(b'\x89PNG')


def test_versus(tool, monkeypatch, root):
    monkeypatch.setattr(benchmark, 'STAGES', [('small', 32, 5)])
    monkeypatch.setattr(benchmark.Side, 'memory', lambda side, job: 5.0)  # test_memory_prints_without_json measures it
    result = tool('benchmark', 'versus', root, '--model', 'test_vim2', '--batch', 1, '--states', 4, '--repeats', 2,
                  '--json')
    assert result.code == 0, result.err
    forward, train, *scans = json.loads(result.out)['results']
    assert (forward['train'], train['train']) == (False, True)
    assert [(s['channels'], s['backward']) for s in scans] == [(32, False), (32, True)]
    for r in (forward, train, *scans):
        assert r['wall_time_ratio'] > 0 and r['cpu_ms_here'] > 0 and r['cpu_ms_there'] > 0
    assert train['peak_mb_here'] == train['peak_mb_there'] == 5


def test_versus_of_what_is_no_checkout(tool, tmp_path):
    (tmp_path / 'vim2').mkdir()
    (tmp_path / 'vim2' / '__init__.py').write_text("raise RuntimeError('broken')")
    result = tool('benchmark', 'versus', tmp_path, '--repeats', 1)
    assert result.code == 2 and 'did not run' in result.err


@pytest.mark.parametrize('arguments, message', [
    (('model', 'no_such_model'), 'no_such_model'), (('scan', '--repeats', 0), '--repeats must be at least 1')])
def test_mistakes(tool, arguments, message):
    result = tool('benchmark', *arguments)
    assert result.code == 2 and message in result.err and 'Traceback' not in result.err


def test_memory_prints_without_json(tool):
    result = tool('benchmark', 'memory', 'test_vim2', '--batch-size', 2, '--img-size', 64, '--train')
    assert result.code == 0, result.err
    assert re.fullmatch(r'test_vim2, training step, batch 2, 64 px: \d+ MB at most\n', result.out)
