"""The folder of a forecaster: model.safetensors and config.json, as TSM2 writes them, forecaster.json with the rest.

What is read may be anything: every field is checked before it is used, and nothing is executed.
"""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from vim2 import _files
from vim2.models import TSM2
from vim2.models.tsm2 import model_arguments
from vim2.pretrained import check_bundled
from .errors import SeriesError
from .grid import parse_frequency
from .intervals import LEVELS, Intervals
from .panel import Columns, Covariates
from .windows import Scaler

__all__ = ['FILE', 'read_folder', 'write_folder']

FILE = 'forecaster.json'
_FORMAT = 3  # 1 has neither roles nor intervals; 2, never released, counts intervals in another unit
_KINDS = {str: 'text', bool: 'true or false', int: 'a whole number', float: 'a number', list: 'a list',
          dict: 'an object', type(None): 'null'}


def write_folder(forecaster, folder: Union[str, Path]) -> None:
    """Write the folder, whole or not at all."""
    f = forecaster
    state = dict(
        format=_FORMAT, columns=f.columns, freq=f.freq, scaler=f.scaler.to_dict(), ids=f.ids, roles=f.roles.to_dict(),
        covariates=f.covariates.to_dict(), season=f.season,
        naive_scale=[[None if np.isnan(v) else v for v in row] for row in f.naive_scale.tolist()],
        intervals=None if f.intervals is None else f.intervals.to_dict(), info=f.info)

    def fill(tmp: str) -> None:
        f.model.save_pretrained(tmp)
        (Path(tmp) / FILE).write_text(json.dumps(state) + '\n', encoding='utf-8')

    _files.write_folder(folder, fill)


def read_folder(folder: Union[str, Path]) -> Tuple[TSM2, Dict[str, Any]]:
    """The model, and the other arguments of `Forecaster`.

    Raises:
        SeriesError: it is no such folder, or a damaged one.
    """
    folder = Path(folder)
    missing = [n for n in ('model.safetensors', 'config.json', FILE) if not (folder / n).is_file()]
    if missing:
        raise SeriesError(f'{folder} is no forecaster: it has no {", ".join(missing)}')
    name = 'config.json'
    try:
        # as TSM2.from_pretrained does, which prints
        model = TSM2(**model_arguments(_read_json(folder / name)))
        name = 'model.safetensors'
        check_bundled(folder / name)
        model.load_state_dict(load_file(folder / name))
        name = FILE
        return model, _arguments(_Fields(_read_json(folder / name)), model)
    # config.json may ask TSM2 for anything, and each layer has errors of its own
    except (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RecursionError, RuntimeError,
            SafetensorError, TypeError, ValueError) as e:
        raise SeriesError(f'cannot read the forecaster in {folder}: {name}: {" ".join(str(e).split())}') from None


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding='utf-8'))


class _Fields:
    """An object of JSON; each field is checked when it is taken."""

    def __init__(self, value: Any, name: str = ''):
        self.value, self.name = value, name
        if not isinstance(value, dict):
            raise ValueError(f'{name or "it"} must be an object, not {_kind(value)}')

    def __contains__(self, name: str) -> bool:
        return name in self.value

    def take(self, name: str, *kinds: type) -> Any:
        where = f'{self.name}.{name}' if self.name else name
        if name not in self.value:
            raise ValueError(f'the field {where} is missing')
        value = self.value[name]
        if type(value) not in kinds and not (float in kinds and type(value) is int):
            raise ValueError(f'{where} must be {" or ".join(_KINDS[k] for k in kinds)}, not {_kind(value)}')
        return value

    def fields(self, name: str) -> '_Fields':
        return _Fields(self.take(name, dict), f'{self.name}.{name}' if self.name else name)

    def texts(self, name: str) -> List[str]:
        values = self.take(name, list)
        if not all(isinstance(v, str) for v in values) or len(set(values)) < len(values):
            raise ValueError(f'{name} must be a list of texts, each of them once')
        return values

    def array(self, name: str, shape: Optional[Tuple[Optional[int], ...]] = None) -> np.ndarray:
        """Numbers; null is NaN. None in a shape is any length of at least 1."""
        try:
            array = np.asarray(self.take(name, list), np.float64)
        except (TypeError, ValueError):
            raise ValueError(f'{name} must be a list of lists of numbers') from None
        shape = shape or (None, None)
        if array.ndim != len(shape) or not all(n == (m or n) > 0 for n, m in zip(array.shape, shape)):
            raise ValueError(f'{name} has the shape {array.shape}, not {tuple(m or "any" for m in shape)}')
        return array


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _arguments(state: _Fields, model: TSM2) -> Dict[str, Any]:
    version = state.take('format', int)
    if version not in (1, _FORMAT):
        raise ValueError(f'it has format {version}, this version reads 1 and {_FORMAT}')
    freq = state.take('freq', str, type(None))
    if freq is not None:
        parse_frequency(freq)
    out = dict(columns=state.texts('columns'), freq=freq, info=state.take('info', dict))
    _check_info(_Fields(out['info'], 'info'))
    scaler = state.fields('scaler')
    if version == 1:  # of one series: one row
        scaler = _Fields({k: [scaler.take(k, list)] for k in ('mean', 'std')}, 'scaler')
    mean = scaler.array('mean')
    std = scaler.array('std', mean.shape)
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise ValueError('scaler must hold finite means and deviations above 0')
    out['scaler'] = Scaler(mean, std)
    K, M = mean.shape
    together = False
    if version != 1:
        roles = state.fields('roles')
        known = {f for f in Columns.__dataclass_fields__}
        if set(roles.value) != known:
            raise ValueError(f'roles must have the fields {", ".join(sorted(known))}')
        for name in ('target', 'past', 'future', 'static', 'categorical'):
            roles.texts(name)
        for name, kinds in (('id', (str, type(None))), ('date', (str, type(None))), ('calendar', (bool,)),
                            ('multivariate', (bool,))):
            roles.take(name, *kinds)
        roles = Columns(**roles.value)
        together = roles.multivariate
        out.update(roles=roles, ids=state.texts('ids'), season=state.take('season', int),
                   naive_scale=state.array('naive_scale', (K, M)), covariates=_covariates(state, roles, model, freq))
        if len(out['ids']) != K:
            raise ValueError(f'it names {len(out["ids"])} series (ids), scaler has {K}')
        if out['season'] < 1:
            raise ValueError(f'season must be at least 1, got {out["season"]}')
        if state.take('intervals', dict, type(None)) is not None:
            intervals = state.fields('intervals')
            if intervals.take('levels', list) != list(LEVELS):
                raise ValueError('the intervals have other levels than this version')
            table = intervals.array('table', (len(LEVELS), model.horizon, None))
            if table.shape[2] not in (1, model.num_variates) or not np.isfinite(table).all():
                raise ValueError(f'intervals.table must hold numbers for 1 or {model.num_variates} variates')
            out['intervals'] = Intervals(table, intervals.take('windows', int))
    if len(out['columns']) != model.num_variates or (K if together else M) != model.num_variates:
        raise ValueError(f'it names {len(out["columns"])} columns and has the scale of {K if together else M}, the '
                         f'model has {model.num_variates} variates')
    return out


def _covariates(state: _Fields, roles: Columns, model: TSM2, freq: Optional[str]) -> Covariates:
    fields = state.fields('covariates')
    groups = {}
    for group in ('past', 'future', 'static'):
        rules = fields.take(group, list)
        for i, rule in enumerate(rules):
            rule = _Fields(rule, f'covariates.{group}[{i}]')
            rule.take('name', str)
            if 'levels' in rule:
                rule.texts('levels')
            elif not np.isfinite(rule.take('mean', float)) or not 0 < rule.take('std', float) < np.inf:
                raise ValueError(f'{rule.name} must have a finite mean, and a deviation above 0')
        if [r['name'] for r in rules] != list(getattr(roles, group)):
            raise ValueError(f'covariates.{group} and roles.{group} name different columns')
        groups[group] = rules
    covariates = Covariates(**groups, calendar=fields.take('calendar', bool))
    if covariates.calendar and freq is None:
        raise ValueError('covariates.calendar needs freq')
    for name, size in covariates.dims(freq).items():
        if getattr(model, name) != size:
            raise ValueError(f'the covariates are {size} numbers for the model\'s {name}, which is '
                             f'{getattr(model, name)}')
    return covariates


def _check_info(info: _Fields) -> None:
    """What is used of the training's record; `reading` are options of `read_series` and `Panel.from_frame`."""
    for name, kind in (('split', str), ('seed', int), ('training', dict), ('all_data', bool)):
        if name in info:
            info.take(name, kind)
    if 'reading' not in info:
        return
    reading = info.fields('reading')
    for name, value in reading.value.items():
        kind = _READING.get(name, str)
        reading.take(name, kind, type(None))
        if kind is list and value is not None:
            reading.texts(name)


_READING = dict(header=bool, day_first=bool, sort=bool, sentinels=bool, skip_rows=int, na=list, names=list)
