"""
Measure what trained Preference Control Models have won, on prompts that they have never seen.

    python examples/evaluate_pcm.py  # the headroom, before any training
    python examples/evaluate_pcm.py --pcm pcm/seed-0 pcm/seed-1 pcm/seed-2

1. Headroom: on training prompts, static weights for each preference; the best of them is what the PCM must beat.
2. Rewards on the evaluation prompts with uniform weights, the best static ones and each PCM; intervals over prompts
   and runs. "mean" is a PCM's mean α under each preference as static weights: what it wins above that comes from
   choosing anew for each prompt and token.
3. The PCM told in words alone, with all six experts active: where does it put α?

Answers, and what guards read in them, are kept in OUTPUT, where examples/evaluate.py finds them too; run again, it
goes on where it stopped. What it found is in OUTPUT/pcm, for examples/inspect_pcm.py to draw. --quick measures one
prompt of each set, in OUTPUT/quick.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
from answers import ARTIFACTS, DEVICE, chats, evaluation_prompts, paper_preferences, spread
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from static_weights import best_static_weights, show_headroom, static_rewards
from tqdm import tqdm

from modeling_pcm_ensemble import demo
from modeling_pcm_ensemble.checkpoint_staging import write_text
from modeling_pcm_ensemble.evaluation import (
    Job,
    Mixture,
    PlainModel,
    RewardJudge,
    bootstrap_interval,
    collect_answers,
    expert_weights_over,
    holm,
    judge_answers,
    label,
    make_jobs,
    permutation_p_value,
    processes,
    read_by_all,
)
from modeling_pcm_ensemble.training.rewards import proxy_rewards

MEASURES = ("static", "mean", "words")


def compare(arms: dict[str, list[dict[str, np.ndarray]]], preferences: list[str], console: Console) -> dict:
    r"""
    Rewards by preference and dimension, and by how much the PCMs are above the others; p-values of preferences are
    Holm's.

    Args:
        arms (`dict`): the runs of each arm, each with its rewards by dimension, `(prompts, preferences)`, NaN where a
            dimension is not wanted.
        preferences (`list[str]`): what they are called.
    """
    others = [arm for arm in arms if arm != "pcm"]
    table = Table("preference", *arms, *(f"pcm − {arm}" for arm in others), title="reward on the evaluation prompts")
    report, rewards = {"preferences": {}}, {}
    for arm, runs in arms.items():
        rewards[arm] = np.array(
            [np.nanmean(list(run.values()), axis=0) for run in runs]
        )  # (runs, prompts, preferences)
    for name, columns in [*((name, [i]) for i, name in enumerate(preferences)), ("all", range(len(preferences)))]:
        means = {arm: values[:, :, list(columns)].mean(axis=2) for arm, values in rewards.items()}  # (runs, prompts)
        entry = {arm: list(bootstrap_interval(values)) for arm, values in means.items()}
        entry["pcm, each run"] = means["pcm"].mean(axis=1).tolist()
        for other in others:
            above = means["pcm"] - means[other]
            entry[f"pcm − {other}"] = list(bootstrap_interval(above))
            entry[f"pcm − {other}, each run"] = [list(bootstrap_interval(run[None])) for run in above]
            entry[f"pcm − {other}, p"] = permutation_p_value(above)
        report["preferences"][name] = entry
        cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*entry[f"pcm − {other}"]) for other in others]
        table.add_row(name, *(f"{entry[arm][0]:.3f}" for arm in arms), *cells)
    console.print(table)
    for other in others:  # one of eight preferences may look worse by chance
        entries = [report["preferences"][name] for name in preferences]
        for entry, p in zip(entries, holm([entry[f"pcm − {other}, p"] for entry in entries])):
            entry[f"pcm − {other}, p"] = p
    report["dimensions"] = {
        arm: {name: float(np.nanmean([run[name] for run in runs])) for name in demo.PREFERENCES if name in runs[0]}
        for arm, runs in arms.items()
    }
    return report


def weights_over(model, jobs: list[Job], answers: list[str], told: list[dict] | None = None) -> list[dict]:
    """A line for each answer: its tokens and their α, under the jobs' preferences or as the PCM was `told`."""
    lines, told = [], told or [{"preference": job.preference} for job in jobs]
    for job, answer, preference in tqdm(list(zip(jobs, answers, told)), desc="expert weights", leave=False):
        ids, values = expert_weights_over(model, job.prompt, answer, **preference)
        if not ids:  # an empty answer
            continue
        facts = {"prompt": job.prompt[-1]["content"], "preference": label(job.preference)}
        rounded = [[round(a, 4) for a in token] for token in values.tolist()]
        lines.append(facts | {"experts": list(job.preference), "token_ids": ids, "expert_weights": rounded})
    return lines


def mean_weights(lines: list[dict], names: list[str]) -> dict[str, dict[str, float]]:
    """Mean α of each preference's experts over all tokens."""
    means = {}
    for preference in dict.fromkeys(line["preference"] for line in lines):
        mine = [line for line in lines if line["preference"] == preference]
        mean = np.mean([token for line in mine for token in line["expert_weights"]], axis=0)
        means[preference] = {name: round(float(mean[names.index(name)]), 3) for name in mine[0]["experts"]}
    return means


def share_of_wanted(lines: list[dict], names: list[str]) -> float:
    """Mean share of α that the wanted experts have."""
    wanted = [[names.index(name) for name in line["experts"]] for line in lines]
    return fmean(sum(token[i] for i in own) for line, own in zip(lines, wanted) for token in line["expert_weights"])


class Evaluation:
    """Answers, kept in a folder, and their rewards."""

    def __init__(self, arguments):
        self.model = demo.trained_ensemble(ARTIFACTS, dtype=demo.fast_dtype(DEVICE)).to(processes().device)
        self.names, self.arguments = self.model.config.expert_names, arguments
        self.jobs = make_jobs(chats(evaluation_prompts(arguments.prompts)), paper_preferences(self.model))
        self.preferences = [label(preference) for preference in paper_preferences(self.model)]
        rewards = proxy_rewards(self.model.backbones[0], self.model.tokenizer)
        self.judge, self.guard = RewardJudge("training rewards", rewards), next(iter(rewards.values())).guard
        base = PlainModel("vanilla", self.model.backbones[0], self.model.tokenizer, arguments.tokens)
        self.vanilla = self.answers(base)
        self.mixture = partial(Mixture, model=self.model, max_new_tokens=arguments.tokens)

    def load(self, folder: Path):
        """Put the trained PCM of a folder in place."""
        learnt = load_file(folder / "pcm.safetensors")
        self.model.pcm.load_state_dict(self.model.pcm.state_dict() | learnt)

    def answers(self, baseline, jobs: list[Job] | None = None, seed: int = 0) -> list[str]:
        jobs = self.jobs if jobs is None else jobs
        return collect_answers(baseline, jobs, self.arguments.output, seed, self.arguments.batch_size)

    def rewards(self, answers: list[str], places: list[int] | None = None) -> dict[str, np.ndarray]:
        """Of answers to all jobs, or to those at `places`: by dimension, `(prompts, preferences)`."""
        places = range(len(self.jobs)) if places is None else places
        jobs, vanilla = ([values[i] for i in places] for values in (self.jobs, self.vanilla))
        read_by_all(self.guard, jobs, self.arguments.output, answers, vanilla)
        return judge_answers(self.judge, jobs, answers, vanilla).dimensions

    def in_words(self, seed: int = 0) -> dict[str, dict[str, float]]:
        """
        Reward, and share of α of the experts meant, where all six are active and words alone say what is wanted; and
        the reward where weights say it.
        """
        prompts = spread(list(dict.fromkeys(json.dumps(job.prompt) for job in self.jobs)), self.arguments.word_prompts)
        places = [i for i, job in enumerate(self.jobs) if json.dumps(job.prompt) in prompts]
        descriptions = {expert["name"]: expert["description"] for expert in self.model.config.experts}
        jobs = [self.jobs[i] for i in places]
        words = {label(job.preference): " ".join(descriptions[name] for name in job.preference) for job in jobs}
        texts = [words[label(job.preference)] for job in jobs]
        turned = [
            Job([{"role": "system", "content": text}, *job.prompt], job.preference) for text, job in zip(texts, jobs)
        ]
        everyone = {"weights": dict.fromkeys(words, dict.fromkeys(self.names, 1.0))}
        arms = {  # how they are told, what is asked, and what the PCM is given beside the context
            "weights": (self.mixture("trained PCM"), jobs, None),
            "nothing": (self.mixture("told nothing", use_pcm=False, **everyone), jobs, None),
            "text": (self.mixture("told as text", words=words), jobs, [{"preference_text": text} for text in texts]),
            "system, untrained": (self.mixture("system message, untrained", use_pcm=False, **everyone), turned, None),
            "system": (self.mixture("system message", **everyone), turned, [{"preference": self.names}] * len(jobs)),
        }
        found = {}
        for name, (baseline, asked, told) in arms.items():
            answers = self.answers(baseline, asked, seed)
            rewards = np.nanmean(list(self.rewards(answers, places).values()), axis=0)
            found[name] = {"reward": float(rewards.mean())}
            if told is not None:
                lines = weights_over(self.model, asked, answers, told)
                found[name]["share of wanted experts"] = share_of_wanted(lines, self.names)
        return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pcm", type=Path, nargs="*", default=[], help="folders with pcm.safetensors; without any, headroom alone"
    )
    parser.add_argument("--output", type=Path, default=Path("evaluation"))
    parser.add_argument(
        "--measure", nargs="*", choices=MEASURES, default=MEASURES, help="beside uniform weights; by default all"
    )
    parser.add_argument("--static-prompts", type=int, default=32, help="training prompts that static weights are from")
    parser.add_argument("--prompts", type=int, help="the shortest evaluation prompts only; by default all")
    parser.add_argument("--word-prompts", type=int, default=10, help="of these, answered with the preference in words")
    parser.add_argument("--tokens", type=int, default=72, help="most tokens of an answer")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="one prompt of each set, 16 tokens")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.output /= "quick"
        arguments.static_prompts, arguments.prompts, arguments.word_prompts, arguments.tokens = 1, 1, 1, 16
    if len({folder.name for folder in arguments.pcm}) < len(arguments.pcm):
        parser.error("--pcm takes folders of different names: what is written about a run is named after its folder")
    if arguments.word_prompts < 1:
        parser.error("--word-prompts must be at least 1")
    console = Console(width=160, quiet=not processes().is_main_process)
    evaluation = Evaluation(arguments)
    model, mixture, names = evaluation.model, evaluation.mixture, evaluation.names
    uniform, seeds = mixture("uniform mixture", use_pcm=False), range(max(len(arguments.pcm), 1))
    # As often as there are PCMs, since one answer to a prompt is mostly chance. A run draws the same random numbers in
    # every arm, so that less of a difference is chance.
    arms = {"uniform": [evaluation.answers(uniform, seed=seed) for seed in seeds]}
    if "static" in arguments.measure:
        headroom = static_rewards(model, arguments)
        show_headroom(headroom, console)
        static = best_static_weights(model, headroom)
        best = mixture("best static weights", use_pcm=False, weights=static)
        arms["static"] = [evaluation.answers(best, seed=seed) for seed in seeds]
    if not arguments.pcm:
        return
    arms["pcm"], words, weights = [], [], []
    for seed, folder in zip(seeds, arguments.pcm):
        evaluation.load(folder)
        arms["pcm"].append(evaluation.answers(mixture("trained PCM"), seed=seed))
        weights.append(weights_over(model, evaluation.jobs, arms["pcm"][-1]))
        if "words" in arguments.measure:
            words.append(evaluation.in_words(seed))
    if "mean" in arguments.measure:
        arms["mean"] = [
            evaluation.answers(mixture("mean α", use_pcm=False, weights=mean_weights(lines, names)), seed=seed)
            for seed, lines in enumerate(weights)
        ]
    rewards = {arm: [evaluation.rewards(answers) for answers in runs] for arm, runs in arms.items()}
    if not processes().is_main_process:
        return
    report = {"runs": [folder.name for folder in arguments.pcm]}
    report |= compare(rewards, evaluation.preferences, console)
    if words:
        report["in words"] = {
            told: {name: fmean(run[told][name] for run in words) for name in words[0][told]} for told in words[0]
        }
        console.print(report["in words"])
    if "static" in arguments.measure:
        report["static weights"] = static
    folder = arguments.output / "pcm"
    write_text(folder / "evaluation.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for run, lines in zip(arguments.pcm, weights):
        write_text(folder / f"expert-weights-{run.name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
    processes().destroy_process_group()
