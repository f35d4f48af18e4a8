"""From a table to windows and a model's options: what training, `bench` and a trained forecaster have in common."""
import logging
from dataclasses import dataclass
from typing import Any, Dict, Optional

import numpy as np
import torch

from vim2.models import TSM2
from .errors import SeriesError
from .grid import season_length
from .panel import Columns, Covariates, Panel
from .training import MODEL, default_lookback, default_patch, training_options
from .windows import Scaler, Windows, split_series

__all__ = ['Setup', 'create_model', 'make_windows', 'masked', 'panel_parts', 'prepare']

log = logging.getLogger('vim2.forecasting')

_PANEL = ('sort', 'duplicates', 'gaps', 'missing', 'sentinels', 'name', 'file')


def _panel(frame, columns: Columns, freq: Optional[str], options: Dict[str, Any]) -> Panel:
    if isinstance(frame, Panel):
        return frame
    unknown = set(options) - set(_PANEL)
    if unknown:
        raise TypeError(f'unexpected argument {sorted(unknown)[0]!r}')
    return Panel.from_frame(frame, columns, freq, **options)


@dataclass
class Setup:
    """What a training run is made of."""
    panel: Panel
    parts: Dict[str, np.ndarray]  # (K, 2) first and one-past-last row of train, val and test
    scaler: Scaler
    covariates: Covariates
    season: int
    windows: Dict[str, Windows]  # train, val, test as far as there are such
    options: Dict[str, Any]  # arguments of TSM2
    training: Dict[str, Any]


def panel_parts(panel: Panel, scheme: str, horizon: int) -> Dict[str, np.ndarray]:
    """(K, 2) rows of train, val and test, each series split by itself; those that do not begin or end together, too.

    A series that is too short for the split has parts without a row.

    Raises:
        SeriesError: all are too short.
    """
    if panel.columns.multivariate:
        begin, end = np.full(len(panel.ids), panel.begin.max()), np.full(len(panel.ids), panel.end.min())
    else:
        begin, end = panel.begin, panel.end
    out = {n: np.stack([begin, begin], 1) for n in ('train', 'val', 'test')}
    errors = []
    for k, (a, b) in enumerate(zip(begin.tolist(), end.tolist())):
        try:
            for name, rows in split_series(b - a, scheme, horizon)._asdict().items():
                out[name][k] = a + rows[0], a + rows[1]
        except SeriesError as e:
            errors.append(e)
    if len(errors) == len(panel.ids):
        raise errors[0]
    return {n: p for n, p in out.items() if (p[:, 1] > p[:, 0]).any()}


def masked(panel: Panel, rows: np.ndarray) -> np.ndarray:
    """The values with NaN outside of (K, 2) rows."""
    at = np.arange(len(panel.index))
    return np.where(((at >= rows[:, :1]) & (at < rows[:, 1:]))[..., None], panel.values, np.nan)


def make_windows(panel: Panel, scaler: Scaler, covariates: Covariates, parts: Dict[str, np.ndarray], lookback: int,
                 horizon: int, season: int) -> Dict[str, Windows]:
    """Windows of parts ((K, 2), first and one-past-last row) of a panel."""
    if panel.columns.multivariate:
        parts = {n: p[:1] for n, p in parts.items()}
    tensors = covariates.tensors(panel, scaler.mean, scaler.std)
    unit = scaler.std.T if panel.columns.multivariate else scaler.std
    return {name: Windows(tensors, part, lookback, horizon, name, season, unit) for name, part in parts.items()}


def prepare(frame, horizon: int, lookback: Optional[int] = None, *, columns: Optional[Columns] = None,
            freq: Optional[str] = None, split: str = 'auto', season: Optional[int] = None,
            model: Optional[Dict[str, Any]] = None, training: Optional[Dict[str, Any]] = None,
            **panel_options) -> Setup:
    """Everything up to the first batch; see `fit`."""
    training = training_options(training or {})
    panel = _panel(frame, columns or Columns(), freq, panel_options)
    for name, value in (('horizon', horizon), ('lookback', lookback), ('season', season)):
        if value is not None and value < 1:
            raise SeriesError(f'⟨{name}⟩ must be at least 1, got {value}')
    parts = panel_parts(panel, split, horizon)
    season = season or season_length(panel.freq)
    scaler = Scaler.fit(masked(panel, parts['train']))
    unseen = np.isnan(scaler.mean).any(1)
    if unseen.any():
        names = [panel.ids[k] for k in np.flatnonzero(unseen)]
        if panel.columns.id is None or panel.columns.multivariate or unseen.all():
            what = ', '.join(map(repr, names if panel.columns.id else panel.columns.target))
            raise SeriesError(f'{what}: no value in the training part')
        log.info('%d series are too short to be split and are left out: %s', len(names), ', '.join(names[:8]))
        panel = panel.select([panel.ids[k] for k in np.flatnonzero(~unseen)])
        scaler, parts = scaler.rows(~unseen), {n: p[~unseen] for n, p in parts.items()}
    rows = int(np.median(parts['train'][:, 1] - parts['train'][:, 0]))
    lookback = lookback or default_lookback(rows, horizon, season)
    covariates = Covariates.fit(panel, parts['train'][:, 1])
    windows = make_windows(panel, scaler, covariates, parts, lookback, horizon, season)
    options = {**MODEL, **(model or {})}
    options.setdefault('patch_len', default_patch(lookback))
    options.setdefault('stride', options['patch_len'])
    if 'center' not in options:
        options['center'] = _center(windows['train'])
    options.update({k: v for k, v in covariates.dims(panel.freq).items() if v})
    options.update(num_variates=len(panel.variates), lookback=lookback, horizon=horizon)
    return Setup(panel, parts, scaler, covariates, season, windows, options, training)


@torch.inference_mode()
def _center(windows: Windows) -> str:
    """'last' if the last value is a better forecast than the mean of the look-back, on the training part."""
    mse: Dict[str, float] = {}
    for index in windows.batches(256, 2000):
        inputs, y = windows.take(index)
        x = inputs['x']
        for name, forecast in (('last', x[:, -1:]), ('mean', x.mean(1, keepdim=True))):
            mse[name] = mse.get(name, 0.) + (forecast - y).square().sum().item()
    return min(mse, key=lambda name: mse[name])


def create_model(options: Dict[str, Any], seed: int) -> TSM2:
    """TSM2 with weights of that seed; torch's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return TSM2(**options)
        except (TypeError, ValueError) as e:
            raise SeriesError(f'cannot make the model: {e}') from None
