"""
Measure what trained Preference Control Models have won, on prompts that they have never seen.

    python examples/evaluate_pcm.py  # the headroom, before any training
    python examples/evaluate_pcm.py --pcm pcm/seed-0 pcm/seed-1 pcm/seed-2

1. Headroom: on training prompts, static weights for each preference; the best of them is what the PCM must beat.
2. Rewards on the evaluation prompts with uniform weights, the best static ones and each PCM; intervals over prompts
   and runs. "mean" is a PCM's mean α under each preference as static weights: what it wins above that comes from
   choosing anew for each prompt and token.
3. The PCM told in words alone, with all six experts active: where does it put α?

Run again, it goes on where it stopped. examples/inspect_pcm.py draws what it found. --quick measures one prompt of
each set, in OUTPUT/quick.
"""

import argparse
import hashlib
import itertools
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from answers import ARTIFACTS, DEVICE, STATIC, KeptLines, evaluation_prompts, training_prompts, with_references
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tqdm import tqdm

from modeling_pcm_ensemble import demo
from modeling_pcm_ensemble.evaluation import bootstrap_interval, holm, permutation_p_value
from modeling_pcm_ensemble.training import RebelConfig
from modeling_pcm_ensemble.training.preference_sampling import DrawnPreference, PreferenceSampler, reward_shares
from modeling_pcm_ensemble.training.rewards import proxy_rewards
from modeling_pcm_ensemble.training.rollouts import RolloutSampler
from modeling_pcm_ensemble.training.scoring import Scorer

MEASURES = ("static", "mean", "words")
WORDS = ("preference_text", "system")  # where the PCM finds a preference that is told in words


class Evaluator:
    """Answers prompts under all eight preferences, and keeps the answers, their rewards and their α in JSONL files."""

    def __init__(self, folder: Path, tokens: int, batch_size: int):
        self.folder, self.tokens, self.batch_size = folder, tokens, batch_size
        self.model = demo.lora_ensemble(ARTIFACTS, dtype=demo.fast_dtype(DEVICE)).to(DEVICE)
        self.untrained = {name: value.clone() for name, value in self.model.pcm.state_dict().items()}
        self.pcm = "untrained"
        self.base = self.model.backbones[0]  # runs without adapters when called on its own
        scorer = Scorer(proxy_rewards(self.base, self.model.tokenizer))
        config = RebelConfig(str(folder), max_completion_length=tokens, use_cpu=DEVICE == "cpu")
        self.sampler = RolloutSampler(self.model, self.model.tokenizer, scorer, config)
        self.preferences = PreferenceSampler(self.model.config).sets
        self.names = self.model.config.expert_names

    def rows(self, prompts: list[str]) -> list[dict]:
        path = self.folder / "evaluation-references.jsonl"
        return with_references(self.base, self.model.tokenizer, prompts, path, self.tokens)

    def load(self, folder: Path | None):
        """A trained PCM, or the untrained one, under which the weights given are the weights of the mixture."""
        path = folder and folder / "pcm.safetensors"
        self.model.pcm.load_state_dict(self.untrained | (load_file(path) if path else {}))
        self.pcm = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path else "untrained"

    def answers(
        self, name: str, rows: list[dict], weights=None, words: str | None = None, seed: int = 0
    ) -> list[dict]:
        """A line for each prompt and preference. `weights`: of a preference's experts, by preference; else equal."""
        kept = KeptLines(self.folder / f"answers-{name}.jsonl")

        def key(row: dict, draw: DrawnPreference) -> str:
            given = None if weights is None else weights[draw.name]
            return json.dumps([row, draw.name, given, words, seed, self.tokens, self.pcm])

        jobs = [(row, draw) for row in rows for draw in self.preferences]
        batches = [jobs[start : start + self.batch_size] for start in range(0, len(jobs), self.batch_size)]
        for number, batch in enumerate(tqdm(batches, desc=name)):
            if not all(key(*job) in kept for job in batch):
                lines = self._answer(batch, weights, words, 1000 * seed + number)
                kept.add({"key": key(*job)} | line for job, line in zip(batch, lines))
        return [kept[key(*job)] for job in jobs]

    def _answer(self, batch: list, weights, words: str | None, seed: int) -> list[dict]:
        rows, wanted = zip(*batch)
        draws = []
        for draw in wanted:
            given = iter((1, 1, 1) if weights is None else weights[draw.name])
            draws.append(DrawnPreference(draw.name, tuple(next(given) if w else 0.0 for w in draw.weights), words))
        rollout, scores = self.sampler.sample(list(rows), draws, seed, reward_shares(list(wanted)))
        expert_weights = self._expert_weights(rollout)
        dimensions = {name: iter(values) for name, values in scores.dimensions.items()}
        lines = []
        for i, draw in enumerate(wanted):
            length = int(rollout.completion_mask[i].sum())
            lines.append(
                {
                    "prompt": rows[i]["prompt"][0]["content"],
                    "preference": draw.name,
                    "token_ids": rollout.completion_ids[i, :length].tolist(),
                    "reward": scores.rewards[i],
                    "dimensions": {n: next(dimensions[n]) for n, w in zip(self.names, draw.weights) if w},
                    "expert_weights": [[round(a, 4) for a in token] for token in expert_weights[i, :length].tolist()],
                }
            )
        return lines

    @torch.no_grad()
    def _expert_weights(self, rollout) -> torch.Tensor:
        """α that each completion token was drawn under, `(rows, seq, experts)`."""
        ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)
        mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)
        preference = {"preference": rollout.weights, "preference_ids": rollout.prefix_ids}
        return self.model.compute_expert_weights(ids, mask, **preference)[:, rollout.prompt_ids.shape[1] - 1 : -1]


def best_static_weights(evaluator: Evaluator, rows: list[dict], console: Console) -> dict[str, tuple]:
    """Each preference's best weights on training prompts, all tried with the same random numbers."""
    found = defaultdict(dict)
    for static in STATIC:
        weights = {draw.name: static for draw in evaluator.preferences}
        for line in evaluator.answers("headroom-" + "-".join(map(str, static)), rows, weights, seed=1):
            found[line["preference"]].setdefault(static, []).append(line["reward"])
    table = Table("preference", *(":".join(map(str, s)) for s in STATIC), title="reward of static weights, training")
    for name, rewards in [*found.items(), ("all", {s: [x for r in found.values() for x in r[s]] for s in STATIC})]:
        table.add_row(name, *(f"{fmean(rewards[static]):.3f}" for static in STATIC))
    console.print(table)
    return {name: max(rewards, key=lambda static: fmean(rewards[static])) for name, rewards in found.items()}


def prompt_means(lines: list[dict], preference: str | None) -> np.ndarray:
    """Mean reward of each prompt, over all preferences or under one, `(prompts,)`."""
    rewards = defaultdict(list)
    for line in lines:
        if preference in (None, line["preference"]):
            rewards[line["prompt"]].append(line["reward"])
    return np.array([fmean(values) for values in rewards.values()])


def compare(arms: dict[str, list[list[dict]]], console: Console) -> dict:
    """
    Rewards by preference and dimension, and by how much the PCMs are above the others; p-values of preferences are
    Holm's. An arm is a list of runs.
    """
    preferences = list(dict.fromkeys(line["preference"] for line in arms["pcm"][0]))
    others = [arm for arm in arms if arm != "pcm"]
    table = Table("preference", *arms, *(f"pcm − {arm}" for arm in others), title="reward on the evaluation prompts")
    report = {"preferences": {}}
    for name in [*preferences, None]:
        means = {arm: np.array([prompt_means(run, name) for run in runs]) for arm, runs in arms.items()}
        entry = {arm: list(bootstrap_interval(values)) for arm, values in means.items()}
        for other in others:
            entry[f"pcm − {other}"] = list(bootstrap_interval(means["pcm"] - means[other]))
            entry[f"pcm − {other}, each run"] = (means["pcm"] - means[other]).mean(axis=1).tolist()
            entry[f"pcm − {other}, p"] = permutation_p_value(means["pcm"] - means[other])
        report["preferences"][name or "all"] = entry
        cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*entry[f"pcm − {other}"]) for other in others]
        table.add_row(name or "all", *(f"{entry[arm][0]:.3f}" for arm in arms), *cells)
    console.print(table)
    for other in others:  # one of eight preferences may look worse by chance
        entries = [report["preferences"][name] for name in preferences]
        for entry, p in zip(entries, holm([entry[f"pcm − {other}, p"] for entry in entries])):
            entry[f"pcm − {other}, p"] = p
    report["dimensions"] = {
        arm: {
            name: fmean(line["dimensions"][name] for run in runs for line in run if name in line["dimensions"])
            for name in demo.PREFERENCES
        }
        for arm, runs in arms.items()
    }
    return report


def mean_weights(lines: list[dict], names: list[str]) -> dict[str, list[float]]:
    """Mean α of each preference's experts over all tokens."""
    tokens = defaultdict(list)
    for line in lines:
        wanted = [name in line["dimensions"] for name in names]
        tokens[line["preference"]] += [list(itertools.compress(token, wanted)) for token in line["expert_weights"]]
    return {name: np.mean(values, axis=0).round(3).tolist() for name, values in tokens.items()}


def in_words(lines: list[dict], names: list[str]) -> dict[str, float]:
    """Reward, and the mean share of α that the wanted experts have."""
    wanted = [[name in line["dimensions"] for name in names] for line in lines]
    shares = [
        sum(itertools.compress(token, experts))
        for line, experts in zip(lines, wanted)
        for token in line["expert_weights"]
    ]
    return {"reward": fmean(line["reward"] for line in lines), "share of wanted experts": fmean(shares)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pcm", type=Path, nargs="*", default=[], help="folders with pcm.safetensors; without any, headroom alone"
    )
    parser.add_argument("--output", type=Path, default=Path("pcm"))
    parser.add_argument(
        "--measure", nargs="*", choices=MEASURES, default=MEASURES, help="beside uniform weights; by default all"
    )
    parser.add_argument("--static-prompts", type=int, default=64, help="training prompts that static weights are from")
    parser.add_argument("--prompts", type=int, help="the shortest evaluation prompts only; by default all")
    parser.add_argument("--word-prompts", type=int, default=10, help="of these, answered with the preference in words")
    parser.add_argument("--tokens", type=int, default=72, help="most tokens of an answer")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="one prompt of each set, 16 tokens")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.output /= "quick"
        arguments.static_prompts, arguments.prompts, arguments.word_prompts, arguments.tokens = 1, 1, 1, 16
    console = Console(width=160)
    evaluator = Evaluator(arguments.output, arguments.tokens, arguments.batch_size)
    known, unseen = training_prompts(), evaluator.rows(evaluation_prompts(arguments.prompts))
    known = known[:: len(known) // arguments.static_prompts][: arguments.static_prompts]
    told = unseen[:: max(len(unseen) // arguments.word_prompts, 1)][: arguments.word_prompts]

    if "static" in arguments.measure:
        static = best_static_weights(evaluator, evaluator.rows(known), console)
    if not arguments.pcm:
        return
    arms, words = {"uniform": [evaluator.answers("uniform", unseen)]}, {}
    if "static" in arguments.measure:
        arms["static"] = [evaluator.answers("static", unseen, static)]
    if "words" in arguments.measure:
        words = {f"untrained, {w}": evaluator.answers(f"untrained-{w}", told, words=w) for w in WORDS}
        words |= {w: [] for w in WORDS}
    arms["pcm"] = []
    for seed, folder in enumerate(arguments.pcm):
        evaluator.load(folder)
        # The first run draws the same random numbers as the other arms, so that less of a difference is chance.
        arms["pcm"].append(evaluator.answers(f"pcm-{folder.name}", unseen, seed=seed))
        for w in WORDS if words else ():
            words[w] += evaluator.answers(f"pcm-{folder.name}-{w}", told, words=w, seed=seed)
    if "mean" in arguments.measure:
        evaluator.load(None)
        arms["mean"] = [
            evaluator.answers(f"mean-{folder.name}", unseen, mean_weights(lines, evaluator.names), seed=seed)
            for seed, (folder, lines) in enumerate(zip(arguments.pcm, arms["pcm"]))
        ]
    report = compare(arms, console)
    report["in words"] = {name: in_words(lines, evaluator.names) for name, lines in words.items()}
    if "static" in arguments.measure:
        report["static weights"] = static
    if words:
        console.print(report["in words"])
    (arguments.output / "evaluation.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
