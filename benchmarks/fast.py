"""`decode --fast`: one decode step with compiled steps, as a ratio to one eager step of one plain model."""

from functools import partial

import torch
from transformers import CompileConfig, PreTrainedModel, StaticCache

from modeling_pcm_ensemble import PCMEnsembleCache, PCMEnsembleForCausalLM
from modeling_pcm_ensemble.compile_steps import CompiledStep
from modeling_pcm_ensemble.lora import clear_traced
from modeling_pcm_ensemble.weight_changes import WeightSnapshot

from .common import (
    CONTEXT,
    DEVICE,
    ENSEMBLES,
    LABELS,
    cached_step,
    grouped_bars,
    interleaved,
    load_backbone,
    one_token,
    some_ids,
    summary,
    write_results,
)

PLAIN = "plain model"
COMPILED = CompileConfig(dynamic=True)


@torch.no_grad()
def run(arguments):
    backbone, experts = load_backbone(arguments), arguments.experts
    # On backbones of their own: what is compiled has no other ensemble's adapters hooked.
    compiled = {PLAIN: load_backbone(arguments)}
    for kind in arguments.kinds:
        compiled[LABELS[kind]] = ENSEMBLES[kind](load_backbone(arguments), experts)
    plain = compiled_plain(compiled[PLAIN])

    rows = []
    for batch in arguments.batches:
        token = one_token(batch)
        steps = {PLAIN: cached_step(backbone, token)}
        steps |= {f"{name}, eager": cached_step(model, token) for name, model in compiled.items() if name != PLAIN}

        for name, model in compiled.items():
            if name == PLAIN:
                step = compiled_plain_step(plain, token, arguments.rounds)
            else:
                step = compiled_step(model, token, arguments.rounds)
            steps[f"{name}, compiled"] = step
        measured = interleaved(steps, arguments.rounds, title=f"batch {batch}")

        firsts = {PLAIN: first_token(backbone, batch)}
        for name, model in compiled.items():
            firsts[f"{name}, eager"] = first_token(model, batch)
            firsts[f"{name}, compiled"] = first_token(model, batch, is_static=True)
        first = {row["name"]: row["seconds"] for row in summary(interleaved(firsts, 8, 1, "first token"), PLAIN)}

        to_compiled = {row["name"]: row["ratio"] for row in summary(measured, f"{PLAIN}, compiled")}
        for row in summary(measured, PLAIN):
            name = row["name"]
            rows.append({"batch": batch, "experts": experts} | row)
            rows[-1] |= {"to compiled": to_compiled[name], "first token": first[name]}

    columns = ["batch", "name", "seconds", "ratio", "to compiled", "first token"]
    picture = partial(grouped_bars, rows=rows, group="batch", label="time of one plain eager step")
    write_results("decode-fast", rows, columns, arguments, picture)


def first_token(model, batch: int, is_static: bool = False):
    """
    Return a call of `generate` for one token. The prefill is not compiled; a static cache is filled by it.
    """
    ids = torch.randint(100, 40000, (batch, CONTEXT), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    if is_static:
        options |= {"cache_implementation": "static", "compile_config": COMPILED, "max_cache_len": 2 * CONTEXT}
    return lambda: model.generate(ids, **options)


def compiled_step(model: PCMEnsembleForCausalLM, token: torch.Tensor, rounds: int, context: int = CONTEXT):
    """Return a step as `cached_step` does, but compiled and into static caches."""
    batch = len(token)
    cache = PCMEnsembleCache(model.config, "static", static_length(rounds, context))
    model(some_ids(batch, context), past_key_values=cache, use_cache=True, logits_to_keep=1)
    call = model.get_compiled_call(COMPILED)
    return lambda: call(token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def compiled_plain(model: PreTrainedModel) -> CompiledStep:
    """Return a plain model's compiled call, as an ensemble compiles its submodels."""
    return CompiledStep(model, run_without_adapters, clear_traced, COMPILED, WeightSnapshot(model))


def compiled_plain_step(call: CompiledStep, token: torch.Tensor, rounds: int, context: int = CONTEXT):
    """Return a step of [`compiled_plain`] as `compiled_step` does."""
    batch, length = len(token), static_length(rounds, context)
    cache = StaticCache(call.model.config, max_cache_len=length)
    call.model(some_ids(batch, context), past_key_values=cache, use_cache=True, logits_to_keep=1)
    call.begin(cache.layers)
    mask = torch.ones(batch, length, dtype=torch.long, device=DEVICE)

    def step():
        positions = cache.get_seq_length().expand(batch, 1).clone()
        inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        return call([], input_ids=token, logits_to_keep=1, **inputs)

    return step


def run_without_adapters(call, adapter_masks: list, *args, **inputs):
    """Run a model that has no adapters."""
    return call(*args, **inputs)


def static_length(rounds: int, context: int) -> int:
    """Return the length of a static cache that holds the context and a token for each round, warm-up too."""
    return context + rounds + 8
