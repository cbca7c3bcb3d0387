"""Steering as pictures: fronts of pairs, and rewards by weight."""

from math import ceil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from .pictures import save
from .steering_measures import BASE, LineRewards, rank_correlation

COLUMNS = 3  # of fronts
COLORS = plt.get_cmap("tab20")([*range(0, 20, 2), *range(1, 20, 2)])  # dark ones first


def draw_fronts(by_way: dict[str, list[LineRewards]], alone: dict, judge: str, path: Path):
    r"""
    Draw the rewards of every pair of experts, a line for each way, with the share of the first expert at its points.

    Args:
        by_way (`dict[str, list[LineRewards]]`): each way's rewards; lines of three experts or more are left out.
        alone (`dict[str, dict[str, float]]`): rewards of experts alone, see [`rewards_alone`].
        judge (`str`): stands in the title.
        path (`Path`): of the picture.
    """
    pairs = {way: [entry for entry in lines if len(entry.line.experts) == 2] for way, lines in by_way.items()}
    number = len(next(iter(pairs.values())))
    columns = min(number, COLUMNS)
    rows = ceil(number / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 1.5 + 4.2 * rows), squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.1)  # or labels are cut off

    for place, axis in enumerate(axes.flat):
        if place >= number:
            axis.set_visible(False)
            continue
        for color, (way, entries) in enumerate(pairs.items()):
            _draw_front(axis, entries[place], way, COLORS[color % len(COLORS)])
        _draw_fixed_points(axis, entries[place].line.experts, alone)

    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=10)
    figure.suptitle(
        f"Mean rewards as the weight moves from one expert to the other (judge: {judge}).\n"
        "Numbers: share of the weight, in %, of the expert on the horizontal axis. Up and to the right is better.",
        fontsize=11,
    )
    save(figure, path)


def _draw_front(axis, entry: LineRewards, way: str, color: np.ndarray):
    """One way's line, and the share of the first expert at its ends and in the middle."""
    order = entry.line.edge(0)
    x, y = entry.rewards.mean(axis=2)[order].T
    axis.plot(x, y, "o-", color=color, label=way, linewidth=1.2, markersize=3.5)

    for place in {0, len(order) // 2, len(order) - 1}:
        share = entry.line.points[order[place]][0] / 2
        label = f"{100 * share:.0f}"
        axis.annotate(label, (x[place], y[place]), textcoords="offset points", xytext=(4, 4), fontsize=8, color=color)


def _draw_fixed_points(axis, experts: tuple[str, ...], alone: dict):
    """The base model and both experts alone, and what the axes are."""
    axis.plot(BASE, BASE, "k*", markersize=9, label="base model")
    for expert, marker, direction in zip(experts, (">", "^"), ("horizontal", "vertical")):
        place = [alone[expert][rewarded] for rewarded in experts]
        axis.plot(*place, f"k{marker}", markersize=6, label=f"expert of the {direction} axis alone")

    axis.set_title(" and ".join(experts), fontsize=10)
    axis.set_xlabel(f"reward of {experts[0]}")
    axis.set_ylabel(f"reward of {experts[1]}")
    axis.grid(alpha=0.3)


def draw_rewards_by_weight(by_judge: dict[str, dict[str, list[LineRewards]]], way: str, path: Path):
    r"""
    Draw one way's rewards as heat maps: a row for each expert of each line, along which its weight rises.

    Args:
        by_judge (`dict[str, dict[str, list[LineRewards]]]`): by judge and way; all have the same colours.
        way (`str`): whose rewards are drawn.
        path (`Path`): of the picture.
    """
    judges = list(by_judge)
    panels = {judge: _rows_by_shares(lines[way]) for judge, lines in by_judge.items()}
    heights = [len(rows) for rows in panels[judges[0]].values()]
    figure, axes = plt.subplots(
        len(heights),
        len(judges),
        figsize=(7.5 * len(judges), 1.6 + 0.27 * sum(heights) + 0.5 * len(heights)),
        squeeze=False,
        height_ratios=heights,
    )
    figure.set_layout_engine("constrained", w_pad=0.15)  # or the longest names are cut off

    furthest = _furthest(by_judge)
    for column, judge in enumerate(judges):
        for axis, (shares, rows) in zip(axes[:, column], panels[judge].items()):
            image = _draw_panel(axis, shares, rows, furthest)
        axes[0, column].set_title(f"judge: {judge}", fontsize=10)

    bar = figure.colorbar(image, ax=axes, shrink=0.5)
    bar.set_label("mean reward (0.5 = base model)")
    figure.suptitle(
        f"{way}: does an expert's reward rise with its weight? It does where a row grows bluer to the right.\n"
        "Beside each row, Spearman's ρ between weight and reward: 1 is perfect obedience.",
        fontsize=11,
    )
    save(figure, path)


def _rows_by_shares(entries: list[LineRewards]) -> dict[tuple[float, ...], list[tuple[str, np.ndarray, float]]]:
    """By shares along an edge, for each expert of a line its name against the others, rewards there, and ρ."""
    found: dict[tuple[float, ...], list[tuple[str, np.ndarray, float]]] = {}
    for entry in entries:
        means = entry.rewards.mean(axis=2)  # (points, experts)
        correlations = rank_correlation(np.array(entry.line.points), means[:, :, None])[:, 0]
        experts = entry.line.experts
        for place, expert in enumerate(experts):
            edge = entry.line.edge(place)
            shares = tuple(round(entry.line.points[point][place] / len(experts), 3) for point in edge)
            others = ", ".join(other for other in experts if other != expert)
            row = (f"{expert} against {others}", means[edge, place], correlations[place])
            found.setdefault(shares, []).append(row)
    return {shares: sorted(rows, key=lambda row: row[0]) for shares, rows in found.items()}


def _furthest(by_judge: dict[str, dict[str, list[LineRewards]]]) -> float:
    """How far from the base model's any mean reward is."""
    entries = [entry for ways in by_judge.values() for lines in ways.values() for entry in lines]
    return max(float(abs(entry.rewards.mean(axis=2) - BASE).max()) for entry in entries)


def _draw_panel(axis, shares: tuple[float, ...], rows: list[tuple[str, np.ndarray, float]], furthest: float):
    values = np.array([rewards for _, rewards, _ in rows])
    image = axis.imshow(values, cmap="RdBu", vmin=BASE - furthest, vmax=BASE + furthest, aspect="auto")
    axis.set_xticks(range(len(shares)), [f"{100 * share:.0f}" for share in shares])
    axis.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=8)
    axis.set_xlabel("share of the weight, %")

    for place, (_, _, correlation) in enumerate(rows):
        axis.annotate(
            f"{correlation:+.2f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8
        )
    return image


__all__ = ["draw_fronts", "draw_rewards_by_weight"]
