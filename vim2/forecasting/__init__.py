"""Forecasting with TSM2: series, windows and splits, errors, baselines. Needs pandas (extra `forecast`)."""
from .baselines import DLinear
from .data import Scaler, SeriesError, Split, Windows, check_series, frequency, future_index, read_series, split_series
from .forecaster import Forecaster
from .metrics import Errors, evaluate

__all__ = ['DLinear', 'Errors', 'Forecaster', 'Scaler', 'SeriesError', 'Split', 'Windows', 'check_series', 'evaluate',
           'frequency', 'future_index', 'read_series', 'split_series']
