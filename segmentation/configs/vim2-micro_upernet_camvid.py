"""UperNet with the bundled ViM2-micro on CamVid (SegNet's 11 classes), at 2/3 of its size: trains on one CPU core.

The folder, data/camvid or the environment's CAMVID_ROOT, holds {train,val,test}/images/*.jpg and masks/*.png, with
class 11 for what is not labelled.
"""
_base_ = ['mmseg::_base_/models/upernet_swin.py', 'mmseg::_base_/default_runtime.py']
custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)

data_root = '{{$CAMVID_ROOT:data/camvid}}'
scale = (320, 240)
crop_size = (128, 160)
unlabelled = 11
metainfo = dict(
    classes=('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian', 'bicyclist'),
    palette=[[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0],
             [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192]])

norm_cfg = dict(type='GN', num_groups=8)  # small batches
# Rare classes count more: the square root of median frequency over frequency, in the training images.
loss = dict(
    type='CrossEntropyLoss', use_sigmoid=False,
    class_weight=[0.53, 0.45, 2.19, 0.39, 1.0, 0.65, 1.96, 1.4, 0.89, 2.52, 2.98])
head = dict(num_classes=11, ignore_index=unlabelled, norm_cfg=norm_cfg)
model = dict(
    data_preprocessor=dict(size=crop_size, seg_pad_val=unlabelled),
    backbone=dict(
        _delete_=True,
        type='ViM2',
        model_name='vim2_micro_patch4_64',
        out_indices=(0, 1, 2),
        drop_path_rate=0.05,
        init_cfg=dict(type='Pretrained', checkpoint='vim2_micro_patch4_64.tiny_imagenet')),
    decode_head=dict(
        in_channels=[88, 176, 352], in_index=[0, 1, 2], channels=64, loss_decode=dict(loss_weight=1.0, **loss),
        **head),
    auxiliary_head=dict(
        in_channels=176, in_index=1, channels=64, loss_decode=dict(loss_weight=0.4, **loss), **head))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=scale, ratio_range=(0.7, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75, ignore_index=unlabelled),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations'),  # after Resize: predictions are compared at the size of the labels
    dict(type='PackSegInputs'),
]
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale=size, keep_ratio=True) for size in ((240, 180), scale, (400, 300))],
        [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0., 1.)],
        [dict(type='LoadAnnotations')],
        [dict(type='PackSegInputs')],
    ]),
]
dataset = dict(
    type='BaseSegDataset', data_root=data_root, metainfo=metainfo, ignore_index=unlabelled, img_suffix='.jpg',
    seg_map_suffix='.png')
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='train/images', seg_map_path='train/masks'), pipeline=train_pipeline, **dataset))
evaluation = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False))
val_dataloader = dict(
    dataset=dict(data_prefix=dict(img_path='val/images', seg_map_path='val/masks'), pipeline=test_pipeline, **dataset),
    **evaluation)
test_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='test/images', seg_map_path='test/masks'), pipeline=test_pipeline, **dataset),
    **evaluation)
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'], ignore_index=unlabelled)
test_evaluator = val_evaluator

max_iters = 1500
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='ViM2OptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    # The heads start at random, the backbone does not.
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.5)), norm_decay_mult=0., bias_decay_mult=0.),
    clip_grad=dict(max_norm=5.))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=60),
    dict(type='PolyLR', eta_min=0., power=0.9, begin=60, end=max_iters, by_epoch=False),
]
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=50, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
env_cfg = dict(cudnn_benchmark=False)
