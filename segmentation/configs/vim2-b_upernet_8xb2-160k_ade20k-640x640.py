"""UperNet on crops of 640 x 640, the size at which ADE20K's larger backbones are compared; 160k iterations, batch 16"""
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    'mmseg::_base_/datasets/ade20k_640x640.py',
    'mmseg::_base_/default_runtime.py',
    './_base_/schedule_160k.py',
]
custom_imports = dict(imports=['vim2.openmmlab'], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(_delete_=True, type='ViM2', model_name='vim2_base', drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024], num_classes=150),
    auxiliary_head=dict(in_channels=512, num_classes=150))
train_dataloader = dict(batch_size=2)
