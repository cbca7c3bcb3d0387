"""An evaluation's numbers as pictures."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


def draw_win_rates(judges: dict[str, dict], path: Path):
    """Draw a bar for each baseline and judge, with its interval."""
    names = list(next(iter(judges.values())))
    figure, axis = plt.subplots(figsize=(9, 1 + 0.45 * len(names)), layout="constrained")
    height = 0.8 / len(judges)

    for number, (judge, baselines) in enumerate(judges.items()):
        rates = [baselines[name]["win_rate"] or [np.nan] * 3 for name in names]  # of some nobody has judged
        mean, low, high = 100 * np.array(rates).T
        places = np.arange(len(names)) + (number - (len(judges) - 1) / 2) * height
        axis.barh(places, mean, height, xerr=[mean - low, high - mean], capsize=2, label=judge)

    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(50, color="black", linewidth=0.8)
    axis.set_xlim(0, 100)
    axis.set_xlabel("win rate, %")
    axis.legend(fontsize=8)
    save(figure, path)


def draw_rewards(rewards: dict[str, dict[str, float]], path: Path):
    """Draw the mean reward of every baseline by dimension, as a radar."""
    names = list(dict.fromkeys(name for entry in rewards.values() for name in entry if name != "mean"))
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    figure, axis = plt.subplots(figsize=(9, 6.5), subplot_kw={"projection": "polar"}, layout="constrained")

    for baseline, entry in rewards.items():
        if set(names) <= set(entry):
            values = [entry[name] for name in names]
            axis.plot([*angles, angles[0]], [*values, values[0]], label=baseline, linewidth=1.2)

    axis.set_xticks(angles, names)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.1, 0.5))
    save(figure, path)


def draw_cost(cost: dict[str, dict], rewards: dict[str, dict[str, float]], path: Path):
    """Draw time a token against mean reward."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, entry in cost.items():
        place = (1000 * entry["seconds_per_token"], rewards[name]["mean"])
        axis.plot(*place, "o")
        axis.annotate(name, place, textcoords="offset points", xytext=(4, 4), fontsize=8)

    axis.set_xlabel("milliseconds a token")
    axis.set_ylabel("mean reward (0.5 = base model)")
    save(figure, path)


def draw_expert_weights(entry: dict, path: Path):
    """
    Draw α over an answer, as stacked areas above its tokens; or strengths, as lines.

    Args:
        entry (`dict`): `title`, `names` of the experts, `tokens` as texts, `values`, `(tokens, experts)`, and,
            where these are strengths, `adds_up`.
        path (`Path`): of the picture.
    """
    values = np.array(entry["values"])  # (tokens, experts)
    figure, axis = plt.subplots(figsize=(14, 3.6), layout="constrained")
    if entry.get("adds_up"):
        axis.plot(values, label=entry["names"])
        axis.set_ylabel("strength")
    else:
        axis.stackplot(range(len(values)), values.T, labels=entry["names"], alpha=0.85)
        axis.set_ylim(0, 1)
        axis.set_ylabel("α")

    axis.set_xticks(range(len(values)), [t.strip() or "⏎" for t in entry["tokens"]], rotation=90, fontsize=7)
    for label in axis.get_xticklabels():
        label.set_parse_math(False)  # a token may be a dollar sign
    axis.set_xlim(0, max(len(values) - 1, 1))
    axis.set_title(entry["title"], fontsize=9, parse_math=False)
    axis.legend(loc="upper right", fontsize=8)
    save(figure, path)


def save(figure, path: Path):
    """Write a picture, and free its memory."""
    figure.savefig(path, dpi=100)
    plt.close(figure)


__all__ = ["draw_cost", "draw_expert_weights", "draw_rewards", "draw_win_rates", "save"]
