"""TSM2 as a model of neuralforecast (Nixtla), and through it of darts.

    from neuralforecast import NeuralForecast
    from vim2.forecasting.neuralforecast import TSM2

    nf = NeuralForecast([TSM2(h=24, input_size=96, n_series=7, max_steps=500)], freq='h')

Importing this registers the class with neuralforecast, so that `NeuralForecast.save` and `.load` know it. In darts:
`NeuralForecastModel(96, 24, model=TSM2, model_kwargs=dict(d_model=32))`.
"""
from typing import Dict, Optional

from neuralforecast import core
from neuralforecast.common._base_model import BaseModel
from neuralforecast.losses.pytorch import MSE
from torch import Tensor

from vim2.models import TSM2 as Network

__all__ = ['TSM2']


class TSM2(BaseModel):
    """TSM2 (arXiv 2403.19888): a multivariate model with static inputs and inputs known for the future."""

    EXOGENOUS_FUTR = True
    EXOGENOUS_HIST = False
    EXOGENOUS_STAT = True
    MULTIVARIATE = True
    RECURRENT = False

    def __init__(
            self,
            h: int,
            input_size: int,
            n_series: int,
            futr_exog_list=None,
            hist_exog_list=None,
            stat_exog_list=None,
            exclude_insample_y: bool = False,
            patch_len: int = 16,
            stride: int = 8,
            d_model: int = 32,
            depth: int = 1,
            d_state: int = 16,
            expand: float = 2.,
            variate_mixer: str = 's6',
            weighted_average: bool = True,
            revin: bool = True,
            center: str = 'mean',
            dropout: float = 0.1,
            head_dropout: float = 0.,
            loss=MSE(),  # noqa: B008 (neuralforecast's convention, which reads the default from the signature)
            valid_loss=None,
            max_steps: int = 1000,
            learning_rate: float = 1e-3,
            num_lr_decays: int = -1,
            early_stop_patience_steps: int = -1,
            val_monitor: str = 'ptl/val_loss',
            val_check_steps: int = 100,
            batch_size: int = 32,
            valid_batch_size: Optional[int] = None,
            windows_batch_size: int = 32,
            inference_windows_batch_size: int = 32,
            start_padding_enabled: bool = False,
            training_data_availability_threshold: float = 0.,
            step_size: int = 1,
            scaler_type: str = 'identity',
            random_seed: int = 1,
            drop_last_loader: bool = False,
            alias: Optional[str] = None,
            optimizer=None,
            optimizer_kwargs=None,
            lr_scheduler=None,
            lr_scheduler_kwargs=None,
            dataloader_kwargs=None,
            **trainer_kwargs,
    ):
        """
        Args:
            h, input_size, n_series: horizon, look-back and number of variates.
            futr_exog_list, stat_exog_list: columns known for the future, and static ones. Past-only ones
                (`hist_exog_list`) are an error: TSM2 has no such input.
            patch_len, stride, d_model, depth, d_state, expand, variate_mixer, weighted_average, center: the arguments
                of `vim2.models.TSM2` of that name.
            revin: reversible instance normalisation, TSM2's `instance_norm`.
            dropout, head_dropout: TSM2's `drop_rate` and `head_drop_rate`.
            loss, …: neuralforecast's, as for its own models.
        """
        super().__init__(
            h=h, input_size=input_size, n_series=n_series, futr_exog_list=futr_exog_list,
            hist_exog_list=hist_exog_list, stat_exog_list=stat_exog_list, exclude_insample_y=exclude_insample_y,
            loss=loss, valid_loss=valid_loss, max_steps=max_steps, learning_rate=learning_rate,
            num_lr_decays=num_lr_decays, early_stop_patience_steps=early_stop_patience_steps, val_monitor=val_monitor,
            val_check_steps=val_check_steps, batch_size=batch_size, valid_batch_size=valid_batch_size,
            windows_batch_size=windows_batch_size, inference_windows_batch_size=inference_windows_batch_size,
            start_padding_enabled=start_padding_enabled,
            training_data_availability_threshold=training_data_availability_threshold, step_size=step_size,
            scaler_type=scaler_type, random_seed=random_seed, drop_last_loader=drop_last_loader, alias=alias,
            optimizer=optimizer, optimizer_kwargs=optimizer_kwargs, lr_scheduler=lr_scheduler,
            lr_scheduler_kwargs=lr_scheduler_kwargs, dataloader_kwargs=dataloader_kwargs, **trainer_kwargs)
        # neuralforecast gives the future inputs over look-back and horizon; a loss may want several outputs per step
        self.network = Network(
            n_series, lookback=input_size, horizon=h * self.loss.outputsize_multiplier, patch_len=patch_len,
            stride=stride, d_model=d_model, depth=depth, d_state=d_state, expand=expand,
            static_dim=self.stat_exog_size, future_dim=self.futr_exog_size, future_len=input_size + h,
            variate_mixer=variate_mixer, weighted_average=weighted_average, instance_norm=revin, center=center,
            drop_rate=dropout, head_drop_rate=head_dropout)

    def forward(self, windows_batch: Dict[str, Tensor]) -> Tensor:
        """Windows as neuralforecast gives them to multivariate models; (B, h, n_series * outputs)."""
        x = windows_batch['insample_y']  # (B, T, M)
        static = future = None
        if self.stat_exog_size > 0:
            static = windows_batch['stat_exog'].unsqueeze(0).expand(len(x), -1, -1)  # (M, S) to (B, M, S)
        if self.futr_exog_size > 0:
            future = windows_batch['futr_exog'].permute(0, 3, 2, 1)  # (B, F, T + h, M) to (B, M, T + h, F)
        y = self.network(x, static, future)
        return y.unflatten(1, (self.h, -1)).transpose(2, 3).flatten(2)


core.MODEL_FILENAME_DICT.update(tsm2=TSM2, autotsm2=TSM2)
