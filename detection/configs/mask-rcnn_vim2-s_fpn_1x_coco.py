_base_ = './mask-rcnn_vim2-t_fpn_1x_coco.py'

model = dict(backbone=dict(model_name='vim2_small'))
