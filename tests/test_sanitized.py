"""The C++ scan under AddressSanitizer and UBSan: a small selection; `make sanitize` runs all tests of the op so."""
import subprocess
import sys

import pytest
import sanitized

pytestmark = pytest.mark.skipif(sanitized.missing() is not None, reason=str(sanitized.missing()))

SCANS = '''
import torch
from vim2.ops import cross_selective_scan, selective_scan
for dim, length, states, groups, dtype in ((1, 1, 1, 1, torch.float32), (6, 63, 5, 3, torch.float32),
                                           (17, 130, 16, 1, torch.bfloat16), (33, 65, 20, 1, torch.float16)):
    u, delta, z = (torch.randn(2, dim, length, dtype=dtype).requires_grad_() for _ in range(3))
    B, C = (torch.randn(2, groups, states, length, dtype=dtype).requires_grad_() for _ in range(2))
    A, D, bias = -torch.rand(dim, states).requires_grad_(), torch.randn(dim).requires_grad_(), torch.randn(dim)
    for reverse in (False, True):
        y = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, reverse=reverse, backend='cpu')
        y.float().square().sum().backward()
for height, width in ((1, 1), (7, 5), (9, 20)):
    x = torch.randn(2, 18, height, width).requires_grad_()
    delta, B, C = (torch.randn(2, 4, n, height, width).requires_grad_() for n in (18, 3, 3))
    A, D = -torch.rand(4, 18, 3).requires_grad_(), torch.randn(4, 18).requires_grad_()
    cross_selective_scan(x, delta, A, B, C, D, delta_softplus=True, backend='cpu').square().sum().backward()
'''
# 4096 numbers, said to be 16 channels of 20000
OVERFLOW = '''
import numpy as np, torch
from vim2.ops import selective_scan
u = torch.from_numpy(np.lib.stride_tricks.as_strided(np.zeros(4096, np.float32), (1, 16, 20000), (0, 800, 4)))
selective_scan(u, torch.zeros(1, 16, 20000), -torch.ones(16, 4), *torch.zeros(2, 1, 4, 20000), backend='cpu')
'''


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    return sanitized.prepare(tmp_path_factory.mktemp('sanitized'), sanitized.best_isa())


def run(code, environment):
    # in that folder: Python looks for the package in the working directory first
    return subprocess.run([sys.executable, '-c', code], env=environment, cwd=environment['PYTHONPATH'],
                          capture_output=True, text=True)


def test_scans_of_odd_shapes_touch_no_memory_that_is_not_theirs(environment):
    done = run(SCANS, environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_sanitizer_would_find_it(environment):
    done = run(OVERFLOW, environment)
    assert done.returncode == 99 and 'ERROR: AddressSanitizer' in done.stderr and 'scan.cpp' in done.stderr
