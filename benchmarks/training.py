"""What training costs: a rollout and an update, and how they grow with completions, length, experts and their size."""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_pcm_ensemble import PCMEnsembleForCausalLM
from modeling_pcm_ensemble.training import RebelConfig, RebelTrainer

from .common import DTYPE, interleaved, summary, write_results

# name: what differs from the first
VARIANTS = {
    "3 experts, 4 prompts, K = 4 completions of 32 tokens": {},
    "the same, 8 prompts": {"prompts": 8},
    "the same, K = 8": {"completions": 8},
    "the same, 64 tokens": {"tokens": 64},
    "the same, 6 experts": {"experts": 6},
    "the same, experts 4 times as large": {"scale": 4},
}
VOCAB, PROMPT = 2048, 32


def add_arguments(parser):
    parser.add_argument("--rounds", type=int, default=8)


def run(arguments):
    arguments.layers = arguments.layers or 2
    rows = []
    rollouts, updates = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in VARIANTS.items():
            rollouts[name], updates[name] = rollout_and_update(folder, arguments, **options)
        for what, steps in (("rollout", rollouts), ("update", updates)):
            measured = summary(interleaved(steps, arguments.rounds, title=what), next(iter(VARIANTS)))
            rows += [{"what": what} | row for row in measured]
    write_results("training", rows, ["what", "name", "seconds", "ratio"], arguments)


def rollout_and_update(
    folder: str, arguments, experts: int = 3, prompts: int = 4, completions: int = 4, tokens: int = 32, scale: int = 1
):
    """Return a call that samples and scores a rollout, and one that goes forward and back through the PCM on it."""
    torch.manual_seed(0)
    backbone = random_llama(arguments.hidden, arguments.layers * scale)
    entries = {f"expert{i}": {"model": backbone, "prompt": "ab"[i % 2] * (i + 1)} for i in range(experts)}
    tokenizer = letters()
    model = PCMEnsembleForCausalLM.from_experts(entries, pcm=random_llama(256, layers=4), tokenizer=tokenizer)
    model.generation_config.eos_token_id = None  # all answers run to the last token

    config = RebelConfig(
        folder,
        per_device_train_batch_size=completions * prompts,
        num_generations=completions,
        max_completion_length=tokens,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    rows = [{"prompt": "a" * PROMPT, "reference": "b"}] * completions * prompts
    rewards = {name: lambda completions, **_: [float(len(c)) for c in completions] for name in entries}
    trainer = RebelTrainer(
        model, rewards, config, Dataset.from_list(rows), preference_sets=[list(entries)], processing_class=tokenizer
    )

    draws = trainer.preferences.sets * len(rows)
    rollout, _ = trainer.rollouts.sample(rows, draws, seed=0)
    rollout.old_log_probs, _ = trainer._old_log_probs(rollout)

    def update():
        trainer.compute_loss(trainer.model, rollout).backward()
        trainer.model.zero_grad()

    return lambda: trainer.rollouts.sample(rows, draws, seed=0), update


def random_llama(width: int, layers: int) -> LlamaForCausalLM:
    """Make a model of random weights."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(DTYPE).eval()


def letters() -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token for each letter, and as many more as the models have."""
    vocabulary = {token: i for i, token in enumerate(["<p>", *"ab", *(f"<{i}>" for i in range(3, VOCAB))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<p>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<p>")
