"""One decode step of several experts, as a ratio to one step of one plain model of the same batch."""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from transformers import DynamicCache

from modeling_pcm_ensemble import PCMEnsembleForCausalLM
from modeling_pcm_ensemble.merging import ExpertLogits, mixture_log_probs
from modeling_pcm_ensemble.weighting import log_expert_weights

from . import fast
from .common import (
    DEVICE,
    DTYPE,
    ENSEMBLES,
    LABELS,
    cached_step,
    grouped_bars,
    interleaved,
    load_backbone,
    one_token,
    prompted_ensemble,
    random_lora_ensemble,
    some_ids,
    summary,
    write_results,
)


def add_arguments(parser):
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=list(ENSEMBLES), default=list(ENSEMBLES), help="of experts")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--fast", action="store_true", help="compiled steps instead")
    parser.add_argument("--xlora", action="store_true", help="X-LoRA too, which runs the whole context at each step")


@torch.no_grad()
def run(arguments):
    if arguments.fast:
        fast.run(arguments)
        return

    backbone, experts = load_backbone(arguments), arguments.experts
    # On backbones of their own: the hooks of adapters take time.
    lora = random_lora_ensemble(load_backbone(arguments), experts)
    models = {"plain model": backbone}
    if "prompted" in arguments.kinds:
        models[LABELS["prompted"]] = prompted_ensemble(backbone, experts)
    if "lora" in arguments.kinds:
        models[LABELS["lora"]] = lora
        models['LoRA, merge="adapters"'] = random_lora_ensemble(load_backbone(arguments), experts, merge="adapters")
    copies = [copy.deepcopy(backbone) for _ in range(experts)]
    peft = with_peft_adapters(copy.deepcopy(backbone), lora)
    xlora = with_xlora(copy.deepcopy(backbone), lora) if arguments.xlora else None

    rows = []
    for batch in arguments.batches:
        token = one_token(batch)
        steps = {name: cached_step(model, token) for name, model in models.items()}
        steps["separate models"] = one_after_another([cached_step(model, token) for model in copies])
        steps["PEFT mixed batch"] = peft_step(peft, backbone, lora.config.expert_names, token)
        steps["mixture alone"] = mixture_step(backbone.config.vocab_size, batch, experts)
        steps["sampler alone"] = sampler_step(backbone.config.vocab_size, batch)
        if xlora is not None and batch == 1:
            context = some_ids(batch)
            steps["PEFT X-LoRA"] = lambda context=context: xlora(context, use_cache=False)

        rounds = arguments.rounds if batch < 32 else max(1, arguments.rounds // 2)
        measured = summary(interleaved(steps, rounds, title=f"batch {batch}"), "plain model")
        rows += [{"batch": batch, "experts": experts} | row for row in measured]

    picture = partial(grouped_bars, rows=rows, group="batch", label="time of one plain step")
    write_results("decode", rows, ["batch", "name", "seconds", "ratio"], arguments, picture)


def one_after_another(steps: list):
    """Return a step that takes all of `steps`."""
    return lambda: [step() for step in steps]


def mixture_step(vocab_size: int, batch: int, num_experts: int):
    """Return what joins the experts' logits, with the weights of a PCM."""
    logits = torch.randn(num_experts, batch, 1, vocab_size, device=DEVICE).to(DTYPE)
    scores = torch.randn(batch, 1, num_experts, device=DEVICE)
    weights = torch.ones(batch, num_experts, device=DEVICE)

    def step():
        experts = [ExpertLogits(i, None, logits[i]) for i in range(num_experts)]
        return mixture_log_probs(experts, log_expert_weights(scores, weights.log()), exact=False)

    return step


def sampler_step(vocab_size: int, batch: int):
    """Return what draws a token from the mixture; part of no other step."""
    probs = torch.randn(batch, vocab_size, device=DEVICE).softmax(-1)
    return lambda: torch.multinomial(probs, 1)


@contextmanager
def exported_adapters(lora: PCMEnsembleForCausalLM) -> Iterator[dict[str, str]]:
    """Give the folder of each expert's adapter, by the expert's name, as long as they stand there."""
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: f"{folder}/{name}" for name in lora.config.expert_names}
        for name, path in folders.items():
            lora.export_adapter(name, path)
        yield folders


def with_peft_adapters(model, lora: PCMEnsembleForCausalLM) -> PeftModel:
    """Put the experts' adapters into a model by PEFT."""
    with exported_adapters(lora) as folders:
        first, *others = folders
        model = PeftModel.from_pretrained(model, folders[first], adapter_name=first)
        for name in others:
            model.load_adapter(folders[name], name)
    return model.to(DEVICE, DTYPE).eval()


def peft_step(peft: PeftModel, backbone, names: list[str], token: torch.Tensor):
    """Return a step of every row once for each expert in one batch, each under its adapter; nothing is mixed."""
    cache = DynamicCache(config=backbone.config)
    backbone(some_ids(1), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(len(token) * len(names))

    rows = token.repeat(len(names), 1)
    adapters = [name for name in names for _ in range(len(token))]
    return lambda: peft(rows, past_key_values=cache, use_cache=True, logits_to_keep=1, adapter_names=adapters)


def with_xlora(model, lora: PCMEnsembleForCausalLM):
    """Put the experts' adapters into a model by X-LoRA."""
    model.config.use_cache = False
    with exported_adapters(lora) as folders:
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=model.config.hidden_size,
            xlora_depth=2,
            adapters={str(i): path for i, path in enumerate(folders.values())},
        )
        return get_peft_model(model, config).to(DTYPE).eval()
