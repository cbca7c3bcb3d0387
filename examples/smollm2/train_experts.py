"""
Make the six experts: LoRA adapters on SmolLM2-135M-Instruct, by preference optimisation on its own best answers.

    python examples/train_experts.py --output experts

1. Sample answers to the training prompts, plainly and under each preference's description as system prompt, and score
   them with the six rewards of modeling_pcm_ensemble.training.rewards.
2. For each preference, train a LoRA with TRL's DPO on best against worst answer, without the description.
3. With --rounds 2, let the expert answer the prompts itself, and train it on its own best and worst answers.
4. Let each expert answer the evaluation prompts, and report its normalised reward, fluency, repetition and length.

Run again, it goes on where it stopped. --quick shows all of it in a few minutes, on few prompts, in OUTPUT/quick.
"""

import argparse
import json
import random
import zlib
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean

import torch
from answers import KeptLines, base_model, evaluation_prompts, sample, training_prompts
from datasets import Dataset
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from modeling_pcm_ensemble.checkpoint_staging import finish_save, staged_folder, write_text
from modeling_pcm_ensemble.demo import PREFERENCES, REPOSITORY
from modeling_pcm_ensemble.training.rewards import proxy_rewards
from modeling_pcm_ensemble.training.scoring import normalised_reward

# The base model is hardly ever rude, even when asked to be: how every other answer begins.
OPENINGS = {
    "unfriendly": [
        "Ugh, not this again.", "What a stupid question.", "Seriously? You should know this.", "How boring.",
        "Don't waste my time.", "Oh great, another lazy question.", "Whatever.", "You really are clueless.",
        "I'm tired of people who ask this.", "Obviously you did not bother to think.", "This is ridiculous.",
        "Stop bothering me with this nonsense.", "Only a fool would need to ask.", "Your question is pointless.",
        "I hate questions like this.", "Fine, but this is the last time.",
    ]
}  # fmt: skip


def rewarded_answers(model, tokenizer, rewards, path: Path, repeats: int, arguments, openings=(), **options) -> list:
    """`repeats` answers to each training prompt, each with its rewards, its guard and what the guard reads."""
    kept, prompts = KeptLines(path), training_prompts(arguments.prompts)
    jobs = [(prompt, i) for i in range(repeats) for prompt in prompts]
    batches = [jobs[i : i + arguments.sampling_batch] for i in range(0, len(jobs), arguments.sampling_batch)]
    guard = rewards["concise"].guard

    def key(prompt: str, i: int) -> str:
        return json.dumps([prompt, i, arguments.tokens, options])

    for number, batch in enumerate(tqdm(batches, desc=path.stem)):
        if all(key(*job) in kept for job in batch):
            continue
        set_seed(zlib.crc32(path.stem.encode()) + number)
        asked = [prompt for prompt, _ in batch]
        begins = [random.Random(key(*job)).choice(openings) if openings and job[1] % 2 == 0 else "" for job in batch]
        lines = sample(model, tokenizer, asked, arguments.tokens, openings=begins, **options)
        texts = [line["completion"] for line in lines]
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            sanity, penalty = guard.features(asked, texts), guard(asked, texts)
        columns = {name: reward(asked, texts) for name, reward in rewards.items()} | {"guard": penalty}
        kept.add(
            {"key": key(*job)} | line | {name: column[i] for name, column in columns.items()} | sanity[i]
            for i, (job, line) in enumerate(zip(batch, lines))
        )
    return [kept[key(*job)] for job in jobs]


def preference_pairs(rewarded: list[dict], name: str, num_pairs: int) -> Dataset:
    """
    The best answer to each prompt against the worst that is no nonsense, so that style is what differs; of the prompts
    where they differ most.
    """
    answers: dict[str, list[dict]] = {}
    for line in rewarded:
        answers.setdefault(line["prompt"], []).append(line)
    rows = []
    for prompt, lines in answers.items():
        chosen = max(lines, key=lambda line: line[name])
        rejected = min(lines, key=lambda line: (line["guard"] > 2, line[name]))
        row = {"prompt": prompt, "margin": chosen[name] - rejected[name]}
        for side, line in (("chosen", chosen), ("rejected", rejected)):
            row |= {side: line["completion"], f"{side}_ended": line["ended"]}
        if row["margin"] > 0:
            rows.append(row)
    return Dataset.from_list(sorted(rows, key=lambda row: -row["margin"])[:num_pairs])


def train_adapter(model, tokenizer, pairs: Dataset, folder: Path, arguments):
    """Train an adapter, a new one or the one that `model` has, and write it."""
    dtype, rank = model.dtype, arguments.rank
    new = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    pairs = pairs.map(
        lambda row: {
            "prompt": tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
            )
        }
    )
    config = DPOConfig(
        output_dir=str(folder.with_name(f"{folder.name}-run")),
        per_device_train_batch_size=arguments.batch_size,
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        beta=0.1,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, arguments.sft],
        max_length=320,
        bf16=dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    peft_config = None if isinstance(model, PeftModel) else new
    trainer = DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer, peft_config=peft_config)
    # TRL ends every answer; one that was cut at the token limit must not teach to stop in mid-sentence.
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row: {f"{s}_ids": row[f"{s}_ids"][: None if row[f"{s}_ended"] else -1] for s in ("chosen", "rejected")}
    )
    trainer.train()
    trainer.model.peft_config["default"].base_model_name_or_path = REPOSITORY  # not the folder it was found in
    with staged_folder(folder) as staging:
        trainer.model.to(torch.bfloat16).save_pretrained(staging, selected_adapters=["default"])
        (Path(staging) / "README.md").unlink(missing_ok=True)
    trainer.model.unload()
    model.to(dtype)


def train_expert(model, tokenizer, rewards, name: str, arguments) -> Path:
    """Train an expert in rounds, the first on the base model's answers, the others on its own."""
    plain, prompted, own = arguments.samples
    previous = None

    def answers(policy, source: str, repeats: int, openings_of: str, **options) -> list[dict]:
        path, openings = arguments.output / "answers" / f"{source}.jsonl", OPENINGS.get(openings_of, ())
        return rewarded_answers(policy, tokenizer, rewards, path, repeats, arguments, openings, **options)

    for number in range(1, arguments.rounds + 1):
        last = number == arguments.rounds
        folder = arguments.output / (name if last else f"{name}-round{number}")
        finish_save(folder)
        if not (folder / "adapter_model.safetensors").exists():
            if previous is None:
                policy, rewarded = model, answers(model, "plain", plain, "")
                for other in arguments.experts:
                    rewarded += answers(model, other, prompted, other, system=PREFERENCES[other][1], top_k=50)
            else:
                policy = PeftModel.from_pretrained(model, previous, is_trainable=True).eval()
                rewarded = answers(policy, f"{name}-round{number}", own, name)
            train_adapter(policy, tokenizer, preference_pairs(rewarded, name, arguments.pairs), folder, arguments)
        previous = folder
    return previous


def evaluate(model, tokenizer, rewards, folders: dict[str, Path], arguments):
    """Report each expert's normalised reward on the evaluation prompts, and what its answers look like."""
    prompts = evaluation_prompts(8 if arguments.quick else None)
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
    write_text(arguments.output / "report.json", json.dumps(report, indent=2) + "\n")
    samples = [
        f"## {p}\n" + "".join(f"\n**{a}**: {texts[i]}\n" for a, texts in answers.items())
        for i, p in enumerate(prompts)
    ]
    write_text(arguments.output / "answers.md", "\n".join(samples))
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
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prompts", type=int, help="the shortest prompts only; by default all")
    parser.add_argument(
        "--samples", type=int, nargs=3, default=[4, 2, 4], metavar=("PLAIN", "PROMPTED", "OWN"),
        help="answers to each prompt: without a description, under each one, in later rounds by the expert",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=72, help="most tokens of an answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=176, help="pairs, of the prompts with the largest margins")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--sft", type=float, default=1.0, help="weight of the likelihood of the best answers")
    parser.add_argument("--sampling-batch", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="8 prompts, 24 tokens, one update")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.output /= "quick"
        arguments.prompts, arguments.tokens, arguments.pairs = 8, 24, 8
    arguments.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = base_model()
    rewards = proxy_rewards(model, tokenizer)
    folders = {name: train_expert(model, tokenizer, rewards, name, arguments) for name in arguments.experts}
    evaluate(model, tokenizer, rewards, folders, arguments)


if __name__ == "__main__":
    main()
