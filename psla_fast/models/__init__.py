"""Models: log-mel input (B, T, F) -> scores (B, C) in [0, 1]; built by name from a registry."""

from psla_fast.models.attention import AttentionPooling
from psla_fast.models.config import ModelConfig
from psla_fast.models.pooling import Pooling
from psla_fast.models.probing import TimeGrid, check_input
from psla_fast.models.registry import Builder, build_model, register
from psla_fast.models.tagger_net import Backbone, TaggerNet, build_pooling, use_channels_last
from psla_fast.models.weights import clean_state_dict, read_state_dict

__all__ = [
    "AttentionPooling",
    "Backbone",
    "Builder",
    "ModelConfig",
    "Pooling",
    "TaggerNet",
    "TimeGrid",
    "build_model",
    "build_pooling",
    "check_input",
    "clean_state_dict",
    "read_state_dict",
    "register",
    "use_channels_last",
]
