"""Put an ensemble on the Hugging Face Hub: checked before, described by a model card, checked again after."""

from .card import model_card
from .upload import hub_upload

__all__ = ["hub_upload", "model_card"]
