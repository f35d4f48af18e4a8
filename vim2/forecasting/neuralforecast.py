"""TSM2 as a model of neuralforecast (Nixtla), with its hyper-parameter search, and through it of darts.

    from neuralforecast import NeuralForecast
    from vim2.forecasting.neuralforecast import AutoTSM2, TSM2

    nf = NeuralForecast([TSM2(h=24, input_size=96, n_series=7, max_steps=500)], freq='h')
    nf = NeuralForecast([AutoTSM2(h=24, n_series=7, num_samples=20)], freq='h')

Importing this registers the class with neuralforecast, so that `NeuralForecast.save` and `.load` know it. In darts:
`NeuralForecastModel(96, 24, model=TSM2, model_kwargs=dict(d_model=32))`.
"""
from typing import Any, Dict, Optional

from neuralforecast import core
from neuralforecast.common._base_auto import BaseAuto, MockTrial
from neuralforecast.common._base_model import BaseModel
from neuralforecast.losses.pytorch import MSE
from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator
from torch import Tensor, cat

from vim2.models import TSM2 as Network
from .training import MODEL, TRAINING, default_patch

__all__ = ['AutoTSM2', 'TSM2']


class TSM2(BaseModel):
    """TSM2 (arXiv 2403.19888): a multivariate model with static covariates and those known for the past and the future.

    Its defaults are those of `vim2.forecasting.fit`; the optimiser, which is Adam without averaged weights, and the
    number of steps are neuralforecast's.
    """

    EXOGENOUS_FUTR = True
    EXOGENOUS_HIST = True
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
            patch_len: Optional[int] = None,
            stride: Optional[int] = None,
            d_model: int = MODEL['d_model'],
            depth: int = MODEL['depth'],
            d_state: int = MODEL['d_state'],
            expand: float = MODEL['expand'],
            variate_mixer: str = 's6',
            weighted_average: bool = True,
            revin: bool = True,
            center: str = 'mean',
            dropout: float = MODEL['drop_rate'],
            head_dropout: float = MODEL['head_drop_rate'],
            loss=MSE(),  # noqa: B008 (neuralforecast's convention, which reads the default from the signature)
            valid_loss=None,
            max_steps: int = 1000,
            learning_rate: float = TRAINING['lr'],
            num_lr_decays: int = -1,
            early_stop_patience_steps: int = -1,
            val_monitor: str = 'ptl/val_loss',
            val_check_steps: int = 100,
            batch_size: int = 32,
            valid_batch_size: Optional[int] = None,
            windows_batch_size: int = TRAINING['batch_size'],
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
            futr_exog_list, hist_exog_list, stat_exog_list: columns known for the future, up to the present, and static
                ones.
            patch_len, stride: steps of a patch and between patches. Default: by the look-back, as `fit` chooses them.
            d_model, depth, d_state, expand, variate_mixer, weighted_average, center: the arguments
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
        patch_len = patch_len or default_patch(input_size)
        # a loss may want several outputs per step
        self.network = Network(
            n_series, lookback=input_size, horizon=h * self.loss.outputsize_multiplier, patch_len=patch_len,
            stride=stride or patch_len, d_model=d_model, depth=depth, d_state=d_state, expand=expand,
            static_dim=self.stat_exog_size, future_dim=self.futr_exog_size, future_len=h,
            past_dim=self.futr_exog_size + self.hist_exog_size,
            variate_mixer=variate_mixer, weighted_average=weighted_average, instance_norm=revin, center=center,
            drop_rate=dropout, head_drop_rate=head_dropout)

    def _check_series(self, dataset: Any) -> None:
        if dataset.n_groups != self.n_series:
            raise ValueError(f'TSM2 forecasts {self.n_series} series together (n_series), the data has '
                             f'{dataset.n_groups}: set n_series to that, or give it the series that it was made for')

    def fit(self, dataset, *args, **kwargs):
        """BaseModel's, for as many series as the model has.

        Raises:
            ValueError: the data has more or fewer.
        """
        self._check_series(dataset)
        return super().fit(dataset, *args, **kwargs)

    def predict(self, dataset, *args, **kwargs):
        """BaseModel's, for as many series as the model has.

        Raises:
            ValueError: the data has more or fewer.
        """
        self._check_series(dataset)
        return super().predict(dataset, *args, **kwargs)

    def forward(self, windows_batch: Dict[str, Tensor]) -> Tensor:
        """Windows as neuralforecast gives them to multivariate models; (B, h, n_series * outputs)."""
        x = windows_batch['insample_y']  # (B, T, M)
        static = future = None
        past = []
        if self.stat_exog_size > 0:
            static = windows_batch['stat_exog'].unsqueeze(0).expand(len(x), -1, -1)  # (M, S) to (B, M, S)
        if self.futr_exog_size > 0:
            known = windows_batch['futr_exog'].permute(0, 3, 2, 1)  # (B, F, T + h, M) to (B, M, T + h, F)
            past, future = [known[:, :, :x.shape[1]]], known[:, :, x.shape[1]:]
        if self.hist_exog_size > 0:
            past.append(windows_batch['hist_exog'].permute(0, 3, 2, 1))  # (B, X, T, M)
        y = self.network(x, static, future, cat(past, dim=3) if past else None)
        return y.unflatten(1, (self.h, -1)).transpose(2, 3).flatten(2)


class AutoTSM2(BaseAuto):
    """Search of TSM2's hyper-parameters, with ray or optuna, as neuralforecast's own Auto models."""

    default_config = dict(
        input_size_multiplier=[2, 4, 8, 16],
        h=None,
        n_series=None,
        d_model=tune.choice([16, 32, 64]),
        depth=tune.choice([1, 2]),
        d_state=tune.choice([4, 16]),
        dropout=tune.uniform(0., 0.5),
        head_dropout=tune.uniform(0., 0.5),
        center=tune.choice(['mean', 'last']),
        learning_rate=tune.loguniform(1e-4, 1e-2),
        max_steps=tune.choice([250, 500, 1000]),
        windows_batch_size=tune.choice([32, 64]),
        loss=None,
        random_seed=tune.randint(1, 20),
    )

    def __init__(
            self,
            h: int,
            n_series: int,
            loss=MSE(),  # noqa: B008
            valid_loss=None,
            config=None,
            search_alg=BasicVariantGenerator(random_state=1),  # noqa: B008
            num_samples: int = 10,
            time_budget: Optional[int] = None,
            refit_with_val: bool = False,
            cpus: Optional[int] = None,
            gpus: Optional[int] = None,
            verbose: bool = False,
            alias: Optional[str] = None,
            backend: str = 'ray',
            callbacks=None,
            **kwargs,
    ):
        if config is None:
            config = self.get_default_config(h=h, backend=backend, n_series=n_series)
        if backend == 'ray':
            config['n_series'] = n_series
        elif config(MockTrial()).get('n_series') != n_series:
            raise ValueError(f"AutoTSM2: the config needs 'n_series': {n_series}")
        super().__init__(
            cls_model=TSM2, h=h, loss=loss, valid_loss=valid_loss, config=config, search_alg=search_alg,
            num_samples=num_samples, time_budget=time_budget, refit_with_val=refit_with_val, cpus=cpus, gpus=gpus,
            verbose=verbose, alias=alias, backend=backend, callbacks=callbacks, **kwargs)

    @classmethod
    def get_default_config(cls, h: int, backend: str, n_series: int):
        """The space that is searched: look-backs of 2 to 16 horizons, widths, dropout, learning rate."""
        config = dict(cls.default_config)
        config['input_size'] = tune.choice([h * x for x in config.pop('input_size_multiplier')])
        if backend == 'optuna':
            config['n_series'] = n_series
            config = cls._ray_config_to_optuna(config)
        return config


core.MODEL_FILENAME_DICT.update(tsm2=TSM2, autotsm2=TSM2)
