"""Makes the ensemble known to vLLM. Runs in each of its processes, and leaves other models as they are."""

import functools
import json

from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.v1.request import Request

from ..configuration_pcm_ensemble import PCMEnsembleConfig
from .requests import asked_for, check_default, front_end_processor
from .settings import check_engine

ARCHITECTURE = "PCMEnsembleForCausalLM"


def register_ensemble():
    """Register configuration, model and what serving it needs; vLLM may call it several times in one process."""
    AutoConfig.register(PCMEnsembleConfig.model_type, PCMEnsembleConfig, exist_ok=True)
    if ARCHITECTURE in ModelRegistry.get_supported_archs():
        return
    ModelRegistry.register_model(ARCHITECTURE, "modeling_pcm_ensemble.vllm.model:PCMEnsembleForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = EnsembleServing
    _salt_with_preferences()


class EnsembleServing(VerifyAndUpdateConfig):
    """What vLLM asks of an architecture when an engine is configured."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig):
        """
        Refuse what cannot be served, and let requests be checked where they arrive.

        Raises:
            ValueError: naming what of the ensemble or of the engine's settings is not supported.
        """
        check_engine(vllm_config)
        check_default(vllm_config)
        processors = vllm_config.model_config.logits_processors or []
        vllm_config.model_config.logits_processors = [*processors, front_end_processor(vllm_config)]


def _salt_with_preferences():
    """
    Keep what is cached of a prompt under one preference from requests under another: keys and values depend on it. No
    hook of vLLM lets a model add to the key of its prefix cache, so a method is wrapped.
    """
    make_request = Request.from_engine_core_request.__func__

    @functools.wraps(make_request)
    def from_engine_core_request(cls, request, block_hasher):
        wish = asked_for(request.sampling_params)
        if wish is not None or request.cache_salt is not None:  # so that nobody's salt can be another's wish
            request.cache_salt = json.dumps([request.cache_salt, wish], sort_keys=True)
        return make_request(cls, request, block_hasher)

    Request.from_engine_core_request = classmethod(from_engine_core_request)
