"""RetinaNet with FPN, 12 epochs, batch 16 (8 GPUs x 2)."""
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)

model = dict(
    # The first stage's output is no level of RetinaNet: its norm would be a parameter without a gradient.
    backbone=dict(_delete_=True, type='ViM2', model_name='vim2_tiny', out_indices=(1, 2, 3), drop_path_rate=0.2),
    neck=dict(in_channels=[192, 384, 768], start_level=0))
optim_wrapper = dict(
    constructor='ViM2OptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05))
