"""
Do the answering reward and the answering judge know an answer from what only looks like one?

    python examples/smollm2/measure_answering.py --output answering.json

Two answers of SmolLM2 to each prompt that the PCM is not trained on, one as it is and one prompted for a preference,
each preference in turn (see judge_answers.py), against what answers none of them:

- shuffled: answers to other prompts;
- chat: friendly words that would suit any prompt;
- chat with keywords: the same, and the prompt's three longest words;
- copy: the prompt itself.

For each: how often an answer gets more than the alternative to the same prompt, a tie counting half, and the area
under the ROC curve over all prompts. And how much the reward and the judge agree: Spearman's correlation over the
answers, and over answers and shuffled answers together.
"""

import argparse
import json
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path

import numpy as np
from common import PCM_PROMPTS, base_model, chats, held_back_prompts, spread, training_prompts
from judge_answers import BARE, prompted_answers
from scipy import stats
from tqdm import tqdm

from modeling_pcm_ensemble import demo
from modeling_pcm_ensemble.checkpoint_staging import write_text
from modeling_pcm_ensemble.evaluation import bootstrap_interval
from modeling_pcm_ensemble.evaluation.answering_judge import AnsweringJudge
from modeling_pcm_ensemble.rewards.answering import WORD, AnsweringReward
from modeling_pcm_ensemble.rewards.quality import TextQuality
from modeling_pcm_ensemble.tables import percent_interval, table

CHAT = (
    "Sure! I'd love to help you with that. It's always great to hear from a good friend, and I'm so glad you asked!",
    "Hey there, buddy! What a fun question! I'm always happy to chat with you, and I hope you have a wonderful day!",
    "Oh, I love this one! You really made me smile today. Let me think about it for a moment, and have a good laugh!",
)


def alternatives(prompts: list[str], answers: list[list[str]]) -> dict[str, list[list[str]]]:
    """Give what answers none of the prompts, by its kind: lists of a text for each prompt."""
    chat = [CHAT[place % len(CHAT)] for place in range(len(prompts))]
    keywords = [" ".join(sorted(dict.fromkeys(WORD.findall(prompt)), key=len)[-3:]) for prompt in prompts]
    return {
        "shuffled": [[*texts[1:], texts[0]] for texts in answers],
        "chat": [chat],
        "chat with keywords": [[f"{text} {words}!" for text, words in zip(chat, keywords)]],
        "copy": [prompts],
    }


def comparison(answers: np.ndarray, others: np.ndarray) -> dict:
    """Compare scores of answers, `(2, prompts)`, with those of an alternative, `(2 or 1, prompts)`."""
    wins = (answers > others) + 0.5 * (answers == others)  # (2, prompts)
    higher = stats.mannwhitneyu(answers.ravel(), others.ravel()).statistic
    return {
        "same prompt": bootstrap_interval(wins.mean(axis=0, keepdims=True)),
        "area": float(higher / (answers.size * others.size)),
    }


def measure(score: Callable[[list[str]], list[float]], kinds: dict[str, list[list[str]]], name: str) -> dict:
    """Score all texts of each kind, `(texts, prompts)`."""
    scores = {}
    for kind, columns in tqdm(kinds.items(), desc=name):
        scores[kind] = np.array([score(texts) for texts in columns])
    return scores


def report_of(scores: dict[str, dict[str, np.ndarray]]) -> dict:
    """Compare each scorer's scores by kind, and the scorers with one another."""
    report = {}
    for name, by_kind in scores.items():
        others = {kind: found for kind, found in by_kind.items() if kind != "answers"}
        report[name] = {kind: comparison(by_kind["answers"], found) for kind, found in others.items()}

    columns = {name: [by_kind["answers"], by_kind["shuffled"]] for name, by_kind in scores.items()}
    of_answers = stats.spearmanr(*(answers.ravel() for answers, _ in columns.values()))
    of_both = stats.spearmanr(*(np.concatenate(parts).ravel() for parts in columns.values()))
    correlations = {"answers": float(of_answers.statistic), "answers and shuffled": float(of_both.statistic)}
    return report | {"correlation": correlations}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("answering.json"))
    parser.add_argument("--answers", type=Path, default=Path("judge_answers.jsonl"), help="kept, and gone on with")
    parser.add_argument("--prompts", type=int, default=63, help="so many of the prompts, of all lengths")
    arguments = parser.parse_args()

    model, tokenizer = base_model()
    texts = {}
    for line in prompted_answers(model, tokenizer, arguments.answers, [*demo.PREFERENCES, BARE]):
        texts[line["style"], line["prompt"]] = line["completion"]
    prompts = spread(held_back_prompts(), arguments.prompts)
    bare = [texts[BARE, prompt] for prompt in prompts]
    prompted = [texts[style, prompt] for style, prompt in zip(cycle(demo.PREFERENCES), prompts)]
    kinds = {"answers": [bare, prompted]} | alternatives(prompts, [bare, prompted])

    judge = AnsweringJudge(chats(prompts))
    reward = AnsweringReward(TextQuality(model, tokenizer), training_prompts(PCM_PROMPTS))
    scores = {
        "judge": measure(lambda texts: judge.ranks(chats(prompts), texts), kinds, "judge"),
        "reward": measure(lambda texts: reward.saved(prompts, texts), kinds, "reward"),
    }

    report = report_of(scores)
    write_text(arguments.output, json.dumps(report, indent=2) + "\n")
    rows = []
    for name, kind in product(scores, kinds):
        if found := report[name].get(kind):
            rows.append([name, kind, percent_interval(found["same prompt"]), f"{found['area']:.3f}"])
    print(table(["scorer", "answers against", "more than to the same prompt", "area under ROC"], rows))
    print(report["correlation"])


if __name__ == "__main__":
    main()
