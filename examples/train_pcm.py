"""
Train the Preference Control Model of the six LoRA experts with REBEL, and measure what it wins.

    python examples/train_pcm.py --output pcm

1. Measure the headroom: on training prompts, uniform weights, single experts and static weights for each preference.
2. Train the PCM online on the eight preferences; stopped and run again, it goes on from the last checkpoint.
3. Answer the evaluation prompts, which it has never seen, with uniform weights, the best static ones and the PCM.
"""

import argparse
import itertools
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from tqdm import trange
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo
from modeling_pcm_ensemble.training import RebelConfig, RebelTrainer
from modeling_pcm_ensemble.training.preference_sampling import DrawnPreference, reward_shares
from modeling_pcm_ensemble.training.rewards import proxy_rewards

DATA = Path(__file__).parent / "data"
ARTIFACTS = Path(__file__).parent / "artifacts"
# Shares of a preference's three experts
STATIC = [(1, 1, 1), *itertools.permutations((3, 1, 1), 3), *itertools.permutations((2, 2, 1), 3)]
STATIC = list(dict.fromkeys([*STATIC, (1, 0, 0), (0, 1, 0), (0, 0, 1)]))


def conversations(prompts: list[str]) -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt}] for prompt in prompts]})


def training_prompts() -> Dataset:
    lines = (DATA / "train_prompts.jsonl").read_text().splitlines()
    return conversations([json.loads(line)["prompt"] for line in lines])


def evaluation_prompts() -> Dataset:
    entries = json.loads((DATA / "evaluation_only" / "koala_eval_50.json").read_text())
    return conversations([entry["prompt"] for entry in entries])


def make_trainer(model: PCMEnsembleForCausalLM, arguments) -> RebelTrainer:
    config = RebelConfig(
        output_dir=str(arguments.output),
        seed=arguments.seed,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.completions // 2,
        steps_per_generation=2,
        num_generations=arguments.generations,
        num_iterations=arguments.iterations,
        num_references=2,
        per_device_eval_batch_size=64,
        learning_rate=arguments.learning_rate,
        warmup_steps=4,
        eta=arguments.eta,
        kl_coef=arguments.kl,
        text_only_fraction=arguments.text_only,
        max_completion_length=arguments.tokens,
        rollout_batch_size=64,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_steps=4,
        save_total_limit=2,
        report_to="none",
    )
    rewards = proxy_rewards(model.backbones[0], model.tokenizer)
    return RebelTrainer(model, config, rewards, training_prompts(), processing_class=model.tokenizer)


def mean_rewards(trainer: RebelTrainer, dataset: Dataset, weights: dict[str, list[float]], seed: int) -> dict:
    """
    Answer all prompts under every preference, each with the given weights of the experts, and score by the preference.

    Returns:
        By preference: the rewards of the prompts, `reward`, and each dimension's, by name.
    """
    wanted = {draw.name: draw for draw in trainer.preferences.sets}
    jobs = [(row, name) for name in weights for row in dataset]
    found = {name: defaultdict(list) for name in weights}
    for start in trange(0, len(jobs), 64, desc="answering", leave=False):
        rows, names = zip(*jobs[start : start + 64])
        draws = [DrawnPreference(name, tuple(weights[name])) for name in names]
        shares = reward_shares([wanted[name] for name in names])
        _, scores = trainer.rollouts.sample(list(rows), draws, seed + start, shares)
        dimensions = {name: iter(values) for name, values in scores.dimensions.items()}
        for name, reward in zip(names, scores.rewards):
            found[name]["reward"].append(reward)
            for expert in name.split(" + "):
                found[name][expert].append(next(dimensions[expert]))
    return found


def spread(trainer: RebelTrainer, preference: str, shares: tuple) -> list[float]:
    """Shares of a preference's experts as weights of all experts."""
    left = iter(shares)
    wanted = preference.split(" + ")
    return [float(next(left)) if name in wanted else 0.0 for name in trainer.ensemble.config.expert_names]


def measured(path: Path, measure) -> dict:
    """What `measure` gives, or gave before."""
    if not path.exists():
        whole = json.dumps(measure(), indent=1)
        path.with_suffix(".part").write_text(whole)
        path.with_suffix(".part").replace(path)
    return json.loads(path.read_text())


def best_static_weights(trainer: RebelTrainer, prompts: int) -> dict[str, dict]:
    """Each preference's mean reward on training prompts under each of `STATIC`: the headroom."""
    dataset = trainer.train_dataset.shuffle(seed=1).select(range(prompts))
    found = defaultdict(dict)
    for shares in STATIC:
        weights = {draw.name: spread(trainer, draw.name, shares) for draw in trainer.preferences.sets}
        for name, rewards in mean_rewards(trainer, dataset, weights, seed=10_000).items():
            found[name][" ".join(map(str, shares))] = fmean(rewards["reward"])
    return found


def evaluate(trainer: RebelTrainer, weights: dict[str, list[float]], rounds: int) -> list[dict]:
    """Rewards on the evaluation prompts, once for each round."""
    return [mean_rewards(trainer, evaluation_prompts(), weights, seed=20_000 + 1000 * i) for i in range(rounds)]


def interval(first: list[dict], second: list[dict], preferences: list[str], samples: int = 10_000) -> tuple:
    """Mean difference of rewards and its 95 % bootstrap interval, over prompts as clusters."""
    differences = np.array(
        [[np.subtract(a[p]["reward"], b[p]["reward"]) for p in preferences] for a, b in zip(first, second)]
    ).mean(axis=(0, 1))  # (prompts,)
    draws = np.random.default_rng(0).choice(differences, (samples, len(differences))).mean(axis=1)
    return differences.mean(), *np.quantile(draws, [0.025, 0.975])


def report(folder: Path, results: dict[str, list[dict]]):
    """Mean rewards by preference, and by how much the PCM is above the others."""
    preferences = list(results["pcm"][0])
    table = Table(
        "preference", *results, "pcm − uniform", "pcm − static", title="mean reward on the evaluation prompts"
    )
    rows = {}
    for name in [*preferences, "all"]:
        some = preferences if name == "all" else [name]
        means = {k: fmean(r for run in runs for p in some for r in run[p]["reward"]) for k, runs in results.items()}
        versus = {k: interval(results["pcm"], results[k], some) for k in ("uniform", "static")}
        rows[name] = {"means": means, **{f"pcm - {k}": list(map(float, v)) for k, v in versus.items()}}
        cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in versus.values()]
        table.add_row(name, *(f"{value:.3f}" for value in means.values()), *cells)
    Console(width=140).print(table)
    (folder / "evaluation.json").write_text(json.dumps(rows, indent=2) + "\n")


def draw_curves(folder: Path, history: list[dict], window: int = 5):
    """Reward, α's entropy and KL over the run, as running means."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    dimensions = [f"reward of {name}" for name in demo.PREFERENCES]
    for axis, names in zip(axes, (["reward", "win_share"], dimensions, ["entropy", "kl"])):
        for name in names:
            steps, values = zip(*((entry["step"], entry[name]) for entry in history if name in entry))
            smooth = [fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
            axis.plot(steps, smooth, label=name)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("pcm"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=160, help="updates; a rollout gives twice --iterations")
    parser.add_argument("--completions", type=int, default=64, help="of a rollout")
    parser.add_argument("--generations", type=int, default=4, help="completions of a prompt")
    parser.add_argument("--iterations", type=int, default=1, help="passes through a rollout")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--eta", type=float, default=4.0)
    parser.add_argument("--kl", type=float, default=0.0)
    parser.add_argument("--text-only", type=float, default=0.2, help="share of prompts with the preference in words")
    parser.add_argument("--tokens", type=int, default=72, help="most tokens of an answer")
    parser.add_argument("--static-prompts", type=int, default=16, help="prompts that static weights are chosen on")
    parser.add_argument("--rounds", type=int, default=1, help="answers to each evaluation prompt")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    set_seed(arguments.seed)
    trainer = make_trainer(demo.lora_ensemble(ARTIFACTS), arguments)
    sets = [draw.name for draw in trainer.preferences.sets]
    uniform = {name: spread(trainer, name, (1, 1, 1)) for name in sets}

    # The head is still zero, so that the weights given are the weights of the mixture.
    headroom = measured(
        arguments.output / "headroom.json", lambda: best_static_weights(trainer, arguments.static_prompts)
    )
    best = {name: max(found, key=found.get) for name, found in headroom.items()}
    static = {name: spread(trainer, name, tuple(map(int, shares.split()))) for name, shares in best.items()}
    results = {
        name: measured(arguments.output / f"{name}.json", lambda w=weights: evaluate(trainer, w, arguments.rounds))
        for name, weights in (("uniform", uniform), ("static", static))
    }
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(arguments.output)))
    draw_curves(arguments.output, trainer.state.log_history)
    (arguments.output / "history.json").write_text(json.dumps(trainer.state.log_history, indent=1))
    learnt = load_file(Path(get_last_checkpoint(str(arguments.output))) / "pcm.safetensors")
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in learnt.items()}, arguments.output / "pcm.safetensors"
    )
    results["pcm"] = measured(
        arguments.output / f"pcm-{trainer.state.global_step}.json",
        lambda: evaluate(trainer, uniform, arguments.rounds),
    )
    report(arguments.output, results)


if __name__ == "__main__":
    main()
