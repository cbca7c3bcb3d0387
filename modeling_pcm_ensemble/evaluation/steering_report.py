"""Results of many ways as one report: Markdown, JSON, pictures."""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..checkpoint_staging import staged_folder
from ..tables import number_interval, signed_interval, table
from .statistics import bootstrap_interval
from .steering import Line
from .steering_measures import (
    HIGHER_IS_BETTER,
    LineRewards,
    hypervolume,
    interval,
    measure_lines,
    over_lines,
    reference_point,
    rewards_alone,
)
from .steering_pictures import draw_fronts, draw_rewards_by_weight

SAMPLES = 2000
EXPLAINED = """\
Rewards are normalised: 0.5 is the base model. All intervals are of 95 %, by resampling prompts; those of differences \
draw the same prompts for both ways. A star marks a difference whose interval leaves out 0; nothing is adjusted for \
the number of comparisons. Ranks and fronts depend on how many prompts there are: noise lowers rank correlations, and \
raises violations and hypervolumes. Compare ways that were asked alike, and no numbers of prompts.

- moved ↑: rise of an expert's reward between the ends of its weight's range, mean over lines and experts
- rank correlation ↑: Spearman's ρ between weight and reward over a line's grid, mean over lines and experts; worst: \
the least of them
- violations ↓: share of the steps on which the reward falls while the weight rises; chance alone gives one half
- hypervolume ↑: share of the box between a reference point and the best reward, 1, that a line's points dominate, \
mean over lines; the reference is the worst of the base model and the line's experts alone, fixed before any way was \
measured
- inner product ↑: rewards weighted by what was asked for, mean over grids; where a judge has a reward that counts \
whatever is wanted (shared ↑, such as answering), it counts half as much beside
- Pareto share ↑: share of a line's points that no other one dominates"""


def read_results(folder: Path) -> tuple[dict, list[dict], dict]:
    """
    Read what was measured of the experts alone, of every way, by name, and of costs: nothing where they were not.

    Raises:
        FileNotFoundError: if the experts, or all ways, are missing.
        ValueError: if a result is of another test than the experts.
    """
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    experts = next((entry for entry in found.values() if "alone" in entry), None)
    ways = {name: entry for name, entry in found.items() if "way" in entry}
    if experts is None or not ways:
        missing = "experts alone" if experts is None else "ways"
        raise FileNotFoundError(f"{folder} has no results of {missing}. Measure them first.")

    for name, entry in ways.items():
        if differing := [key for key, value in experts["asked"].items() if entry["asked"].get(key) != value]:
            raise ValueError(
                f"{folder / name} was measured with other {', '.join(differing)} than the experts alone. Measure it "
                "again, or remove it."
            )
    costs: dict = next((entry for entry in found.values() if "costs" in entry), {})
    return experts, list(ways.values()), costs


def summarise_steering(experts: dict, results: list[dict], costs: dict, against: str) -> dict:
    r"""
    Compute every measure of every way.

    Args:
        experts (`dict`): from [`SteeringTest.measure_experts`].
        results (`list[dict]`): of each way, from [`SteeringTest.measure`].
        costs (`dict`): from [`SteeringTest.measure_costs`], or empty.
        against (`str`): the way that all others are compared with.

    Returns:
        `against`; `asked`; `judges`, each with `reference` (by line and expert), `hypervolume alone` (by line, what
        the experts alone and the base model dominate), `ways` and `differences` (by way and measure, estimate and
        ends of the interval), `hypervolume` (by line and way, likewise); `text` and `dtype` by way; and `costs`.

    Raises:
        ValueError: if `against` was not measured.
    """
    names = [result["way"] for result in results]
    if against not in names:
        raise ValueError(f"The ways cannot be compared with {against!r}. There are {', '.join(map(repr, names))}.")

    return {
        "against": against,
        "asked": experts["asked"],
        "judges": {judge: _of_judge(judge, experts, results, against) for judge in experts["asked"]["judges"]},
        "text": {result["way"]: _text(result["text"]) for result in results},
        "dtype": {result["way"]: result["dtype"] for result in results},
        "costs": costs,
    }


def line_rewards(experts: dict, result: dict, judge: str) -> list[LineRewards]:
    """Return one way's rewards on every line before one judge."""
    entries = []
    for asked, measured in zip(experts["asked"]["lines"], result["lines"], strict=True):
        line = Line(tuple(asked["experts"]), tuple(map(tuple, asked["points"])))
        reference = reference_point(line, experts["alone"][judge])
        shared = measured["shared"].get(judge)
        rewards = np.array(measured["rewards"][judge])
        entries.append(LineRewards(line, rewards, reference, None if shared is None else np.array(shared)))
    return entries


def _of_judge(judge: str, experts: dict, results: list[dict], against: str) -> dict:
    entries = line_rewards(experts, results[0], judge)
    references, without = {}, {}
    for entry in entries:
        label, points = entry.line.label, rewards_alone(entry.line, experts["alone"][judge])
        references[label] = dict(zip(entry.line.experts, entry.reference.tolist()))
        without[label] = float(hypervolume(points[:, :, None], entry.reference)[0])

    by_line = {}
    for result in tqdm(results, desc=f"measures: {judge}"):
        by_line[result["way"]] = measure_lines(line_rewards(experts, result, judge), SAMPLES)
    whole = {way: over_lines(lines) for way, lines in by_line.items()}

    hypervolumes: dict[str, dict[str, tuple]] = {}
    for place, label in enumerate(references):
        hypervolumes[label] = {way: interval(lines[place]["hypervolume"]) for way, lines in by_line.items()}

    differences = {}
    for way, measures in whole.items():
        if way != against:
            differences[way] = {name: interval(v - whole[against][name]) for name, v in measures.items()}
    return {
        "reference": references,
        "hypervolume alone": without,
        "ways": {way: {name: interval(v) for name, v in measures.items()} for way, measures in whole.items()},
        "differences": differences,
        "hypervolume": hypervolumes,
    }


def _text(by_prompt: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    """Means of what was read in answers, with their intervals."""
    return {name: bootstrap_interval(np.array([values])) for name, values in by_prompt.items()}


def write_steering_report(results: Path, folder: Path, against: str, command: str) -> dict:
    r"""
    Write `report.md`, `report.json` and pictures of all results that are there.

    Args:
        results (`Path`): a folder with results as JSON, see [`SteeringTest`].
        folder (`Path`): where the report is written; made if it is not there.
        against (`str`): the way that all others are compared with.
        command (`str`): what made it.

    Returns:
        What [`summarise_steering`] gives.

    Raises:
        FileNotFoundError, ValueError: as [`read_results`] and [`summarise_steering`].
    """
    experts, ways, costs = read_results(results)
    ways.sort(key=lambda way: way["way"] != against)
    report = {"command": command} | summarise_steering(experts, ways, costs, against)

    rewards = {}
    for judge in report["judges"]:
        rewards[judge] = {way["way"]: line_rewards(experts, way, judge) for way in ways}

    with staged_folder(folder) as name:  # pictures and tables of one report
        staging = Path(name)
        (staging / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for judge, by_way in rewards.items() if _has_pairs(report) else ():
            draw_fronts(by_way, experts["alone"][judge], judge, staging / _file("fronts", judge))
        for way in tqdm(report["text"], desc="pictures"):
            draw_rewards_by_weight(rewards, way, staging / _file("rewards", way))
        (staging / "report.md").write_text(markdown(report), encoding="utf-8")
    return report


def markdown(report: dict) -> str:
    """Write the report as text with tables and pictures."""
    asked = report["asked"]
    points = sum(len(line["points"]) for line in asked["lines"])
    parts = [
        "# Steering by weights",
        f"`{report['command']}`",
        f"Lines: {len(asked['lines'])}, with {points} points. Prompts: {len(asked['prompts'])}. Answers to each "
        f"prompt at each point: {asked['answers']}.",
        EXPLAINED,
        summary_tables(report),
    ]

    for judge, entry in report["judges"].items():
        if _has_pairs(report):
            parts += [f"## Fronts of pairs, judge: {judge}", f"![fronts]({_file('fronts', judge)})"]
        parts += [f"## Hypervolume by line, judge: {judge}", _hypervolumes(entry)]
    parts += ["## Rewards by weight"]
    parts += [f"![rewards by weight, {way}]({_file('rewards', way)})" for way in report["text"]]
    return "\n\n".join(parts) + "\n"


def _has_pairs(report: dict) -> bool:
    return any(len(line["experts"]) == 2 for line in report["asked"]["lines"])


def summary_tables(report: dict) -> str:
    """Write the tables by way: steering before each judge, differences, answers as text and cost."""
    parts = []
    for judge, entry in report["judges"].items():
        parts += [f"## Steering, judge: {judge}", _measures(entry["ways"], number_interval)]
        if entry["differences"]:
            parts += [f"## Less {report['against']}, judge: {judge}", _measures(entry["differences"], _starred)]

    parts += ["## Answers as text", _texts(report)]
    if report["costs"]:
        parts += ["## Cost, 8 answers at once", _costs(report["costs"])]
    return "\n\n".join(parts)


def _measures(ways: dict[str, dict], write) -> str:
    """One row for each way, one column for each measure."""
    names = list(next(iter(ways.values())))
    header = [f"{name} {'↑' if HIGHER_IS_BETTER[name] else '↓'}" for name in names]
    return table(["", *header], [[way, *(write(entry[name]) for name in names)] for way, entry in ways.items()])


def _starred(difference: tuple[float, float, float]) -> str:
    _, low, high = difference
    return signed_interval(difference) + " *" * (low > 0 or high < 0)


def _hypervolumes(entry: dict) -> str:
    """One row for each line: its reference point, and what each way dominates from there on."""
    rows = []
    for line, of_ways in entry["hypervolume"].items():
        reference = ", ".join(f"{value:.3f}" for value in entry["reference"][line].values())
        alone = f"{entry['hypervolume alone'][line]:.3f}"
        rows.append([line, reference, alone, *(number_interval(value) for value in of_ways.values())])
    return table(["line", "reference", "experts alone", *entry["ways"]], rows)


def _texts(report: dict) -> str:
    names = list(next(iter(report["text"].values())))
    rows = []
    for way, entry in report["text"].items():
        rows.append([way, *(number_interval(entry[name]) for name in names), report["dtype"][way]])
    return table(["", *names, "dtype"], rows)


def _costs(measured: dict) -> str:
    rows = []
    for way, cost in measured["costs"].items():
        rows.append([way, f"{cost['time']:.2f}", f"{cost['working_mb']:.0f}", f"{cost['weights_mb']:.0f}"])
    return table([measured["dtype"], "time of a token", "working memory, MB", "weights, MB"], rows)


def _file(kind: str, name: str) -> str:
    """The file of a picture, without what a link in Markdown would end at."""
    return f"{kind}-{''.join(c if c.isalnum() else '-' for c in name)}.png"


__all__ = ["markdown", "read_results", "summarise_steering", "summary_tables", "write_steering_report"]
