"""pytest plugin: a suite of the op in Triton's interpreter, at a cost that `make test` can bear.

Loaded by tests/test_ops_triton.py (`-p interpreted`, TRITON_INTERPRET=1) in its own processes; scripts import it for
the first of the changes alone:

- Triton's interpreter replaces the functions of triton.language once per module instead of at every call of a helper
  function and finds NumPy's dtypes by name: half of the time. The kernels that run, and the arithmetic, are the same.
- It leaves out its overflow check of integer sums, half of what remains.
- Cases of many steps keep their names and parameters but run on fewer steps (`LENGTHS`, `MAPS`): enough for several
  segments between saved states.
- Of the products of many parameters it runs a part (`THINNED`), in which every value meets most of the others.
- Outcomes go, as JSON, to the file that VIM2_TEST_OUTCOMES names.
"""
import dataclasses
import json
import os

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

# Steps of a scan, or rows and columns of a map, as the suite asks for them: as they run here.
LENGTHS = {35: 5, 63: 9, 100: 18, 1000: 33}
MAPS = {(1, 9): (1, 5), (9, 1): (5, 1), (5, 7): (3, 5), (8, 8): (4, 4), (13, 6): (6, 3), (9, 6): (4, 3), (9, 9): (3, 3)}
THINNED = {'test_sequence': 5, 'test_map': 3,  # a fifth of lengths x states x variants, a third of shapes x states
           'test_sequence_strides': 2}
CHANNELS = 40  # at most: more than a block of 32
WHOLE = ('test_meta',)  # asserts the shape of a result that is not computed
outcomes = {}


def _patch_once():
    original, done = interpreter._patch_lang, set()

    class Patched:
        """The stand-in for the changes to a module's functions that stay."""

        def restore(self):
            pass

    def patch(function):
        if id(function.__globals__) not in done:
            done.add(id(function.__globals__))
            original(function)
        return Patched()

    interpreter._patch_lang = patch


def _dtypes_by_name():
    original, known = interpreter._get_np_dtype, {}

    def find(dtype):
        if isinstance(dtype, tl.block_type):
            dtype = dtype.element_ty
        if isinstance(dtype, tl.pointer_type):
            return np.dtype(np.uint64)
        if dtype.name not in known:
            known[dtype.name] = original(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = find


_patch_once()
_dtypes_by_name()


def pytest_collection_modifyitems(config, items):
    dropped = []
    for function, fraction in THINNED.items():
        product = [item for item in items if item.name.startswith(function + '[')]
        values = {key: list(dict.fromkeys(item.callspec.params[key] for item in product))
                  for key in product[0].callspec.params} if product else {}
        dropped += [item for item in product if sum(
            known.index(item.callspec.params[key]) for key, known in values.items()) % fraction]
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)


def pytest_configure():
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def steps_run(length: int) -> int:
    return LENGTHS.get(length, length if length <= 20 else 17 + length % 2)


@pytest.fixture(autouse=True)
def _fewer_steps(request, monkeypatch):
    module = request.module
    if request.node.name in WHOLE:
        return
    sequence, image = module.sequence_inputs, module.map_inputs

    def sequence_inputs(batch=2, dim=24, length=63, **rest):
        steps = steps_run(length)
        return sequence(batch if steps == length else 1, min(dim, CHANNELS), steps, **rest)

    def map_inputs(batch=2, dim=24, height=5, width=7, **rest):
        size = MAPS.get((height, width), (height, width))
        return image(batch if size == (height, width) else batch - 1, min(dim, CHANNELS), *size, **rest)

    monkeypatch.setattr(module, 'sequence_inputs', sequence_inputs)
    monkeypatch.setattr(module, 'map_inputs', map_inputs)


def pytest_runtest_logreport(report):
    name = report.nodeid.split('::', 1)[1]
    if report.when == 'call' or report.outcome != 'passed':
        outcomes[name] = report.outcome


def pytest_sessionfinish():
    path = os.environ.get('VIM2_TEST_OUTCOMES')
    if path:
        with open(path, 'w') as f:
            json.dump(outcomes, f)
