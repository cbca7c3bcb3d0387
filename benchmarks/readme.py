"""Write the README's tables from the results, so that no number is typed by hand."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def add_arguments(parser):
    parser.add_argument("--readme", default=str(ROOT / "README.md"))


def run(arguments):
    readme = Path(arguments.readme)
    readme.write_text(with_tables(readme.read_text(), Path(arguments.output)))


def with_tables(text: str, results: Path) -> str:
    """`text` with the table behind each marker made anew from `results`."""
    for name, make_table in TABLES.items():
        table = make_table(json.loads((results / f"{name}.json").read_text())["rows"])
        before, marker, after = text.partition(f"<!-- {name} table -->\n")
        text = before + marker + table + re.sub(r"\A(\|.*\n)*", "", after)
    return text


def decode_table(rows: list[dict]) -> str:
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    ratios = {(row["name"], row["batch"]): row["ratio"] for row in rows}
    lines = ["| | " + " | ".join(f"batch {batch}" for batch in batches) + " |", "|---" * (len(batches) + 1) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [f"{ratios[name, batch]:.2f}" if (name, batch) in ratios else "–" for batch in batches]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def scaling_table(rows: list[dict]) -> str:
    """The part with one request and the shortest context."""
    shortest = min(row["context"] for row in rows)
    mine = [r for r in rows if r["name"] == "LoRA experts" and (r["batch"], r["context"]) == (1, shortest)]
    lines = [
        "| LoRA experts | " + " | ".join(str(row["experts"]) for row in mine) + " |",
        "|---" * (len(mine) + 1) + "|",
    ]
    return "\n".join([*lines, "| batch 1 | " + " | ".join(f"{row['ratio']:.2f}" for row in mine) + " |"]) + "\n"


def serve_table(rows: list[dict]) -> str:
    lines = ["| | seconds a request | throughput |", "|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['name']} | {row['seconds']:.3f} | {row['throughput']:.2f}× |")
    return "\n".join(lines) + "\n"


TABLES = {
    "decode": decode_table,
    "decode-llama-16x1280": decode_table,
    "scaling": scaling_table,
    "serve": serve_table,
}
