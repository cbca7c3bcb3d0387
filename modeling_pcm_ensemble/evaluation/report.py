"""An evaluation as Markdown, JSON, pictures and the results of a model card."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from huggingface_hub import EvalResult

from ..checkpoint_staging import staged_folder


def write_report(report: dict, folder: Path):
    r"""
    Write `report.json`, `report.md` and the pictures it shows.

    Args:
        report (`dict`):
            `title`, `command`, and what [`evaluate`] gives: `ours`, `base`, `judges` (by name what [`summarise`]
            gives), `agreement` (by pair of judges), `rewards` (by baseline, dimension and `mean` → mean normalised
            reward), `quality` (by baseline, measure → mean), `cost` (what [`measure_cost`] gives), and
            `expert_weights` (`tokens`, `names`, `values`, `title`).
        folder (`Path`): made if it is not there.
    """
    with staged_folder(folder) as staging:  # pictures and tables of one report
        staging = Path(staging)
        (staging / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draw_win_rates(report["judges"], staging / "win_rates.png")
        draw_rewards(report["rewards"], staging / "rewards.png")
        draw_cost(report["cost"], report["rewards"], staging / "cost.png")
        draw_expert_weights(report["expert_weights"], staging / "expert_weights.png")
        (staging / "report.md").write_text(markdown(report), encoding="utf-8")


def markdown(report: dict) -> str:
    """The report as text with tables."""
    parts = [f"# {report['title']}", f"`{report['command']}`", "![win rates](win_rates.png)"]
    for judge, baselines in report["judges"].items():
        parts += [f"## Win rate of {report['ours']}, judge: {judge}", win_rate_table(baselines)]
    for part in ("preferences", "dimensions"):
        parts += [f"## Win rates by {part[:-1]}, % (* p < 0.05)"]
        parts += [_part_table(judge, baselines, part) for judge, baselines in report["judges"].items()]
    rows = [[pair, f"{both[0]:.0%}", f"{both[1]:.2f}"] for pair, both in report["agreement"].items() if both]
    parts += ["## Agreement of judges", table(["judges", "same side", "Cohen's κ"], rows)]
    parts += [
        "## Mean reward against the base model (0.5)",
        "![by dimension](rewards.png)",
        _numbers(report["rewards"]),
    ]
    parts += ["## Answers as text", _numbers(report["quality"]), _worse_text(report)]
    cost = {
        name: {
            "tokens per second": 1 / entry["seconds_per_token"],
            "working memory, MB": entry["working_mb"],
            "weights, MB": entry["weights_mb"],
        }
        for name, entry in report["cost"].items()
    }
    parts += [
        "## Cost, 8 answers at once (the PCM runs in every mixture)",
        "![cost and reward](cost.png)",
        _numbers(cost, digits=1),
    ]
    parts += ["## α over an answer", "![α](expert_weights.png)"]
    return "\n\n".join(parts) + "\n"


def worse_by(ours: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """
    How much worse answers are as text than the base model's, in %: their nats a token, and those that the prompt
    saves, both of the base model's nats a token; and the share of repeated word triples, in points.
    """
    worse = {
        "nll": (ours["nll"] - base["nll"]) / base["nll"],
        "gain": (base["gain"] - ours["gain"]) / base["nll"],
        "repetition": ours["repetition"] - base["repetition"],
    }
    return {name: 100 * value for name, value in worse.items()}


def _worse_text(report: dict) -> str:
    worse = worse_by(report["quality"][report["ours"]], report["quality"][report["base"]])
    parts = [f"{name} {value:+.1f} %" for name, value in worse.items()]
    return (
        f"How much worse than {report['base']} the {report['ours']} is: {', '.join(parts)} (of the nats a token of "
        f"{report['base']}; repetition in points)."
    )


def win_rate_table(baselines: dict[str, dict]) -> str:
    """Win rates with intervals, p-values and the judge's position bias."""
    rows = [
        [name, interval(entry["win_rate"]), f"{entry['p']:.3f}", f"{100 * entry['position_bias']:+.1f} %"]
        for name, entry in baselines.items()
        if entry["win_rate"]
    ]
    return table(["against", "win rate [95 %]", "p (Holm)", "shown first"], rows)


def _part_table(judge: str, baselines: dict[str, dict], part: str) -> str:
    """Win rates by preference or dimension; a star where Holm's p is below 0.05."""
    names = list(dict.fromkeys(name for entry in baselines.values() for name in entry[part]))
    rows = [[name, *(_cell(entry[part].get(name)) for entry in baselines.values())] for name in names]
    return f"Judge: {judge}\n\n" + table(["", *baselines], rows)


def _cell(entry: dict | None) -> str:
    if entry is None or entry["win_rate"] is None:
        return "–"
    return f"{100 * entry['win_rate'][0]:.0f}" + "*" * (entry["p"] < 0.05)


def interval(rate: list[float]) -> str:
    """`66.1 % [61.0, 71.2]`"""
    mean, low, high = (100 * value for value in rate)
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def _numbers(entries: dict[str, dict[str, float]], digits: int = 3) -> str:
    columns = list(dict.fromkeys(name for entry in entries.values() for name in entry))
    rows = [[name, *(f"{e[c]:.{digits}f}" if c in e else "–" for c in columns)] for name, e in entries.items()]
    return table(["", *columns], rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def eval_results(report: dict, dataset: str, dataset_name: str) -> list[EvalResult]:
    """Win rates in the form of a model card's index."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset_name,
            metric_type="win_rate",
            metric_name=f"win rate against {name}, judge: {judge}",
            metric_value=round(entry["win_rate"][0], 4),
        )
        for judge, baselines in report["judges"].items()
        for name, entry in baselines.items()
        if entry["win_rate"]
    ]


def draw_win_rates(judges: dict[str, dict], path: Path):
    """A bar for each baseline and judge, with its interval."""
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
    _save(figure, path)


def draw_rewards(rewards: dict[str, dict[str, float]], path: Path):
    """Mean reward of every baseline by dimension, as a radar."""
    names = list(dict.fromkeys(name for entry in rewards.values() for name in entry if name != "mean"))
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    figure, axis = plt.subplots(figsize=(9, 6.5), subplot_kw={"projection": "polar"}, layout="constrained")
    for baseline, entry in rewards.items():
        if set(names) <= set(entry):
            values = [entry[name] for name in names]
            axis.plot([*angles, angles[0]], [*values, values[0]], label=baseline, linewidth=1.2)
    axis.set_xticks(angles, names)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.1, 0.5))
    _save(figure, path)


def draw_cost(cost: dict[str, dict], rewards: dict[str, dict[str, float]], path: Path):
    """Time a token against mean reward."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, entry in cost.items():
        place = (1000 * entry["seconds_per_token"], rewards[name]["mean"])
        axis.plot(*place, "o")
        axis.annotate(name, place, textcoords="offset points", xytext=(4, 4), fontsize=8)
    axis.set_xlabel("milliseconds a token")
    axis.set_ylabel("mean reward (0.5 = base model)")
    _save(figure, path)


def draw_expert_weights(entry: dict, path: Path):
    """α over an answer, as a heat map: experts down, tokens along."""
    values = np.array(entry["values"]).T  # (experts, tokens)
    figure, axis = plt.subplots(figsize=(14, 1.2 + 0.4 * len(values)), layout="constrained")
    image = axis.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axis.set_yticks(range(len(values)), entry["names"])
    axis.set_xticks(range(len(entry["tokens"])), [t.strip() or "⏎" for t in entry["tokens"]], rotation=90, fontsize=7)
    for label in axis.get_xticklabels():
        label.set_parse_math(False)
    axis.set_title(entry["title"], fontsize=9, parse_math=False)
    figure.colorbar(image, label="α")
    _save(figure, path)


def _save(figure, path: Path):
    figure.savefig(path, dpi=100)
    plt.close(figure)
