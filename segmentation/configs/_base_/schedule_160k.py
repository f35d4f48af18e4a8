"""mmseg's 160k iterations with Swin's optimizer: AdamW, a warm-up of 1500 iterations, then linearly to 0; batch 16."""
_base_ = 'mmseg::_base_/schedules/schedule_160k.py'

optim_wrapper = dict(
    constructor='ViM2OptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0., power=1., by_epoch=False, begin=1500, end=160000),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
