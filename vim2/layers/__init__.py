"""Layers of MambaMixer: S6, the selective mixers, a token perceptron, and the weighted average of earlier features."""
from .channel_mixer import SelectiveChannelMixer
from .legacy import upgrade_state_dict
from .s6 import S6
from .token_mixer import SelectiveTokenMixer
from .token_mlp import TokenMlp
from .weighted_average import WeightedAverage

__all__ = ['S6', 'SelectiveChannelMixer', 'SelectiveTokenMixer', 'TokenMlp', 'WeightedAverage', 'upgrade_state_dict']
