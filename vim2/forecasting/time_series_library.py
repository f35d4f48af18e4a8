"""TSM2 as a model of the Time-Series-Library (github.com/thuml/Time-Series-Library).

There a model is a file `models/NAME.py` with a class `Model(configs)`; `models/TSM2.py` is this one line:

    from vim2.forecasting.time_series_library import Model
"""
from typing import Any, Optional

from torch import Tensor, nn

from vim2.models import TSM2

__all__ = ['Model']


class Model(nn.Module):
    """Long- and short-term forecasting with TSM2, from the library's options.

    Of `configs`, seq_len, pred_len and enc_in are needed. d_model, e_layers (depth), d_state, expand, dropout,
    patch_len and stride are taken where present; so are variate_mixer, weighted_average, use_norm (instance norm),
    center and head_dropout.
    The library's defaults are for Transformers: pass `--d_model 32 --d_state 16 --e_layers 1 --dropout 0.1`.
    """
    _NAMES = dict(patch_len='patch_len', stride='stride', d_model='d_model', e_layers='depth', d_state='d_state',
                  expand='expand', variate_mixer='variate_mixer', weighted_average='weighted_average',
                  center='center', dropout='drop_rate', head_dropout='head_drop_rate')
    _TASKS = ('long_term_forecast', 'short_term_forecast')

    def __init__(self, configs: Any):
        super().__init__()
        task = getattr(configs, 'task_name', self._TASKS[0])
        if task not in self._TASKS:
            raise ValueError(f'TSM2 forecasts: task_name must be one of {", ".join(self._TASKS)}, got {task!r}')
        self.task_name = task
        self.pred_len = configs.pred_len
        options = {ours: getattr(configs, theirs) for theirs, ours in self._NAMES.items() if hasattr(configs, theirs)}
        if hasattr(configs, 'use_norm'):
            options['instance_norm'] = bool(configs.use_norm)
        self.network = TSM2(configs.enc_in, lookback=configs.seq_len, horizon=configs.pred_len, **options)

    def forward(self, x_enc: Tensor, x_mark_enc: Optional[Tensor] = None, x_dec: Optional[Tensor] = None,
                x_mark_dec: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Tensor:
        """(B, seq_len, enc_in) to (B, pred_len, enc_in). The calendar marks and the decoder's input are not read."""
        return self.network(x_enc)
