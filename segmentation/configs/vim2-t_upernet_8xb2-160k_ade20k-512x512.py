"""UperNet, crops of 512 x 512, 160k iterations, batch 16 (8 GPUs x 2); multi-scale and flipped testing with --tta."""
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py',
    './_base_/schedule_160k.py',
]
custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type='ViM2', model_name='vim2_tiny', drop_path_rate=0.3),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150))
train_dataloader = dict(batch_size=2)
