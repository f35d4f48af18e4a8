"""tools/kernel_report.py and tools/gpu_check.py without a GPU."""
import json
import os
import subprocess
import sys

import pytest
from conftest import needs_interpreter

pytest.importorskip('triton')


def run(root, *args, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ('TRITON_INTERPRET', 'VIM2_SCAN_BACKEND')}
    environment.update(OMP_NUM_THREADS='1', PYTHONPATH=str(root), **variables)
    return subprocess.run([sys.executable, *args], cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope='module')
def report(root):
    sys.path.insert(0, str(root / 'tools'))
    import kernel_report
    return kernel_report


def test_recorded_launches(report):
    import torch
    shape = report.Shape(8, 64, 5, 7, 16, 4)
    launches = report.record(shape, torch.bfloat16, processors=1)
    assert [launch.kernel for launch in launches] == ['scan_forward', 'scan_backward', 'add_up']
    assert launches[0].constants['KM'] == 4 and launches[0].programs == 8 * 2      # image x block of 32 channels
    apart = report.record(shape, torch.bfloat16, processors=1000, training=False)
    assert [launch.kernel for launch in apart] == ['scan_forward', 'add_up']
    assert apart[0].constants['KM'] == 1 and apart[0].programs == 4 * 8 * 2
    amd = report.record(shape, torch.bfloat16, processors=1, wave=64)              # a lane owns a channel there too
    assert amd[0].constants['BE'] == 64 and amd[1].constants['NL'] * amd[1].constants['CL'] == 64
    chunked = report.record(report.Shape(1, 32, 1, 1024), torch.bfloat16)
    assert [launch.kernel for launch in chunked[:3]] == ['chunk_summary', 'chunk_carry', 'scan_forward']


def test_minimum_bytes(report):
    import torch
    shape = report.Shape(1, 2, 1, 3, 4, 1)
    # u, delta, out of 6 numbers, B and C of 12; backward: grad_out, and the gradients of u, delta, B, C.
    assert report.minimum_bytes(shape, torch.float16, False) == 2 * (3 * 6 + 2 * 12)
    assert report.minimum_bytes(shape, torch.float32, True) == 4 * (5 * 6 + 4 * 12)


def test_machine_code_of_a_map(root, tmp_path):
    """Nothing spills in what the models run most, whatever the Triton."""
    out = tmp_path / 'report.json'
    done = run(root, 'tools/kernel_report.py', '--variants', 'map-infer-bf16', 'map-bf16', '--targets', 'sm_90',
               '--json', str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    rows = {row['kernel']: row for row in result['machine_code']}
    assert all(row['triton'] == result['triton'] for row in result['machine_code'] + result['roofline'])
    assert all(row['spills'] == 0 and 32 < row['registers'] <= 255 for row in rows.values())
    # One exponential a step in the forward; in the backward one for each time that a state is found, and the adjoint's.
    for kernel, exponentials in (('scan_forward', 1), ('scan_backward', 3.5)):
        mix = rows[kernel]['per_state']
        assert exponentials <= mix['exp'] < exponentials + 1.5 and mix['fma'] > 4
        # Shuffles are the sums over lanes alone; nothing changes its layout through shared memory.
        assert mix.get('shuffle', 0) < 5 and mix.get('shared', 0) < 0.1


def test_table_of_several_compilers(report):
    def row(triton, kernel, registers, **rest):
        return dict(triton=triton, variant='map', kernel=kernel, target='sm_90', registers=registers, spills=0,
                    shared=512, per_state=None, **rest)

    rows = [row('3.8.0', 'scan', 40), row('3.8.0', 'add', 41), row('3.8.0', 'add', 42), row('3.6.0', 'scan', 43)]
    rows += [dict(rows[3], target='gfx942', error='no')]
    rows[0]['per_state'] = dict(fma=1.5, exp=1)
    assert report.machine_code_table(rows).splitlines() == [
        '| variant | kernel | sm_90, Triton 3.6.0 | sm_90, Triton 3.8.0 | gfx942, Triton 3.6.0 |',
        '|---|---|---|---|---|',
        '| map | scan | 43 / 0 / 512 | 40 / 0 / 512 / 2.5 | failed |', '| map | add | – | 41 / 0 / 512 | – |',
        '| map | add, 2 | – | 42 / 0 / 512 | – |']


@needs_interpreter
def test_gpu_check_without_a_gpu(root, tmp_path):
    done = run(root, 'tools/gpu_check.py', '--dry-run', '--output', str(tmp_path / 'check'))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / 'check.json').read_text())
    assert list(result['stages']) == [
        'correct', 'operator', 'timings', 'plans', 'models', 'compile', 'train']
    assert all(stage['rows'] for stage in result['stages'].values())
    assert all(row['passed'] for row in result['stages']['correct']['rows'])
    assert '## timings' in (tmp_path / 'check.md').read_text()
