"""Trains, evaluates and classifies in turn, in one process, and watches that memory and speed stay flat (make soak).

    python tests/soak.py [SECONDS]      default: 600

The exit code is 1 if the last quarter of the rounds takes more memory (by over 5 %), threads, open files or processor
time (by over 25 % in the median; that of loader processes counts) than the second quarter; the first quarter is for
warming up. Time on the clock is shown, but not judged: others may want the processor.
"""
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tools'), str(ROOT / 'tests')]

import numpy as np  # noqa: E402
from conftest import colored_image, jpeg, write_npz  # noqa: E402

import predict  # noqa: E402
import train  # noqa: E402
import validate  # noqa: E402


def run(module, *arguments) -> str:
    """What a tool prints, run in this process."""
    sys.argv = [f'{module.__name__}.py', *map(str, arguments)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = module.main()
    assert not code, (module.__name__, code)
    return out.getvalue()


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(seconds: float, cpu: float) -> dict:
    with open('/proc/self/statm') as f:
        memory = int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2 ** 20
    return dict(seconds=seconds, cpu=cpu, memory=memory, threads=len(os.listdir('/proc/self/task')),
                files=len(os.listdir('/proc/self/fd')))


def rounds(folder: Path, seconds: float):
    rng = np.random.default_rng(0)
    for split, n in (('train', 160), ('test', 50)):
        labels = np.arange(n) % 4
        write_npz(folder / f'{split}.npz', [jpeg(colored_image(y, rng)) for y in labels], labels)
    for i in range(8):
        colored_image(i % 4, rng, size=(60 + i, 50)).save(folder / f'{i}.png')
    data = ('--dataset', 'npz', '--data-dir', folder)
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        begin, cpu = time.perf_counter(), processor_seconds()
        run(train, *data, '--val-split', 'test', '--model', 'test_vim2', '--img-size', 32, '--epochs', 1, '-b', 16,
            '--workers', 1, '--warmup-epochs', 0, '--output', folder, '--experiment', f'run{number % 2}', '--device',
            'cpu', '--no-progress', '--model-ema')
        model = folder / f'run{number % 2}' / 'model'
        report = json.loads(run(validate, *data, '--split', 'test', '--model', f'local-dir:{model}', '--device', 'cpu',
                                '-j', 1, '--json'))
        assert report['count'] == 50
        out = json.loads(run(predict, *folder.glob('*.png'), '--model', f'local-dir:{model}', '--device', 'cpu',
                             '--json', '--annotate', folder / 'annotated'))
        assert len(out['results']) == 8 and not out['skipped']
        for file in (folder / f'run{number % 2}').glob('*.pth.tar'):
            file.unlink()  # the next round starts anew
        number += 1
        yield measure(time.perf_counter() - begin, processor_seconds() - cpu)


def main() -> int:
    limit = float(sys.argv[1]) if len(sys.argv) > 1 else 600
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in rounds(Path(folder), limit):
            rows.append(row)
            print(f'round {len(rows)}: {row["seconds"]:.1f} s, {row["cpu"]:.1f} s of the processor, '
                  f'{row["memory"]:.0f} MiB, {row["threads"]} threads, {row["files"]} files', flush=True)
    if len(rows) < 8:
        print(f'{len(rows)} rounds are too few to compare: give it more seconds', file=sys.stderr)
        return 2
    quarter = len(rows) // 4
    problems = []
    for key, most in (('memory', 1.05), ('threads', 1), ('files', 1), ('cpu', 1.25)):
        early, late = (statistics.median(row[key] for row in part) for part in (rows[quarter:2 * quarter],
                                                                               rows[-quarter:]))
        print(f'{key}: {early:.4g} in the second quarter of the rounds, {late:.4g} in the last')
        if late > most * early:
            problems.append(key)
    if problems:
        print(f'not flat: {", ".join(problems)}', file=sys.stderr)
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
