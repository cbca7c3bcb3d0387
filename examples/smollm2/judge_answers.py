"""Answers of the prompted base model, which the learned judges are trained on and the answering judge is tried on."""

import json
from pathlib import Path

from common import DATA, held_back_prompts, sample
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from modeling_pcm_ensemble import demo
from modeling_pcm_ensemble.evaluation import KeptLines

PLAIN = "plain"  # no system message, and demonstrations without a style
BARE = "bare"  # nothing but the prompt
STYLES = [*demo.PREFERENCES, PLAIN, BARE]
DEMONSTRATIONS = DATA / "style_demonstrations.json"


def prompted_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    styles: list[str],
    samples: int = 1,
    tokens: int = 64,
) -> list[dict]:
    r"""
    Sample the base model's answers to prompts that the PCM is not trained on, or take what `path` has of them.

    Args:
        path (`Path`): a JSONL file.
        styles (`list[str]`): preferences, `PLAIN` or `BARE`.
        samples (`int`): answers to each prompt in each style.
        tokens (`int`): most tokens of an answer.

    Returns:
        Of each answer `prompt`, `style`, `sample` and `completion`.
    """
    prompts, kept, answers = held_back_prompts(), KeptLines(path), []
    shown = json.loads(DEMONSTRATIONS.read_text(encoding="utf-8"))

    rounds = [(number, style) for number in range(samples) for style in styles]
    for number, style in tqdm(rounds, desc="prompted answers"):
        keys = [json.dumps([style, number, tokens, prompt]) for prompt in prompts]
        if not all(key in kept for key in keys):
            set_seed(number * len(STYLES) + STYLES.index(style))
            _, system = demo.PREFERENCES.get(style, (None, None))
            turns = [] if style == BARE else demonstration_turns(shown["questions"], shown["answers"][style])
            options = {"system": system, "top_k": demo.EXPERT_TOP_K, "demonstrations": turns}
            lines = sample(model, tokenizer, prompts, tokens, **options)
            kept.add({"key": key, "style": style, "sample": number} | line for key, line in zip(keys, lines))
        answers += [kept[key] for key in keys]
    return answers


def demonstration_turns(questions: list[str], answers: list[str]) -> list[dict]:
    """Give questions and answers as the turns of a conversation."""
    turns = []
    for question, answer in zip(questions, answers):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns
