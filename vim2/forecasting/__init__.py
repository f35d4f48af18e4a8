"""Forecasting with TSM2: reading series, training, forecasts, errors. Needs pandas (extra `forecast`)."""
from .baselines import DLinear
from .errors import SeriesError, SeriesWarning
from .forecaster import Forecaster, fit
from .grid import frequency, future_index
from .intervals import Intervals
from .metrics import Errors, evaluate
from .panel import Columns, Panel
from .reading import parse_dates, read_series
from .windows import Scaler, Split, Windows, split_series

__all__ = ['Columns', 'DLinear', 'Errors', 'Forecaster', 'Intervals', 'Panel', 'Scaler', 'SeriesError', 'SeriesWarning',
           'Split', 'Windows', 'evaluate', 'fit', 'frequency', 'future_index', 'parse_dates', 'read_series',
           'split_series']
