"""UperNet on Cityscapes: crops of 512 x 1024, 80k iterations, batch 16 (8 GPUs x 2)."""
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    'mmseg::_base_/datasets/cityscapes.py',
    'mmseg::_base_/default_runtime.py',
    './_base_/schedule_80k.py',
]
custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    backbone=dict(_delete_=True, type='ViM2', model_name='vim2_tiny', drop_path_rate=0.3))
train_dataloader = dict(batch_size=2)
