"""DINO with four scales, 12 epochs, batch 16 (8 GPUs x 2); as in mmdet, the backbone learns at a tenth of the rate"""
_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', 'mmdet::retinanet/retinanet_tta.py']
custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type='ViM2', model_name='vim2_tiny', out_indices=(1, 2, 3), drop_path_rate=0.2),
    neck=dict(in_channels=[192, 384, 768]))
optim_wrapper = dict(constructor='ViM2OptimWrapperConstructor')
