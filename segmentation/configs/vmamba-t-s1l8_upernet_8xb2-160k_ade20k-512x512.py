"""VMamba-T[s1l8] from its ImageNet weights, UperNet, crops of 512 x 512, 160k iterations, batch 16 (8 GPUs x 2)."""
_base_ = './vim2-t_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(
    type='MambaBackbone', model_name='vmamba_tiny_s1l8', drop_path_rate=0.2,
    init_cfg=dict(type='Pretrained', checkpoint='vmamba_tiny_s1l8.in1k')))
optim_wrapper = dict(constructor='MambaOptimWrapperConstructor')
