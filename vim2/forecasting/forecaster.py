"""Training, and a trained forecaster with everything that it needs to read a series and to be judged."""
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Union

import numpy as np
import pandas as pd
import torch
from torch import nn

from vim2.pretrained import WEIGHTS_DIR
from . import storage
from .errors import SeriesError, SeriesWarning
from .grid import frequency, same_step, season_length
from .intervals import Intervals, spread
from .metrics import evaluate, naive_scale
from .panel import Columns, Covariates, Panel
from .preparation import Setup, create_model, make_windows, masked, panel_parts, prepare
from .training import Trainer, training_options
from .windows import Scaler, Windows

__all__ = ['Forecaster', 'fit']

FEW_TRAIN, FEW_VAL = 200, 20  # windows, below which a warning is due


def _warn(message: str, found: List[str]) -> None:
    warning = SeriesWarning(message)
    found.append(str(warning))
    warnings.warn(warning, stacklevel=3)


def fit(
        frame: Union[pd.DataFrame, Panel],
        horizon: int,
        lookback: Optional[int] = None,
        *,
        columns: Optional[Columns] = None,
        freq: Optional[str] = None,
        split: str = 'auto',
        all_data: bool = False,
        season: Optional[int] = None,
        model: Optional[Dict[str, Any]] = None,
        training: Optional[Dict[str, Any]] = None,
        seed: int = 0,
        device: Union[str, torch.device, None] = None,
        start: Optional[nn.Module] = None,
        checkpoint: Optional[Path] = None,
        resume: bool = False,
        log: Callable[[str], None] = lambda text: None,
        wrap: Callable = iter,
        **panel_options,
) -> 'Forecaster':
    """Train a forecaster on a series, or on many, and measure it beside the naive forecasts.

    Args:
        frame: the table (see `Panel.from_frame`, which takes `panel_options`: sort, duplicates, gaps, missing, …).
        horizon: steps to forecast.
        lookback: steps that a forecast reads. Default: 512, less for a short series (`default_lookback`).
        columns: what the columns are. Default: all are forecast.
        freq: step of the dates. Default: what they say.
        split: of `split_series`.
        all_data: after the run that chooses the epoch and measures errors and intervals, train anew on all rows for as
            many updates; the forecaster is that one, its errors are of the first.
        season: steps of the season of the seasonal naive forecast. Default: by the step of the dates.
        model: arguments of TSM2 beside `MODEL`. The centre of the instance norm is the last value where that is a
            better forecast than the mean in the training part.
        training: changes of `TRAINING`, see `training_options`.
        seed: of everything random.
        device: where to train. Default: the CPU.
        start: a trained model to start from.
        checkpoint: file for the state after each epoch; with `resume` it is continued from, if it is there.
        log, wrap: take a line per epoch; wrap the batches, as a progress bar does.

    Raises:
        SeriesError: the series, or an option, cannot be used.

    Warns:
        SeriesWarning: there are few windows, the validation loss was still falling, or the model loses to repeating
            the last value or the value of a season before.
    """
    setup = prepare(frame, horizon, lookback, columns=columns, freq=freq, split=split, season=season, model=model,
                    training=training, **panel_options)
    device = torch.device(device or 'cpu')
    network = create_model(setup.options, seed)
    if start is not None:
        network.load_state_dict(start.state_dict())
    train, val, test = (setup.windows.get(n) for n in ('train', 'val', 'test'))
    found: List[str] = []
    if len(train) < FEW_TRAIN or len(val) < FEW_VAL:
        _warn(f'there are few windows, {len(train)} to train on and {len(val)} to validate (below {FEW_TRAIN} and '
              f'{FEW_VAL}): a shorter ⟨lookback⟩ or ⟨horizon⟩ leaves more', found)
    trainer = Trainer(network, train, val, setup.training, seed, device)
    log(f'TSM2: {sum(p.numel() for p in network.parameters()):,} parameters, {len(setup.panel.ids)} series, '
        f'{len(setup.panel.variates)} variates, step {setup.panel.freq}, look-back {setup.options["lookback"]}, '
        f'horizon {horizon}; split {split}: {len(train):,} training and {len(val):,} validation windows, at most '
        f'{setup.training["epochs"]} epochs of {trainer.steps} batches of {trainer.batch_size}')
    if resume and checkpoint is not None and Path(checkpoint).exists():
        trainer.load(checkpoint)
        log(f'resumed at epoch {trainer.epoch}')
    trainer.fit(checkpoint, log, wrap)
    if trainer.still_falling:
        _warn(f'the validation loss was still falling after {trainer.epoch} epochs of {trainer.steps} batches: more '
              '⟨epochs⟩ may help', found)

    panel = setup.panel
    scale = naive_scale(masked(panel, setup.parts['train']), setup.season)
    dates = {f'{n}_end': [str(panel.index[b - 1]) for b in p[:, 1]] for n, p in setup.parts.items()}
    info = dict(split=split, seed=seed, training=setup.training, epoch=trainer.best_epoch, epochs=trainer.epoch,
                updates=trainer.updates, val_mse=trainer.best_loss, all_data=all_data, **dates)
    forecaster = Forecaster(
        trainer.model, setup.scaler, panel.variates, panel.freq, info, ids=panel.ids, roles=panel.columns,
        covariates=setup.covariates, season=setup.season, naive_scale=scale)
    forecaster.intervals = Intervals.fit(trainer.model, [train, val], device=device)
    judged = test if test is not None else val
    report = forecaster._measure(judged, 'test' if test is not None else 'val', device=device)
    forecaster.info['report'] = {k: report[k] for k in ('part', 'windows', 'errors', 'first_step', 'coverage')}
    for line in losses_to_naive(report):
        _warn(line, found)
    forecaster.info['warnings'] = found
    if all_data:
        if test is not None:  # the newest errors count too, now that the coverage is measured
            forecaster.intervals = Intervals.fit(trainer.model, [train, val, test], device=device)
        log(f'training anew on all rows for {trainer.best_epoch + 1} epochs of {trainer.steps} batches')
        forecaster._refit(panel, setup, trainer, seed, device, start, log, wrap)
    forecaster.model.cpu().eval()
    forecaster.history = trainer.history
    return forecaster


def losses_to_naive(report: Dict[str, Any]) -> List[str]:
    """A sentence for each naive forecast that is better than the model, over all steps or at the first one."""
    out = []
    for kind, name in (('last', 'repeating the last value'), ('seasonal', 'the seasonal naive forecast')):
        for where, errors in (('', report['errors']), (' at the first step', report['first_step'])):
            ours, theirs = errors['model']['mse'], errors[kind]['mse']
            # a first step is noisier than a mean: there only a clear loss counts
            if theirs < ours * (1 if not where else 1 / 1.5):
                ratio = ours / theirs if theirs > 0 else float('inf')
                out.append(f'the model loses to {name}{where}: MSE {ours:.4g} against {theirs:.4g} on the '
                           f'{report["part"]} part, {ratio:.2f} times as much')
                break
    return out


class Forecaster:
    """pandas in, pandas out: a TSM2 with the scale, the columns and the step of the series that it was trained on.

    A folder of one holds model.safetensors and config.json (`TSM2.from_pretrained` reads them alone) and
    forecaster.json with all the rest.
    """
    fit = staticmethod(fit)

    def __init__(
            self,
            model: nn.Module,
            scaler: Scaler,
            columns: Sequence[str],
            freq: Optional[str] = None,
            info: Optional[Dict[str, Any]] = None,
            *,
            ids: Sequence[str] = ('',),
            roles: Optional[Columns] = None,
            covariates: Optional[Covariates] = None,
            season: Optional[int] = None,
            naive_scale: Optional[np.ndarray] = None,
            intervals: Optional[Intervals] = None,
    ):
        """
        Args:
            model: (B, lookback, M) to (B, horizon, M), with attributes lookback and horizon; reads and gives
                standardised values.
            scaler: of each series and variate.
            columns: names of the M variates.
            freq: pandas' name of the step between dates.
            info: about its training, as JSON has it.
            ids: names of the series, one empty name for a table of one.
            roles: what the columns of a table are.
            covariates: how they become the model's inputs.
            season: steps of the season of the seasonal naive forecast.
            naive_scale: (series, variates), MASE's denominators.
            intervals: around its forecasts.
        """
        self.model = model.eval()
        self.scaler = scaler
        self.columns = [str(c) for c in columns]
        self.freq = freq
        self.info = dict(info or {})
        self.ids = list(ids)
        self.roles = roles or Columns(target=tuple(self.columns))
        self.covariates = covariates or Covariates([], [], [], False)
        self.season = season or (season_length(freq) if freq else 1)
        self.naive_scale = np.full(scaler.mean.shape, np.nan) if naive_scale is None else np.asarray(naive_scale, float)
        self.intervals = intervals
        self.history: List[dict] = []

    @property
    def lookback(self) -> int:
        return self.model.lookback

    @property
    def horizon(self) -> int:
        return self.model.horizon

    # ---------------------------------------------------------------------------------------------------------- files

    def save(self, folder: Union[str, Path]) -> None:
        """Write the folder, whole or not at all; the parts are as `from_pretrained` wants them."""
        storage.write_folder(self, folder)

    @classmethod
    def load(cls, folder: Union[str, Path]) -> 'Forecaster':
        """Read a folder; nothing in it is executed.

        Raises:
            SeriesError: it is no such folder, or a damaged one.
        """
        model, arguments = storage.read_folder(folder)
        return cls(model, **arguments)

    @classmethod
    def bundled(cls, name: str) -> 'Forecaster':
        """One of the forecasters that come with the package, such as 'tsm2.ETTh1-96'."""
        names = sorted(p.parent.name for p in WEIGHTS_DIR.glob(f'*/{storage.FILE}'))
        if name not in names:
            raise SeriesError(f'no folder and no bundled forecaster {name!r}: there is {", ".join(names) or "none"}')
        return cls.load(WEIGHTS_DIR / name)

    # --------------------------------------------------------------------------------------------------------- series

    def panel(self, frame: Union[pd.DataFrame, Panel], freq: Optional[str] = None, tail: Optional[int] = None,
              **options) -> Panel:
        """A table with this forecaster's columns as arrays, checked against its training.

        Args:
            frame: the table; further columns are left out.
            freq: step of the dates. Default: that of training, which the dates must have.
            tail: read no more than so many rows before the end of each series.

        Raises:
            SeriesError: a column or series is missing or unknown, or the step is another one than in training.
        """
        if isinstance(frame, Panel):
            return frame
        name = options.get('name', 'the series')
        names = [str(c) for c in frame.columns]
        roles = self.roles
        wanted = [*roles.target, *([roles.id] if roles.id else []), *roles.past, *roles.future,
                  *(c for c in roles.static if c != roles.id)]
        lacking = [c for c in wanted if c not in names]
        if lacking:
            raise SeriesError(f'{name} has the columns {", ".join(map(repr, names[:20]))}, the forecaster was trained '
                              f'on {len(wanted)}: it lacks {", ".join(map(repr, lacking[:20]))}')
        if self.freq is not None and freq is not None and not same_step(freq, self.freq):
            raise SeriesError(f'⟨freq⟩ {freq!r} is not the step {self.freq!r} that the forecaster was trained on')
        if freq is None and isinstance(frame.index, pd.DatetimeIndex):
            seen = self._step(frame, tail)
            if seen is not None and self.freq is not None and not same_step(seen, self.freq):
                raise SeriesError(f'the dates of {name} have a step of {seen!r}, the forecaster was trained on one of '
                                  f'{self.freq!r}')
            freq = seen or self.freq
        panel = Panel.from_frame(frame, roles, freq, tail=tail, **options)
        strange = [i for i in panel.ids if i not in set(self.ids)]
        if strange and roles.id is not None:
            raise SeriesError(f'{name} has series that the forecaster was not trained on: '
                              f'{", ".join(map(repr, strange[:8]))}{", …" if len(strange) > 8 else ""}')
        if roles.multivariate:
            absent = [i for i in self.ids if i not in set(panel.ids)]
            if absent:
                raise SeriesError(f'{name} lacks the series {", ".join(map(repr, absent[:8]))}: the forecaster reads '
                                  f'all {len(self.ids)} that it was trained on together')
            panel = panel.select(self.ids)
        return panel

    def _step(self, frame: pd.DataFrame, tail: Optional[int]) -> Optional[str]:
        """The step between the last dates of the longest series, None where it cannot be told."""
        index = frame.index
        if self.roles.id is not None:
            ids = frame[self.roles.id].astype(str)
            index = index[(ids == ids.value_counts().index[0]).to_numpy()]
        index = pd.DatetimeIndex(index.dropna().unique().sort_values(), freq=None)
        for part in (index[-tail:] if tail else index, index):
            seen = frequency(part)
            if seen is not None:
                return seen
        return None

    def _rows(self, panel: Panel) -> np.ndarray:
        at = {i: k for k, i in enumerate(self.ids)}
        return np.array([at[i] for i in panel.ids]) if self.roles.id is not None else np.array([0])

    def windows(self, panel: Panel, parts: Dict[str, np.ndarray]) -> Dict[str, Windows]:
        """Windows of parts ((K, 2), first and one-past-last row) of a panel, in this forecaster's scale."""
        return make_windows(panel, self.scaler.rows(self._rows(panel)), self.covariates, parts, self.lookback,
                            self.horizon, self.season)

    # ------------------------------------------------------------------------------------------------------- forecast

    @torch.inference_mode()
    def _forecast(self, panel: Panel, batch_size: int = 256) -> np.ndarray:
        """(K, H, M) after the end of each series of an extended panel, in scaled units, and their spread (K, 1, M)."""
        scaler = self.scaler.rows(self._rows(panel))
        tensors = self.covariates.tensors(panel, scaler.mean, scaler.std)
        T, H = self.lookback, self.horizon
        if panel.columns.multivariate:
            if len(set(panel.end.tolist())) > 1:
                raise SeriesError('the series end at different dates: what is forecast together must end together')
            ends = panel.end[:1]
        else:
            ends = panel.end
        M = tensors.values.shape[2]
        parameter = next(self.model.parameters())
        out, spreads = [], []
        for k in torch.arange(len(ends)).split(batch_size):
            now = torch.as_tensor(ends)[k]
            back, ahead = now[:, None] - T + torch.arange(T), now[:, None] + torch.arange(H)
            for i, e in zip(k.tolist(), now.tolist()):
                if e - T < 0 or e - T < panel.begin[i] and not panel.columns.multivariate:
                    alone = not self.roles.id or self.roles.multivariate
                    who = 'the series' if alone else f'the series {panel.ids[i]!r}'
                    raise SeriesError(f'{who} has {e - panel.begin[i]} rows, a forecast needs {T} (the look-back)')
            inputs = dict(x=tensors.values[k[:, None], back])
            if tensors.past is not None:
                inputs['past'] = tensors.past[k[:, None], back].transpose(1, 2).expand(-1, M, -1, -1)
            if tensors.future is not None:
                inputs['future'] = tensors.future[k[:, None], ahead].transpose(1, 2).expand(-1, M, -1, -1)
            if tensors.static is not None:
                inputs['static'] = tensors.static[k].expand(-1, M, -1)
            for name, value in inputs.items():
                bad = value.isnan()
                if bad.any():
                    raise SeriesError(self._missing(panel, name, bad, k, back, ahead))
            spreads.append(spread(inputs['x']).double())
            inputs = {n: v.to(parameter.device, parameter.dtype) for n, v in inputs.items()}
            out.append(self.model(**inputs).double().cpu())
        return torch.cat(out).numpy(), torch.cat(spreads).numpy()

    def _missing(self, panel: Panel, name: str, bad, k, back, ahead) -> str:
        b = int(bad.flatten(1).any(1).nonzero()[0])
        who = f' of {panel.ids[int(k[b])]!r}' if self.roles.id and not self.roles.multivariate else ''
        if name == 'x':
            t = int(bad[b].any(1).nonzero()[0])
            return (f'the look-back{who} has a missing value at {panel.index[int(back[b, t])]}: ⟨missing⟩ and ⟨gaps⟩ '
                    'can be interpolate, forward or zero')
        if name == 'static':
            return f'a static covariate{who} is missing'
        t = int(bad[b].any(2).any(0).nonzero()[0])
        date = panel.index[int((ahead if name == 'future' else back)[b, t])]
        columns = self.roles.future if name == 'future' else (*self.roles.past, *self.roles.future)
        return (f'the covariates ({", ".join(columns)}){who} are not all known at {date}' + (
            f': a forecast of {self.horizon} steps needs them for all of these, as further rows or by ⟨future_data⟩'
            if name == 'future' else ''))

    def predict(self, frame: Union[pd.DataFrame, Panel], future: Optional[pd.DataFrame] = None, *,
                quantiles: Sequence[float] = (), freq: Optional[str] = None, after: Any = None,
                **panel_options) -> pd.DataFrame:
        """The forecast after the end of each series, in its units.

        Args:
            frame: the series up to now, at least `lookback` rows each; what is older is not read. Rows after the last
                value bring the covariates of the future.
            future: such rows in a table of their own.
            quantiles: of the forecast's distribution, 0.01 to 0.99: a column `NAME_q0.1` for each.
            freq: step of the dates. Default: that of training.
            after: forecast from the step after this date, as if nothing later were known but covariates.
            panel_options: of `Panel.from_frame`.

        Returns:
            A row for each date of the horizon (and each series); the dates are the index, then the column of names if
            there is one, the variates, and the quantiles.
        """
        if isinstance(frame, Panel):
            panel = frame
        else:
            if future is not None:
                frame = self._joined(frame, future)
            if after is not None:
                frame = self._as_of(frame, after)
            panel = self.panel(frame, freq, tail=self.lookback, **panel_options)
        panel = panel.extended(self.horizon)
        scaled, spreads = self._forecast(panel)
        together = self.roles.multivariate
        scaler = self.scaler.rows(self._rows(panel))
        mean, std = (scaler.mean.T[:, None], scaler.std.T[:, None]) if together else (
            scaler.mean[:, None], scaler.std[:, None])  # (S, 1, M)
        parts = {'': scaled}
        if len(quantiles):
            if self.intervals is None:
                raise SeriesError('this forecaster has no intervals: it was saved by an older version; train it anew')
            for q, offset in zip(sorted(quantiles), self.intervals.offsets(sorted(quantiles)).numpy()):
                parts[f'_q{q:g}'] = scaled + offset * spreads
        parts = {k: v * std + mean for k, v in parts.items()}
        target = self.roles.target
        frames = []
        for i, name in enumerate(panel.ids):
            e = int(panel.end[i])
            index = panel.index[e:e + self.horizon]
            data = {} if self.roles.id is None else {self.roles.id: name}
            for suffix, v in parts.items():
                for m, column in enumerate(target):
                    data[column + suffix] = v[0, :, i] if together else v[i, :, m]
            frames.append(pd.DataFrame(data, index=index))
        return pd.concat(frames)

    def _joined(self, frame: pd.DataFrame, future: pd.DataFrame) -> pd.DataFrame:
        """Further rows with covariates, for the dates after the last row of each series."""
        roles = self.roles
        if not roles.future:
            raise SeriesError('⟨future_data⟩ was given, but the forecaster has no ⟨future⟩ covariates')
        needed = [*([roles.id] if roles.id else []), *roles.future]
        lacking = [c for c in needed if c not in map(str, future.columns)]
        if lacking:
            raise SeriesError(f'⟨future_data⟩ lacks the column {", ".join(map(repr, lacking))}')
        for f in (frame, future):
            if not isinstance(f.index, pd.DatetimeIndex):
                raise SeriesError(f'the series and ⟨future_data⟩ need a DatetimeIndex, got a {type(f.index).__name__}')
        if (frame.index.tz is None) != (future.index.tz is None):
            raise SeriesError('only one of the series and ⟨future_data⟩ has a time zone: ⟨timezone⟩')
        if roles.id is None:
            future = future[future.index > frame.index.max()]
            static = None
        else:
            ids, later = frame[roles.id].astype(str), future[roles.id].astype(str)
            last = pd.Series(frame.index, index=ids.to_numpy()).groupby(level=0).max()
            future = future[later.isin(last.index).to_numpy()]
            later = future[roles.id].astype(str)
            future = future[(future.index > pd.DatetimeIndex(last.reindex(later)))]
            static = [c for c in roles.static if c != roles.id]
        future = future[[c for c in needed]]
        joined = pd.concat([frame, future])
        if static:
            joined[static] = joined.groupby(joined[roles.id].astype(str).to_numpy())[static].ffill()
        return joined

    def _as_of(self, frame: pd.DataFrame, after: Any) -> pd.DataFrame:
        try:
            date = pd.Timestamp(after)
            if (date.tz is None) != (frame.index.tz is None):
                date = date.tz_localize(frame.index.tz) if date.tz is None else date.tz_localize(None)
        except (ValueError, TypeError) as e:
            raise SeriesError(f'⟨after⟩ {after!r} is no date: {e}') from None
        known = frame[list(self.roles.target)].notna().any(axis=1) if set(self.roles.target) <= set(
            map(str, frame.columns)) else pd.Series(True, frame.index)
        dates = frame.index[known.to_numpy()]
        if not len(dates) or date < dates.min():
            raise SeriesError(f'⟨after⟩ {after} is before the first date, {frame.index.min()}')
        if date > dates.max():
            raise SeriesError(f'⟨after⟩ {after} is beyond the last date, {dates.max()}: nothing is known there')
        past = frame.index <= date
        if not (self.roles.future or self.roles.id):
            return frame[past]
        frame = frame.copy()
        frame.loc[~past, list(self.roles.target)] = np.nan
        return frame if self.roles.future else frame[past]

    # ------------------------------------------------------------------------------------------------------- measured

    def _measure(self, windows: Windows, part: str, batch_size: int = 256, level: float = 0.8,
                 device: Optional[torch.device] = None, rows: Optional[np.ndarray] = None) -> Dict[str, Any]:
        scale = self.naive_scale if rows is None else self.naive_scale[rows]
        scale = scale.T if self.roles.multivariate else scale
        model = self.model.to(device) if device is not None else self.model
        errors = {kind: evaluate(which, windows, batch_size, device=device, scale=scale)
                  for kind, which in (('model', model), ('last', 'last'), ('seasonal', 'seasonal'))}
        coverage = None
        if self.intervals is not None:
            coverage = dict(level=level, covered=self._coverage(windows, level, batch_size, device))
        return dict(part=part, windows=len(windows), left_out=windows.left_out, coverage=coverage, raw=errors,
                    errors={k: e.summary() for k, e in errors.items()},
                    first_step={k: e.summary(step=slice(0, 1)) for k, e in errors.items()})

    @torch.inference_mode()
    def _coverage(self, windows: Windows, level: float, batch_size: int, device) -> float:
        low, high = self.intervals.offsets([0.5 - level / 2, 0.5 + level / 2])
        inside = total = 0
        for index in windows.batches(batch_size):
            inputs, y = windows.take(index)
            forecast = self.model(**{k: v.to(device) for k, v in inputs.items()}).cpu()
            error = ((y - forecast) / spread(inputs['x'])).double()
            inside += ((error >= low) & (error <= high)).sum().item()
            total += error.numel()
        return inside / total

    def evaluate(self, frame: Union[pd.DataFrame, Panel], part: str = 'test', split: Optional[str] = None, *,
                 level: float = 0.8, freq: Optional[str] = None, batch_size: int = 256,
                 device: Union[str, torch.device, None] = None, **panel_options) -> Dict[str, Any]:
        """The errors over all windows of a part, beside those of the naive forecasts.

        Args:
            frame: the series.
            part: 'train', 'val', 'test' or 'all'.
            split: of `split_series`. Default: that of training.
            level: whose interval's coverage is measured.
            batch_size: windows at a time.
            device: where to. Default: the CPU.

        Returns:
            errors: for 'model', 'last' and 'seasonal' each mse and mae (standardised), own_mse and own_mae (in the
            units of the series) and mase; first_step likewise; raw: `Errors` for each step and variate; coverage of
            the interval; part, split, freq, season, windows, left_out (for a missing value).

        Warns:
            SeriesWarning: the part begins before training ended, or the model loses to a naive forecast.
        """
        panel = self.panel(frame, freq, **panel_options)
        split = split or self.info.get('split') or 'auto'
        if part == 'all':
            rows = np.stack([panel.begin, panel.end], 1)
        else:
            parts = panel_parts(panel, split, self.horizon)
            if part not in parts:
                raise SeriesError(f'the ⟨split⟩ {split!r} has no {part} part: ⟨part⟩')
            rows = parts[part]
        windows = self.windows(panel, {part: rows})[part]
        device = torch.device(device or 'cpu')
        report = self._measure(windows, part, batch_size, level, device, self._rows(panel))
        found: List[str] = []
        if part in ('val', 'test'):
            self._seen(panel, rows[:, 0], f'the {part} part begins', found)
        for line in losses_to_naive(report):
            _warn(line, found)
        report.update(split=split, freq=panel.freq, season=self.season, warnings=found)
        return report

    def _seen(self, panel: Panel, first: np.ndarray, what: str, found: List[str]) -> None:
        """Warn if the model was trained on rows at or after the (K,) `first` ones."""
        ends = self.info.get('test_end' if self.info.get('all_data') else 'train_end')
        if not isinstance(ends, list) or len(ends) != len(self.ids):
            return
        for k, row in zip(self._rows(panel), first):
            end, begin = pd.Timestamp(ends[k]), panel.index[min(int(row), len(panel.index) - 1)]
            if (end.tz is None) == (begin.tz is None) and begin <= end:
                _warn(f'{what} at {begin}, and the model was trained on rows up to {end}: these errors are not those '
                      'of unseen data', found)
                return

    def backtest(self, frame: Union[pd.DataFrame, Panel], origins: int = 5, stride: Optional[int] = None, *,
                 refit: bool = False, quantiles: Sequence[float] = (), freq: Optional[str] = None,
                 device: Union[str, torch.device, None] = None, log: Callable[[str], None] = lambda text: None,
                 **panel_options) -> pd.DataFrame:
        """Forecasts from several dates of the past, as they would have been made then.

        Args:
            frame: the series.
            origins: number of dates; the last one is a horizon before the end of each series.
            stride: steps between them. Default: the horizon.
            refit: train anew for each origin on what was known then, with the options of this forecaster; otherwise the
                forecaster stays as it is.
            quantiles: as of `predict`.
            device: to train on.
            log: takes a line per origin.

        Returns:
            A row for each origin, series, variate and step: fold (the origin's number), origin (the last known date),
            the date, the column of names if there is one, variate, y, forecast, last and seasonal (the naive
            forecasts), and the quantiles.

        Warns:
            SeriesWarning: without refit, an origin is before the end of what the model was trained on.
        """
        for name, value in (('origins', origins), ('stride', stride)):
            if value is not None and value < 1:
                raise SeriesError(f'⟨{name}⟩ must be at least 1, got {value}')
        panel = self.panel(frame, freq, **panel_options)
        H, stride = self.horizon, stride or self.horizon
        end = np.full(len(panel.ids), panel.end.min()) if self.roles.multivariate else panel.end
        origins = [end - H - i * stride for i in reversed(range(origins))]  # (K,) rows each
        # a series that began too close to an origin has no forecast from it
        long = [rows - panel.begin >= self.lookback for rows in origins]
        if not (long[0].all() if self.roles.multivariate else long[0].any()):
            need = self.lookback + H + (len(origins) - 1) * stride
            raise SeriesError(f'{len(origins)} ⟨origins⟩ {stride} steps apart need {need} rows, there are '
                              f'{(panel.end - panel.begin).max()}')
        if not refit:
            self._seen(panel, np.maximum(origins[0], 0), 'the forecasts begin', [])
        out = []
        for fold, (rows, enough) in enumerate(zip(origins, long)):
            then = panel.until(np.maximum(rows, panel.begin + 1))
            forecaster = self
            if refit:
                log(f'training for origin {fold + 1} of {len(origins)}')
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore', SeriesWarning)
                    forecaster = fit(then, H, self.lookback, split='no-test', season=self.season,
                                     model=self._model_options(), training=self.info.get('training'),
                                     seed=self.info.get('seed', 0), device=device)
                    forecaster.model.to(device or 'cpu')
            usable = [i for i, e in zip(panel.ids, enough) if e and i in set(forecaster.ids)]
            forecast = forecaster.predict(then.select(usable), quantiles=quantiles)
            out.append(self._fold(panel, usable, forecast, fold, rows, quantiles))
            mse = out[-1].eval('(y - forecast) ** 2').mean()
            log(f'origin {out[-1].origin.iloc[0]}: {len(usable)} series, MSE {mse:.4g} in the units of the series')
        return pd.concat(out, ignore_index=True)

    def _fold(self, panel: Panel, ids: Sequence[str], forecast: pd.DataFrame, fold: int, rows: np.ndarray,
              quantiles: Sequence[float]) -> pd.DataFrame:
        H = self.horizon
        at = {i: k for k, i in enumerate(panel.ids)}
        frames = []
        for n, name in enumerate(ids):
            k = at[name]
            row = int(rows[k])
            for m, column in enumerate(self.roles.target):
                history = panel.values[k, :row, m]
                back = row - self.season + np.arange(H) % self.season
                seasonal = np.where(back >= 0, history[np.maximum(back, 0)], history[-1])
                block = forecast.iloc[n * H:(n + 1) * H]
                data = dict(fold=fold, origin=panel.index[row - 1], date=panel.index[row:row + H])
                if self.roles.id is not None:
                    data[self.roles.id] = name
                data.update(variate=column, y=panel.values[k, row:row + H, m], forecast=block[column].to_numpy(),
                            last=history[-1], seasonal=np.where(np.isnan(seasonal), history[-1], seasonal))
                data.update({f'q{q:g}': block[f'{column}_q{q:g}'].to_numpy() for q in sorted(quantiles)})
                frames.append(pd.DataFrame(data))
        return pd.concat(frames)

    def _model_options(self) -> Dict[str, Any]:
        """The arguments of TSM2 that `fit` does not choose itself."""
        own = {'num_variates', 'lookback', 'horizon', 'static_dim', 'future_dim', 'past_dim', 'future_len', 'device',
               'dtype'}
        config = getattr(self.model, '_hub_mixin_config', {})
        return {k: v for k, v in dict(config).items() if k not in own}

    # ----------------------------------------------------------------------------------------------- further training

    def fine_tune(self, frame: Union[pd.DataFrame, Panel], *, split: str = 'auto', freq: Optional[str] = None,
                  training: Optional[Dict[str, Any]] = None, **options) -> 'Forecaster':
        """Train on from these weights, on a series with the same columns; a new forecaster.

        Args:
            frame: the series; the scale is that of its own training part.
            split, options: of `fit`.
            training: changes of this forecaster's options; the default learning rate is a fifth of its own.
        """
        trained = dict(self.info.get('training') or {})
        lr = trained.get('lr', training_options({})['lr']) / 5
        known = set(training_options({}))
        return fit(frame, self.horizon, self.lookback, columns=self.roles, freq=freq or self.freq, split=split,
                   season=self.season, model=self._model_options(),
                   training={**{k: v for k, v in trained.items() if k in known}, 'lr': lr, **(training or {})},
                   start=self.model, **options)

    def _refit(self, panel, setup: Setup, trainer: Trainer, seed: int, device, start, log, wrap) -> None:
        rows = np.stack([panel.begin, panel.end], 1)
        scaler = Scaler.fit(panel.values)
        covariates = Covariates.fit(panel, panel.end)
        windows = make_windows(panel, scaler, covariates, {'train': rows}, self.lookback, self.horizon, setup.season)
        network = create_model(setup.options, seed)
        if start is not None:
            network.load_state_dict(start.state_dict())
        again = Trainer(network, windows['train'], None, dict(setup.training, epochs=trainer.best_epoch + 1,
                                                              steps=trainer.steps), seed, device)
        again.fit(None, log, wrap)
        self.model, self.scaler, self.covariates = again.model, scaler, covariates
        self.info['test_end'] = [str(panel.index[e - 1]) for e in panel.end]
