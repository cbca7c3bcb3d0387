"""Write the tables in the documents from the results, so that no number is typed by hand."""

import json
import re
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "examples/artifacts/README.md")


def add_arguments(parser):
    """Nothing beside what all commands take."""


def run(arguments):
    if Path(arguments.output).resolve() != ROOT / "benchmarks" / "results":
        raise SystemExit("The documents' tables are of benchmarks/results; `readme` takes no other --output.")
    for name in DOCUMENTS:
        document = ROOT / name
        document.write_text(with_tables(document.read_text()))


def with_tables(text: str) -> str:
    """`text` with the table behind each marker made anew from its results."""
    for name, (path, make_table) in TABLES.items():
        before, marker, after = text.partition(f"<!-- {name} table -->\n")
        if marker:
            table = make_table(json.loads((ROOT / path).read_text()))
            text = before + marker + table + re.sub(r"\A(\|.*\n)*", "", after)
    return text


def decode_table(results: dict) -> str:
    rows = results["rows"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    ratios = {(row["name"], row["batch"]): row["ratio"] for row in rows}
    lines = ["| | " + " | ".join(f"batch {batch}" for batch in batches) + " |", "|---" * (len(batches) + 1) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [f"{ratios[name, batch]:.2f}" if (name, batch) in ratios else "–" for batch in batches]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def fast_table(results: dict) -> str:
    """Steps as multiples of an eager and of a compiled plain one; the first token in ms, and compiling in seconds."""
    rows = results["rows"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    found = {(row["name"], row["batch"]): row for row in rows}
    more = f"first token, ms, batch {' / '.join(map(str, batches))} | compiling, s, in all"
    lines = ["| | " + " | ".join([*(f"batch {batch}" for batch in batches), more]) + " |"]
    lines.append("|---" * (len(batches) + 3) + "|")
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [found[name, batch] for batch in batches]
        cells = [f"{row['ratio']:.2f} / {row['to compiled']:.2f}" for row in mine]
        cells.append(" / ".join(f"{1000 * row['first token']:.0f}" for row in mine))
        cells.append("–" if mine[0]["warm-up"] is None else f"{sum(row['warm-up'] for row in mine):.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def greedy_table(results: dict) -> str:
    """Of answers that differ, how many do so at a tie, and the largest margin."""
    lines = [
        "| | answers | the same | others at a tie (below 0.001) | largest margin, nats | time of compiled to eager |",
        "|---" * 6 + "|",
    ]
    for row in results["rows"]:
        ties, margin = sum(m < 1e-3 for m in row["margins"]), row["largest margin of another choice"]
        cells = [row["dtype"], row["answers"], row["equal"], ties, f"{margin:.3f}", f"{row['compiled to eager']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def continuous_table(results: dict) -> str:
    names = [name for name in results["rows"][0] if name != "name"]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in results["rows"]:
        lines.append(f"| {row['name']} | " + " | ".join(f"{row[name]:.1f}" for name in names) + " |")
    return "\n".join(lines) + "\n"


def memory_table(results: dict) -> str:
    rows = results["rows"][1:]
    lines = ["| | MB |", "|---|---|"]
    return "\n".join(lines + [f"| {row['name']} | {row['over_empty_mb']:.0f} |" for row in rows]) + "\n"


def scaling_table(results: dict) -> str:
    """The part with one request and the shortest context."""
    rows = results["rows"]
    shortest = min(row["context"] for row in rows)
    mine = [r for r in rows if r["name"] == "LoRA experts" and (r["batch"], r["context"]) == (1, shortest)]
    lines = [
        "| LoRA experts | " + " | ".join(str(row["experts"]) for row in mine) + " |",
        "|---" * (len(mine) + 1) + "|",
    ]
    return "\n".join([*lines, "| batch 1 | " + " | ".join(f"{row['ratio']:.2f}" for row in mine) + " |"]) + "\n"


def serve_table(results: dict) -> str:
    lines = ["| | seconds a request | throughput |", "|---|---|---|"]
    for row in results["rows"]:
        lines.append(f"| {row['name']} | {row['seconds']:.3f} | {row['throughput']:.2f}× |")
    return "\n".join(lines) + "\n"


def training_table(results: dict) -> str:
    """Seconds of a rollout and of an update, as multiples of the first row's."""
    found = {(row["what"], row["name"]): row["ratio"] for row in results["rows"]}
    lines = ["| | rollout | update |", "|---|---|---|"]
    for name in dict.fromkeys(row["name"] for row in results["rows"]):
        lines.append(f"| {name} | {found['rollout', name]:.2f} | {found['update', name]:.2f} |")
    return "\n".join(lines) + "\n"


def experts_table(report: dict) -> str:
    """Of every expert the reward on its own dimension, and its answers as text."""
    lines = ["| | own dimension | nll | relevance | repetition | words |", "|---" * 6 + "|"]
    for name, entry in report.items():
        own = 0.5 if name == "base" else entry[name]
        sane = f"{entry['nll']:.2f} | {entry['gain']:.2f} | {entry['repetition']:.3f} | {entry['words']:.0f}"
        lines.append(f"| {name} | {own:.3f} | {sane} |")
    return "\n".join(lines) + "\n"


def pcm_table(report: dict) -> str:
    """Rewards by preference, and by how much trained PCMs are above the others."""
    lines = ["| preference | uniform | best static | PCM | PCM − uniform | PCM − static |", "|---" * 6 + "|"]
    for name, entry in report["preferences"].items():
        means = [f"{entry[arm][0]:.3f}" for arm in ("uniform", "static", "pcm")]
        above = [_above(entry[f"pcm − {arm}"]) for arm in ("uniform", "static")]
        lines.append("| " + " | ".join([name, *means, *above]) + " |")
    return "\n".join(lines) + "\n"


def seeds_table(report: dict) -> str:
    """Of each training run the mean reward over all preferences, and by how much it is above the others."""
    found, arms = report["preferences"]["all"], ("uniform", "static", "mean")
    rows = [
        (name, found["pcm, each run"][run], *(found[f"pcm − {arm}, each run"][run] for arm in arms))
        for run, name in enumerate(report["runs"])
    ]
    rows.append(("all", found["pcm"][0], *(found[f"pcm − {arm}"] for arm in arms)))
    lines = ["| run | PCM | PCM − uniform | PCM − static | PCM − its mean α |", "|---" * 5 + "|"]
    for name, mean, *above in rows:
        lines.append("| " + " | ".join([name, f"{mean:.3f}", *map(_above, above)]) + " |")
    return "\n".join(lines) + "\n"


def words_table(report: dict) -> str:
    """Mean reward by how the preference is told, and the share of α of the experts meant, where all are active."""
    lines = ["| told by | reward | α of the experts meant |", "|---" * 3 + "|"]
    for told, found in report["in words"].items():
        share = found.get("share of wanted experts")
        lines.append(f"| {told} | {found['reward']:.3f} | {'–' if share is None else f'{share:.3f}'} |")
    return "\n".join(lines) + "\n"


def win_rates_table(report: dict) -> str:
    """Of every baseline the win rate against it, by each judge, and its mean reward."""
    judges = list(report["judges"])
    lines = ["| against | " + " | ".join(judges) + " | its mean reward |", "|---" * (len(judges) + 2) + "|"]
    for name in report["judges"][judges[0]]:
        rates = [_rate(report["judges"][judge][name]["win_rate"]) for judge in judges]
        lines.append(f"| {name} | " + " | ".join(rates) + f" | {report['rewards'][name]['mean']:.3f} |")
    return "\n".join(lines) + "\n"


def average_table(report: dict) -> str:
    """The mean of the win rates against the baselines of the paper's average."""
    paper = ("vanilla", "prompting", "Personalized Soup")
    means = [fmean(entry[name]["win_rate"][0] for name in paper) for entry in report["judges"].values()]
    lines = ["| | " + " | ".join(report["judges"]) + " |", "|---" * (len(means) + 1) + "|"]
    cells = " | ".join(f"{100 * mean:.1f} %" for mean in means)
    return "\n".join([*lines, f"| average of vanilla, prompting and Personalized Soup | {cells} |"]) + "\n"


def new_preferences_table(report: dict) -> str:
    """Of every kind of preference the win rate against either baseline, by each judge."""
    against = ("weights as given", "prompting")
    columns = [f"{name}: {judge}" for name in against for judge in report]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for kind in dict.fromkeys(name.partition(": ")[0] for name in next(iter(report.values()))):
        found = [report[judge][f"{kind}: {name}"]["win_rate"] for name in against for judge in report]
        lines.append(f"| {kind} | " + " | ".join(_rate(rate) for rate in found) + " |")
    return "\n".join(lines) + "\n"


def drafts_table(results: dict) -> str:
    """By preference the time, as a multiple of that without drafts, and tokens a pass of the mixture."""
    rows = results["rows"]
    preferences = list(dict.fromkeys(row["preference"] for row in rows))
    found = {(row["name"], row["preference"]): row for row in rows}
    lines = ["| | " + " | ".join(preferences) + " |", "|---" * (len(preferences) + 1) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [found[name, preference] for preference in preferences]
        tokens = ["" if row["tokens a pass"] is None else f" / {row['tokens a pass']:.2f}" for row in mine]
        cells = [f"{row['ratio']:.2f}{passed}" for row, passed in zip(mine, tokens)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _above(interval: list[float]) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval)


def _rate(win_rate: list[float]) -> str:
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * value for value in win_rate))


TABLES = {  # by marker: the results, and the table of them
    "decode": ("benchmarks/results/decode.json", decode_table),
    "decode-fast": ("benchmarks/results/decode-fast.json", fast_table),
    "greedy": ("benchmarks/results/greedy.json", greedy_table),
    "continuous": ("benchmarks/results/continuous.json", continuous_table),
    "memory": ("benchmarks/results/memory.json", memory_table),
    "decode-llama-16x1280": ("benchmarks/results/decode-llama-16x1280.json", decode_table),
    "scaling": ("benchmarks/results/scaling.json", scaling_table),
    "serve": ("benchmarks/results/serve.json", serve_table),
    "training": ("benchmarks/results/training-llama-2x1024.json", training_table),
    "experts": ("examples/artifacts/report.json", experts_table),
    "pcm": ("examples/artifacts/evaluation.json", pcm_table),
    "words": ("examples/artifacts/evaluation.json", words_table),
    "seeds": ("examples/artifacts/seeds.json", seeds_table),
    "drafts": ("benchmarks/results/drafts.json", drafts_table),
    "new preferences": ("docs/results/new_preferences.json", new_preferences_table),
    "win rates": ("docs/results/report.json", win_rates_table),
    "average": ("docs/results/report.json", average_table),
    "ablations": ("docs/results/ablations/report.json", win_rates_table),
}
