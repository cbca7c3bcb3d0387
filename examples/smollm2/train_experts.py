"""
Make the six experts: LoRA adapters on SmolLM2-135M-Instruct, by preference optimisation on its own best answers.

    python examples/smollm2/train_experts.py --output experts

1. Sample answers to the training prompts, plainly and under each preference's description as system prompt, and score
   them with the six rewards of modeling_pcm_ensemble.rewards.proxies.
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
from common import base_model, chats, evaluation_prompts, sample, training_prompts
from datasets import Dataset
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from modeling_pcm_ensemble.checkpoint_staging import finish_save, staged_folder, write_text
from modeling_pcm_ensemble.demo import PREFERENCES, REPOSITORY
from modeling_pcm_ensemble.evaluation import KeptLines
from modeling_pcm_ensemble.rewards.proxies import proxy_rewards
from modeling_pcm_ensemble.rewards.quality import TextQuality
from modeling_pcm_ensemble.rewards.scoring import normalised_reward

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


def rewarded_answers(
    model, tokenizer, rewards, path: Path, repeats: int, arguments, openings=(), **options
) -> list[dict]:
    """
    Sample `repeats` answers to each training prompt, each with what [`score`] measures. They are kept in a file;
    `options` are those of [`sample`].
    """
    kept, prompts = KeptLines(path), training_prompts(arguments.prompts)
    samples = [(prompt, i) for i in range(repeats) for prompt in prompts]
    keys = [json.dumps([prompt, i, arguments.tokens, options]) for prompt, i in samples]

    starts = range(0, len(samples), arguments.sampling_batch)
    for number, start in enumerate(tqdm(starts, desc=path.stem)):
        batch = slice(start, start + arguments.sampling_batch)
        if all(key in kept for key in keys[batch]):
            continue

        set_seed(zlib.crc32(path.stem.encode()) + number)
        begins = []
        for key, (_, i) in zip(keys[batch], samples[batch]):
            begins.append(random.Random(key).choice(openings) if openings and i % 2 == 0 else "")
        asked = [prompt for prompt, _ in samples[batch]]
        lines = sample(model, tokenizer, asked, arguments.tokens, openings=begins, **options)
        scores = score(model, rewards, asked, [line["completion"] for line in lines])
        kept.add([{"key": key} | line | entry for key, line, entry in zip(keys[batch], lines, scores)])
    return [kept[key] for key in keys]


def score(model, rewards, prompts: list[str], texts: list[str]) -> list[dict[str, float]]:
    """Measure each answer's rewards, its penalty as text (`guard`), and what that is for."""
    quality = rewards["concise"].quality
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():  # the base reads
        features, penalties = quality.features(prompts, texts), quality.penalties(prompts, texts)
    columns = {name: reward(prompts, texts) for name, reward in rewards.items()}

    scores = []
    for row, (penalty, entry) in enumerate(zip(penalties, features)):
        scores.append({name: column[row] for name, column in columns.items()} | {"guard": penalty} | entry)
    return scores


def preference_pairs(rewarded: list[dict], name: str, num_pairs: int) -> Dataset:
    """
    Pair the best answer to each prompt with the worst that is no nonsense, so that style is what differs; of the
    prompts where they differ most.
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
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=pairs.map(lambda row: {"prompt": opening_of(tokenizer, row["prompt"])}),
        processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else new,
    )
    trainer.train_dataset = trainer.train_dataset.map(without_false_ends)
    trainer.train()

    trainer.model.peft_config["default"].base_model_name_or_path = REPOSITORY  # not the folder it was found in
    with staged_folder(folder) as staging:
        trainer.model.to(torch.bfloat16).save_pretrained(staging, selected_adapters=["default"])
        (Path(staging) / "README.md").unlink(missing_ok=True)
    trainer.model.unload()
    model.to(dtype)


def opening_of(tokenizer, prompt: str) -> str:
    """Write a prompt as the text that an answer follows."""
    return tokenizer.apply_chat_template(chats([prompt])[0], add_generation_prompt=True, tokenize=False)


def without_false_ends(row: dict) -> dict:
    """Drop the end that TRL gives an answer which was cut at the limit: it would teach to stop in mid-sentence."""
    sides = {}
    for side in ("chosen", "rejected"):
        ids = row[f"{side}_ids"]
        sides[f"{side}_ids"] = ids if row[f"{side}_ended"] else ids[:-1]
    return sides


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
        if (folder / "adapter_model.safetensors").exists():
            previous = folder
            continue

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


def report_experts(model, tokenizer, rewards, folders: dict[str, Path], arguments):
    """Report each expert's normalised reward on the evaluation prompts, and what its answers look like."""
    prompts = evaluation_prompts(8 if arguments.quick else None)
    set_seed(0)
    answers = {"base": [line["completion"] for line in sample(model, tokenizer, prompts, arguments.tokens)]}
    for name, folder in tqdm(folders.items(), desc="evaluating"):
        expert = PeftModel.from_pretrained(model, folder).eval()
        set_seed(1)
        answers[name] = [line["completion"] for line in sample(expert, tokenizer, prompts, arguments.tokens)]
        expert.unload()

    quality = rewards["concise"].quality
    references = {name: reward(prompts, answers["base"]) for name, reward in rewards.items()}
    report = {}
    for author, texts in answers.items():
        features = quality.features(prompts, texts)
        entry = {}
        for name, reward in rewards.items():
            entry[name] = fmean(map(normalised_reward, reward(prompts, texts), references[name]))
        for measure in ("nll", "gain", "repetition", "words"):
            entry[measure] = fmean(values[measure] for values in features)
        report[author] = entry | {"guard": fmean(quality.penalties(prompts, texts))}
    write_text(arguments.output / "report.json", json.dumps(report, indent=2) + "\n")

    samples = []
    for row, prompt in enumerate(prompts):
        samples.append(f"## {prompt}\n" + "".join(f"\n**{a}**: {texts[row]}\n" for a, texts in answers.items()))
    write_text(arguments.output / "answers.md", "\n".join(samples))

    title = "normalised rewards, and means of what answers are as text"
    table = Table("answers by", *next(iter(report.values())), title=title)
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
    rewards = proxy_rewards(TextQuality(model, tokenizer))
    folders = {name: train_expert(model, tokenizer, rewards, name, arguments) for name in arguments.experts}
    report_experts(model, tokenizer, rewards, folders, arguments)


if __name__ == "__main__":
    main()
