"""Mask R-CNN with FPN, 36 epochs, batch 16 (8 GPUs x 2); multi-scale training, schedule, AdamW of mmdet's Swin."""
_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py', 'mmdet::retinanet/retinanet_tta.py']
custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)

pretrained = None  # Swin's
model = dict(backbone=dict(_delete_=True, type='ViM2', model_name='vim2_tiny', drop_path_rate=0.2))
optim_wrapper = dict(constructor='ViM2OptimWrapperConstructor', paramwise_cfg=dict(_delete_=True))
