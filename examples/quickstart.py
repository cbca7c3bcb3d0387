"""
Six experts on one SmolLM2-135M, mixed token by token by their trained PCM: one question, under several preferences.

    python examples/quickstart.py
    python examples/quickstart.py --question "What is money?" --preference friendly --preference elementary=2,concise
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo, preference_weights

ARTIFACTS = Path(__file__).parent / "artifacts"
PREFERENCES = ("elementary", "elementary,friendly=0.5,concise=0.5", "knowledgeable,informative")

FRESH_INTERPRETER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, preference, tokens, ids = sys.argv[1], *map(json.loads, sys.argv[2:])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
answer = model.generate(torch.tensor(ids), preference=preference, max_new_tokens=tokens, do_sample=False)
print(answer.tolist())
"""


class AnswerTable(BaseStreamer):
    """Draws every row of a batch in a column of its own while `generate` writes it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, titles: list[str], live: Live, finished: dict[str, str]):
        self.tokenizer, self.titles, self.live, self.finished = tokenizer, titles, live, finished
        self.tokens = None  # one list for each row; None until the prompt has passed

    def put(self, value: torch.Tensor):
        if self.tokens is None:
            self.tokens = [[] for _ in self.titles]
            return
        for row, token in zip(self.tokens, value.tolist()):
            row.append(token)
        table = Table(*self.answers(), expand=True)
        for column in table.columns:
            column.ratio = 1
        table.add_row(*self.answers().values())
        self.live.update(table)

    def end(self):
        self.live.refresh()

    def answers(self) -> dict[str, str]:
        texts = self.tokenizer.batch_decode(self.tokens, skip_special_tokens=True)
        return self.finished | dict(zip(self.titles, texts))


def parse_preference(text: str) -> dict[str, float]:
    """`elementary,friendly=0.5` → {"elementary": 1.0, "friendly": 0.5}"""
    pairs = [entry.partition("=") for entry in text.split(",")]
    preference = {name.strip(): float(weight or 1) for name, _, weight in pairs}
    preference_weights(preference, list(demo.PREFERENCES), batch_size=1)  # refuses what the model would refuse later
    return preference


def stream_answers(
    model: PCMEnsembleForCausalLM, inputs: BatchEncoding, preferences: dict[str, dict], tokens: int, console: Console
) -> torch.Tensor:
    """Answer with the plain model, then under every preference at once, as rows of one batch."""
    options = {"max_new_tokens": tokens, "do_sample": False}
    with Live(console=console, refresh_per_second=8) as live:
        vanilla = AnswerTable(model.tokenizer, ["vanilla"], live, {})
        model.backbones[0].generate(**inputs, streamer=vanilla, **options)
        table = AnswerTable(model.tokenizer, list(preferences), live, vanilla.answers())
        rows = {name: value.expand(len(preferences), -1) for name, value in inputs.items()}
        return model.generate(**rows, preference=list(preferences.values()), streamer=table, **options)


def weights_table(
    model: PCMEnsembleForCausalLM, sequences: torch.Tensor, preferences: dict[str, dict], prompt_length: int
) -> Table:
    """α, and what each expert contributed to the tokens that were written, as means over each answer."""
    preference = list(preferences.values())
    weights = model.compute_expert_weights(sequences, preference=preference)[:, prompt_length - 1 : -1]
    shares = model.attribute(sequences, preference=preference)[:, prompt_length - 1 :]
    written = sequences[:, prompt_length:, None] != model.generation_config.pad_token_id  # ended rows are padded
    means = [100 * (x * written).sum(dim=1) / written.sum(dim=1) for x in (weights, shares)]  # (preferences, experts)
    table = Table("expert", *preferences, title="α of each expert / its share of the text, percent", expand=True)
    for name, alphas, parts in zip(model.config.expert_names, *(x.T.tolist() for x in means)):
        table.add_row(name, *(f"{a:.0f} / {part:.0f}" if a else "" for a, part in zip(alphas, parts)))
    return table


def seconds_per_token(runs: dict[str, tuple], inputs: BatchEncoding, rounds: int = 3, tokens: int = 16) -> dict:
    """Medians over rounds in which the runs take turns. A run is a model and the options of its `generate`."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (model, options) in runs.items():
            start = time.perf_counter()
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)
            seconds[name].append((time.perf_counter() - start) / tokens)
    return {name: median(values) for name, values in seconds.items()}


def print_speed(model: PCMEnsembleForCausalLM, inputs: BatchEncoding, console: Console):
    names = model.config.expert_names
    runs = {
        "one expert alone": (model.backbones[0], {}),
        "3 experts and the PCM": (model, {"preference": names[::2]}),
        "6 experts and the PCM": (model, {"preference": names}),
    }
    seconds = seconds_per_token(runs, inputs)
    for name, value in seconds.items():
        ratio = value / seconds["one expert alone"]
        console.print(f"{1 / value:5.1f} tokens per second for {name}: {ratio:.2f}× the time of one")


def check_in_fresh_interpreter(model, inputs: BatchEncoding, preference: dict, tokens: int, folder: str):
    """Save, load through AutoModelForCausalLM in a new Python process, and compare what both write."""
    model.save_pretrained(folder)
    here = model.generate(**inputs, preference=preference, max_new_tokens=tokens, do_sample=False).tolist()
    arguments = [json.dumps(value) for value in (preference, tokens, inputs["input_ids"].tolist())]
    command = [sys.executable, "-c", FRESH_INTERPRETER, folder, *arguments]
    there = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert json.loads(there) == here, "the loaded ensemble wrote another text"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", default="What is gravity?")
    parser.add_argument(
        "--preference", action="append", help=f"experts and weights, such as {PREFERENCES[1]}; may be given many times"
    )
    parser.add_argument("--tokens", type=int, default=60, help="most tokens of an answer (default 60)")
    parser.add_argument("--output", default="ensemble", help="folder to save the ensemble in (default ensemble)")
    arguments = parser.parse_args()
    try:
        preferences = {text.replace(",", ", "): parse_preference(text) for text in arguments.preference or PREFERENCES}
    except ValueError as error:
        parser.error(str(error))

    console = Console()
    model = demo.trained_ensemble(ARTIFACTS)
    chat = [{"role": "user", "content": arguments.question}]
    inputs = model.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    console.rule(arguments.question)
    sequences = stream_answers(model, inputs, preferences, arguments.tokens, console)
    console.print()
    console.print(weights_table(model, sequences, preferences, inputs["input_ids"].shape[1]))

    print_speed(model, inputs, console)
    check_in_fresh_interpreter(model, inputs, next(iter(preferences.values())), arguments.tokens, arguments.output)
    console.print(f"Saved in {arguments.output!r}; a fresh interpreter loaded it and wrote the same text.")


if __name__ == "__main__":
    main()
