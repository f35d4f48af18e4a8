"""The folder of a training run: its checkpoints, which resume exactly, its log, its exported model; and signals."""
import argparse
import copy
import csv
import io
import os
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
import yaml

import _common as common
from _common import UserError

FORMAT = 1


def read_training_checkpoint(path: str) -> dict:
    """A last.pth.tar, best.pth.tar or previous.pth.tar, verified; what could not be resumed is refused in words."""
    if not os.path.isfile(path):
        raise UserError(f'no checkpoint to resume from at {path}')
    try:
        checkpoint = common.read_torch(path)
    except UserError as e:
        previous = Path(path).with_name('previous.pth.tar')
        hint = f'. The checkpoint before it is {previous}' if previous.is_file() and previous.name not in path else ''
        raise UserError(f'{e}{hint}') from None
    check_training_state(checkpoint, path)
    return checkpoint


def check_training_state(checkpoint: Any, path: str) -> None:
    """Refuse what is no training state of this tool, or one with fields absent or of another kind."""
    if not isinstance(checkpoint, dict) or 'progress' not in checkpoint or 'args' not in checkpoint:
        raise UserError(f'{path} is no training state of this tool: use --initial-checkpoint to start from its weights')
    if type(checkpoint.get('format')) is not int or checkpoint['format'] != FORMAT:
        found = common.one_line(repr(checkpoint.get('format')), 40)
        raise UserError(f'{path} has checkpoint format {found}, this tool reads {FORMAT}')

    def texts(value) -> bool:
        return isinstance(value, dict) and all(isinstance(k, str) for k in value)

    def weights(value) -> bool:
        return texts(value) and bool(value) and all(isinstance(v, torch.Tensor) for v in value.values())

    def count(value) -> bool:
        return type(value) is int and 0 <= value < 1 << 53

    progress = checkpoint['progress'] if texts(checkpoint['progress']) else {}
    options = checkpoint['args'] if texts(checkpoint['args']) else {}
    names = checkpoint.get('label_names')
    for what, ok in (
            ('args', texts(checkpoint['args'])),
            ('arch', isinstance(checkpoint.get('arch'), str) and checkpoint['arch'] == options.get('model')),
            ('progress', all(count(progress.get(k)) for k in ('epoch', 'batch', 'updates', 'samples'))
             and all(isinstance(progress.get(k), (int, float)) for k in ('loss_sum', 'train_seconds'))
             and isinstance(progress.get('best_metric'), (int, float, type(None)))
             and (progress.get('best_epoch') is None or count(progress['best_epoch']))
             and progress.get('best_kind', 'weights') in ('weights', 'averaged weights')),
            ('world_size', count(checkpoint.get('world_size'))),
            ('train_samples', 'train_samples' in checkpoint
             and (checkpoint['train_samples'] is None or count(checkpoint['train_samples']))),
            ('label_names', names is None or isinstance(names, list) and all(isinstance(n, str) for n in names)),
            ('state_dict', weights(checkpoint.get('state_dict'))),
            ('state_dict_ema', 'state_dict_ema' not in checkpoint or weights(checkpoint['state_dict_ema'])),
            ('optimizer', texts(checkpoint.get('optimizer'))),
    ):
        if not ok:
            raise UserError(f'{path} is no training state that can be resumed: its field {what} is missing or damaged')


class Progress:
    """How far a run is, and what it measured on the way; saved with the weights."""

    def __init__(self):
        self.epoch = 0  # current epoch
        self.batch = 0  # batches of it that are done
        self.updates = 0  # optimizer updates since the start
        self.loss_sum = 0.  # of this epoch, weighted by samples, over this process's samples
        self.samples = 0
        self.best_metric: Optional[float] = None
        self.best_epoch: Optional[int] = None
        self.best_kind = 'weights'  # or 'averaged weights'
        self.train_seconds = 0.

    def state_dict(self) -> Dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        vars(self).update(state)


class _Dumper(yaml.SafeDumper):
    """Without anchors and aliases, which recipes may not have."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class Stopped(Exception):
    """A signal asked the run to end; the text says where it continues."""

    def __init__(self, number: int, text: str):
        super().__init__(text)
        self.number = number


class Signals:
    """Notes SIGTERM and SIGINT, so that training ends at an update, with a checkpoint; a second one ends it at once."""

    def __init__(self):
        self.number: Optional[int] = None
        self._old: Dict[int, Any] = {}

    def __enter__(self) -> 'Signals':
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _note(self, number: int, frame: Any) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number


class Run:
    """The folder of a run: its files are complete or absent, whenever the process dies."""

    def __init__(self, folder: str, args: argparse.Namespace):
        self.folder = Path(folder)
        self.args = args
        self._lock = ExitStack()

    def create(self, resume: bool) -> None:
        if not resume and (self.folder / 'last.pth.tar').exists():
            raise UserError(f'{self.folder} already holds a run: pass --resume {self.folder / "last.pth.tar"} to '
                            'continue it, or another --experiment')
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f'cannot create the run folder {self.folder}: {e.strerror}') from None
        self._lock.enter_context(common.locked_folder(self.folder))
        text = yaml.dump(vars(self.args), Dumper=_Dumper, default_flow_style=None)
        common.write_text(self.folder / 'args.yaml', text)

    def release(self) -> None:
        """Let other processes use the folder."""
        self._lock.close()

    def save(self, state: dict, best: bool) -> None:
        """Write last.pth.tar; what it was becomes previous.pth.tar."""
        last = self.folder / 'last.pth.tar'
        try:
            if last.exists():
                self.copy('last.pth.tar', 'previous.pth.tar')
            common.write_torch(last, state)
            if best:
                self.copy('last.pth.tar', 'best.pth.tar')
        except UserError as e:
            good = f'; {last} is complete, the state before' if last.exists() else ''
            raise UserError(f'{e}{good}') from None

    def copy(self, source: str, target: str) -> None:
        """Make a file of the folder the same as another one, without a second copy on the disk where that can be."""
        common.write_atomic(self.folder / target, lambda tmp: self._copy(self.folder / source, tmp))

    def adopt(self, checkpoint: str) -> None:
        """Make the state that the run continues from its last.pth.tar: the one there may be damaged, or too new."""
        last = self.folder / 'last.pth.tar'
        if os.path.realpath(checkpoint) != os.path.realpath(last):
            common.write_atomic(last, lambda tmp: self._copy(Path(checkpoint), tmp))

    def restore_best(self, progress: 'Progress') -> Optional[str]:
        """Make best.pth.tar the state that `progress` names; a line that says so where it is lost."""
        if progress.best_epoch is None:
            return None
        if progress.batch == 0 and progress.best_epoch == progress.epoch - 1:  # of last.pth.tar, written just before
            self.copy('last.pth.tar', 'best.pth.tar')
            return None
        path = self.folder / 'best.pth.tar'
        try:
            found = read_training_checkpoint(str(path))['progress']
            if (found['best_epoch'], found['best_metric']) == (progress.best_epoch, progress.best_metric):
                return None
            problem = f'it is of epoch {found["best_epoch"]}'
        except UserError as e:
            problem = str(e)
        text = f'the best epoch, {progress.best_epoch}, is lost ({problem}): from here on the best is sought anew'
        progress.best_epoch = progress.best_metric = None
        return text

    @staticmethod
    def _copy(source: Path, target: str) -> None:
        Path(target).unlink(missing_ok=True)
        try:
            os.link(source, target)  # no second copy on the disk
        except OSError:
            shutil.copyfile(source, target)

    def append_summary(self, row: Dict[str, Any]) -> None:
        """Add an epoch to summary.csv, in place of rows that a killed continuation of the run left."""
        path = self.folder / 'summary.csv'
        rows = []
        if path.exists():
            with open(path, newline='', encoding='utf-8') as f:
                rows = [r for r in csv.DictReader(f) if int(r['epoch']) < row['epoch']]
        fields = list(dict.fromkeys([*(rows[0] if rows else ()), *row]))
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=fields, restval='', lineterminator='\n')
        writer.writeheader()
        writer.writerows([*rows, row])
        common.write_text(path, text.getvalue())

    def export(self, model: torch.nn.Module, label_names: Optional[List[str]],
               label_descriptions: Optional[Dict[str, str]]) -> Path:
        """The weights as a folder that `timm.create_model('local-dir:…')` loads."""
        from timm.models._hub import save_for_hf
        final = self.folder / 'model'
        model = copy.deepcopy(model).to('cpu', memory_format=torch.contiguous_format)  # as safetensors wants it
        labels = dict(label_names=label_names, label_descriptions=label_descriptions)
        config = {k: v for k, v in labels.items() if v}
        common.write_folder(
            final, lambda tmp: save_for_hf(model, tmp, model_config=config, safe_serialization=True))
        return final
