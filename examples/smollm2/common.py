"""What the training examples share: prompts, the base model, and answers kept in files."""

import itertools
import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from modeling_pcm_ensemble import demo
from modeling_pcm_ensemble.evaluation import KeptLines
from modeling_pcm_ensemble.training.preference_sampling import default_preference_sets

HERE = Path(__file__).parent
ARTIFACTS = HERE / "artifacts"
KOALA = HERE / "data" / "evaluation_only" / "koala_eval_50.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Static weights of a preference's three experts that are tried for the best
STATIC = [
    w for first in ((1, 1, 1), (1, 0, 0), (3, 1, 1), (2, 2, 1)) for w in sorted(set(itertools.permutations(first)))
]


def training_prompts(number: int | None = None) -> list[str]:
    """The shortest `number` training prompts, or all."""
    lines = (HERE / "data" / "train_prompts.jsonl").read_text().splitlines()
    return sorted((json.loads(line)["prompt"] for line in lines), key=len)[:number]


def evaluation_prompts(number: int | None = None, path: Path = KOALA) -> list[str]:
    """
    The shortest `number` prompts of a JSON list of objects with `prompt`, or all; by default Koala's, which nothing is
    trained on.

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
    """`number` prompts of all lengths, from the first to the last; all where there are no more."""
    if number >= len(prompts):
        return prompts
    return [prompts[round(i * (len(prompts) - 1) / max(number - 1, 1))] for i in range(number)]


def chats(prompts: list[str]) -> list[list[dict[str, str]]]:
    """Each prompt as a conversation."""
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def paper_preferences(model) -> list[dict[str, float]]:
    """The eight: one expert of each dimension."""
    return [dict.fromkeys(names, 1.0) for names in default_preference_sets(model.config)]


def base_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 without adapters, on a GPU if there is one, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(demo.fetch_smollm2(), dtype=demo.fast_dtype(DEVICE))
    tokenizer = AutoTokenizer.from_pretrained(demo.fetch_smollm2(), padding_side="left")
    return model.to(DEVICE).eval(), tokenizer


@torch.no_grad()
def sample(
    model, tokenizer, prompts: list[str], tokens: int, system: str | None = None, openings=None, top_k: int = 0
) -> list[dict]:
    """One answer to each prompt at temperature 1. Openings are the words that each answer begins with."""
    openings = openings or [""] * len(prompts)
    head = [{"role": "system", "content": system}] if system else []
    chats = [[*head, {"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    texts = [text + opening for text, opening in zip(texts, openings)]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    options = {"do_sample": True, "temperature": 1.0, "top_k": top_k, "top_p": 1.0, "max_new_tokens": tokens}
    answers = model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
    return [
        {
            "prompt": prompt,
            "completion": (opening + tokenizer.decode(answer, skip_special_tokens=True)).strip(),
            "ended": tokenizer.eos_token_id in answer.tolist(),
        }
        for prompt, opening, answer in zip(prompts, openings, answers[:, inputs["input_ids"].shape[1] :])
    ]


def with_references(model, tokenizer, prompts: list[str], path: Path, tokens: int, batch_size: int = 32) -> list[dict]:
    """The prompts as conversations, each with one answer of the base model, which rewards are measured against."""
    kept = KeptLines(path)
    new = [prompt for prompt in prompts if f"{tokens} {prompt}" not in kept]
    for start in tqdm(range(0, len(new), batch_size), desc="answers of the base model", disable=not new):
        set_seed(len(kept.lines))
        lines = sample(model, tokenizer, new[start : start + batch_size], tokens)
        kept.add({"key": f"{tokens} {line['prompt']}"} | line for line in lines)
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "reference": kept[f"{tokens} {prompt}"]["completion"],
        }
        for prompt in prompts
    ]
