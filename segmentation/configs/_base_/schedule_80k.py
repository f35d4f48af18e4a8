"""The schedule of 160k iterations in half as many."""
_base_ = './schedule_160k.py'

param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=80000)]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
