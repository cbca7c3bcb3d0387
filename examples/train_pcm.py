"""
Train a Preference Control Model with REBEL: two prompted experts, a reward for each, a handful of prompts.

    python examples/train_pcm.py
"""

import argparse

import torch
from datasets import Dataset

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo
from modeling_pcm_ensemble.training import RebelConfig, RebelTrainer

QUESTIONS = ["What is gravity?", "Why do cats purr?", "How does a plane fly?", "What is money?", "Who was Plato?"]
CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]


def shortness(prompts, completions, **columns) -> list[float]:
    """Reward short answers. A reward is a function as for TRL, or a sequence-classification model."""
    return [-len(answer[-1]["content"]) / 100 for answer in completions]


def curiosity(prompts, completions, **columns) -> list[float]:
    """Reward answers that ask back."""
    return [float(answer[-1]["content"].count("?")) for answer in completions]


@torch.no_grad()
def mean_weights(model, preference) -> list[float]:
    """Average α, by expert, where answers to the questions would begin."""
    inputs = model.tokenizer.apply_chat_template(
        CHATS, add_generation_prompt=True, padding=True, return_tensors="pt", tokenizer_kwargs={"padding_side": "left"}
    )
    return model.compute_expert_weights(**inputs, preference=preference)[:, -1].mean(dim=0).tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="my-pcm")
    parser.add_argument("--steps", type=int, default=16, help="updates")
    parser.add_argument("--quick", action="store_true", help="one update on answers of 8 tokens")
    arguments = parser.parse_args()

    smollm2 = demo.fetch_smollm2()  # "HuggingFaceTB/SmolLM2-135M-Instruct", or a model of yours
    experts = {
        "short": {"model": smollm2, "prompt": "Answer in a few words."},
        "curious": {"model": smollm2, "prompt": "Answer, and ask a question back."},
    }
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=smollm2, pcm_layers=4)
    model.pcm.body.requires_grad_(False)  # the head alone: a pretrained body knows already what the context is
    rewards = {"short": shortness, "curious": curiosity}
    before = mean_weights(model, list(experts))

    config = RebelConfig(
        f"{arguments.output}/run",
        max_steps=1 if arguments.quick else arguments.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8 if arguments.quick else 32,
        learning_rate=1e-3,
        report_to="none",
    )
    trainer = RebelTrainer(
        model,
        args=config,
        reward_funcs=rewards,
        train_dataset=Dataset.from_dict({"prompt": CHATS}),
        preference_sets=[list(experts), {"short": 2.0, "curious": 0.5}],
    )
    trainer.train()

    for name, old, new in zip(experts, before, mean_weights(model, list(experts))):
        print(f"α of the {name} expert: {old:.2f} before, {new:.2f} after")
    trainer.save_model(f"{arguments.output}/ensemble")


if __name__ == "__main__":
    main()
