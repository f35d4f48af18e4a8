"""Weights of VMamba's vanilla network (arXiv 2401.10166) as a start for ViM2

With `channel_depths=0, weighted_average=False` ViM2 *is* VMamba's vanilla network ("v0": S6 of N states with a SiLU
gate, 4 x 4 patches, 2 x 2 patch merging, no MLP), and its parameters map one to one. A ViM2 with channel mixers and
averages starts as that network: the channel mixers' last projections are set to zero, so that each passes on its
input, and the averages to the plain chain. docs/conversion.md has the table of names.

    https://github.com/MzeroMiko/VMamba

Copyright 2025 the vim2 authors. Licensed under the Apache License 2.0.
"""
import re
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from vim2.layers import SelectiveTokenMixer, upgrade_state_dict
from .loading import abridged

__all__ = ['VMambaConversion', 'convert_vmamba', 'is_vmamba', 'spread_blocks']

_BLOCK = re.compile(r'layers\.(\d+)\.blocks\.(\d+)\.(.+)')
# The same parameters under the names of January 2024 (`ln_1`, `self_attention`) and of the later code (`norm`, `op`).
_IN_BLOCK = [
    (re.compile(r'(?:ln_1|norm)\.(weight|bias)'), r'norm.\1'),
    (re.compile(r'(?:self_attention|op)\.((?:in_proj|out_proj)\.weight|(?:conv2d|out_norm)\.(?:weight|bias))'),
     r'mixer.\1'),
    (re.compile(r'(?:self_attention|op)\.(x_proj_weight|dt_projs_weight|dt_projs_bias|A_logs|Ds)'), r'mixer.s6.\1'),
]
_OUTSIDE = [
    (re.compile(r'patch_embed\.(?:proj|0)\.(weight|bias)'), r'stem.conv.\1'),
    (re.compile(r'patch_embed\.(?:norm|2)\.(weight|bias)'), r'stem.norm.\1'),
    (re.compile(r'(?:classifier\.)?norm\.(weight|bias)'), r'norm.\1'),
    (re.compile(r'(?:classifier\.)?head\.(weight|bias)'), r'head.fc.\1'),
]
_DOWNSAMPLE = re.compile(r'layers\.(\d+)\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)')
_STAGE_NORM = re.compile(r'outnorm(\d+)\.(weight|bias)')


class VMambaConversion(NamedTuple):
    """What `convert_vmamba` made of a checkpoint.

    Attributes:
        state_dict: for the model; everything but what the checkpoint cannot give (`random` below).
        blocks: for each stage, the checkpoint's blocks that its token mixers start as.
        depths: number of blocks in each stage of the checkpoint.
        mapped: the model's key to the checkpoint's.
        initialized: the model's other keys, to how they start: 'identity' (channel mixers that pass on their input),
            'chain' (averages), 'random' (the model's own initialisation: a classifier or norm that is not there).
        unused: the checkpoint's keys that went nowhere, to the reason.
    """
    state_dict: Dict[str, Tensor]
    blocks: List[List[int]]
    depths: List[int]
    mapped: Dict[str, str]
    initialized: Dict[str, str]
    unused: Dict[str, str]


def is_vmamba(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a VMamba of any version: classification network or detector's backbone."""
    pattern = re.compile(r'(backbone\.)?layers\.0\.blocks\.0\.(self_attention|op)\.')
    return any(pattern.match(key) for key in keys)


def spread_blocks(have: int, want: int) -> List[int]:
    """`want` of the blocks 0 … have - 1, evenly spread, with the first and the last: (9, 6) gives 0 2 3 5 6 8."""
    if want > have:
        raise ValueError(f'cannot choose {want} of {have} blocks')
    if want < 2:
        return [0] * want
    return [(2 * i * (have - 1) + want - 1) // (2 * (want - 1)) for i in range(want)]


def convert_vmamba(
        state_dict: Dict[str, Tensor],
        model: nn.Module,
        blocks: Optional[Sequence[Sequence[int]]] = None,
) -> VMambaConversion:
    """Weights of a ViM2 that starts as the VMamba of a checkpoint, restricted to some of its blocks.

    Args:
        state_dict: of VMamba's vanilla network, or of a detector or segmenter with it as `backbone.`.
        model: a `VisionMambaMixer`; it gives the names, and the values of what is left at its initialisation. It is
            not changed.
        blocks: for each stage, one block of the checkpoint per token mixer of the model, in the order in which they
            run. Default: evenly spread, `spread_blocks`.

    Raises:
        RuntimeError: this is no VMamba, or not the vanilla one, or of other depths, saying why. Whether shapes match
            is for the caller to check, as `checkpoint_filter_fn` does.
    """
    if not is_vmamba(state_dict):
        raise RuntimeError('the checkpoint holds no VMamba: it has no layers.0.blocks.0.self_attention.* or .op.*')
    unused = {}
    source = {}
    prefix = 'backbone.' if any(k.startswith('backbone.layers.') for k in state_dict) else ''
    for key in state_dict:
        if key.startswith(prefix):
            source[key[len(prefix):]] = key
        else:
            unused[key] = "outside the backbone: the detector's own neck and heads"
    _refuse_newer(source, state_dict)

    tokens = [[j for j, block in enumerate(stage.blocks) if isinstance(block.mixer, SelectiveTokenMixer)]
              for stage in model.stages]
    depths = _source_depths(source)
    blocks = _choose_blocks(depths, [len(t) for t in tokens], blocks)

    out: Dict[str, Tensor] = {}
    mapped: Dict[str, str] = {}
    has_norm = any(k in source for k in ('norm.weight', 'classifier.norm.weight'))
    unknown = []
    for name, key in source.items():
        targets, why = _targets(name, tokens, blocks, has_norm)
        if why:
            unused[key] = why
        elif not targets:
            unknown.append(key)
        for target in targets:
            out[target], mapped[target] = state_dict[key], key
    if unknown:
        raise RuntimeError("the checkpoint holds parameters that VMamba's vanilla network does not have: "
                           + abridged(unknown))

    for target in [t for t in out if t.endswith('.mixer.in_proj.weight')]:  # VMamba's holds branch and gate
        mapped[target.replace('in_proj', 'gate_proj')] = mapped[target]
    out = upgrade_state_dict(out)
    initialized = {}
    channel_blocks = tuple(f'stages.{i}.blocks.{j}.' for i, stage in enumerate(model.stages)
                           for j in range(len(stage.blocks)) if j not in tokens[i])
    gives_norm = any(target.startswith('norm.') for target in out)
    for target, value in model.state_dict().items():
        if target in out:
            continue
        if '.averages.' in target:
            out[target], initialized[target] = torch.zeros_like(value), 'chain'
            out[target][-1] = 1.
        elif target.startswith(channel_blocks):
            last = target.endswith(('.mixer.out_proj.weight', '.mixer.fc2.weight', '.mixer.fc2.bias'))
            out[target], initialized[target] = torch.zeros_like(value) if last else value.clone(), 'identity'
        elif target.startswith('norm.') and not gives_norm:
            out[target], initialized[target] = value.clone(), 'random'
        elif target.startswith('head.'):
            # Not given: timm keeps the model's own for another number of classes, and otherwise says it is missing.
            initialized[target] = 'random'
    return VMambaConversion(out, blocks, depths, mapped, initialized, unused)


def _targets(
        name: str, tokens: List[List[int]], blocks: List[List[int]], has_norm: bool,
) -> Tuple[List[str], Optional[str]]:
    """The model's keys for one of the checkpoint's, or none and the reason; none without a reason: unknown."""
    match = _BLOCK.fullmatch(name)
    if match:
        stage, block = int(match[1]), int(match[2])
        rest = _renamed(match[3], _IN_BLOCK)
        if rest is None:
            return [], None
        places = [tokens[stage][i] for i, chosen in enumerate(blocks[stage]) if chosen == block]
        targets = [f'stages.{stage}.blocks.{place}.{rest}' for place in places]
        return targets, None if targets else f'block {block} of stage {stage + 1} was not chosen'
    match = _DOWNSAMPLE.fullmatch(name)
    if match:  # VMamba's stages end with the down-sampling, ours begin with it
        return [f'stages.{int(match[1]) + 1}.downsample.{match[2]}'], None
    match = _STAGE_NORM.fullmatch(name)
    if match:
        if int(match[1]) == len(tokens) - 1 and not has_norm:  # in a backbone it stands for the final norm
            return [f'norm.{match[2]}'], None
        return [], f"the detector's norm of stage {int(match[1]) + 1}'s output"
    target = _renamed(name, _OUTSIDE)
    return ([target], None) if target else ([], None)


def _renamed(name: str, rules: List[Tuple['re.Pattern', str]]) -> Optional[str]:
    for pattern, replacement in rules:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement)
    return None


def _refuse_newer(source: Dict[str, str], state_dict: Dict[str, Tensor]) -> None:
    """Raise for VMamba of versions after the vanilla one, whose blocks compute something else, saying what."""
    block = next(k for k in source if re.match(r'layers\.0\.blocks\.0\.(self_attention|op)\.', k))
    mixer = re.match(r'layers\.0\.blocks\.0\.(self_attention|op)\.', block)[0]

    def shape(name: str) -> Tuple[int, ...]:
        return tuple(state_dict[source[name]].shape) if name in source else ()

    why = []
    out_proj, in_proj = shape(mixer + 'out_proj.weight'), shape(mixer + 'in_proj.weight')
    if len(out_proj) > 1 and in_proj and in_proj[0] != 2 * out_proj[1]:
        why.append(f'its mixers have no gate (in_proj has {in_proj[0]} rows, where branch and gate need '
                   f'{2 * out_proj[1]})')
    if any('.mlp.' in k for k in source):
        why.append('its blocks have an MLP')
    if mixer + 'conv2d.weight' in source and mixer + 'conv2d.bias' not in source:
        why.append('its convolution has no bias')
    if any(re.match(r'patch_embed\.[3-9]\.', k) for k in source):
        why.append('its patch embedding is two overlapping convolutions')
    if any(re.match(r'layers\.\d+\.downsample\.\d', k) for k in source):
        why.append('its down-sampling is a convolution, not patch merging')
    if mixer + 'dt_projs_weight' not in source or mixer + 'A_logs' not in source:
        why.append('its scans have other projections')
    if why:
        raise RuntimeError("this is a newer VMamba (v05 or later), whose weights compute something else than ViM2's "
                           "token mixers, which are those of the vanilla version (v0): " + '; '.join(why))


def _source_depths(source: Dict[str, str]) -> List[int]:
    indices: Dict[int, set] = {}
    for name in source:
        match = _BLOCK.fullmatch(name)
        if match:
            indices.setdefault(int(match[1]), set()).add(int(match[2]))
    for stage, found in sorted(indices.items()):
        if found != set(range(len(found))):
            raise RuntimeError(f'the checkpoint is incomplete: stage {stage + 1} has only blocks '
                               + ', '.join(map(str, sorted(found))))
    if set(indices) != set(range(len(indices))):
        raise RuntimeError('the checkpoint is incomplete: it has only stages '
                           + ', '.join(str(i + 1) for i in sorted(indices)))
    return [len(indices[i]) for i in range(len(indices))]


def _choose_blocks(
        depths: List[int], wanted: List[int], blocks: Optional[Sequence[Sequence[int]]],
) -> List[List[int]]:
    if len(depths) != len(wanted):
        raise RuntimeError(f'the checkpoint has {len(depths)} stages, the model {len(wanted)}')
    if blocks is None:
        for i, (have, want) in enumerate(zip(depths, wanted)):
            if want > have:
                raise RuntimeError(f'stage {i + 1} of the model has {want} token mixers, the checkpoint only {have}: '
                                   'name a block for each with tools/convert_vmamba.py --blocks, some more than once')
        return [spread_blocks(have, want) for have, want in zip(depths, wanted)]
    if len(blocks) != len(wanted):
        raise RuntimeError(f'blocks are given for {len(blocks)} stages, the model has {len(wanted)}')
    for i, (chosen, have, want) in enumerate(zip(blocks, depths, wanted)):
        if len(chosen) != want:
            raise RuntimeError(f'stage {i + 1} of the model has {want} token mixers, but {len(chosen)} blocks are '
                               'given for it')
        wrong = [b for b in chosen if not 0 <= b < have]
        if wrong:
            raise RuntimeError(f'stage {i + 1} of the checkpoint has blocks 0 to {have - 1}, not {wrong[0]}')
    return [list(chosen) for chosen in blocks]
