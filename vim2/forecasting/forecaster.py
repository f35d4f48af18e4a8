"""A trained forecaster with everything that it needs to read a series: scaler, columns, frequency."""
import json
from pathlib import Path
from typing import Any, Dict, Optional, Union

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vim2.models import TSM2
from vim2.pretrained import WEIGHTS_DIR, check_bundled
from .data import Scaler, SeriesError, check_series, frequency, future_index, select_columns

__all__ = ['Forecaster']

_FILE = 'forecaster.json'
_FORMAT = 1


class Forecaster:
    """pandas in, pandas out: a TSM2, the scaler of its training data, and the columns it was trained on.

    A folder of one holds model.safetensors and config.json (`TSM2.from_pretrained` reads them alone) and
    forecaster.json with all the rest.
    """

    def __init__(self, model: nn.Module, scaler: Scaler, columns: list, freq: Optional[str] = None,
                 info: Optional[Dict[str, Any]] = None):
        """
        Args:
            model: (B, lookback, M) to (B, horizon, M), with attributes lookback and horizon; reads and gives
                standardised values.
            scaler: of the M variates.
            columns: their names.
            freq: pandas' name of the step between dates, None if they are not even.
            info: anything about its training, as JSON has it.
        """
        self.model = model.eval()
        self.scaler = scaler
        self.columns = [str(c) for c in columns]
        self.freq = freq
        self.info = dict(info or {})

    @property
    def lookback(self) -> int:
        return self.model.lookback

    @property
    def horizon(self) -> int:
        return self.model.horizon

    def save(self, folder: Union[str, Path]) -> None:
        """Write the folder; the parts are as `from_pretrained` wants them."""
        folder = Path(folder)
        self.model.save_pretrained(folder)
        state = dict(format=_FORMAT, columns=self.columns, freq=self.freq, scaler=self.scaler.to_dict(), info=self.info)
        (folder / _FILE).write_text(json.dumps(state, indent=1) + '\n', encoding='utf-8')

    @classmethod
    def load(cls, folder: Union[str, Path]) -> 'Forecaster':
        """Read a folder; nothing in it is executed.

        Raises:
            SeriesError: it is no such folder, or a damaged one.
        """
        folder = Path(folder)
        missing = [n for n in ('model.safetensors', 'config.json', _FILE) if not (folder / n).is_file()]
        if missing:
            raise SeriesError(f'{folder} is no forecaster: it has no {", ".join(missing)}')
        try:
            state = json.loads((folder / _FILE).read_text(encoding='utf-8'))
            # as TSM2.from_pretrained does, which prints
            model = TSM2(**json.loads((folder / 'config.json').read_text(encoding='utf-8')))
            check_bundled(folder / 'model.safetensors')
            model.load_state_dict(load_file(folder / 'model.safetensors'))
            scaler = Scaler.from_dict(state['scaler'])
            if state['format'] != _FORMAT:
                raise ValueError(f'it has format {state["format"]}, this version reads {_FORMAT}')
            columns = state['columns']
            if len(columns) != model.num_variates or len(scaler.mean) != model.num_variates:
                raise ValueError(f'{_FILE} names {len(columns)} columns, the model has {model.num_variates} variates')
        except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as e:
            raise SeriesError(f'cannot read the forecaster in {folder}: {" ".join(str(e).split())}') from None
        return cls(model, scaler, columns, state.get('freq'), state.get('info'))

    @classmethod
    def bundled(cls, name: str) -> 'Forecaster':
        """One of the forecasters that come with the package, such as 'tsm2.ETTh1-96'."""
        names = sorted(p.parent.name for p in WEIGHTS_DIR.glob(f'*/{_FILE}'))
        if name not in names:
            raise SeriesError(f'no folder and no bundled forecaster {name!r}: there is {", ".join(names) or "none"}')
        return cls.load(WEIGHTS_DIR / name)

    def select(self, frame: pd.DataFrame, name: str = 'the series') -> pd.DataFrame:
        """The checked series, with this forecaster's columns in its order; further columns are left out."""
        names = [str(c) for c in frame.columns]
        if not set(self.columns) <= set(names):
            raise SeriesError(
                f'{name} has {len(names)} variates ({", ".join(map(repr, names))}), the forecaster was trained on '
                f'{len(self.columns)}: it lacks {", ".join(repr(c) for c in self.columns if c not in names)}')
        return check_series(select_columns(frame.set_axis(names, axis=1), self.columns, name), name)

    @torch.inference_mode()
    def predict(self, frame: pd.DataFrame, freq: Optional[str] = None) -> pd.DataFrame:
        """The forecast after the end of a series, in its units.

        Args:
            frame: the series up to now, at least `lookback` rows; what is older is not read.
            freq: step of the dates. Default: that of the series, else that of training.

        Returns:
            (horizon, M), with the dates of the future.
        """
        frame = self.select(frame)
        if len(frame) < self.lookback:
            raise SeriesError(f'the series has {len(frame)} rows, a forecast needs {self.lookback} (the look-back)')
        past = frame.iloc[-self.lookback:]
        index = future_index(frame.index, self.horizon, freq or frequency(frame.index) or self.freq)
        parameter = next(self.model.parameters())
        x = torch.as_tensor(self.scaler.transform(past.to_numpy()), dtype=parameter.dtype, device=parameter.device)
        y = self.model(x.unsqueeze(0))[0].double().cpu().numpy()
        return pd.DataFrame(np.asarray(self.scaler.inverse(y)), index=index, columns=self.columns)
