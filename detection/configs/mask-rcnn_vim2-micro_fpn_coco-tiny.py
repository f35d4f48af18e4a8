"""Mask R-CNN with the bundled ViM2-micro on a small subset of COCO 2017: trains on one CPU core.

The folder, data/coco_tiny or the environment's COCO_TINY_ROOT, is in COCO's format: annotations/, images/train2017/ and
images/val2017/.
"""
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)

data_root = '{{$COCO_TINY_ROOT:data/coco_tiny}}/'
channels = 64
norm_cfg = dict(type='GN', num_groups=8)
model = dict(
    backbone=dict(
        _delete_=True,
        type='ViM2',
        model_name='vim2_micro_patch4_64',
        out_indices=(0, 1, 2),
        frozen_stages=3,  # all: the images are few
        init_cfg=dict(type='Pretrained', checkpoint='vim2_micro_patch4_64.tiny_imagenet')),
    neck=dict(in_channels=[88, 176, 352], out_channels=channels, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=channels, feat_channels=channels,
        anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, norm_cfg=norm_cfg)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)))

meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction', 'instances')
load, resize = dict(type='LoadImageFromFile'), dict(type='Resize', scale=(192, 192), keep_ratio=True)
annotations = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
pack = dict(type='PackDetInputs', meta_keys=meta_keys)
train_pipeline = [load, annotations, resize, dict(type='RandomFlip', prob=0.5), pack]
test_pipeline = [load, resize, annotations, pack]  # predictions are compared at the image's own size
tta_model = dict(
    type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
tta_pipeline = [load, dict(type='TestTimeAug', transforms=[
    [dict(type='Resize', scale=(side, side), keep_ratio=True) for side in (192, 256)],
    [dict(type='RandomFlip', prob=p) for p in (1., 0.)], [annotations], [pack]])]
dataset = dict(type='CocoDataset', data_root=data_root)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        ann_file='annotations/instances_train2017.json', data_prefix=dict(img='images/train2017/'),
        filter_cfg=dict(filter_empty_gt=True), pipeline=train_pipeline, **dataset))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        ann_file='annotations/instances_val2017.json', data_prefix=dict(img='images/val2017/'),
        pipeline=test_pipeline, test_mode=True, **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', metric=['bbox', 'segm'])
test_evaluator = val_evaluator

max_iters = 1600
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='ViM2OptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=max_iters),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=50, max_keep_ckpts=2))
log_processor = dict(by_epoch=False)
