"""
Train the Preference Control Model of the six LoRA experts online with REBEL: of their mixture on the paper's eight
preferences and, less often, on those of two experts; where tilts add up on any experts at strengths of both signs.

    python examples/smollm2/train_pcm.py --output pcm --seeds 0 1 2
    python examples/smollm2/train_pcm.py --merge product --output product --seeds 0

1. Let the base model answer every prompt once: rewards are measured against these answers.
2. Train each seed's PCM with REBEL, its head alone: rewards are noisy, and a pretrained body knows already what the
   context is.
3. Teach it which experts descriptions and other words ask for, and how much of each (demo_wordings.py): to do when
   told in words what it does when told weights, on the first words of prompts and answers and, one time in twenty, on
   whole ones. No expert runs.
4. Write each seed's PCM, its log, and the curves of all.

Stopped and run again, it goes on from the last checkpoint.

measure_pcm.py measures what it has won for a mixture. --quick trains on eight prompts for one rollout.
"""

import argparse
import json
import random
from collections import defaultdict
from itertools import chain, combinations
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import torch
from common import (
    ANSWERS_AT_ONCE,
    DEVICE,
    PCM_PROMPTS,
    READINGS_AT_ONCE,
    base_model,
    chats,
    training_prompts,
    with_references,
)
from datasets import Dataset
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_pcm_ensemble import demo
from modeling_pcm_ensemble.checkpoint_staging import finish_save, write_text
from modeling_pcm_ensemble.configuration_pcm_ensemble import TOP_K_MERGES
from modeling_pcm_ensemble.demo_wordings import compose
from modeling_pcm_ensemble.evaluation.pictures import save
from modeling_pcm_ensemble.rewards.answering import AnsweringReward
from modeling_pcm_ensemble.rewards.proxies import proxy_rewards
from modeling_pcm_ensemble.rewards.quality import TextQuality
from modeling_pcm_ensemble.training import DescriptionConfig, DescriptionTrainer, RebelConfig, RebelTrainer
from modeling_pcm_ensemble.training.preference_sampling import default_preference_sets

# Noise on the weights that a rollout is sampled under. Shares are less sensitive: only their ratios count.
EXPLORATION = {"product": 0.5, "adapters": 0.5, "probabilities": 2.0}
# Updates, rows of each, and the learning rates of the head and the body: a degree takes longer to learn than who is
# meant, and a body that changes slowly keeps more of the words that are not in training.
OF_STRENGTHS = (4000, 16, 8e-4, 2e-4)
DESCRIPTIONS = {"product": OF_STRENGTHS, "adapters": OF_STRENGTHS, "probabilities": (1100, 8, 5e-4, 5e-4)}
LEARNING_LAYERS = 4  # the last ones; what lies below knows words already that are not in training, and keeps them
# Descriptions are learnt on the first words of prompts and answers, where many words of preferences are read in little
# time: four in five without the chat template's own system message. One text in twenty is whole, and has that message,
# since descriptions are read from afar then.
PROMPT_WORDS, ANSWER_WORDS, WITH_SYSTEM, WHOLE = 3, 2, 5, 20
SYSTEM_LENGTH = 100  # of that message, in characters
# What users may ask for by weights, told in descriptions
DESCRIBED = [list(names) for number in range(1, 7) for names in combinations(demo.PREFERENCES, number)]


def make_trainer(model, rewards, answering, dataset: Dataset, folder: Path, seed: int, arguments) -> RebelTrainer:
    batch = min(arguments.completions, arguments.batch)
    updates = arguments.completions // batch * arguments.iterations  # of a rollout
    config = RebelConfig(
        output_dir=str(folder),
        seed=seed,
        max_steps=arguments.rollouts * updates,
        per_device_train_batch_size=batch,
        steps_per_generation=arguments.completions // batch,
        num_generations=8,
        num_iterations=arguments.iterations,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=4,
        eta=arguments.eta,
        exploration=EXPLORATION[arguments.merge],
        weight_distribution="signed" if model.config.adds_up else "equal",
        max_completion_length=arguments.tokens,
        generation_batch_size=ANSWERS_AT_ONCE,
        bf16=model.backbones[0].dtype == torch.bfloat16,
        use_cpu=DEVICE == "cpu",
        logging_steps=1,
        save_steps=updates * max(arguments.rollouts // 5, 1),
        save_total_limit=1,
        report_to="none",
    )

    return RebelTrainer(
        model,
        args=config,
        reward_funcs=rewards,
        train_dataset=dataset,
        processing_class=model.tokenizer,
        preference_sets=preference_sets(model.config),
        shared_reward=answering if model.config.adds_up else None,
    )


def preference_sets(config) -> list[list[str]]:
    """Return the sets that preferences are drawn from."""
    if not config.adds_up:
        # Pairs in one of three: what rewards teach of three experts would else carry over to two by chance.
        pairs = [names for names in default_preference_sets(config, whole=False) if len(names) == 2]
        return 3 * default_preference_sets(config) + pairs

    # Any experts go together where tilts add up, opposites too; of each number of them as many.
    sets = []
    for size in range(2, config.num_experts + 1):
        of_size = [list(names) for names in combinations(config.expert_names, size)]
        sets += of_size * (60 // len(of_size))  # there are 15, 20, 15, 6 and 1 of six experts
    return sets


def teach_descriptions(model, dataset: Dataset, folder: Path, seed: int, arguments):
    """Train a PCM to do when told in words what it does when told the weights that they mean."""
    steps, rows, head_rate, body_rate = DESCRIPTIONS[arguments.merge]
    steps = arguments.description_steps or steps
    config = DescriptionConfig(
        output_dir=str(folder),
        seed=seed,
        max_steps=steps,
        learning_rate=head_rate,
        per_device_train_batch_size=rows,
        bf16=model.backbones[0].dtype == torch.bfloat16,
        use_cpu=DEVICE == "cpu",
        train_sampling_strategy="group_by_length",
        save_strategy="steps",
        save_steps=250,
        save_total_limit=1,
        report_to="none",
    )

    def text(row: dict, number: int) -> dict:
        prompt, answer = row["prompt"][-1]["content"], row["reference"]
        if number % WHOLE:
            prompt, answer = first_words(prompt, PROMPT_WORDS), first_words(answer, ANSWER_WORDS)
        chat, length = chats([prompt])[0], len(prompt) + len(answer)
        if number % WITH_SYSTEM:
            chat.insert(0, {"role": "system", "content": ""})
        else:
            length += SYSTEM_LENGTH
        return {"prompt": chat, "completion": answer, "length": length}

    written = dataset.filter(lambda row: row["reference"]).map(text, with_indices=True)
    generator = random.Random(seed)
    wordings = [compose(generator, "training") for _ in range(steps * rows)]

    body = [parameter for parameter in model.pcm.body.parameters() if parameter.requires_grad]
    groups = [{"params": model.pcm.head.parameters()}, {"params": body, "lr": body_rate}]
    optimizers = (torch.optim.AdamW(groups, lr=head_rate, weight_decay=0.0), None)
    trainer = DescriptionTrainer(
        model, config, written, preference_sets=DESCRIBED, wordings=wordings, optimizers=optimizers
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)


def first_words(text: str, number: int) -> str:
    return " ".join(text.split()[:number])


def train(dataset: Dataset, rewards, answering, seed: int, arguments) -> Path:
    """Train one PCM and write what has learnt. What each part has given is kept in a file."""
    folder = arguments.output / f"seed-{seed}"
    rewarded, described = folder / "rewards.safetensors", folder / "pcm.safetensors"
    finish_save(folder)
    check_options(folder, arguments)
    if described.exists():
        return folder

    set_seed(seed)
    top_k = arguments.expert_top_k if arguments.merge in TOP_K_MERGES else 0
    model = demo.adapter_ensemble(dtype=demo.fast_dtype(DEVICE), merge=arguments.merge, expert_top_k=top_k or None)
    if arguments.rollouts and not rewarded.exists():
        model.pcm.body.requires_grad_(False)
        trainer = make_trainer(model, rewards, answering, dataset, folder, seed, arguments)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
        write_text(folder / "history.json", json.dumps(trainer.state.log_history, indent=1) + "\n")
        model.save_pcm(rewarded, torch.bfloat16)

    if arguments.rollouts:
        model.load_pcm(rewarded)
        model.pcm.body.requires_grad_(True)
    model.pcm.body.layers[:-LEARNING_LAYERS].requires_grad_(False)
    teach_descriptions(model, dataset, folder / "words", seed, arguments)
    model.save_pcm(described, torch.bfloat16)
    return folder


def check_options(folder: Path, arguments):
    """Refuse a folder that was begun with other options, whose PCM would be taken for one of these."""
    options = {name: value for name, value in vars(arguments).items() if name not in ("output", "seeds")}
    path = folder / "options.json"
    begun = json.loads(path.read_text()) if path.exists() else options
    others = [f"{name}={begun.get(name)}" for name, value in options.items() if begun.get(name) != value]
    if others:
        raise ValueError(f"{folder} was begun with {', '.join(others)}. Take these options, or another --output.")
    write_text(path, json.dumps(options, indent=1) + "\n")


def draw_curves(histories: list[list[dict]], path: Path, window: int = 8):
    """Draw reward, reward by dimension and α's entropy of what was sampled: means of seeds, smoothed."""
    panels = {
        "sampled answers against the base model (0.5 = equal)": {"reward": "reward", "win_share": "won comparisons"},
        "reward by dimension": {f"rewards/{name}/mean": name for name in demo.PREFERENCES},
        "nats a token": {"expert_weight_entropy": "entropy of α"},
    }

    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4), layout="constrained")
    for axis, (title, names) in zip(axes, panels.items()):
        for name, label in names.items():
            steps, means = mean_curve(histories, name)
            smooth = [fmean(means[max(0, i - window + 1) : i + 1]) for i in range(len(means))]
            axis.plot(steps, smooth, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
        axis.legend(fontsize=8)
    save(figure, path)


def mean_curve(histories: list[list[dict]], name: str) -> tuple[list[int], list[float]]:
    """Average a logged metric over seeds: the updates at which it was logged, and its means there."""
    by_step = defaultdict(list)
    for entry in chain.from_iterable(histories):
        if name in entry:
            by_step[entry["step"]].append(entry[name])
    steps = sorted(by_step)
    return steps, [fmean(by_step[step]) for step in steps]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("pcm"))
    parser.add_argument("--merge", choices=EXPLORATION, default="probabilities", help="how the experts are merged")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--prompts", type=int, default=PCM_PROMPTS, help="train on so many of the shortest prompts")
    parser.add_argument("--rollouts", type=int, default=12, help="0: learn descriptions alone, and no rewards")
    parser.add_argument("--completions", type=int, default=384, help="of a rollout, eight for each prompt")
    parser.add_argument("--iterations", type=int, default=8, help="passes through a rollout")
    parser.add_argument("--batch", type=int, default=64, help="completions of an update")
    parser.add_argument("--description-steps", type=int, help="updates that teach descriptions; default by --merge")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--eta", type=float, default=16.0)
    parser.add_argument("--tokens", type=int, default=72, help="most tokens of an answer")
    parser.add_argument(
        "--expert-top-k", type=int, default=demo.EXPERT_TOP_K, help="tokens that an expert keeps; 0: all"
    )
    parser.add_argument("--quick", action="store_true", help="8 prompts, 8 completions of 16 tokens, in OUTPUT/quick")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.output /= "quick"
        arguments.prompts, arguments.completions, arguments.tokens = 8, 8, 16
        arguments.rollouts = min(arguments.rollouts, 1)
        arguments.description_steps = 2

    base, tokenizer = base_model()
    prompts = training_prompts(arguments.prompts)
    rows = with_references(base, tokenizer, prompts, arguments.output / "references.jsonl", arguments.tokens)
    # Of all seeds: what has been measured is kept
    quality = TextQuality(base, tokenizer, batch_size=READINGS_AT_ONCE)
    rewards, answering = proxy_rewards(quality), AnsweringReward(quality, training_prompts(PCM_PROMPTS))
    folders = [train(Dataset.from_list(rows), rewards, answering, seed, arguments) for seed in arguments.seeds]
    if arguments.rollouts:
        histories = [json.loads((folder / "history.json").read_text()) for folder in folders]
        draw_curves(histories, arguments.output / "curves.png")


if __name__ == "__main__":
    main()
