"""Training of a forecaster: a resumable loop, stopped early by the validation loss."""
import math
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn import functional as F
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR

from vim2 import _files
from .errors import SeriesError
from .metrics import evaluate
from .windows import Windows

__all__ = ['MODEL', 'TRAINING', 'Trainer', 'default_lookback', 'default_patch', 'training_options']

_FORMAT = 2

# The one configuration of all data sets, chosen on the validation parts of the benchmark's (docs/forecasting.md).
MODEL: Dict[str, Any] = dict(d_model=32, depth=1, d_state=4, expand=2.0, drop_rate=0.2, head_drop_rate=0.2)
TRAINING: Dict[str, Any] = dict(
    epochs=30, steps=0, batch_size=64, lr=1e-3, weight_decay=0.01, warmup_steps=10, patience=6, ema_decay=0.99,
    val_windows=700, clip_grad=1.0, loss='mse', schedule='cosine')
LOSSES = dict(mse=F.mse_loss, mae=F.l1_loss, huber=F.smooth_l1_loss)


def default_lookback(train_rows: int, horizon: int, season: int) -> int:
    """Steps that a forecast reads: 512, or as many as leave two thirds of the training part as windows.

    Of a short series up to half is given for two seasons.
    """
    free = max(train_rows - horizon, 2)
    return max(1, min(512, max(free // 3, min(2 * season, free // 2))))


def default_patch(lookback: int) -> int:
    """Steps of a patch: 32 for long look-backs, at least four patches for short ones."""
    return 32 if lookback >= 256 else 16 if lookback >= 96 else 8 if lookback >= 32 else max(1, lookback // 4)


def training_options(options: Dict[str, Any]) -> Dict[str, Any]:
    """`TRAINING` changed by options, checked.

    epochs: most epochs, each of which ends with the validation loss. steps: batches in an epoch; 0: a sixth of the
    windows, at least 10 and at most 60 batches; -1: all windows. batch_size: windows in it. lr, weight_decay: AdamW's.
    warmup_steps: batches of linear warm-up. schedule: of the learning rate after it: 'cosine' to a hundredth over all
    epochs, 'constant', or 'halve' after each epoch from the second on, as Informer's code does, and many after it.
    patience: stop after so many epochs without a better validation loss; 0: never. ema_decay: of the averaged weights,
    per batch. val_windows: validation windows, evenly spread; 0: all. clip_grad: largest norm of the gradients; 0: any.
    loss: 'mse', 'mae' or 'huber'.
    """
    unknown = set(options) - set(TRAINING)
    if unknown:
        raise SeriesError(f'unknown option of training {sorted(unknown)[0]!r}; there are {", ".join(TRAINING)}')
    out = {**TRAINING, **options}
    for name, choices in (('loss', tuple(LOSSES)), ('schedule', ('cosine', 'constant', 'halve'))):
        if out[name] not in choices:
            raise SeriesError(f'⟨{name}⟩ must be one of {", ".join(choices)}, got {out[name]!r}')
    for name, value in out.items():
        if name in ('loss', 'schedule'):
            continue
        least = {'epochs': 1, 'batch_size': 1, 'steps': -1}.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
            raise SeriesError(f'⟨{name}⟩ must be a number of at least {least}, got {value!r}')
        if isinstance(TRAINING[name], int) and value != int(value):
            raise SeriesError(f'⟨{name}⟩ must be a whole number, got {value!r}')
    if out['ema_decay'] >= 1:
        raise SeriesError(f'⟨ema_decay⟩ must be below 1, got {out["ema_decay"]}')
    return out


class Trainer:
    """Trains a forecaster on the windows of one part, and keeps the weights that are best on those of another.

    An epoch is `steps` batches of windows drawn at random without repetition, as long as there are such. The validation
    loss is the mean squared error of the averaged weights (EMA).
    Every random number is a function of (seed, epoch): training that is resumed from `state` ends with the bits of one
    that was not interrupted. torch's own random state is left as it was.
    """

    def __init__(self, model: torch.nn.Module, train: Windows, val: Optional[Windows], config: Dict[str, Any],
                 seed: int, device: Optional[torch.device] = None):
        """
        Args:
            model: inputs of `Windows.take` to (B, H, M).
            train, val: windows to train on and to choose the epoch by; without val all epochs are trained and the last
                is kept.
            config: of `training_options`.
            seed: of everything random in training.
        """
        self.train, self.val = train, val
        self.config, self.seed = config, seed
        self.device = device or torch.device('cpu')
        self.model = model.to(self.device)
        self.ema = ModelEmaV3(self.model, decay=config['ema_decay'], use_warmup=True)
        self.optimizer = create_optimizer_v2(
            self.model, opt='adamw', lr=config['lr'], weight_decay=config['weight_decay'])
        self.batch_size = min(config['batch_size'], len(train))
        whole = math.ceil(len(train) / self.batch_size)
        automatic = min(max(whole // 6, 10), 60)
        self.steps = {0: automatic, -1: whole}.get(config['steps'], config['steps'])
        total, warmup = config['epochs'] * self.steps, config['warmup_steps']
        rest = max(total - warmup, 1)
        after = dict(
            cosine=lambda: CosineAnnealingLR(self.optimizer, rest, config['lr'] * 0.01),
            constant=lambda: ConstantLR(self.optimizer, 1., 0),
            halve=lambda: LambdaLR(self.optimizer, lambda n: 0.5 ** max(n // self.steps - 1, 0)))[config['schedule']]()
        self.scheduler = after if not warmup else SequentialLR(
            self.optimizer, [LinearLR(self.optimizer, 1 / (warmup + 1), total_iters=warmup), after], [warmup])
        self.updates = 0
        self.epoch = 0
        self.history: List[Dict[str, Any]] = []  # one an epoch
        self.best: Optional[Dict[str, torch.Tensor]] = None
        self.best_loss, self.best_epoch = math.inf, -1
        self.seconds = 0.

    def state(self) -> Dict[str, Any]:
        return dict(
            format=_FORMAT, config=self.config, seed=self.seed, epoch=self.epoch, updates=self.updates,
            history=self.history, state_dict=self.model.state_dict(), ema=self.ema.module.state_dict(),
            optimizer=self.optimizer.state_dict(), scheduler=self.scheduler.state_dict(), best=self.best,
            best_loss=self.best_loss, best_epoch=self.best_epoch, seconds=self.seconds)

    def load(self, path: Path) -> None:
        """Continue from a state; it must be of the same run.

        Raises:
            SeriesError: it is none, or of another run.
        """
        try:
            _files.check_torch(path)
            state = torch.load(path, map_location='cpu', weights_only=True)
            if not isinstance(state, dict) or state.get('format') != _FORMAT:
                raise ValueError(f'it has no format {_FORMAT}')
            for what, saved, now in (('seed', state['seed'], self.seed), *(
                    (k, state['config'].get(k), v) for k, v in self.config.items())):
                if saved != now:
                    raise SeriesError(f'{path} was trained with {what} {saved!r}, now it is {now!r}: continue it with '
                                      'the same options, or start another run')
            self.model.load_state_dict(state['state_dict'])
            self.ema.module.load_state_dict(state['ema'])
            self.optimizer.load_state_dict(state['optimizer'])
            self.scheduler.load_state_dict(state['scheduler'])
            for name in ('epoch', 'updates', 'history', 'best', 'best_loss', 'best_epoch', 'seconds'):
                setattr(self, name, state[name])
        except SeriesError:
            raise
        except Exception as e:  # torch, zip and pickle each have their own errors for a damaged file
            text = ' '.join(str(e).split())[:200]
            raise SeriesError(f'cannot continue from {path}: damaged, or of another run ({text})') from None

    def done(self) -> bool:
        c = self.config
        return self.epoch >= c['epochs'] or (
            self.val is not None and c['patience'] > 0 and self.epoch - 1 - self.best_epoch >= c['patience'])

    @property
    def still_falling(self) -> bool:
        """Whether the validation loss was the best in the last epoch that the budget had."""
        return self.val is not None and self.epoch >= self.config['epochs'] > 1 and self.best_epoch == self.epoch - 1

    def _order(self) -> torch.Tensor:
        wanted, n = self.steps * self.batch_size, len(self.train)
        return torch.cat([torch.randperm(n) for _ in range(math.ceil(wanted / n))])[:wanted]

    def train_epoch(self, wrap: Callable = iter) -> float:
        """One epoch; the mean loss. `wrap` gets the batches' numbers, as a progress bar does."""
        c = self.config
        total = 0.
        self.model.train()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == 'cuda' else []):
            torch.manual_seed((self.seed * 1_000_003 + self.epoch * 7919 + 1) % 2 ** 63)
            for index in wrap(self._order().split(self.batch_size)):
                inputs, y = self.train.take(index)
                forecast = self.model(**{k: v.to(self.device) for k, v in inputs.items()})
                loss = LOSSES[c['loss']](forecast, y.to(self.device))
                self.optimizer.zero_grad()
                loss.backward()
                if c['clip_grad']:
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), c['clip_grad'])
                self.optimizer.step()
                self.scheduler.step()
                self.ema.update(self.model, step=self.updates)
                self.updates += 1
                total += loss.item()
                if not math.isfinite(total):
                    raise SeriesError(f'the loss is {loss.item()} in epoch {self.epoch}: training diverged; a lower '
                                      '⟨lr⟩ may help')
        return total / self.steps

    def fit(self, checkpoint: Optional[Path] = None, log: Callable[[str], None] = lambda text: None,
            wrap: Callable = iter) -> None:
        """Train to the end, or until `patience` epochs bring nothing better; the model then has the best weights.

        Args:
            checkpoint: where the state goes after each epoch.
            log: takes a line per epoch.
            wrap: of the batches, as a progress bar does.
        """
        while not self.done():
            begin = time.perf_counter()
            train_loss = self.train_epoch(wrap)
            loss = math.nan if self.val is None else evaluate(
                self.ema.module, self.val, limit=self.config['val_windows'] or None,
                device=self.device).mse.mean().item()
            best = loss < self.best_loss or self.val is None
            if best:
                self.best_loss, self.best_epoch = loss, self.epoch
                self.best = {k: v.clone() for k, v in self.ema.module.state_dict().items()}
            self.seconds += time.perf_counter() - begin
            self.history.append(dict(epoch=self.epoch, train_loss=train_loss, val_mse=loss))
            log(f'epoch {self.epoch}: train loss {train_loss:.4f}' + (
                '' if self.val is None else f', validation MSE {loss:.4f}{" *" if best else ""}') +
                f', {self.seconds:.0f} s')
            self.epoch += 1
            if checkpoint is not None:
                _files.write_torch(checkpoint, self.state())
        if self.best is None:
            raise SeriesError('the validation loss was never a finite number: training diverged; a lower ⟨lr⟩ may help')
        self.model.load_state_dict(self.best)
        self.model.eval()
