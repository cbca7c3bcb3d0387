"""What the scripts of this folder share: prompts, the base model, and samples of it."""

import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, Preference, demo
from modeling_pcm_ensemble.configuration_pcm_ensemble import TOP_K_MERGES
from modeling_pcm_ensemble.evaluation import KeptLines, with_settings
from modeling_pcm_ensemble.evaluation.baselines import Conversation, sample_tokens
from modeling_pcm_ensemble.training.preference_sampling import default_preference_sets

DATA = Path(__file__).parent / "data"
KOALA = DATA / "evaluation_only" / "koala_eval_50.json"
PCM_PROMPTS = 240  # the PCM is trained on so many of the shortest training prompts
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ANSWERS_AT_ONCE, READINGS_AT_ONCE = (64, 16) if DEVICE == "cpu" else (768, 256)


def training_prompts(number: int | None = None) -> list[str]:
    """Read the shortest `number` training prompts, or all."""
    lines = (DATA / "train_prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    return sorted(prompts, key=len)[:number]


def held_back_prompts(most_words: int = 60) -> list[str]:
    """Read the training prompts, up to `most_words` long, that the experts are trained on and the PCM is not."""
    return [prompt for prompt in training_prompts()[PCM_PROMPTS:] if len(prompt.split()) <= most_words]


def evaluation_prompts(number: int | None = None, path: Path = KOALA) -> list[str]:
    """
    Read the shortest `number` prompts of a JSON list of objects with `prompt`, or all; by default Koala's, which
    nothing is trained on.

    Raises:
        ValueError: if it is no such list, or an empty one.
    """
    entries = json.loads(path.read_text(encoding="utf-8"))
    entries = entries if isinstance(entries, list) else []
    texts = [entry.get("prompt") if isinstance(entry, dict) else None for entry in entries]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{path} must be a JSON list of objects with a text as `prompt`: [{{"prompt": "…"}}, …].')
    return sorted(texts, key=len)[:number]


def spread(prompts: list[str], number: int) -> list[str]:
    """Choose `number` prompts of all lengths, from the first to the last; all where there are no more."""
    if number >= len(prompts):
        return prompts
    step = (len(prompts) - 1) / max(number - 1, 1)
    return [prompts[round(i * step)] for i in range(number)]


def chats(prompts: list[str]) -> list[Conversation]:
    """Turn each prompt into a conversation."""
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def paper_preferences(model) -> list[Preference]:
    """Return the eight: one expert of each dimension."""
    return [Preference(dict.fromkeys(names, 1.0)) for names in default_preference_sets(model.config)]


def mean_weights(lines: list[dict], names: list[str]) -> dict[str, Preference]:
    """
    Average α over all tokens under each preference, by its label, of the experts that it wants. A line is of an
    answer: `preference` (its label), `experts` (which it wants), and `expert_weights`, `(tokens, experts)`.
    """
    means = {}
    for label in dict.fromkeys(line["preference"] for line in lines):
        of_label = [line for line in lines if line["preference"] == label]
        mean = np.concatenate([line["expert_weights"] for line in of_label]).mean(axis=0)
        wanted = of_label[0]["experts"]
        means[label] = Preference({name: round(float(mean[names.index(name)]), 3) for name in wanted})
    return means


def merged_by(model: PCMEnsembleForCausalLM, merge: str, top_k: int | None) -> PCMEnsembleForCausalLM:
    """Return the same, merged otherwise, each expert cut to `top_k` tokens where that is possible."""
    return with_settings(model, merge=merge, expert_top_k=top_k if merge in TOP_K_MERGES else None)


def sampled_from(model: PCMEnsembleForCausalLM, top_k: int | None) -> int:
    """Say from how many tokens of the merged distribution to sample: all, where each expert keeps its `top_k` best."""
    return 0 if model.config.expert_top_k else top_k or 0


def base_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2 without adapters, on a GPU if there is one, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(demo.fetch_smollm2(), dtype=demo.fast_dtype(DEVICE))
    tokenizer = AutoTokenizer.from_pretrained(demo.fetch_smollm2(), padding_side="left")
    return model.to(DEVICE).eval(), tokenizer


def sample(
    model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    tokens: int,
    system: str | None = None,
    openings: list[str] | None = None,
    top_k: int = 0,
    demonstrations: Conversation | None = None,
) -> list[dict]:
    r"""
    Sample one answer to each prompt at temperature 1.

    Args:
        system (`str`, *optional*): a system message for all.
        openings (`list[str]`, *optional*): words that each answer begins with.
        top_k (`int`): tokens that are sampled from; 0 for all.
        demonstrations (`list[dict]`, *optional*): turns that come before each prompt.

    Returns:
        For each prompt `prompt`, `completion`, and whether it has `ended` before the limit.
    """
    openings = openings or [""] * len(prompts)
    head = [{"role": "system", "content": system}] if system else []
    head += demonstrations or []
    conversations = [[*head, *chat] for chat in chats(prompts)]
    texts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    texts = [text + opening for text, opening in zip(texts, openings)]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    answers = sample_tokens(model, inputs, tokens, top_k=top_k, pad_token_id=tokenizer.pad_token_id)

    lines = []
    for prompt, opening, answer in zip(prompts, openings, answers):
        completion = (opening + tokenizer.decode(answer, skip_special_tokens=True)).strip()
        ended = tokenizer.eos_token_id in answer.tolist()
        lines.append({"prompt": prompt, "completion": completion, "ended": ended})
    return lines


def with_references(model, tokenizer, prompts: list[str], path: Path, tokens: int, batch_size: int = 32) -> list[dict]:
    """Give prompts as conversations, each with one answer of the base model, which rewards are measured against."""
    kept = KeptLines(path)
    new = [prompt for prompt in prompts if f"{tokens} {prompt}" not in kept]
    for start in tqdm(range(0, len(new), batch_size), desc="answers of the base model", disable=not new):
        set_seed(len(kept.lines))
        lines = sample(model, tokenizer, new[start : start + batch_size], tokens)
        kept.add({"key": f"{tokens} {line['prompt']}"} | line for line in lines)

    references = [kept[f"{tokens} {prompt}"]["completion"] for prompt in prompts]
    return [{"prompt": chat, "reference": text} for chat, text in zip(chats(prompts), references)]
