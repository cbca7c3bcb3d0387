"""
Does a PCM of strengths understand words? Tell it texts with all experts active, and compare what it does with what
they mean. No expert runs: it takes minutes.

    python examples/smollm2/measure_words.py --pcm pcm/seed-0/pcm.safetensors --output words

1. Texts of the phrases that it was trained on, put together anew, and of phrases that it has never read
   (demo_wordings.py): Spearman's ρ between the strength that is meant for an expert and the one that it gets, over all
   experts that the texts name; the strength of those that they do not name; and the mean absolute difference over all.
2. Weights of one to six experts, of both signs, where its factors should stay at 1: how far they are from it.

Strengths are read where an answer to an evaluation prompt begins. OUTPUT gets words.json and words.png.
"""

import argparse
import json
import random
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import DEVICE, chats, evaluation_prompts, spread
from rich.console import Console
from rich.markdown import Markdown
from scipy import stats
from tqdm import tqdm

from modeling_pcm_ensemble import demo
from modeling_pcm_ensemble.checkpoint_staging import write_text
from modeling_pcm_ensemble.demo_wordings import EXPERTS, KINDS, LEVELS, SPLITS, Wording, compose
from modeling_pcm_ensemble.evaluation.pictures import save
from modeling_pcm_ensemble.tables import table

MEASURES = ("rank correlation", "of those not named", "difference")
PROMPTS = 8
BATCH = 32


def composed(split: str, kind: str, number: int) -> list[Wording]:
    """Compose texts of a kind, the same ones at every call."""
    generator = random.Random(f"measured {split} {kind}")
    return [compose(generator, split, kind) for _ in range(number)]


@torch.no_grad()
def strengths(model, asked: list[dict]) -> np.ndarray:
    """Return each request's strengths where an answer begins, `(requests, experts)`, prompts taking turns."""
    prompts = chats(spread(evaluation_prompts(), PROMPTS))
    rows = list(zip(cycle(prompts), asked))

    found = []
    for start in tqdm(range(0, len(rows), BATCH), leave=False):
        conversations, requests = zip(*rows[start : start + BATCH])
        inputs = model.tokenizer.apply_chat_template(
            list(conversations), add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        told = {name: [request[name] for request in requests] for name in requests[0]}
        found.append(model.compute_expert_weights(**inputs, **told)[:, -1].float().cpu().numpy())
    return np.concatenate(found)


def rank_correlation(pairs: np.ndarray) -> float:
    return float(stats.spearmanr(*pairs.T).statistic)


def by_words(model, wordings: list[Wording]) -> tuple[dict[str, float], np.ndarray]:
    """Compare what wordings mean with what they get: measures, and pairs of both for all named experts, `(n, 2)`."""
    given = strengths(model, [{"preference_text": text} for text, _ in wordings])
    meant = np.array([[levels.get(name, np.nan) for name in EXPERTS] for _, levels in wordings])
    named = ~np.isnan(meant)

    pairs = np.stack([meant[named], given[named]], axis=1)
    measures = {} if len(np.unique(pairs[:, 0])) == 1 else {"rank correlation": rank_correlation(pairs)}
    measures |= {
        "of those not named": float(given[~named].mean()),
        "difference": float(np.abs(given - np.nan_to_num(meant)).mean()),
    }
    return measures, pairs


def by_weights(model, experts: int, number: int) -> dict[str, float]:
    """Say how far factors are from 1, where so many experts are given weights, one in four of them below 0."""
    generator = random.Random(f"measured weights of {experts}")
    asked = np.zeros((number, len(EXPERTS)))
    for row in asked:
        for place in generator.sample(range(len(EXPERTS)), experts):
            row[place] = generator.uniform(0.05, 2.0) * generator.choice([1, 1, 1, -1])

    given = strengths(model, [{"preference": dict(zip(EXPERTS, row))} for row in asked.tolist()])
    factors = given[asked != 0] / asked[asked != 0]
    return {
        "factors within 0.1 of 1": float((np.abs(factors - 1) < 0.1).mean()),
        "median distance": float(np.median(np.abs(factors - 1))),
        "95 % are within": float(np.quantile(np.abs(factors - 1), 0.95)),
    }


def draw(pairs_of: dict[str, np.ndarray], path: Path):
    """Draw the median and the middle half of what is given, by what is meant."""
    figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
    for split, pairs in pairs_of.items():
        levels = np.intersect1d(LEVELS, pairs[:, 0])  # personas mean others too, few each
        quartiles = np.array([np.quantile(pairs[pairs[:, 0] == level, 1], (0.25, 0.5, 0.75)) for level in levels])
        axis.plot(levels, quartiles[:, 1], marker="o", label=f"{split.replace('_', ' ')} phrases")
        axis.fill_between(levels, quartiles[:, 0], quartiles[:, 2], alpha=0.2)

    axis.plot([0, 2], [0, 2], color="black", linewidth=0.8)
    axis.set_xlabel("strength that the words mean")
    axis.set_ylabel("strength that the PCM gives: median, middle half")
    axis.legend()
    save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pcm", type=Path, default=demo.ARTIFACTS / demo.PCM_OF_STRENGTHS)
    parser.add_argument("--output", type=Path, default=Path("evaluation/words"))
    parser.add_argument("--texts", type=int, default=128, help="of each kind and split")
    arguments = parser.parse_args()

    model = demo.adapter_ensemble(merge="adapters", dtype=demo.fast_dtype(DEVICE)).to(DEVICE)
    model.load_pcm(arguments.pcm)

    report: dict = {"words": {}, "weights": {}}
    pairs_of, rows = {}, []
    for split in SPLITS:
        found = {kind: by_words(model, composed(split, kind, arguments.texts)) for kind in KINDS}
        pairs_of[split] = np.concatenate([pairs for _, pairs in found.values()])
        report["words"][split] = {kind: measures for kind, (measures, _) in found.items()}
        report["words"][split]["all"] = {"rank correlation": rank_correlation(pairs_of[split])}
        for kind, measures in report["words"][split].items():
            numbers = [f"{measures[name]:.2f}" if name in measures else "" for name in MEASURES]
            rows.append([split.replace("_", " "), kind, *numbers])
    numbers_of_experts = range(1, len(EXPERTS) + 1)
    report["weights"] = {str(number): by_weights(model, number, arguments.texts) for number in numbers_of_experts}

    arguments.output.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output / "words.json", json.dumps(report, indent=1) + "\n")
    draw(pairs_of, arguments.output / "words.png")
    Console(width=120).print(Markdown(table(["phrases", "kind", *MEASURES], rows)))
    factors = [[name, *(f"{value:.2f}" for value in found.values())] for name, found in report["weights"].items()]
    Console(width=120).print(Markdown(table(["experts with weights", *report["weights"]["1"]], factors)))


if __name__ == "__main__":
    main()
