"""PCM Ensemble: frozen expert language models, mixed token by token under a preference."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import PCMEnsembleCache
from .configuration_pcm_ensemble import PCMEnsembleConfig
from .modeling_pcm_ensemble import PCMEnsembleForCausalLM, PCMEnsembleOutput
from .preference import Preference, preference_weights

__version__ = "0.2.0.dev0"  # pyproject.toml reads it here

AutoConfig.register("pcm_ensemble", PCMEnsembleConfig, exist_ok=True)
AutoModel.register(PCMEnsembleConfig, PCMEnsembleForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(PCMEnsembleConfig, PCMEnsembleForCausalLM, exist_ok=True)

__all__ = [
    "PCMEnsembleCache",
    "PCMEnsembleConfig",
    "PCMEnsembleForCausalLM",
    "PCMEnsembleOutput",
    "Preference",
    "preference_weights",
]
