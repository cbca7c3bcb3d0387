"""
Draw what measure_pcm.py found: rewards of every arm, and what a trained PCM's α depends on.

    python examples/smollm2/inspect_pcm.py evaluation/pcm --run seed-0

Prints how much of α's variance preference, position and token explain, and draws α over the answer in which it moves
most from one expert to another.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from common import mean_weights
from rich.console import Console
from transformers import AutoTokenizer

from modeling_pcm_ensemble import demo
from modeling_pcm_ensemble.checkpoint_staging import write_text
from modeling_pcm_ensemble.evaluation import omega_squared
from modeling_pcm_ensemble.evaluation.pictures import draw_expert_weights, save

NAMES = list(demo.PREFERENCES)


def explained(lines: list[dict]) -> dict[str, float]:
    """
    Compute the share of each expert's variance of α that lies between preferences; and, of what is left within a
    preference, between positions in the answer, and between the tokens that were read last.
    """
    cells, places, tokens, values = [], [], [], []
    for line in lines:
        wanted = [i for i, expert in enumerate(NAMES) if expert in line["experts"]]
        # the α of a token was given when the one before it was read
        for place, (token, weights) in enumerate(zip([None, *line["token_ids"]], line["expert_weights"])):
            for i in wanted:
                cells.append((NAMES[i], line["preference"]))
                places.append(place)
                tokens.append(token)
                values.append(weights[i])

    return {
        "preference": omega_squared(cells, values, [expert for expert, _ in cells]),
        "position": omega_squared(list(zip(cells, places)), values, cells),
        "token": omega_squared(list(zip(cells, tokens)), values, cells),
    }


def hand_over(line: dict) -> float:
    """Compute how far α moves between the first and the last third of an answer; 0 of a short one."""
    weights = np.array(line["expert_weights"])  # (tokens, experts)
    third = len(weights) // 3
    if third < 6:
        return 0.0
    return float(np.abs(weights[-third:].mean(axis=0) - weights[:third].mean(axis=0)).sum())


def draw_arms(report: dict, path: Path):
    """Draw rewards of every arm: by preference with 95 % intervals, and by dimension."""
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
    save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where measure_pcm.py has written: OUTPUT/pcm")
    parser.add_argument("--run", default="seed-0", help="whose α to look at")
    arguments = parser.parse_args()
    folder, console = arguments.folder, Console()

    lines = [json.loads(line) for line in (folder / f"expert-weights-{arguments.run}.jsonl").read_text().splitlines()]
    means = {label: dict(preference.weights) for label, preference in mean_weights(lines, NAMES).items()}
    report = {"explained": explained(lines), "mean": means}
    console.print("variance of α explained by", {name: round(share, 3) for name, share in report["explained"].items()})
    console.print("mean α", report["mean"])
    write_text(folder / "expert_weights.json", json.dumps(report, indent=1) + "\n")

    line = max(lines, key=hand_over)
    tokenizer = AutoTokenizer.from_pretrained(demo.fetch_smollm2())
    tokens = [tokenizer.decode([token]) for token in line["token_ids"]]
    console.print(f"\n{line['prompt']}\n[{line['preference']}]\n{''.join(tokens)}", markup=False)
    columns = [NAMES.index(name) for name in line["experts"]]
    values = np.array(line["expert_weights"])[:, columns]
    picture = {"title": line["prompt"], "names": line["experts"], "tokens": tokens, "values": values}
    draw_expert_weights(picture, folder / "expert_weights.png")
    draw_arms(json.loads((folder / "evaluation.json").read_text()), folder / "rewards.png")


if __name__ == "__main__":
    main()
