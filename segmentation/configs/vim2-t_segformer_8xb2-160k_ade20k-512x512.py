"""SegFormer's head of MLPs; crops, schedule and optimizer of UperNet's config."""
_base_ = [
    'mmseg::_base_/models/segformer_mit-b0.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py',
    './_base_/schedule_160k.py',
]
custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type='ViM2', model_name='vim2_tiny', drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=150))
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(decode_head=dict(lr_mult=10.))))  # as SegFormer's
