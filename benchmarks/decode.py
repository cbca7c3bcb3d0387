"""One decode step of three experts, as a ratio to one step of one plain model of the same batch."""

import copy
import tempfile

import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from transformers import CompileConfig, DynamicCache, StaticCache

from modeling_pcm_ensemble import PCMEnsembleCache, PCMEnsembleForCausalLM
from modeling_pcm_ensemble.merging import ExpertLogits, log_expert_weights, mixture_log_probs

from .common import (
    DTYPE,
    grouped_bars,
    interleaved,
    load_backbone,
    lora_ensemble,
    prompted_ensemble,
    summary,
    write_results,
)

EXPERTS, CONTEXT = 3, 64


def add_arguments(parser):
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--fast", action="store_true", help="grouped attention too")
    parser.add_argument("--compiled", action="store_true", help="and compiled steps, which take minutes to compile")
    parser.add_argument("--xlora", action="store_true", help="X-LoRA too, which runs the whole context at each step")


@torch.no_grad()
def run(arguments):
    backbone = load_backbone(arguments)
    grouped = arguments.fast or arguments.compiled
    own = [copy.deepcopy(backbone) for _ in range(3 * grouped)]  # compiled where no other's adapters are hooked
    lora = lora_ensemble(backbone, EXPERTS)
    models = {
        "plain model": backbone,
        "prompted experts": prompted_ensemble(backbone, EXPERTS),
        "LoRA experts": lora,
        'LoRA, merge="adapters"': lora_ensemble(backbone, EXPERTS, merge="adapters"),
    }
    fast = {}
    if grouped:
        fast = {"plain model": own[0], "prompted experts": prompted_ensemble(own[1], EXPERTS)}
        fast["LoRA experts"] = lora_ensemble(own[2], EXPERTS)
        for one in fast.values():
            one.set_attn_implementation("grouped_sdpa")
        models |= {f"{name}, grouped": one for name, one in fast.items()}
    copies = [copy.deepcopy(backbone) for _ in range(EXPERTS)]
    peft = with_peft_adapters(copy.deepcopy(backbone), lora)
    xlora = with_xlora(copy.deepcopy(backbone), lora) if arguments.xlora else None
    rows = []
    for batch in arguments.batches:
        token = torch.full((batch, 1), 500)
        steps = {name: cached_step(model, token) for name, model in models.items()}
        if arguments.compiled:
            steps |= {
                f"{name}, grouped, compiled": compiled_step(m, token, arguments.rounds) for name, m in fast.items()
            }
        steps["separate models"] = one_after_another([cached_step(model, token) for model in copies])
        steps["PEFT mixed batch"] = peft_step(peft, backbone, lora.config.expert_names, token)
        steps["mixture alone"] = mixture_step(backbone.config.vocab_size, batch)
        if xlora is not None and batch == 1:
            context = torch.randint(100, 40000, (batch, CONTEXT))
            steps["PEFT X-LoRA"] = lambda context=context: xlora(context, use_cache=False)
        rounds = arguments.rounds if batch < 32 else arguments.rounds // 2
        measured = summary(interleaved(steps, rounds, title=f"batch {batch}"), "plain model")
        rows += [{"batch": batch, "experts": EXPERTS} | row for row in measured]
    columns = ["batch", "name", "seconds", "ratio"]
    write_results("decode-fast" if fast else "decode", rows, columns, arguments, lambda axes: grouped_bars(axes, rows, "batch", "time of one plain step"))  # fmt: skip  # noqa: E501


def one_after_another(steps: list):
    return lambda: [step() for step in steps]


def mixture_step(vocab_size: int, batch: int):
    """What joins three experts' logits, with the weights of a PCM."""
    logits = torch.randn(EXPERTS, batch, 1, vocab_size).to(DTYPE)
    scores, weights = torch.randn(batch, 1, EXPERTS), torch.ones(batch, EXPERTS)

    def step():
        experts = [ExpertLogits(i, None, logits[i]) for i in range(EXPERTS)]
        return mixture_log_probs(experts, log_expert_weights(scores, weights.log()), exact=False)

    return step


def cached_step(model, token: torch.Tensor, context: int = CONTEXT):
    """A step of `model` behind a context of which every row has the same. Decode time depends on shapes only."""
    ids = torch.randint(100, 40000, (1, context), generator=torch.Generator().manual_seed(0))
    is_ensemble = isinstance(model, PCMEnsembleForCausalLM)
    cache = PCMEnsembleCache(model.config) if is_ensemble else DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if len(token) > 1:
        cache.batch_repeat_interleave(len(token))
    return lambda: model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def compiled_step(model, token: torch.Tensor, rounds: int, context: int = CONTEXT):
    """The same into static caches, with compiled steps; the first calls compile."""
    ids = torch.randint(100, 40000, (1, context), generator=torch.Generator().manual_seed(0))
    length = context + rounds + 16  # warm-up too
    if isinstance(model, PCMEnsembleForCausalLM):
        cache, call = PCMEnsembleCache(model.config, "static", length), model.get_compiled_call(None)
    else:
        cache = StaticCache(model.config, max_cache_len=length)
        call = model.get_compiled_call(CompileConfig(dynamic=True, mode="default"))
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if len(token) > 1:
        cache.batch_repeat_interleave(len(token))
    return lambda: call(token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def with_peft_adapters(model, lora: PCMEnsembleForCausalLM) -> PeftModel:
    with tempfile.TemporaryDirectory() as folder:
        for name in lora.config.expert_names:
            lora.export_adapter(name, f"{folder}/{name}")
        first, *others = lora.config.expert_names
        model = PeftModel.from_pretrained(model, f"{folder}/{first}", adapter_name=first)
        for name in others:
            model.load_adapter(f"{folder}/{name}", name)
    return model.to(DTYPE).eval()


def peft_step(peft: PeftModel, backbone, names: list[str], token: torch.Tensor):
    """Every row once for each expert in one batch, each under its adapter; the mixture is not computed."""
    cache = DynamicCache(config=backbone.config)
    ids = torch.randint(100, 40000, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    backbone(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(len(token) * len(names))
    rows, adapters = token.repeat(len(names), 1), [name for name in names for _ in range(len(token))]
    return lambda: peft(rows, past_key_values=cache, use_cache=True, logits_to_keep=1, adapter_names=adapters)


def with_xlora(model, lora: PCMEnsembleForCausalLM):
    model.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        for name in lora.config.expert_names:
            lora.export_adapter(name, f"{folder}/{name}")
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=model.config.hidden_size,
            xlora_depth=2,
            adapters={str(i): f"{folder}/{name}" for i, name in enumerate(lora.config.expert_names)},
        )
        return get_peft_model(model, config).to(DTYPE).eval()
