"""Models: log-mel input (B, T, F) -> scores (B, C) in [0, 1]; built by name from a registry."""

from psla_fast.models.attention import AttentionPooling
from psla_fast.models.registry import ModelConfig, build_model, register
from psla_fast.models.tagger_net import TaggerNet, use_channels_last
from psla_fast.models.weights import clean_state_dict, read_state_dict

__all__ = [
    "AttentionPooling",
    "ModelConfig",
    "TaggerNet",
    "build_model",
    "clean_state_dict",
    "read_state_dict",
    "register",
    "use_channels_last",
]
