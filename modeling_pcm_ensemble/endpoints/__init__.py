"""Experts that somebody else serves, as backbones of an ensemble: an endpoint tells the most probable next tokens."""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration import EndpointConfig
from .model import EndpointForCausalLM
from .requests import EndpointError, Key, Usage

AutoConfig.register(EndpointConfig.model_type, EndpointConfig, exist_ok=True)
AutoModelForCausalLM.register(EndpointConfig, EndpointForCausalLM, exist_ok=True)

__all__ = ["EndpointConfig", "EndpointError", "EndpointForCausalLM", "Key", "Usage"]
