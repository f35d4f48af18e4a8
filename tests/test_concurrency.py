"""Threads, processes and copies of a model give the same bits, and a thousand calls leave nothing behind."""
import copy
import gc
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

import vim2  # noqa: F401
from vim2.ops import selective_scan


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('test_vim2', num_classes=5).eval()


@pytest.fixture(scope='module')
def images():
    return torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def logits(model, images):
    with torch.inference_mode():
        return model(images)


def test_eight_threads_give_the_same_bits(model, images, logits):
    barrier = threading.Barrier(8)

    def call(_):
        barrier.wait(30)
        with torch.inference_mode():
            return [model(images) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        results = [y for part in pool.map(call, range(8)) for y in part]
    assert len(results) == 24 and all(torch.equal(y, logits) for y in results)


def test_threads_that_train_have_gradients_of_their_own(model, images):
    def gradients(_):
        own = copy.deepcopy(model)
        own(images).sum().backward()
        return [p.grad for p in own.parameters()]

    want = gradients(0)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(gradients, range(8)):
            assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_copies_give_the_same_bits(model, images, logits):
    with torch.inference_mode():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images), logits)


def call_model(model, images, queue):
    torch.set_num_threads(1)
    with torch.inference_mode():
        queue.put(model(images).numpy())


def test_a_spawned_process_gives_the_same_bits(model, images, logits):
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    process = context.Process(target=call_model, args=(model, images, queue))
    process.start()
    got = queue.get(timeout=3600)
    process.join(60)
    assert process.exitcode == 0
    assert torch.equal(torch.from_numpy(got), logits)


class Scanned(torch.utils.data.Dataset):
    """A data set whose items run the scan, in whatever process the loader has."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(index)
        u, delta, B, C = (torch.randn(1, n, 300, generator=g) for n in (16, 16, 4, 4))
        return selective_scan(u, delta, -torch.rand(16, 4, generator=g), B, C, delta_softplus=True)[0]


def test_the_scan_in_loader_processes():
    """Forked from a process that has run it, whose threads they do not have."""
    want = torch.stack([Scanned()[i] for i in range(12)])
    loader = torch.utils.data.DataLoader(Scanned(), batch_size=4, num_workers=2, timeout=3600)
    assert torch.equal(torch.cat(list(loader)), want)


def resources():
    """Threads, open files and resident memory (bytes) of this process."""
    with open('/proc/self/statm') as f:
        memory = int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    return len(os.listdir('/proc/self/task')), len(os.listdir('/proc/self/fd')), memory


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='needs /proc, which only Linux has')
def test_a_thousand_calls_leave_nothing_behind():
    u, delta, B, C = (torch.randn(2, n, 200) for n in (32, 32, 8, 8))
    A = torch.nn.Parameter(-torch.rand(32, 8))

    def call(count):
        for _ in range(count):
            selective_scan(u, delta, A, B, C, delta_softplus=True).sum().backward()
            A.grad = None
        gc.collect()

    call(100)
    threads, files, memory = resources()
    call(1000)
    after = resources()
    assert after[:2] == (threads, files)
    assert after[2] - memory < 8 << 20  # one leaked output of each call would be 51 MB
