#!/usr/bin/env python
"""Speed and memory of vim2, beside named peers, in one run on one machine.

    python tools/benchmark.py scan                  the selective scan against bare torch.exp, per stage of ViM2
    python tools/benchmark.py model NAME [NAME...]  images/s, latency, training step and peak memory of timm models
    python tools/benchmark.py parts NAME            where the time of a forward pass and a training step goes
    python tools/benchmark.py scaling NAME [...]    time and memory per pixel from 224 to 1024 px
    python tools/benchmark.py import                what `import vim2` costs over `import timm`
    python tools/benchmark.py versus CHECKOUT       the scan and a model here and in another checkout of this repository

Whatever is compared is run in turn, A B C A B C ..., and every ratio is the median of the rounds' own ratios, so that a
machine whose speed drifts does not favour one side. Times are those of a clock on the wall (`versus`: also of the CPU);
--json prints all figures on one line.
"""
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Callable, Dict, List, Sequence

import torch

from _common import HelpFormatter, UserError, at_least, print_json, register_models, run, write_atomic

# Width of a stage's inner map, for dims of 96 to 768 (tiny, small) and 128 to 1024 (base), and its side at 224 px.
STAGES = [(f'{name} stage {i + 1}', 2 * dim * 2 ** i, 56 // 2 ** i)
          for name, dim in (('tiny/small', 96), ('base', 128)) for i in range(4)]
EXP_ELEMENTS = 1 << 18  # torch.exp is timed in pieces of this size, which fit the caches, and in one call


def machine() -> Dict[str, object]:
    """What the numbers depend on."""
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            names = [line.partition(':')[2].strip() for line in f if line.startswith('model name')]
        name = names[0] if names else name
    return dict(cpu=name, simd=torch.backends.cpu.get_cpu_capability(), cores=os.cpu_count(),
                threads=torch.get_num_threads(), torch=torch.__version__)


def timed(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def rounds(jobs: Dict[str, Callable[[], object]], repeats: int, warmup: int = 2, warm: bool = False
           ) -> Dict[str, List[float]]:
    """Seconds of each job in each round; the jobs take turns.

    With `warm` each job runs once more, untimed, right before it is timed: it then finds its inputs in the caches, as
    it would behind the layer that made them, and not what the other jobs left there.
    """
    for _ in range(warmup):
        for fn in jobs.values():
            fn()
    times: Dict[str, List[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, fn in jobs.items():
            if warm:
                fn()
            times[name].append(timed(fn))
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, base))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print('  '.join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


# ---------------------------------------------------------------------------------------------------- scan

def scan_inputs(batch: int, dim: int, side: int, states: int) -> List[torch.Tensor]:
    """The inputs of the token mixer's scan, laid out as ViM2 lays them out."""
    torch.manual_seed(0)
    directions, rank = 4, max(1, dim // 32)
    proj = torch.randn(batch, side, side, directions, rank + 2 * states)
    _, B, C = proj.split([rank, states, states], dim=-1)
    x = torch.randn(batch, side, side, dim).permute(0, 3, 1, 2)
    delta = torch.randn(directions, batch, side, side, dim).permute(1, 0, 4, 2, 3)
    A = -torch.arange(1, states + 1, dtype=torch.float32).expand(directions, dim, states)
    bias = torch.rand(directions, dim) * 4.6 - 6.9  # softplus of it is 0.001 to 0.1, as at initialisation
    return [x, delta, A, B.permute(0, 3, 4, 1, 2), C.permute(0, 3, 4, 1, 2), torch.ones(directions, dim), bias]


def bench_scan(args: argparse.Namespace) -> Dict[str, object]:
    from vim2.ops import cross_selective_scan
    results = []

    def updates(batch, dim, side, states):  # state updates of four directions
        return 4 * batch * side * side * dim * states

    most = max([EXP_ELEMENTS] + [updates(b, dim, side, n) for n in args.states for _, dim, side in STAGES
                                 for b in args.batch])
    buffer = torch.randn(EXP_ELEMENTS).repeat(-(-most // EXP_ELEMENTS))[:most]
    target = torch.zeros_like(buffer)  # written to: its pages are there before anything is timed
    for states in args.states:
        for stage, dim, side in STAGES:
            for batch in args.batch:
                inputs = scan_inputs(batch, dim, side, states)
                leaves = [t.detach().requires_grad_() for t in inputs]
                elements = updates(batch, dim, side, states)
                pieces, rest = divmod(elements, EXP_ELEMENTS)

                def exp(pieces=pieces, rest=rest):
                    for _ in range(pieces):
                        torch.exp(buffer[:EXP_ELEMENTS], out=target[:EXP_ELEMENTS])
                    torch.exp(buffer[:rest], out=target[:rest])

                def whole_exp(elements=elements):
                    torch.exp(buffer[:elements], out=target[:elements])

                def forward(inputs=inputs):
                    with torch.no_grad():
                        cross_selective_scan(*inputs, True)

                out = cross_selective_scan(*leaves, True)
                grad = torch.randn_like(out)
                times = rounds(dict(
                    exp=exp, whole_exp=whole_exp, forward=forward,
                    backward=lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)),  # noqa: B023
                    args.repeats, warm=True)
                results.append(dict(
                    stage=stage, states=states, batch=batch, channels=dim, side=side, updates=elements,
                    forward_ms=1e3 * statistics.median(times['forward']),
                    backward_ms=1e3 * statistics.median(times['backward']),
                    exp_ms=1e3 * statistics.median(times['exp']),
                    whole_exp_ms=1e3 * statistics.median(times['whole_exp']),
                    forward_over_exp=ratio(times['forward'], times['exp']),
                    forward_over_whole_exp=ratio(times['forward'], times['whole_exp']),
                    backward_over_forward=ratio(times['backward'], times['forward'])))
                if not args.json:
                    r = results[-1]
                    print(f"N={states:<2d} batch {batch} {stage:18s} {dim:4d} x {side}x{side}: forward "
                          f"{r['forward_ms']:8.2f} ms = {r['forward_over_whole_exp']:.3f} x exp in one call, "
                          f"{r['forward_over_exp']:.3f} x exp in the caches; backward "
                          f"{r['backward_over_forward']:.2f} x forward", flush=True)
    ratios = ('forward_over_whole_exp', 'forward_over_exp', 'backward_over_forward')
    worst = [dict(states=n, **{key: max(r[key] for r in results if r['states'] == n) for key in ratios})
             for n in args.states]
    if not args.json:
        for w in worst:
            print(f"N={w['states']}: at most {w['forward_over_whole_exp']:.3f} x exp in one call, "
                  f"{w['forward_over_exp']:.3f} x exp in the caches; backward "
                  f"{w['backward_over_forward']:.2f} x forward")
    return dict(benchmark='scan', results=results, worst=worst)


# ---------------------------------------------------------------------------------------------------- models

def build(name: str, train: bool = False, size: int = 0) -> torch.nn.Module:
    """A timm model with random weights, for square images of `size` px (0: its own)."""
    import timm
    kwargs = {}
    if size:
        # Transformers fix their size unless told otherwise; the others take any.
        kwargs = dict(img_size=size) if any(k in name for k in ('swin', 'vit', 'deit')) else {}
    try:
        model = timm.create_model(name, **kwargs)
    except (RuntimeError, ValueError) as e:
        raise UserError(f'{name}: {e}') from None
    torch.manual_seed(0)
    return model.train(train)


def image_size(model: torch.nn.Module) -> int:
    return model.pretrained_cfg['input_size'][-1]


def train_step(model: torch.nn.Module, batch: int, size: int) -> Callable[[], None]:
    x = torch.randn(batch, 3, size, size)
    y = torch.randint(0, model.num_classes, (batch,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return step


def eval_step(model: torch.nn.Module, batch: int, size: int) -> Callable[[], None]:
    x = torch.randn(batch, 3, size, size)

    def step():
        with torch.inference_mode():
            model(x)
    return step


# What glibc's allocator keeps for itself else changes from run to run, by a tenth of a model's memory.
MEMORY_IS_RETURNED = {'MALLOC_MMAP_THRESHOLD_': '131072'}


def peak_bytes() -> int:
    """Most memory this process has held, in bytes."""
    if os.path.exists('/proc/self/status'):
        # ru_maxrss would count the parent's memory too: a child inherits its peak
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_memory(args: argparse.Namespace) -> Dict[str, object]:
    """In a process of its own: what one step takes beyond what the process held before the model was built."""
    model = build('test_vim2')  # imports, thread pools and compiled kernels are not the model's memory
    train_step(model.train(), 2, 32)()
    eval_step(model.eval(), 2, 32)()
    before = peak_bytes()
    model = build(args.models[0], args.train, args.img_size)
    size = args.img_size or image_size(model)
    (train_step if args.train else eval_step)(model, args.batch_size, size)()
    peak = (peak_bytes() - before) / 2 ** 20
    if not args.json:
        step = 'training step' if args.train else 'forward pass'
        print(f'{args.models[0]}, {step}, batch {args.batch_size}, {size} px: {peak:.0f} MB at most')
    return dict(peak_mb=peak)


def memory_of(name: str, batch: int, size: int, train: bool) -> float:
    """MB that a forward pass or a training step takes, measured in a fresh process."""
    command = [sys.executable, os.path.abspath(__file__), 'memory', name, '--batch-size', str(batch), '--img-size',
               str(size), '--json', '--threads', str(torch.get_num_threads())] + (['--train'] if train else [])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MEMORY_IS_RETURNED})
    if done.returncode:
        raise UserError(f'measuring the memory of {name} failed: {done.stderr.strip().splitlines()[-1:]}')
    return json.loads(done.stdout)['peak_mb']


def bench_model(args: argparse.Namespace) -> Dict[str, object]:
    models = {name: build(name, size=args.img_size) for name in args.models}
    sizes = {name: args.img_size or image_size(model) for name, model in models.items()}
    if args.compile:
        for model in models.values():
            model.compile()
    figures: Dict[str, Dict[str, List[float]]] = {}
    measures = dict(batch=(eval_step, args.batch_size), latency=(eval_step, 1), train=(train_step, args.batch_size))
    for measure, (make, batch) in measures.items():
        if measure == 'train' and args.no_train:
            continue
        jobs = {name: make(model.train(measure == 'train'), batch, sizes[name]) for name, model in models.items()}
        figures[measure] = rounds(jobs, args.repeats)
    results = []
    base = args.models[-1]
    for name, model in models.items():
        r = dict(model=name, parameters=sum(p.numel() for p in model.parameters()), img_size=sizes[name],
                 batch_size=args.batch_size,
                 images_per_s=args.batch_size / statistics.median(figures['batch'][name]),
                 latency_ms=1e3 * statistics.median(figures['latency'][name]),
                 speed_vs_last=ratio(figures['batch'][base], figures['batch'][name]),
                 latency_speed_vs_last=ratio(figures['latency'][base], figures['latency'][name]))
        if not args.no_train:
            r.update(train_images_per_s=args.batch_size / statistics.median(figures['train'][name]),
                     train_speed_vs_last=ratio(figures['train'][base], figures['train'][name]))
        if not args.no_memory:
            r['forward_peak_mb'] = memory_of(name, args.batch_size, sizes[name], False)
            if not args.no_train:
                r['train_peak_mb'] = memory_of(name, args.batch_size, sizes[name], True)
        results.append(r)
    if not args.json:
        columns = [('images_per_s', '{:.1f}', 'images/s'), ('speed_vs_last', '{:.2f}x', 'ratio'),
                   ('latency_ms', '{:.1f}', 'latency ms'), ('latency_speed_vs_last', '{:.2f}x', 'ratio'),
                   ('train_images_per_s', '{:.2f}', 'train images/s'), ('train_speed_vs_last', '{:.2f}x', 'ratio'),
                   ('forward_peak_mb', '{:.0f}', 'forward MB'), ('train_peak_mb', '{:.0f}', 'train MB')]
        columns = [c for c in columns if c[0] in results[0]]
        print_table(['model'] + [c[2] for c in columns],
                    [[r['model']] + [c[1].format(r[c[0]]) for c in columns] for r in results])
        print(f'batch {args.batch_size}; ratios are speed over that of {base}')
    return dict(benchmark='model', results=results)


# Parts of a pass by the names of PyTorch's operators; what no name here begins with is 'other'.
PARTS = {
    'scan': ('vim2::scan', 'vim2::scan_backward'),
    'matrix products': ('aten::addmm', 'aten::mm', 'aten::bmm', 'aten::baddbmm', 'mkldnn::_linear'),
    'convolutions': ('aten::mkldnn_convolution', 'aten::convolution_backward', 'aten::_slow_conv', 'aten::thnn_conv'),
    'normalisation': ('aten::native_layer_norm',),
    'activations': ('aten::silu', 'aten::gelu', 'aten::_softmax'),
    'attention': ('aten::_scaled_dot_product',),
    'products and sums': ('aten::mul', 'aten::add', 'aten::addcmul', 'aten::sum', 'aten::div', 'aten::sub'),
    'copies': ('aten::copy_', 'aten::fill_', 'aten::zero_', 'aten::cat', 'aten::constant_pad_nd', 'aten::roll'),
    'optimizer': ('Optimizer', 'aten::_foreach', 'aten::_fused', 'aten::lerp', 'aten::addcdiv', 'aten::sqrt'),
}


def bench_parts(args: argparse.Namespace) -> Dict[str, object]:
    """Time of each kind of operator, without what it calls, by torch.profiler."""
    results = []
    for measure, make in dict(forward=eval_step, train=train_step).items():
        for name in args.models:
            model = build(name, measure == 'train', args.img_size)
            step = make(model, args.batch_size, args.img_size or image_size(model))
            step()
            step()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                for _ in range(args.repeats):
                    step()
            parts = dict.fromkeys([*PARTS, 'other'], 0.0)
            for event in profile.key_averages():
                part = next((part for part, names in PARTS.items() if event.key.startswith(names)), 'other')
                parts[part] += event.self_cpu_time_total / 1e3 / args.repeats
            total = sum(parts.values())
            results.append(dict(model=name, measure=measure, ms=total, parts_ms=parts))
            if not args.json:
                print(f'{name}, {measure}, batch {args.batch_size}: {total:.0f} ms')
                for part, ms in sorted(parts.items(), key=lambda item: -item[1]):
                    print(f'  {part:18s} {ms:8.1f} ms {ms / total:6.1%}')
    return dict(benchmark='parts', results=results)


def bench_scaling(args: argparse.Namespace) -> Dict[str, object]:
    results = []
    for size in args.sizes:
        models = {name: build(name, size=size) for name in args.models}
        times = rounds({name: eval_step(model, 1, size) for name, model in models.items()}, args.repeats)
        for name in models:
            seconds = statistics.median(times[name])
            results.append(dict(model=name, img_size=size, ms=1e3 * seconds, ns_per_pixel=1e9 * seconds / size ** 2,
                                bytes_per_pixel=2 ** 20 * memory_of(name, 1, size, False) / size ** 2))
            if not args.json:
                r = results[-1]
                print(f"{name:34s} {size:5d} px {r['ms']:9.1f} ms {r['ns_per_pixel']:8.1f} ns/px "
                      f"{r['bytes_per_pixel']:8.0f} B/px", flush=True)
    if args.plot:
        plot_scaling(results, args.plot)
    return dict(benchmark='scaling', results=results)


def plot_scaling(results: List[Dict[str, object]], path: str) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError('--plot needs matplotlib: pip install matplotlib') from None
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, key, title in ((axes[0], 'ns_per_pixel', 'time per pixel, ns'),
                             (axes[1], 'bytes_per_pixel', 'peak memory per pixel, bytes')):
        for name in dict.fromkeys(r['model'] for r in results):
            rows = [r for r in results if r['model'] == name]
            axis.plot([r['img_size'] for r in rows], [r[key] for r in rows], marker='o', label=name)
        axis.set(xlabel='image side, px', title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    write_atomic(path, lambda tmp: figure.savefig(tmp, dpi=120, format=os.path.splitext(path)[1][1:] or 'png'))


# ---------------------------------------------------------------------------------------------------- import

def bench_import(args: argparse.Namespace) -> Dict[str, object]:
    def process(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, '-c', code], check=True)

    times = rounds(dict(timm=process('import timm'), both=process('import timm, vim2')), args.repeats, warmup=1)
    extra = statistics.median(b - a for a, b in zip(times['timm'], times['both']))
    code = ('import time, torch, timm, vim2; model = timm.create_model("vim2_tiny").eval()\n'
            'x = torch.randn(1, 3, 224, 224); times = [time.time()]\n'
            'with torch.no_grad():\n'
            '    for _ in range(2): model(x); times.append(time.time())\n'
            'print([times[1] - times[0], times[2] - times[1]])')
    first, second = (statistics.median(times) for times in zip(*(
        json.loads(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout)
        for _ in range(args.repeats))))
    result = dict(timm_s=statistics.median(times['timm']), both_s=statistics.median(times['both']), vim2_extra_s=extra,
                  first_forward_s=first, second_forward_s=second)
    if not args.json:
        print(f"import timm {result['timm_s']:.2f} s, import timm, vim2 {result['both_s']:.2f} s: vim2 adds "
              f"{extra:.3f} s; first forward of vim2_tiny {first:.2f} s, second {second:.2f} s")
    return dict(benchmark='import', **result)


# ---------------------------------------------------------------------------------------------------- versus

def serve(args: argparse.Namespace) -> None:
    """What `versus` talks to, a line of JSON each way: a job to prepare, then numbers of times to run it."""
    from vim2.ops import cross_selective_scan
    step = None
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            start = time.perf_counter(), time.process_time()
            for _ in range(request):
                step()
            answer = dict(wall=time.perf_counter() - start[0], cpu=time.process_time() - start[1])
        elif 'model' in request:
            model = build(request['model'], request['train'])
            make = train_step if request['train'] else eval_step
            step = make(model, request['batch'], image_size(model))
            answer = {}
        else:
            inputs = scan_inputs(*(request[key] for key in ('batch', 'channels', 'side', 'states')))
            leaves = [t.detach().requires_grad_() for t in inputs]
            out = cross_selective_scan(*leaves, True)
            grad = torch.randn_like(out)

            def step(inputs=inputs, leaves=leaves, out=out, grad=grad, backward=request['backward']):
                if backward:
                    torch.autograd.grad(out, leaves, grad, retain_graph=True)
                else:
                    with torch.no_grad():
                        cross_selective_scan(*inputs, True)
            answer = {}
        print(json.dumps(answer), flush=True)


class Side:
    """A process that imports vim2 from one checkout."""

    def __init__(self, python: str, checkout: str, threads: int):
        self.command = [python, os.path.abspath(__file__)]
        self.environment = dict(os.environ, PYTHONPATH=checkout, OMP_NUM_THREADS=str(threads))
        self.threads = ['--threads', str(threads)]
        self.process = subprocess.Popen([*self.command, 'serve', *self.threads], text=True, env=self.environment,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, request: object) -> Dict[str, float]:
        try:
            self.process.stdin.write(json.dumps(request) + '\n')
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise UserError(f"vim2 of {self.environment['PYTHONPATH']} did not run: its error is above") from None

    def memory(self, job: Dict[str, object]) -> float:
        command = [*self.command, 'memory', job['model'], '--batch-size', str(job['batch']), '--json', *self.threads]
        done = subprocess.run(command + ['--train'] * job['train'], text=True, capture_output=True, check=True,
                              env={**self.environment, **MEMORY_IS_RETURNED})
        return json.loads(done.stdout)['peak_mb']

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()


def bench_versus(args: argparse.Namespace) -> Dict[str, object]:
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    threads = args.threads or torch.get_num_threads()
    jobs = [dict(model=args.model, batch=batch, train=train) for batch in args.batch for train in (False, True)]
    jobs += [dict(batch=batch, channels=dim, side=side, states=states, backward=backward)
             for states in args.states for batch in args.batch for _, dim, side in STAGES for backward in (False, True)]
    sides = [Side(python, os.path.abspath(checkout), threads)
             for python, checkout in ((args.python, args.checkout), (sys.executable, here))]
    results = []
    try:
        for job in jobs:
            for side in sides:
                side.ask(job)
                side.ask(2)  # warm
            count = max(1, int(0.2 / sides[1].ask(1)['wall']))
            rounds = [[side.ask(count) for side in sides] for _ in range(args.repeats)]
            r = dict(job)
            for clock in ('cpu', 'wall'):
                old, new = ([1e3 * answers[i][clock] / count for answers in rounds] for i in (0, 1))
                r.update({f'{clock}_ms_there': statistics.median(old), f'{clock}_ms_here': statistics.median(new),
                          f'{clock}_time_ratio': ratio(new, old)})
            if 'model' in job and not args.no_memory:
                r['peak_mb_there'], r['peak_mb_here'] = (side.memory(job) for side in sides)
            results.append(r)
            if not args.json:
                what = (f"{'training step' if job['train'] else 'forward'} of {job['model']}" if 'model' in job else
                        f"{'backward' if job['backward'] else 'forward'} of the scan, {job['channels']} x "
                        f"{job['side']}x{job['side']}, N={job['states']}")
                memory = f"; {r['peak_mb_there']:.0f} -> {r['peak_mb_here']:.0f} MB" if 'peak_mb_here' in r else ''
                times = [f"{r[f'{clock}_ms_there']:.2f} -> {r[f'{clock}_ms_here']:.2f} ms ({clock}), "
                         f"{r[f'{clock}_time_ratio']:.3f}" for clock in ('cpu', 'wall')]
                print(f"batch {job['batch']}: {what}: {'; '.join(times)}{memory}", flush=True)
    finally:
        for side in sides:
            side.close()
    return dict(benchmark='versus', checkout=args.checkout, results=results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True, metavar='scan|model|parts|scaling|import|versus')
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--json', action='store_true', help='print one line of JSON instead of a table')
    common.add_argument('--threads', type=int, metavar='N', help="torch's threads (default: torch's own choice)")
    common.add_argument('--repeats', type=int, default=7, metavar='N', help='rounds; medians are quoted')

    def command(name, fn, text):
        p = commands.add_parser(name, parents=[common], help=text, description=text, formatter_class=HelpFormatter)
        p.set_defaults(fn=fn)
        return p

    p = command('scan', bench_scan, "the fused scan against bare torch.exp over as many elements as it updates states "
                                    "(one call on one tensor, and pieces that fit the caches, both with a result that "
                                    "exists already), at the shapes of every stage of every ViM2")
    p.set_defaults(repeats=15)  # short runs: more of them, so that a process that is still warming up is outvoted
    p.add_argument('--states', type=int, nargs='+', default=[16, 4], metavar='N', help='states per channel')
    p.add_argument('--batch', type=int, nargs='+', default=[1, 8], metavar='N', help='batch sizes')

    def model_options(p, batch=True):
        p.add_argument('models', nargs='+', metavar='NAME', help='timm model; ratios are against the last one')
        if batch:
            p.add_argument('--batch-size', type=int, default=8, metavar='N', help='images per step')
            p.add_argument('--img-size', type=int, default=0, metavar='PX', help="side of the images (0: the model's)")

    p = command('model', bench_model, 'images/s, latency at batch 1, training step and peak memory, side by side')
    model_options(p)
    p.add_argument('--no-train', action='store_true', help='forward only')
    p.add_argument('--compile', action='store_true', help='under torch.compile; memory is measured without')
    p.add_argument('--no-memory', action='store_true', help='skip the memory measurements')
    p = command('parts', bench_parts, 'where the time of a forward pass and a training step goes, by kind of operator')
    model_options(p)
    p.set_defaults(repeats=3)
    p = command('scaling', bench_scaling, 'time and peak memory per pixel of one forward pass at growing image sizes')
    model_options(p, batch=False)
    p.add_argument('--sizes', type=int, nargs='+', default=[224, 384, 512, 768, 1024], metavar='PX', help='image sides')
    p.add_argument('--plot', metavar='FILE.png', help='draw the curves')
    command('import', bench_import, 'seconds that `import vim2` adds to `import timm`, and of the first forward pass')
    p = command('versus', bench_versus, 'a model and the scan in this checkout against those of another one')
    p.add_argument('checkout', help='folder of the other checkout')
    p.add_argument('--python', default=sys.executable, help='what runs it, where it needs other packages')
    p.add_argument('--model', default='vim2_tiny', metavar='NAME', help='timm model')
    p.add_argument('--batch', type=int, nargs='+', default=[1, 8], metavar='N', help='batch sizes')
    p.add_argument('--states', type=int, nargs='*', default=[16, 4], metavar='N', help='states of the scans')
    p.add_argument('--no-memory', action='store_true', help='skip the memory measurements')
    commands.add_parser('serve', parents=[common]).set_defaults(fn=serve)  # versus starts it
    p = command('memory', measure_memory, 'peak memory of one step, in MB, of this very process')
    model_options(p)
    p.add_argument('--train', action='store_true', help='a training step')

    args = parser.parse_args()
    at_least(args, 1, 'repeats', 'threads')
    register_models()
    if args.threads:
        torch.set_num_threads(args.threads)
    result = args.fn(args)
    if args.json and result:
        print_json({**result, 'machine': machine()} if args.command != 'memory' else result)


if __name__ == '__main__':
    run(main)
