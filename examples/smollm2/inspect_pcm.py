"""
Draw what examples/evaluate_pcm.py found: rewards of every arm, and what a trained PCM's α depends on.

    python examples/inspect_pcm.py evaluation/pcm --run seed-0

Prints how much of α's variance preference, position and token explain, and draws α over the answer in which it moves
most from one expert to another.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from transformers import AutoTokenizer

from modeling_pcm_ensemble import demo
from modeling_pcm_ensemble.checkpoint_staging import write_text
from modeling_pcm_ensemble.evaluation import omega_squared

NAMES = list(demo.PREFERENCES)


def explained(lines: list[dict]) -> dict[str, float]:
    """
    Share of each expert's variance of α that lies between preferences; and, of what is left within a preference,
    between positions in the answer, and between the tokens that were read last.
    """
    rows = [
        ((expert, line["preference"]), place, token, weights[i])
        for line in lines
        # the α of a token was given when the one before it was read
        for place, (token, weights) in enumerate(zip([None, *line["token_ids"]], line["expert_weights"]))
        for i, expert in enumerate(NAMES)
        if expert in line["experts"]
    ]
    cells, places, tokens, values = zip(*rows)
    return {
        "preference": omega_squared(cells, values, [expert for expert, _ in cells]),
        "position": omega_squared(list(zip(cells, places)), values, cells),
        "token": omega_squared(list(zip(cells, tokens)), values, cells),
    }


def mean_weights(lines: list[dict]) -> dict[str, dict[str, float]]:
    """Mean α of each expert under each preference."""
    found = {}
    for preference in dict.fromkeys(line["preference"] for line in lines):
        rows = np.concatenate([line["expert_weights"] for line in lines if line["preference"] == preference])
        found[preference] = {name: round(w, 3) for name, w in zip(NAMES, rows.mean(axis=0).tolist()) if w}
    return found


def hand_over(line: dict) -> float:
    """How far α moves between the first and the last third of an answer."""
    weights, third = np.array(line["expert_weights"]), len(line["expert_weights"]) // 3
    return float(np.abs(weights[-third:].mean(axis=0) - weights[:third].mean(axis=0)).sum()) if third >= 6 else 0.0


def draw_expert_weights(line: dict, tokens: list[str], path: Path):
    """α over an answer, as stacked areas above its tokens."""
    experts = [i for i, name in enumerate(NAMES) if name in line["experts"]]
    weights = np.array(line["expert_weights"])[:, experts]  # (tokens, experts)
    figure, axis = plt.subplots(figsize=(14, 3.6), layout="constrained")
    axis.stackplot(range(len(weights)), weights.T, labels=[NAMES[i] for i in experts], alpha=0.85)
    axis.set_xticks(range(len(tokens)), [t.strip() or "⏎" for t in tokens], rotation=90, fontsize=7)
    for label in axis.get_xticklabels():
        label.set_parse_math(False)
    axis.set_xlim(0, len(weights) - 1)
    axis.set_ylim(0, 1)
    axis.set_ylabel("α")
    axis.set_title(line["prompt"], fontsize=9, parse_math=False)
    axis.legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_rewards(report: dict, path: Path):
    """Rewards of every arm: by preference with 95 % intervals, and by dimension."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 4.5), width_ratios=(3, 2), layout="constrained")
    for number, (arm, by_dimension) in enumerate(report["dimensions"].items()):
        shift = 0.15 * (number - 1)
        mean, low, high = np.array([entry[arm] for entry in report["preferences"].values()]).T
        places = np.arange(len(mean)) + shift
        left.errorbar(places, mean, [mean - low, high - mean], fmt="o", capsize=3, label=arm)
        right.plot(np.arange(len(by_dimension)) + shift, list(by_dimension.values()), "o", label=arm)
    left.set_xticks(range(len(mean)), [name.replace(" + ", "\n") for name in report["preferences"]], fontsize=8)
    right.set_xticks(range(len(NAMES)), NAMES, fontsize=8)
    for axis in (left, right):
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.set_ylabel("reward (0.5 = base model)")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where examples/evaluate_pcm.py has written: OUTPUT/pcm")
    parser.add_argument("--run", default="seed-0", help="whose α to look at")
    arguments = parser.parse_args()
    folder, console = arguments.folder, Console()
    lines = [json.loads(line) for line in (folder / f"expert-weights-{arguments.run}.jsonl").read_text().splitlines()]
    report = {"explained": explained(lines), "mean": mean_weights(lines)}
    console.print("variance of α explained by", {name: round(share, 3) for name, share in report["explained"].items()})
    console.print("mean α", report["mean"])
    line = max(lines, key=hand_over)
    tokenizer = AutoTokenizer.from_pretrained(demo.fetch_smollm2())
    tokens = [tokenizer.decode([token]) for token in line["token_ids"]]
    console.print(f"\n{line['prompt']}\n[{line['preference']}]\n{''.join(tokens)}", markup=False)
    write_text(folder / "expert_weights.json", json.dumps(report, indent=1) + "\n")
    draw_expert_weights(line, tokens, folder / "expert_weights.png")
    draw_rewards(json.loads((folder / "evaluation.json").read_text()), folder / "rewards.png")


if __name__ == "__main__":
    main()
