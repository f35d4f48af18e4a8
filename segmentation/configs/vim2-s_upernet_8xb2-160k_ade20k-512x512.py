_base_ = './vim2-t_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(model_name='vim2_small'))
