"""What can be served, and by which settings of an engine; the rest is refused by name before it starts."""

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from ..configuration_pcm_ensemble import ADAPTERS, ENDPOINT, PCMEnsembleConfig


def slots_of(vllm_config: VllmConfig) -> int | None:
    """
    Return how many experts an engine runs for a request: `expert_slots` of its `additional_config`, or all that may
    have a weight; None where adapters are added up, which any number of them run in one row.
    """
    config = vllm_config.model_config.hf_config
    if config.merge == ADAPTERS:
        return None
    return (vllm_config.additional_config or {}).get("expert_slots", len(config.weighted_names))


def check_engine(vllm_config: VllmConfig):
    """
    Check what an engine is asked to serve, and how.

    Raises:
        ValueError: naming what of the ensemble or of the engine's settings is not supported.
    """
    if not current_platform.is_cpu():
        raise ValueError(
            f"An ensemble is served by vLLM on CPUs so far, and this is {current_platform.device_name}: how its PCM "
            "reads keys and values was never run on a GPU. Use `transformers serve` there."
        )
    _check_ensemble(vllm_config.model_config.hf_config)
    _check_settings(vllm_config)


def _check_ensemble(config: PCMEnsembleConfig):
    if any(backbone.model_type == ENDPOINT for backbone in config.backbones):
        raise ValueError("vLLM serves ensembles whose experts run here; one of this one's is behind an endpoint.")
    if len(config.backbones) > 1:
        raise ValueError(
            f"vLLM serves ensembles whose experts are adapters or prompts on one backbone; this one has "
            f"{len(config.backbones)} backbones."
        )


def _check_settings(vllm_config: VllmConfig):
    parallel = vllm_config.parallel_config
    refused = {
        "a `kv_cache_dtype` of its own": vllm_config.cache_config.cache_dtype
        not in ("auto", "float16", "bfloat16", "float32"),
        "`--runner pooling`": vllm_config.model_config.runner_type != "generate",
        "`--enable-prompt-embeds`": vllm_config.model_config.enable_prompt_embeds,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "KV connectors, some of which know prefixes by tokens alone": vllm_config.kv_transfer_config is not None,
        "`--kv-offloading-size`, which makes a KV connector": vllm_config.cache_config.kv_offloading_size is not None,
        "`--enable-lora`, since the experts' adapters are the ensemble's own": vllm_config.lora_config is not None,
    }
    for name, is_asked in refused.items():
        if is_asked:
            raise ValueError(f"An ensemble is not served with {name}. Start the engine without it.")

    settings = vllm_config.additional_config or {}
    most = len(vllm_config.model_config.hf_config.weighted_names)
    slots = settings.get("expert_slots", most)
    if isinstance(slots, bool) or not isinstance(slots, int) or not 1 <= slots <= most:
        raise ValueError(
            f"`expert_slots` of `additional_config` must be a whole number from 1 to {most}, the experts that a "
            f"preference may want, got {slots!r}."
        )
