"""VMamba-T[s1l8] from its ImageNet weights, Mask R-CNN with FPN, 36 epochs, multi-scale training."""
_base_ = './mask-rcnn_vim2-t_fpn_ms-crop-3x_coco.py'

model = dict(backbone=dict(
    type='MambaBackbone', model_name='vmamba_tiny_s1l8',
    init_cfg=dict(type='Pretrained', checkpoint='vmamba_tiny_s1l8.in1k')))
optim_wrapper = dict(constructor='MambaOptimWrapperConstructor')
