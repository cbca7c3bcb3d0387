"""Training the Preference Control Model: online, experts frozen."""

from importlib.util import find_spec

if find_spec("trl") is None:
    raise ImportError("Training needs trl. Install it with `pip install 'pcm-ensemble[training]'`.")

from .description_trainer import DescriptionConfig, DescriptionTrainer
from .fused_head import add_mixture_head
from .rebel_config import RebelConfig
from .rebel_trainer import RebelTrainer

__all__ = [
    "DescriptionConfig",
    "DescriptionTrainer",
    "RebelConfig",
    "RebelTrainer",
    "add_mixture_head",
]
