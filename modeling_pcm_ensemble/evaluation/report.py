"""An evaluation as Markdown, JSON, pictures and the results of a model card."""

import json
from pathlib import Path

from huggingface_hub import EvalResult

from ..checkpoint_staging import staged_folder
from ..tables import percent_interval, table
from .pictures import draw_cost, draw_expert_weights, draw_rewards, draw_win_rates


def write_report(report: dict, folder: Path):
    r"""
    Write `report.json`, `report.md` and the pictures it shows.

    Args:
        report (`dict`):
            `title`, `command`, and what [`evaluate`] gives: `ours`, `base`, `judges` (by name what [`summarise`]
            gives), `agreement` (by pair of judges), `rewards` (by baseline, dimension and `mean` → mean normalised
            reward), `quality` (by baseline, measure → mean), `cost` (what [`measure_cost`] gives),
            `expert_weights` (`tokens`, `names`, `values`, `title`), and `truncation` (`bound`, `tokens`; or None).
        folder (`Path`): made if it is not there.
    """
    with staged_folder(folder) as name:  # pictures and tables of one report
        staging = Path(name)
        (staging / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draw_win_rates(report["judges"], staging / "win_rates.png")
        draw_rewards(report["rewards"], staging / "rewards.png")
        if report["cost"]:
            draw_cost(report["cost"], report["rewards"], staging / "cost.png")
        draw_expert_weights(report["expert_weights"], staging / "expert_weights.png")
        (staging / "report.md").write_text(markdown(report), encoding="utf-8")


def markdown(report: dict) -> str:
    """Write the report as text with tables."""
    parts = [f"# {report['title']}", f"`{report['command']}`", "![win rates](win_rates.png)"]
    for judge, baselines in report["judges"].items():
        parts += [f"## Win rate of {report['ours']}, judge: {judge}", win_rate_table(baselines)]
    for part in ("preferences", "dimensions"):
        parts += [f"## Win rates by {part[:-1]}, % (* p < 0.05)"]
        parts += [_part_table(judge, baselines, part) for judge, baselines in report["judges"].items()]

    rows = [[pair, f"{both[0]:.0%}", f"{both[1]:.2f}"] for pair, both in report["agreement"].items() if both]
    parts += ["## Agreement of judges", table(["judges", "same side", "Cohen's κ"], rows)]

    parts += ["## Mean reward against the base model (0.5)", "![by dimension](rewards.png)"]
    parts += [_numbers(report["rewards"])]
    parts += ["## Answers as text", _numbers(report["quality"]), _worse_text(report)]

    if report["cost"]:
        parts += ["## Cost, 8 answers at once (the PCM runs in every mixture)", "![cost and reward](cost.png)"]
        parts += [_numbers({name: _cost(entry) for name, entry in report["cost"].items()}, digits=1)]
    if (truncation := report.get("truncation")) is not None:
        parts += [
            "Experts keep their most probable tokens alone. Over "
            f"{truncation['tokens']} tokens of answers, the mixture is at most {truncation['bound']:.3f} of the "
            "probability, on average, from that of whole distributions."
        ]
    parts += ["## α over an answer", "![α](expert_weights.png)"]
    return "\n\n".join(parts) + "\n"


def worse_by(ours: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """
    Compute how much worse answers are as text than the base model's, in %: their nats a token, and those that the
    prompt saves, both of the base model's nats a token; and the share of repeated word triples, in points.
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


def _cost(entry: dict[str, float]) -> dict[str, float]:
    return {
        "tokens per second": 1 / entry["seconds_per_token"],
        "working memory, MB": entry["working_mb"],
        "weights, MB": entry["weights_mb"],
    }


def win_rate_table(baselines: dict[str, dict]) -> str:
    """Write win rates with intervals, p-values and the judge's position bias."""
    rows = []
    for name, entry in baselines.items():
        if entry["win_rate"]:
            bias = f"{100 * entry['position_bias']:+.1f} %"
            rows.append([name, percent_interval(entry["win_rate"]), f"{entry['p']:.3f}", bias])
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


def _numbers(entries: dict[str, dict[str, float]], digits: int = 3) -> str:
    columns = list(dict.fromkeys(name for entry in entries.values() for name in entry))
    rows = []
    for name, entry in entries.items():
        rows.append([name, *(f"{entry[column]:.{digits}f}" if column in entry else "–" for column in columns)])
    return table(["", *columns], rows)


def eval_results(report: dict, dataset: str, dataset_name: str) -> list[EvalResult]:
    """Give win rates in the form of a model card's index; those of the baselines that a judge has compared."""
    results = []
    for judge, baselines in report["judges"].items():
        for name, entry in baselines.items():
            if not entry["win_rate"]:
                continue

            result = EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=dataset_name,
                metric_type="win_rate",
                metric_name=f"win rate against {name}, judge: {judge}",
                metric_value=round(entry["win_rate"][0], 4),
            )
            results.append(result)
    return results


__all__ = ["eval_results", "markdown", "win_rate_table", "worse_by", "write_report"]
