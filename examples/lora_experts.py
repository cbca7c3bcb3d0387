"""
Experts of your own: train two LoRA adapters with PEFT and TRL, mix them under a preference, add a third expert.

    python examples/lora_experts.py --output my-experts
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo

ANSWERS = {  # a few lines show the way; an expert worth having needs hundreds
    "polite": {
        "What is rain?": "Thank you for asking! Rain is water that falls from clouds. I hope that helps you.",
        "Who was Einstein?": "What a good question, thank you! Einstein was a physicist. Please ask me more.",
    },
    "short": {"What is rain?": "Water from clouds.", "Who was Einstein?": "A physicist."},
}


def train_adapter(base: str, answers: dict[str, str], folder: Path, steps: int):
    """Train a LoRA on answers by question, and write it as PEFT does."""
    rows = []
    for question, answer in answers.items():
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})

    options = {"bf16": False, "use_cpu": not torch.cuda.is_available(), "save_strategy": "no", "report_to": "none"}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=SFTConfig(str(folder), max_steps=steps, learning_rate=1e-3, **options),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("my-experts"))
    parser.add_argument("--steps", type=int, default=20, help="updates of each adapter")
    parser.add_argument("--quick", action="store_true", help="two updates")
    arguments = parser.parse_args()

    base = demo.fetch_smollm2()  # "HuggingFaceTB/SmolLM2-135M-Instruct", or a model of yours
    experts = {}
    for name, answers in ANSWERS.items():
        folder = arguments.output / name
        train_adapter(base, answers, folder, 2 if arguments.quick else arguments.steps)
        experts[name] = {"model": base, "adapter": str(folder), "description": f"Give a {name} answer."}

    # The untrained PCM leaves the user's weights as they are; examples/train_pcm.py trains one.
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=base, pcm_layers=4, dtype=torch.float32)
    model.add_expert("plain", base)  # the model itself is an expert too, and shared

    chat = [{"role": "user", "content": "What is gravity?"}]
    inputs = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    for preference in ("polite", "short", {"polite": 1.0, "short": 0.5}, ["short", "plain"]):
        output = model.generate(**inputs, preference=preference, max_new_tokens=24, do_sample=False)
        print(preference, model.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]), sep=": ")
    model.save_pretrained(arguments.output / "ensemble")


if __name__ == "__main__":
    main()
