"""Parameters of version 0.1.0 under today's names."""
from typing import Any, Dict

from torch import Tensor, nn

__all__ = ['upgrade_before_loading', 'upgrade_state_dict']


def upgrade_state_dict(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """A state dict in which the mixers' parameters have today's names; one that has them already as it is.

    Until 0.1.0 one `in_proj` held the weights of branch and gate (VMamba's still does), one above the other, and the
    channel mixer's convolutions were two tensors, `conv_weight` and `conv_bias`, for all directions.
    """
    out = {}
    for key, value in state_dict.items():
        prefix, _, name = key.rpartition('in_proj.weight')
        if not name and (not prefix or prefix.endswith('.')) and prefix + 'gate_proj.weight' not in state_dict:
            rows = state_dict.get(prefix + 'out_proj.weight')
            if rows is not None and rows.ndim == 2 and value.shape[0] == 2 * rows.shape[1]:
                # copies: a file of safetensors takes no two tensors of one memory
                out[key], out[prefix + 'gate_proj.weight'] = (half.clone() for half in value.chunk(2))
                continue
        if key.endswith(('conv_weight', 'conv_bias')) and key.rpartition('conv_')[0] + 'dt_projs_diag' in state_dict:
            prefix, _, name = key.rpartition('conv_')
            for s, part in enumerate(value.split(1)):
                out[f'{prefix}conv1d.{s}.{name}'] = part.clone()
            continue
        out[key] = value
    return out


def upgrade_before_loading(module: nn.Module, state_dict: Dict[str, Tensor], prefix: str, *args: Any) -> None:
    """A `load_state_dict` pre-hook of the mixers, so that every loader reads old files: a detector's, a trainer's."""
    old = {k: state_dict[k] for k in list(state_dict) if k.startswith(prefix)}
    new = upgrade_state_dict(old)
    if new.keys() != old.keys():
        for key in old:
            del state_dict[key]
        state_dict.update(new)
