"""Training of a forecaster, for tools/forecast.py: a resumable loop, stopped early by the validation loss."""
import math
import time
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn import functional as F

import _common as common
import _data as data
from _common import UserError

_FORMAT = 1


def learning_rate(step: int, total: int, warmup: int, peak: float, last: float) -> float:
    """Linear warm-up, then half a cosine from `peak` to `last` at step `total`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return last + 0.5 * (peak - last) * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


class Trainer:
    """Trains a forecaster on the windows of one part, and keeps the weights that are best on those of another.

    An epoch is `steps` batches of windows drawn at random without repetition (all windows if they are fewer).
    The validation loss is the mean squared error of the averaged weights (EMA) over `val_windows` evenly spread
    windows.
    Every random number is a function of (seed, epoch, step): training that is resumed from `state` ends with the bits
    of one that was not interrupted.
    """

    def __init__(self, model: torch.nn.Module, train, val, config: Dict[str, Any], seed: int,
                 device: Optional[torch.device] = None):
        """
        Args:
            model: (B, T, M) to (B, H, M).
            train, val: vim2.forecasting.Windows.
            config: the training options of tools/forecast.py: epochs, steps, batch_size, lr, weight_decay,
                warmup_steps, patience, ema_decay, val_windows, clip_grad, loss.
            seed: of everything random in training.
        """
        self.train, self.val = train, val
        self.config, self.seed = config, seed
        self.device = device or torch.device('cpu')
        self.model = model.to(self.device)
        self.ema = ModelEmaV3(self.model, decay=config['ema_decay'], use_warmup=True)
        self.optimizer = create_optimizer_v2(
            self.model, opt='adamw', lr=config['lr'], weight_decay=config['weight_decay'])
        self.steps = math.ceil(len(train) / config['batch_size'])
        if config['steps']:
            self.steps = min(self.steps, config['steps'])
        self.epoch = 0
        self.history = []  # one dict per epoch
        self.best: Optional[Dict[str, torch.Tensor]] = None
        self.best_loss, self.best_epoch = math.inf, -1
        self.seconds = 0.

    def state(self) -> Dict[str, Any]:
        return dict(
            format=_FORMAT, config=self.config, seed=self.seed, epoch=self.epoch, history=self.history,
            state_dict=self.model.state_dict(), ema=self.ema.module.state_dict(), optimizer=self.optimizer.state_dict(),
            best=self.best, best_loss=self.best_loss, best_epoch=self.best_epoch, seconds=self.seconds)

    def restore(self, state: Dict[str, Any], source: str) -> None:
        """Continue from a state; it must be of the same run."""
        if not isinstance(state, dict) or state.get('format') != _FORMAT:
            raise UserError(f'{source} is no training state of this tool')
        for what, saved, now in (('seed', state['seed'], self.seed), *(
                (k, state['config'].get(k), v) for k, v in self.config.items())):
            if saved != now:
                raise UserError(f'{source} was trained with {what} {saved!r}, now it is {now!r}: continue it with the '
                                'same options, or start another run')
        try:
            self.model.load_state_dict(state['state_dict'])
            self.ema.module.load_state_dict(state['ema'])
            self.optimizer.load_state_dict(state['optimizer'])
        except (RuntimeError, ValueError, KeyError) as e:
            raise UserError(f'{source} does not fit this run: {common.one_line(e)}') from None
        for name in ('epoch', 'history', 'best', 'best_loss', 'best_epoch', 'seconds'):
            setattr(self, name, state[name])

    def save(self, path: Path) -> None:
        common.write_atomic(path, lambda tmp: torch.save(self.state(), tmp))

    def load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location='cpu', weights_only=True)
        except common._LOAD_ERRORS as e:
            raise UserError(f'cannot read the checkpoint {path}: damaged, truncated or not a checkpoint '
                            f'({common.one_line(e, 200)})') from None
        self.restore(state, str(path))

    def done(self) -> bool:
        c = self.config
        return self.epoch >= c['epochs'] or (c['patience'] > 0 and self.epoch - 1 - self.best_epoch >= c['patience'])

    def train_epoch(self, progress: bool) -> float:
        c = self.config
        data.seed_everything(self.seed, 1, self.epoch)
        order = torch.randperm(len(self.train))[:self.steps * c['batch_size']].split(c['batch_size'])
        loss_fn = F.mse_loss if c['loss'] == 'mse' else F.l1_loss
        total = 0.
        self.model.train()
        for i, index in enumerate(common.progress(order, desc=f'epoch {self.epoch}', disable=not progress)):
            data.seed_everything(self.seed, 2, self.epoch, i)
            step = self.epoch * self.steps + i
            lr = learning_rate(step, c['epochs'] * self.steps, c['warmup_steps'], c['lr'], c['lr'] * 0.01)
            for group in self.optimizer.param_groups:
                group['lr'] = lr
            x, y = self.train.take(index)
            loss = loss_fn(self.model(x.to(self.device)), y.to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            if c['clip_grad']:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), c['clip_grad'])
            self.optimizer.step()
            self.ema.update(self.model, step=step)
            total += loss.item()
            if not math.isfinite(total):
                raise UserError(f'the loss is {loss.item()} in epoch {self.epoch}, step {i}: training diverged; a '
                                'lower --lr may help')
        return total / len(order)

    def fit(self, checkpoint: Optional[Path] = None, log: Callable[[str], None] = print,
            progress: bool = False) -> None:
        """Train to the end, or until `patience` epochs bring nothing better; the model then has the best weights.

        Args:
            checkpoint: where the state goes after each epoch.
            log: takes a line per epoch.
            progress: show a bar on a terminal.
        """
        from vim2.forecasting import evaluate
        while not self.done():
            begin = time.perf_counter()
            train_loss = self.train_epoch(progress)
            loss = evaluate(self.ema.module, self.val, limit=self.config['val_windows'] or None,
                            device=self.device).mse.mean().item()
            best = loss < self.best_loss
            if best:
                self.best_loss, self.best_epoch = loss, self.epoch
                self.best = {k: v.clone() for k, v in self.ema.module.state_dict().items()}
            self.seconds += time.perf_counter() - begin
            self.history.append(dict(epoch=self.epoch, train_loss=train_loss, val_mse=loss))
            log(f'epoch {self.epoch}: train loss {train_loss:.4f}, validation MSE {loss:.4f}{" *" if best else ""}, '
                f'{common.duration(self.seconds)}')
            self.epoch += 1
            if checkpoint is not None:
                self.save(checkpoint)
        self.model.load_state_dict(self.best)
        self.model.eval()
