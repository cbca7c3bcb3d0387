"""Write the tables in the documents from the results, so that no number is typed by hand."""

import itertools
import json
import re
from pathlib import Path
from statistics import fmean

from modeling_pcm_ensemble.tables import percent_interval, signed_interval, table

from .continuous import MEASURES

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    "README.md",
    "docs/results.md",
    "docs/guides/speed.md",
    "docs/guides/training.md",
    "examples/smollm2/artifacts/README.md",
    "examples/serving/README.md",
    "examples/endpoints/README.md",
)
REPORT, STEERING = "docs/results/report.json", "examples/smollm2/artifacts/steering/report.json"
ADDED_ADAPTERS = "docs/results/adapters/report.json"


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
            made = make_table(json.loads((ROOT / path).read_text())) + "\n"
            text = before + marker + made + re.sub(r"\A(\|.*\n)*", "", after)
    return text


def decode_in_short_table(results: dict) -> str:
    names = ("prompted experts", "LoRA experts", 'LoRA, merge="adapters"', "separate models", "PEFT mixed batch")
    return decode_table({"rows": [row for row in results["rows"] if row["name"] in names]})


def decode_table(results: dict) -> str:
    rows = results["rows"]
    batches = _distinct(rows, "batch")
    ratios = {(row["name"], row["batch"]): row["ratio"] for row in rows}

    lines = []
    for name in _distinct(rows, "name"):
        found = [ratios.get((name, batch)) for batch in batches]
        lines.append([name, *("–" if ratio is None else f"{ratio:.2f}" for ratio in found)])
    return table(["", *(f"batch {batch}" for batch in batches)], lines)


def fast_table(results: dict) -> str:
    """Steps as multiples of an eager and of a compiled plain one, and the first token in ms."""
    rows = results["rows"]
    batches = _distinct(rows, "batch")
    found = {(row["name"], row["batch"]): row for row in rows}

    lines = []
    for name in _distinct(rows, "name"):
        of_name = [found[name, batch] for batch in batches]
        steps = [f"{row['ratio']:.2f} / {row['to compiled']:.2f}" for row in of_name]
        first_tokens = " / ".join(f"{1000 * row['first token']:.0f}" for row in of_name)
        lines.append([name, *steps, first_tokens])

    columns = [f"batch {batch}" for batch in batches]
    return table(["", *columns, f"first token, ms, batch {' / '.join(map(str, batches))}"], lines)


def start_table(results: dict) -> str:
    """Seconds of a process' first answer and of later ones, and the tokens after which compiling has paid."""
    lines = []
    for row in results["rows"]:
        pays_after = "–" if not row["pays after"] else f"{row['pays after']:.0f}"
        lines.append([row["name"], f"{row['first']:.1f}", f"{row['later']:.2f}", pays_after])
    return table(["", "first answer, s", "later answers, s", "compiling pays after, tokens"], lines)


def greedy_table(results: dict) -> str:
    """Of answers that differ, how many do so at a tie, and the largest margin."""
    header = ["", "answers", "the same", "others at a tie (below 0.001)", "largest margin, nats"]
    lines = []
    for row in results["rows"]:
        ties = sum(margin < 1e-3 for margin in row["margins"])
        margin, time = row["largest margin of another choice"], row["compiled to eager"]
        lines.append([row["dtype"], str(row["answers"]), str(row["equal"]), str(ties), f"{margin:.3f}", f"{time:.2f}"])
    return table([*header, "time of compiled to eager"], lines)


def continuous_table(results: dict) -> str:
    lines = [[row["name"], *(f"{row[measure]:.1f}" for measure in MEASURES)] for row in results["rows"]]
    return table(["", *MEASURES], lines)


def memory_table(results: dict) -> str:
    lines = [[r["name"], f"{r['weights_mb']:.0f}", f"{r['over_empty_mb']:.0f}"] for r in results["rows"][1:]]
    return table(["", "weights, MB", "peak, MB"], lines)


def scaling_table(results: dict) -> str:
    """The part with one request and the shortest context."""
    rows = results["rows"]
    shortest = min(row["context"] for row in rows)
    shown = [row for row in rows if (row["batch"], row["context"]) == (1, shortest)]

    lines = []
    for name in _distinct(shown, "name"):
        lines.append([name, *(f"{row['ratio']:.2f}" for row in shown if row["name"] == name)])
    return table(["experts", *map(str, _distinct(shown, "experts"))], lines)


def serve_table(results: dict) -> str:
    lines = [[row["name"], f"{row['seconds']:.3f}", f"{row['throughput']:.2f}×"] for row in results["rows"]]
    return table(["", "seconds a request", "throughput"], lines)


def endpoints_table(results: dict) -> str:
    """By batch size, tokens a second, milliseconds of a request, and how much of waiting and work overlaps."""
    rows = results["rows"]
    batches = _distinct(rows, "batch")
    found = {(row["name"], row["batch"]): row for row in rows}

    lines = []
    for name in _distinct(rows, "name"):
        of_name = [found[name, batch] for batch in batches]
        speeds = [f"{row['tokens a second']:.1f}" for row in of_name]
        requests = " / ".join(f"{row['request ms']:.0f}" if "request ms" in row else "–" for row in of_name)
        overlaps = " / ".join(f"{100 * row['overlap']:.0f} %" if "overlap" in row else "–" for row in of_name)
        lines.append([name, *speeds, requests, overlaps])

    all_batches = " / ".join(map(str, batches))
    header = ["", *(f"tokens a second, batch {batch}" for batch in batches)]
    return table([*header, f"a request, ms, batch {all_batches}", f"overlap, batch {all_batches}"], lines)


def load_table(results: dict) -> str:
    """By rate of arrivals, tokens a second, and seconds until the first token and the last one."""
    lines = []
    for row in results["rows"]:
        speeds = [f"{row['tokens a second']:.1f}"]
        speeds += [f"{row[name]:.2f}" for name in ("first token", "whole answer", "slowest tenth")]
        lines.append([f"{row['rate']:g}", row["name"], *speeds])
    header = ["requests a second", "", "tokens a second", "first token, s", "whole answer, s", "slowest tenth, s"]
    return table(header, lines)


def training_table(results: dict) -> str:
    """Seconds of a rollout and of an update, as multiples of the first row's."""
    rows = results["rows"]
    found = {(row["what"], row["name"]): row["ratio"] for row in rows}
    lines = []
    for name in _distinct(rows, "name"):
        lines.append([name, f"{found['rollout', name]:.2f}", f"{found['update', name]:.2f}"])
    return table(["", "rollout", "update"], lines)


def experts_table(report: dict) -> str:
    """Of every expert the reward on its own dimension, and its answers as text."""
    lines = []
    for name, entry in report.items():
        own = 0.5 if name == "base" else entry[name]
        text = [f"{entry['nll']:.2f}", f"{entry['gain']:.2f}", f"{entry['repetition']:.3f}", f"{entry['words']:.0f}"]
        lines.append([name, f"{own:.3f}", *text])
    return table(["", "own dimension", "nll", "relevance", "repetition", "words"], lines)


def pcm_table(report: dict) -> str:
    """Rewards by preference, and by how much trained PCMs are above the others."""
    lines = []
    for name, entry in report["preferences"].items():
        means = [f"{entry[arm][0]:.3f}" for arm in ("uniform", "static", "pcm")]
        above = [signed_interval(entry[f"pcm − {arm}"]) for arm in ("uniform", "static")]
        lines.append([name, *means, *above])
    return table(["preference", "uniform", "best static", "PCM", "PCM − uniform", "PCM − static"], lines)


def seeds_table(report: dict) -> str:
    """Of each training run the mean reward over all preferences, and by how much it is above the others."""
    found, arms = report["preferences"]["all"], ("uniform", "static", "mean")
    lines = []
    for run, name in enumerate(report["runs"]):
        above = [signed_interval(found[f"pcm − {arm}, each run"][run]) for arm in arms]
        lines.append([name, f"{found['pcm, each run'][run]:.3f}", *above])
    lines.append(["all", f"{found['pcm'][0]:.3f}", *(signed_interval(found[f"pcm − {arm}"]) for arm in arms)])
    return table(["run", "PCM", "PCM − uniform", "PCM − static", "PCM − its mean α"], lines)


def words_table(report: dict) -> str:
    """Mean reward by how the preference is told, and the share of α of the experts meant, where all are active."""
    lines = []
    for told, found in report["in words"].items():
        share = found.get("share of wanted experts")
        lines.append([told, f"{found['reward']:.3f}", "–" if share is None else f"{share:.3f}"])
    return table(["told by", "reward", "α of the experts meant"], lines)


def win_rates_table(report: dict) -> str:
    """Of every baseline the win rate against it, by each judge, and its mean reward."""
    judges = report["judges"]
    lines = []
    for name in next(iter(judges.values())):
        rates = [percent_interval(baselines[name]["win_rate"]) for baselines in judges.values()]
        lines.append([name, *rates, f"{report['rewards'][name]['mean']:.3f}"])
    lines.append([report["ours"], *("–" for _ in judges), f"{report['rewards'][report['ours']]['mean']:.3f}"])
    return table(["against", *judges, "mean reward of the row"], lines)


def win_rates_in_short_table(report: dict) -> str:
    """The win rate against what users do most, by each judge."""
    names = ("vanilla", "prompting", "Personalized Soup", "uniform mixture", "weight average (PEFT)")
    lines = []
    for name in names:
        lines.append([name, *(percent_interval(entry[name]["win_rate"]) for entry in report["judges"].values())])
    return table(["against", *report["judges"]], lines)


def steering_in_short_table(report: dict) -> str:
    """How far rewards move with the weights, in the ways that users have."""
    ways = (
        "static product",
        "static added adapters",
        "weight average (PEFT)",
        "static mixture",
        "added adapters in words",
        "prompting in words",
    )
    lines = []
    for way in ways:
        moved = [judge["ways"][way]["moved"][0] for judge in report["judges"].values()]
        lines.append([way, " / ".join(f"{value:.2f}" for value in moved)])
    return table(["", "rises by"], lines)


def steering_table(report: dict) -> str:
    """Of every way how well answers follow the weights, by each judge."""
    names = {
        "moved": "moved",
        "rank correlation": "rank correlation",
        "worst rank correlation": "the worst",
        "hypervolume": "hypervolume",
        "inner product": "inner product",
    }
    lines = []
    for way in report["text"]:
        found = [judge["ways"][way] for judge in report["judges"].values()]
        lines.append([way, *(" / ".join(f"{ways[name][0]:.2f}" for ways in found) for name in names)])
    return table([" / ".join(report["judges"]), *names.values()], lines)


def average_table(report: dict) -> str:
    """The mean of the win rates against the baselines of the paper's average."""
    paper = ("vanilla", "prompting", "Personalized Soup")
    means = [fmean(entry[name]["win_rate"][0] for name in paper) for entry in report["judges"].values()]
    line = ["average of vanilla, prompting and Personalized Soup", *(f"{100 * mean:.1f} %" for mean in means)]
    return table(["", *report["judges"]], [line])


def new_preferences_table(report: dict) -> str:
    """Of every kind of preference the win rate against either baseline, by each judge."""
    columns = list(itertools.product(("weights as given", "prompting"), report))  # (baseline, judge)
    kinds = dict.fromkeys(name.partition(": ")[0] for name in next(iter(report.values())))
    lines = []
    for kind in kinds:
        rates = [report[judge][f"{kind}: {name}"]["win_rate"] for name, judge in columns]
        lines.append([kind, *map(percent_interval, rates)])
    return table(["", *(f"{name}: {judge}" for name, judge in columns)], lines)


def drafts_table(results: dict) -> str:
    """By preference the time, as a multiple of that without drafts, and tokens a pass of the mixture."""
    rows = results["rows"]
    preferences = _distinct(rows, "preference")
    found = {(row["name"], row["preference"]): row for row in rows}

    lines = []
    for name in _distinct(rows, "name"):
        cells = []
        for preference in preferences:
            row = found[name, preference]
            tokens = "" if row["tokens a pass"] is None else f" / {row['tokens a pass']:.2f}"
            cells.append(f"{row['ratio']:.2f}{tokens}")
        lines.append([name, *cells])
    return table(["", *preferences], lines)


def _distinct(rows: list[dict], column: str) -> list:
    """The different values of a column, in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


def strengths_in_words_table(report: dict) -> str:
    """Spearman's ρ by kind of text: phrases of training, and held out."""
    training, held_out = report["words"].values()
    lines = []
    for kind in training:
        of_kind = [split[kind] for split in (training, held_out)]
        ranks = [
            f"{measures['rank correlation']:.2f}" if "rank correlation" in measures else "–" for measures in of_kind
        ]
        others = [f"{measures['difference']:.2f}" if "difference" in measures else "–" for measures in of_kind]
        lines.append([kind, " / ".join(ranks), " / ".join(others)])
    return table(["phrases of training / held out", "rank correlation", "mean absolute difference"], lines)


def strengths_under_weights_table(report: dict) -> str:
    """How far the PCM's factors are from 1, by how many experts have weights."""
    names = next(iter(report["weights"].values()))
    lines = [[number, *(f"{value:.2f}" for value in found.values())] for number, found in report["weights"].items()]
    return table(["experts with weights", *names], lines)


TABLES = {  # by marker: the results, and the table of them
    "win rates in short": (REPORT, win_rates_in_short_table),
    "steering in short": (STEERING, steering_in_short_table),
    "steering": (STEERING, steering_table),
    "decode in short": ("benchmarks/results/decode.json", decode_in_short_table),
    "decode": ("benchmarks/results/decode.json", decode_table),
    "decode-fast": ("benchmarks/results/decode-fast.json", fast_table),
    "prefill": ("benchmarks/results/prefill.json", decode_table),
    "start": ("benchmarks/results/start.json", start_table),
    "greedy": ("benchmarks/results/greedy.json", greedy_table),
    "continuous": ("benchmarks/results/continuous.json", continuous_table),
    "memory": ("benchmarks/results/memory.json", memory_table),
    "decode-llama-16x1280": ("benchmarks/results/decode-llama-16x1280.json", decode_table),
    "scaling": ("benchmarks/results/scaling.json", scaling_table),
    "serve": ("benchmarks/results/serve.json", serve_table),
    "endpoints": ("benchmarks/results/endpoints.json", endpoints_table),
    "load": ("benchmarks/results/load.json", load_table),
    "engine": ("benchmarks/results/engine.json", decode_table),
    "training": ("benchmarks/results/training-llama-2x1024.json", training_table),
    "experts": ("examples/smollm2/artifacts/report.json", experts_table),
    "pcm": ("examples/smollm2/artifacts/evaluation.json", pcm_table),
    "words": ("examples/smollm2/artifacts/evaluation.json", words_table),
    "seeds": ("examples/smollm2/artifacts/seeds.json", seeds_table),
    "strengths in words": ("examples/smollm2/artifacts/strengths/words.json", strengths_in_words_table),
    "strengths under weights": ("examples/smollm2/artifacts/strengths/words.json", strengths_under_weights_table),
    "drafts": ("benchmarks/results/drafts.json", drafts_table),
    "new preferences": ("docs/results/new_preferences.json", new_preferences_table),
    "win rates": (REPORT, win_rates_table),
    "win rates of added adapters": (ADDED_ADAPTERS, win_rates_table),
    "average": (REPORT, average_table),
    "ablations": ("docs/results/ablations/report.json", win_rates_table),
}
