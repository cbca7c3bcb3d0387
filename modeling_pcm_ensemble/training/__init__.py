"""Training the Preference Control Model: online, experts frozen. `rewards` holds rewards that run offline."""

from .description_trainer import DescriptionConfig, DescriptionTrainer
from .fused_head import add_mixture_head
from .rebel_config import RebelConfig
from .rebel_trainer import RebelTrainer
from .scoring import ModelReward

__all__ = [
    "DescriptionConfig",
    "DescriptionTrainer",
    "ModelReward",
    "RebelConfig",
    "RebelTrainer",
    "add_mixture_head",
]
