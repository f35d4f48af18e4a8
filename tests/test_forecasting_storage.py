"""The folder of a forecaster: what is read back, and what is refused, in one line that names the field."""
import json
import shutil
import warnings

import numpy as np
import pytest
from test_forecasting import LONG, QUICK, SMALL, long_frame, series

from vim2.forecasting import Forecaster, SeriesError, SeriesWarning, fit

ODD = (None, True, 0, -1, 1.5, float('nan'), 'x', [], [[1]], ['x', 'x'], {}, {'x': 1})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A forecaster with every kind of covariate."""
    path = tmp_path_factory.mktemp('storage') / 'model'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SeriesWarning)
        fit(long_frame(), 4, 16, columns=LONG, model=SMALL, training=dict(QUICK, epochs=1, steps=1)).save(path)
    return path


def fields(value, path=()):
    """Paths to the fields of an object, and to those of the objects in it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            if path[:1] != ('info',):  # a record: only its own fields are used
                yield from fields(inner, (*path, key))
    elif isinstance(value, list) and path[-1] in ('past', 'future', 'static') and value and isinstance(value[0], dict):
        yield from fields(value[0], (*path, 0))


def changed(state, path, *value):
    """A copy with another value at a path, or without it."""
    state = json.loads(json.dumps(state))
    place = state
    for key in path[:-1]:
        place = place[key]
    if value:
        place[path[-1]] = value[0]
    else:
        del place[path[-1]]
    return state


USED = {('info', n) for n in ('split', 'seed', 'training', 'all_data')}


@pytest.mark.parametrize('name', ['forecaster.json', 'config.json'])
def test_odd_fields(folder, tmp_path, name):
    """Absent, or of another kind: a SeriesError of one line, which names the field or says what contradicts it."""
    shutil.copytree(folder, tmp_path / 'model')
    path = tmp_path / 'model' / name
    state = json.loads(path.read_text())
    refused = 0

    def refuses(state, field, required):
        path.write_text(json.dumps(state))
        try:
            Forecaster.load(tmp_path / 'model')
        except SeriesError as e:
            assert '\n' not in str(e) and name in str(e) or name == 'config.json', e  # or the weights do not fit it
            return 1
        assert not required, field
        return 0

    for field in fields(state):
        if field[:1] == ('info',) and field not in {('info',), *USED}:
            continue
        own = state
        for key in field:
            own = own[key]
        optional = name == 'config.json' or field[0] == 'info' and len(field) > 1
        if field != ('format',):
            refused += refuses(changed(state, field), field, not optional)
        for value in ODD:
            if value == own or name == 'config.json':
                continue
            same = type(value) is type(own) or {type(value), type(own)} <= {int, float} or value is None
            refused += refuses(changed(state, field, value), field, not same)
    if name == 'config.json':
        for field, value in (('num_variates', 'x'), ('num_variates', 0), ('lookback', None), ('d_model', 1.5),
                             ('horizon', 5), ('format', 2), ('format', True), ('new', 1), ('norm', []),
                             ('past_dim', -1), ('drop_rate', 'x'), ('d_state', 10 ** 9)):
            assert refuses(dict(state, **{field: value}), field, True)
        for value in ODD:
            path.write_text(json.dumps(value))
            with pytest.raises(SeriesError):
                Forecaster.load(tmp_path / 'model')
    else:
        assert refused > 250
        for text in ('', '{', '[]', '"x"', 'null', '[' * 100000):
            path.write_text(text)
            with pytest.raises(SeriesError, match='cannot read the forecaster in .*: forecaster.json: '):
                Forecaster.load(tmp_path / 'model')


@pytest.mark.parametrize('field, value, message', [
    (('scaler', 'std'), [[0.], [1.], [1.]], 'finite means and deviations above 0'),
    (('scaler', 'mean'), [[1.]], r'scaler.std has the shape \(3, 1\), not \(1, 1\)|has the shape'),
    (('ids',), ['x', 'y'], 'names 2 series'), (('ids',), ['x', 'y', 'y'], 'each of them once'),
    (('season',), 0, 'season must be at least 1'), (('season',), '7', 'season must be a whole number, not text'),
    (('freq',), 'nonsense', "'nonsense'"), (('columns',), ['y', 'z'], 'names 2 columns'),
    (('naive_scale',), [[1.]], r'naive_scale has the shape \(1, 1\), not \(3, 1\)'),
    (('roles', 'future'), ['promo'], 'covariates.future and roles.future name different columns'),
    (('covariates', 'calendar'), False, 'numbers for the model'),
    (('covariates', 'future', 0, 'std'), 0., 'a deviation above 0'),
    (('intervals', 'table'), [[[0.]]], r'the shape \(1, 1, 1\), not \(17, 4, \'any\'\)'),
    (('format',), 2, 'format 2, this version reads 1 and 3'), (('info', 'training'), [], 'info.training must be an'),
    (('info', 'reading'), dict(separator=5), 'info.reading.separator must be text or null, not a whole number'),
    (('info', 'reading'), dict(na=[1]), 'na must be a list of texts'),
])
def test_messages(folder, tmp_path, field, value, message):
    shutil.copytree(folder, tmp_path / 'model')
    path = tmp_path / 'model' / 'forecaster.json'
    path.write_text(json.dumps(changed(json.loads(path.read_text()), field, value)))
    with pytest.raises(SeriesError, match=message):
        Forecaster.load(tmp_path / 'model')


def test_the_first_format(tmp_path):
    """Files of one series, without roles, covariates and intervals."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SeriesWarning)
        original = fit(series(120), 4, 16, model=SMALL, training=dict(QUICK, epochs=1, steps=1))
    original.save(tmp_path)
    state = json.loads((tmp_path / 'forecaster.json').read_text())
    first = dict(format=1, columns=state['columns'], freq=state['freq'], info={},
                 scaler={k: v[0] for k, v in state['scaler'].items()})
    (tmp_path / 'forecaster.json').write_text(json.dumps(first))
    again = Forecaster.load(tmp_path)
    np.testing.assert_allclose(again.predict(series(120)), original.predict(series(120)), rtol=1e-6)
    with pytest.raises(SeriesError, match='has no intervals'):
        again.predict(series(120), quantiles=[0.1])
