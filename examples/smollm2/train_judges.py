"""
Train a style judge for each preference on sentence embeddings of prompted answers of the base model.

    python examples/smollm2/train_judges.py --output smollm2_style_heads.json

1. SmolLM2 answers prompts that the PCM is not trained on: asked for each style by a system message and two answers in
   that style, and without style (see judge_answers.py).
2. Of each preference, its answers are compared with those asked for the opposite and with those without style.
3. A head for each learns to tell them apart. How often it does so on prompts that it has not seen is written beside
   it; one that is not better than chance is not offered.

The package's own is modeling_pcm_ensemble/evaluation/smollm2_style_heads.json.
"""

import argparse
import json
from collections import defaultdict
from itertools import product
from pathlib import Path

from common import base_model
from judge_answers import PLAIN, prompted_answers

from modeling_pcm_ensemble import demo
from modeling_pcm_ensemble.checkpoint_staging import write_text
from modeling_pcm_ensemble.evaluation.embeddings import SentenceEmbedder
from modeling_pcm_ensemble.evaluation.learned_judges import train_heads
from modeling_pcm_ensemble.tables import percent_interval, table


def style_comparisons(answers: list[dict]) -> dict[str, list[tuple[str, str, str]]]:
    """Give by preference (prompt, answer asked for it, answer asked for the opposite or for no style)."""
    texts = defaultdict(list)  # by prompt and style
    for line in answers:
        texts[line["prompt"], line["style"]].append(line["completion"])

    comparisons = {}
    for name in demo.PREFERENCES:
        triples = []
        for prompt in dict.fromkeys(line["prompt"] for line in answers):
            others = texts[prompt, opposite(name)] + texts[prompt, PLAIN]
            triples += [(prompt, *pair) for pair in product(texts[prompt, name], others)]
        comparisons[name] = triples
    return comparisons


def opposite(name: str) -> str:
    """Return the other preference of the same dimension."""
    dimension, _ = demo.PREFERENCES[name]
    return next(other for other in demo.PREFERENCES if other != name and demo.PREFERENCES[other][0] == dimension)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("smollm2_style_heads.json"))
    parser.add_argument("--answers", type=Path, default=Path("judge_answers.jsonl"), help="kept, and gone on with")
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt in each style")
    arguments = parser.parse_args()

    answers = prompted_answers(*base_model(), arguments.answers, [*demo.PREFERENCES, PLAIN], arguments.samples)
    heads = train_heads(style_comparisons(answers), SentenceEmbedder())
    write_text(arguments.output, json.dumps(heads) + "\n")

    rows = []
    for name, entry in heads.items():
        rows.append(
            [name, percent_interval(entry["accuracy"]), f"{entry['p']:.4f}", "yes" if entry["offered"] else ""]
        )
    print(table(["preference", "right on unseen prompts", "p", "offered"], rows))


if __name__ == "__main__":
    main()
