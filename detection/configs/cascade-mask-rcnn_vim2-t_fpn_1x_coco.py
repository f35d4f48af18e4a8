"""Cascade Mask R-CNN with FPN, 12 epochs, batch 16 (8 GPUs x 2)."""
_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    './_base_/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
    'mmdet::retinanet/retinanet_tta.py',  # --tta
]
custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type='ViM2', model_name='vim2_tiny', drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]))
