"""The plots of forecast.py; matplotlib is imported when one is drawn."""
import math
from pathlib import Path
from typing import Any, List, Optional, Tuple

import _common as common
from _common import UserError

__all__ = ['plot_backtest', 'plot_forecast', 'plot_panels']


def plot_panels(pieces, roles, wanted: List[str], ids: Optional[str]) -> List[Tuple[str, Any, Any, Any]]:
    """Title, history, truth and forecast (columns forecast, q…) of each panel."""
    out = []
    for key, history, truth, ahead in pieces:
        for column in roles.target:
            title = column if ids is None else key if len(roles.target) == 1 else f'{key}: {column}'
            if (column if ids is None else key) in wanted:
                own = ahead[[c for c in ahead.columns if c == column or c.startswith(f'{column}_q')]]
                own = own.rename(columns=lambda c, n=column: 'forecast' if c == n else c[len(n) + 1:])
                out.append((title, history[column], truth[column], own))
    return out


def _axes(count: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    rows = math.ceil(count / 2) if count > 1 else 1
    figure = Figure(figsize=(13 if count > 1 else 9, 2.3 * rows + 0.9), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2 if count > 1 else 1, squeeze=False, sharex=True).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[max(count - 2, 0):count]:  # also above an empty place
        axis.tick_params(labelbottom=True)
    return figure, axes


def _finish(figure, axes, title: str, path: str) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    for axis in axes:
        axis.margins(x=0.01)
        locator = AutoDateLocator(minticks=3, maxticks=7)
        axis.xaxis.set_major_locator(locator)
        axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    handles, labels = axes[0].get_legend_handles_labels()
    named = dict(zip(labels, handles))
    figure.legend(named.values(), named.keys(), loc='outside upper right', ncols=len(named), frameon=False)
    figure.text(0.01, 0.995, title, ha='left', va='top', fontsize=9, color='0.35')
    try:
        common.write_atomic(path, lambda tmp: figure.savefig(tmp, dpi=110, format=Path(path).suffix[1:] or 'png'))
    except ValueError as e:
        raise UserError(f'cannot write the plot {path}: {common.one_line(e)}') from None


def _draw(axis, ahead, start, first: bool) -> None:
    """A forecast from `start` (date, value) with its intervals, the widest the lightest."""
    levels = sorted(float(c[1:]) for c in ahead.columns if c.startswith('q') and c != 'q')
    dates = [start[0], *ahead.index]
    while len(levels) > 1:
        low, high = levels[0], levels[-1]
        axis.fill_between(dates, [start[1], *ahead[f'q{low:g}']], [start[1], *ahead[f'q{high:g}']], color='#d62728',
                          alpha=0.18, linewidth=0, label=f'{low:g} to {high:g}' if first else None)
        levels = levels[1:-1]
    label = 'forecast' if first else None
    axis.plot(dates, [start[1], *ahead['forecast']], color='#d62728', linewidth=1.4, label=label)


def plot_forecast(panels, history: int, path: str, title: str) -> None:
    """One panel per variate or series: history, truth where it is known, forecast and its quantiles."""
    figure, axes = _axes(len(panels))
    for axis, (name, past, truth, ahead) in zip(axes, panels):
        past = past.dropna().iloc[-history:]
        axis.plot(past.index, past, color='0.35', linewidth=1.1, label='history')
        start = past.index[-1], past.iloc[-1]
        if len(truth):  # joined to the history, as the forecast is
            axis.plot([start[0], *truth.index], [start[1], *truth], color='#1f77b4', linewidth=1.1, label='truth')
        _draw(axis, ahead, start, True)
        axis.axvline(start[0], color='0.7', linewidth=0.8, linestyle='--')
        axis.set_title(name, fontsize=10, loc='left')
    _finish(figure, axes, title, path)


def plot_backtest(table, key: str, names: List[str], path: str, title: str) -> None:
    """One panel per name in the column `key` of `Forecaster.backtest`'s table: the truth and each forecast."""
    figure, axes = _axes(len(names))
    for axis, name in zip(axes, names):
        own = table[table[key].astype(str) == name]
        truth = own.drop_duplicates('date').sort_values('date')
        axis.plot(truth['date'], truth['y'], color='0.35', linewidth=1.1, label='truth')
        for n, (_, part) in enumerate(own.groupby('fold')):
            _draw(axis, part.set_index('date'), (part['origin'].iloc[0], part['last'].iloc[0]), n == 0)
            axis.axvline(part['origin'].iloc[0], color='0.7', linewidth=0.8, linestyle='--')
        axis.set_title(name, fontsize=10, loc='left')
    _finish(figure, axes, title, path)
