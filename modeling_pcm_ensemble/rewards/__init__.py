"""Rewards of completions: from models or offline proxies, against the base model's completions."""

from .models import ModelReward

__all__ = ["ModelReward"]
