"""
Make the constants that standardise the rewards and the held-out proxies: mean and deviation of every feature, and of
what the prompt saves against other prompts, over the base model's answers.

    python examples/smollm2/reward_constants.py --output smollm2_rewards.json --held-out smollm2_held_out.json

The package's own: modeling_pcm_ensemble/rewards/smollm2_rewards.json is of four answers to each training prompt,
modeling_pcm_ensemble/rewards/smollm2_answering.json of one answer to each of the shortest 96 (`--prompts 96 --samples
1`), and modeling_pcm_ensemble/evaluation/smollm2_held_out.json of one answer to each of the shortest 192.
"""

import argparse
import json
from pathlib import Path

from common import PCM_PROMPTS, base_model, sample, training_prompts
from tqdm import tqdm
from transformers import set_seed

from modeling_pcm_ensemble.checkpoint_staging import write_text
from modeling_pcm_ensemble.evaluation.held_out_proxies import held_out_constants
from modeling_pcm_ensemble.rewards.answering import AnsweringReward, answering_constant
from modeling_pcm_ensemble.rewards.proxies import reward_constants
from modeling_pcm_ensemble.rewards.quality import TextQuality


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("smollm2_rewards.json"))
    parser.add_argument("--held-out", type=Path, default=Path("smollm2_held_out.json"))
    parser.add_argument("--answering", type=Path, default=Path("smollm2_answering.json"))
    parser.add_argument("--prompts", type=int, help="the shortest prompts only; by default all")
    parser.add_argument("--samples", type=int, default=4, help="answers to each prompt")
    parser.add_argument("--tokens", type=int, default=72, help="most tokens of an answer")
    arguments = parser.parse_args()

    model, tokenizer = base_model()
    prompts = training_prompts(arguments.prompts) * arguments.samples
    completions = []
    for start in tqdm(range(0, len(prompts), 64), desc="answers of the base model"):
        set_seed(start)
        lines = sample(model, tokenizer, prompts[start : start + 64], arguments.tokens)
        completions += [line["completion"] for line in lines]

    held_out = held_out_constants(completions)
    write_text(arguments.held_out, json.dumps(held_out, indent=2) + "\n")
    quality = TextQuality(model, tokenizer)
    answering = AnsweringReward(quality, training_prompts(PCM_PROMPTS))
    write_text(arguments.answering, json.dumps(answering_constant(answering, prompts, completions)) + "\n")
    constants = reward_constants(quality, prompts, completions)
    write_text(arguments.output, json.dumps(constants, indent=2) + "\n")


if __name__ == "__main__":
    main()
