"""
Make the six experts: LoRA adapters on SmolLM2-135M-Instruct, by preference optimisation on its own best answers.

    python examples/train_experts.py --output experts

1. Sample answers to the training prompts, plainly and under each preference's description as system prompt.
2. Score every answer with the six rewards of modeling_pcm_ensemble.training.rewards, which are standardised first.
3. For each preference, train a LoRA with TRL's DPO on best against worst answer, without the description.
4. Let each expert answer the evaluation prompts, and report its normalised reward, fluency, repetition and length.

Run again, it goes on where it stopped.
"""

import argparse
import json
from itertools import accumulate
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

from modeling_pcm_ensemble.demo import PREFERENCES, REPOSITORY, fetch_smollm2
from modeling_pcm_ensemble.training.rewards import (
    CONSTANTS,
    Guard,
    proxy_rewards,
    reward_constants,
)
from modeling_pcm_ensemble.training.scoring import normalised_reward

DATA = Path(__file__).parent / "data"
PLAIN, PROMPTED = 4, 2  # samples of each prompt without a description, and under each of the six


def training_prompts() -> list[str]:
    return [json.loads(line)["prompt"] for line in (DATA / "train_prompts.jsonl").read_text().splitlines()]


def evaluation_prompts() -> list[str]:
    return [entry["prompt"] for entry in json.loads((DATA / "evaluation_only" / "koala_eval_50.json").read_text())]


def read_lines(path: Path) -> list[dict]:
    """The lines of a JSONL file that were written whole."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], tokens: int, system: str | None = None, **options) -> list[dict]:
    """One answer to each prompt at temperature 1."""
    head = [{"role": "system", "content": system}] if system else []
    chats = [[*head, {"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    width = inputs["input_ids"].shape[1]
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    answers = model.generate(**inputs, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id, **options)
    return [
        {
            "prompt": prompt,
            "completion": tokenizer.decode(answer, skip_special_tokens=True).strip(),
            "ended": tokenizer.eos_token_id in answer.tolist(),
        }
        for prompt, answer in zip(prompts, answers[:, width:])
    ]


def sample_pool(model, tokenizer, folder: Path, tokens: int, batch_size: int) -> list[dict]:
    """Answers of the base model to all training prompts, under no and under each description."""
    path = folder / "pool.jsonl"
    pool = read_lines(path)
    prompts = sorted(training_prompts(), key=len)
    sources = [("plain", None)] * PLAIN + [(n, text) for n, (_, text) in PREFERENCES.items() for _ in range(PROMPTED)]
    jobs = [
        (source, system, prompts[start : start + batch_size])
        for source, system in sources
        for start in range(0, len(prompts), batch_size)
    ]
    ends = accumulate(len(batch) for _, _, batch in jobs)
    pool = pool[: max((end for end in ends if end <= len(pool)), default=0)]  # a batch cut off is sampled again
    with path.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in pool)
        done = 0
        for number, (source, system, batch) in enumerate(tqdm(jobs, desc="sampling")):
            done += len(batch)
            if done <= len(pool):
                continue
            set_seed(number)
            # Rollouts are sampled from the whole distribution, and so is what rewards are measured against.
            options = {} if system is None else {"top_k": 50}
            for line in sample(model, tokenizer, batch, tokens, system, **options):
                pool.append(line | {"source": source})
                file.write(json.dumps(pool[-1]) + "\n")
            file.flush()
    return pool


def score_pool(model, tokenizer, pool: list[dict], folder: Path) -> list[dict]:
    """Every answer with its six rewards and its guard, by the stored constants, which are made here if missing."""
    path = folder / "scores.jsonl"
    scored = read_lines(path)
    if len(scored) == len(pool):
        return scored
    prompts, completions = ([line[key] for line in pool] for key in ("prompt", "completion"))
    if not CONSTANTS.exists():
        plain = [line for line in pool if line["source"] == "plain"]
        guard = Guard(model, tokenizer)
        constants = reward_constants(guard, [p["prompt"] for p in plain], [p["completion"] for p in plain])
        CONSTANTS.write_text(json.dumps(constants, indent=2) + "\n")
    rewards = proxy_rewards(model, tokenizer)
    with path.open("w") as file:
        for start in tqdm(range(0, len(pool), 64), desc="scoring"):
            batch = slice(start, start + 64)
            columns = {name: reward(prompts[batch], completions[batch]) for name, reward in rewards.items()}
            guard = rewards["concise"].guard
            columns["guard"] = guard(prompts[batch], completions[batch])
            sanity = guard.features(prompts[batch], completions[batch])
            for i, line in enumerate(pool[batch]):
                scored.append(line | {name: values[i] for name, values in columns.items()} | sanity[i])
                file.write(json.dumps(scored[-1]) + "\n")
    return scored


def preference_pairs(scored: list[dict], name: str, num_pairs: int) -> Dataset:
    """
    The best answer to each prompt against the worst that is no nonsense, so that style is what differs; of the prompts
    where they differ most.
    """
    answers: dict[str, list[dict]] = {}
    for line in scored:
        answers.setdefault(line["prompt"], []).append(line)
    rows = []
    for prompt, lines in answers.items():
        chosen = max(lines, key=lambda line: line[name])
        rejected = min(lines, key=lambda line: (line["guard"] > 2, line[name]))
        rows.append(
            {
                "prompt": prompt,
                "chosen": chosen["completion"],
                "rejected": rejected["completion"],
                "chosen_ended": chosen["ended"],
                "rejected_ended": rejected["ended"],
                "margin": chosen[name] - rejected[name],
            }
        )
    return Dataset.from_list(sorted(rows, key=lambda row: -row["margin"])[:num_pairs])


def train_expert(model, tokenizer, scored: list[dict], name: str, arguments) -> Path:
    """Train and write one adapter."""
    folder = arguments.output / name
    if (folder / "adapter_model.safetensors").exists():
        return folder

    def as_chat(prompt: str) -> str:
        chat = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    pairs = preference_pairs(scored, name, arguments.pairs)
    pairs = pairs.map(lambda row: {"prompt": as_chat(row["prompt"])})
    config = DPOConfig(
        output_dir=str(arguments.output / f"{name}-run"),
        per_device_train_batch_size=arguments.batch_size,
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        beta=0.1,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, arguments.sft],
        max_length=320,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    lora = LoraConfig(
        r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer, peft_config=lora)
    # TRL ends every answer; one that was cut at the token limit must not teach to stop in mid-sentence.
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row: {f"{s}_ids": row[f"{s}_ids"][: None if row[f"{s}_ended"] else -1] for s in ("chosen", "rejected")}
    )
    trainer.train()
    trainer.model.peft_config["default"].base_model_name_or_path = REPOSITORY  # not the folder it was found in
    trainer.model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    trainer.model.unload()
    return folder


def evaluate(model, tokenizer, folders: dict[str, Path], arguments):
    """Report each expert's normalised reward on the evaluation prompts, and what its answers look like."""
    prompts = evaluation_prompts()
    rewards = proxy_rewards(model, tokenizer)
    set_seed(0)
    answers = {"base": [line["completion"] for line in sample(model, tokenizer, prompts, arguments.tokens)]}
    for name, folder in tqdm(folders.items(), desc="evaluating"):
        expert = PeftModel.from_pretrained(model, folder).eval()
        set_seed(1)
        answers[name] = [line["completion"] for line in sample(expert, tokenizer, prompts, arguments.tokens)]
        expert.unload()
    references = {name: reward(prompts, answers["base"]) for name, reward in rewards.items()}
    report = {}
    for author, texts in answers.items():
        sanity = rewards["concise"].guard.features(prompts, texts)
        report[author] = {
            name: fmean(map(normalised_reward, reward(prompts, texts), references[name]))
            for name, reward in rewards.items()
        } | {key: fmean(entry[key] for entry in sanity) for key in ("nll", "gain", "repetition", "words")}
        report[author]["guard"] = fmean(rewards["concise"].guard(prompts, texts))
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    samples = [
        f"## {p}\n" + "".join(f"\n**{a}**: {texts[i]}\n" for a, texts in answers.items())
        for i, p in enumerate(prompts)
    ]
    (arguments.output / "answers.md").write_text("\n".join(samples))
    table = Table(
        "answers by", *next(iter(report.values())), title="normalised rewards, and means of what guards read"
    )
    for author, values in report.items():
        table.add_row(author, *(f"{value:.2f}" for value in values.values()))
    Console(width=160).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("experts"))
    parser.add_argument("--experts", nargs="+", choices=PREFERENCES, default=list(PREFERENCES))
    parser.add_argument("--tokens", type=int, default=72, help="most tokens of an answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=176, help="pairs, of the prompts with the largest margins")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--sft", type=float, default=1.0, help="weight of the likelihood of the best answers")
    parser.add_argument("--sampling-batch", type=int, default=64)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    source = fetch_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(device).eval()
    pool = sample_pool(model, tokenizer, arguments.output, arguments.tokens, arguments.sampling_batch)
    scored = score_pool(model, tokenizer, pool, arguments.output)
    folders = {name: train_expert(model, tokenizer, scored, name, arguments) for name in arguments.experts}
    evaluate(model, tokenizer, folders, arguments)


if __name__ == "__main__":
    main()
