"""
Measure what trained Preference Control Models have won, on prompts that they have never seen.

    python examples/smollm2/measure_pcm.py  # the headroom, before any training
    python examples/smollm2/measure_pcm.py --pcm pcm/seed-0 pcm/seed-1 pcm/seed-2

1. Headroom: on training prompts, static weights for each preference; the best of them is what the PCM must beat.
2. Rewards on the evaluation prompts with uniform weights, the best static ones and each PCM; intervals over prompts
   and runs. "mean" is a PCM's mean α under each preference as static weights: what it wins above that comes from
   choosing anew for each prompt and token.
3. The PCM told in words alone, with all six experts active: where does it put α?

Answers, and what is read in them, are kept in OUTPUT, where evaluate.py finds them too; run again, it goes on
where it stopped. What it found is in OUTPUT/pcm, for inspect_pcm.py to draw. --quick measures one prompt of each set,
in OUTPUT/quick.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import numpy as np
from common import (
    ANSWERS_AT_ONCE,
    DEVICE,
    READINGS_AT_ONCE,
    chats,
    evaluation_prompts,
    mean_weights,
    paper_preferences,
    spread,
)
from rich.console import Console
from rich.table import Table
from static_weights import best_static_weights, show_headroom, static_rewards
from tqdm import tqdm

from modeling_pcm_ensemble import Preference, demo
from modeling_pcm_ensemble.checkpoint_staging import write_text
from modeling_pcm_ensemble.evaluation import (
    Baseline,
    Case,
    PlainModel,
    RewardJudge,
    StaticWeights,
    ToldInWords,
    TrainedEnsemble,
    bootstrap_interval,
    collect_answers,
    collect_text_features,
    distributed_state,
    expert_weights_over,
    judge_answers,
    make_cases,
)
from modeling_pcm_ensemble.rewards.proxies import proxy_rewards
from modeling_pcm_ensemble.rewards.quality import TextQuality
from modeling_pcm_ensemble.tables import signed_interval

MEASURES = ("static", "mean", "words")
Rewards = dict[str, np.ndarray]  # by dimension, (prompts, preferences); NaN where a dimension is not wanted


def compare(arms: dict[str, list[Rewards]], labels: list[str]) -> dict:
    r"""
    Compare rewards by preference and dimension, and by how much the PCMs are above the others; p-values of preferences
    are Holm's.

    Args:
        arms (`dict`): the runs of each arm, each with its rewards.
        labels (`list[str]`): the preferences'.
    """
    rewards = {}
    for arm, runs in arms.items():
        rewards[arm] = np.array([np.nanmean(list(run.values()), axis=0) for run in runs])  # (runs, prompts, labels)

    columns_of = {label: [column] for column, label in enumerate(labels)} | {"all": list(range(len(labels)))}
    preferences = {}
    for label, columns in columns_of.items():
        means = {arm: values[:, :, columns].mean(axis=2) for arm, values in rewards.items()}  # (runs, prompts)
        preferences[label] = _against_others(means)

    dimensions: dict[str, dict[str, float]] = {}
    for arm, runs in arms.items():
        wanted = [name for name in demo.PREFERENCES if name in runs[0]]
        dimensions[arm] = {name: float(np.nanmean([run[name] for run in runs])) for name in wanted}
    return {"preferences": preferences, "dimensions": dimensions}


def _against_others(means: dict[str, np.ndarray]) -> dict:
    """Each arm's mean, and by how much the PCMs are above the others; `means` are `(runs, prompts)`."""
    entry = {arm: list(bootstrap_interval(values)) for arm, values in means.items()}
    entry["pcm, each run"] = means["pcm"].mean(axis=1).tolist()
    for other in _others(means):
        above = means["pcm"] - means[other]
        entry[f"pcm − {other}"] = list(bootstrap_interval(above))
        entry[f"pcm − {other}, each run"] = [list(bootstrap_interval(run[None])) for run in above]
    return entry


def _others(arms: dict) -> list[str]:
    return [arm for arm in arms if arm != "pcm"]


def show_comparison(report: dict, console: Console):
    """Print what [`compare`] gives, by preference."""
    arms = list(report["dimensions"])
    others = _others(report["dimensions"])
    table = Table("preference", *arms, *(f"pcm − {arm}" for arm in others), title="reward on the evaluation prompts")
    for label, entry in report["preferences"].items():
        above = [signed_interval(entry[f"pcm − {other}"]) for other in others]
        table.add_row(label, *(f"{entry[arm][0]:.3f}" for arm in arms), *above)
    console.print(table)


def weights_over(model, cases: list[Case], answers: list[str], told: list[dict] | None = None) -> list[dict]:
    """Give a line for each answer: its tokens and their α, under the cases' preferences or as the PCM was `told`."""
    told = told or [{"preference": case.preference} for case in cases]
    lines = []
    for case, answer, preference in tqdm(list(zip(cases, answers, told)), desc="expert weights", leave=False):
        ids, values = expert_weights_over(model, case.prompt, answer, **preference)
        if not ids:  # an empty answer
            continue

        line = {
            "prompt": case.prompt[-1]["content"],
            "preference": case.preference.label,
            "experts": list(case.preference.weights),
            "token_ids": ids,
            "expert_weights": [[round(alpha, 4) for alpha in token] for token in values.tolist()],
        }
        lines.append(line)
    return lines


def share_of_wanted(lines: list[dict], names: list[str]) -> float:
    """Average the share of α that the wanted experts have."""
    shares = []
    for line in lines:
        wanted = [names.index(name) for name in line["experts"]]
        shares += [sum(token[expert] for expert in wanted) for token in line["expert_weights"]]
    return fmean(shares)


class Measurement:
    """Answers of the shipped experts under the paper's preferences, kept in a folder, and their rewards."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.model = demo.trained_ensemble(dtype=demo.fast_dtype(DEVICE)).to(distributed_state().device)
        self.names = self.model.config.expert_names
        self.preferences = paper_preferences(self.model)
        self.cases = make_cases(chats(evaluation_prompts(arguments.prompts)), self.preferences)

        self.quality = TextQuality(self.model.backbones[0], self.model.tokenizer, batch_size=READINGS_AT_ONCE)
        self.judge = RewardJudge("training rewards", proxy_rewards(self.quality))
        base = PlainModel("vanilla", self.model.backbones[0], self.model.tokenizer, arguments.tokens)
        self.vanilla = self.answers(base)

    def trained(self, name: str = "trained PCM", **options) -> TrainedEnsemble:
        return TrainedEnsemble(name, self.model, self.arguments.tokens, **options)

    def static(self, name: str, weights: dict[str, Preference] | None = None) -> StaticWeights:
        return StaticWeights(name, self.model, self.arguments.tokens, weights=weights)

    def answers(self, baseline: Baseline, cases: list[Case] | None = None, seed: int = 0) -> list[str]:
        cases = self.cases if cases is None else cases
        return collect_answers(baseline, cases, self.arguments.output, seed, self.arguments.batch_size)

    def rewards(self, answers: list[str], places: list[int] | None = None) -> Rewards:
        """Measure answers to all cases, or to those at `places`."""
        places = list(range(len(self.cases))) if places is None else places
        cases = [self.cases[place] for place in places]
        vanilla = [self.vanilla[place] for place in places]
        collect_text_features(self.quality, cases, self.arguments.output, answers, vanilla)
        return judge_answers(self.judge, cases, answers, vanilla).dimensions

    def in_words(self, seed: int = 0) -> dict[str, dict[str, float]]:
        """
        Measure the reward, and the share of α of the experts meant, where all six are active and words alone say what
        is wanted; and the reward where weights say it.
        """
        every_prompt = list(dict.fromkeys(json.dumps(case.prompt) for case in self.cases))
        prompts = spread(every_prompt, self.arguments.word_prompts)
        places = [place for place, case in enumerate(self.cases) if json.dumps(case.prompt) in prompts]
        cases = [self.cases[place] for place in places]
        descriptions = {expert["name"]: expert["description"] for expert in self.model.config.experts}

        words = {}
        for preference in self.preferences:
            words[preference.label] = " ".join(descriptions[name] for name in preference.weights)
        texts = [words[case.preference.label] for case in cases]
        in_system = []
        for text, case in zip(texts, cases):
            in_system.append(Case([{"role": "system", "content": text}, *case.prompt], case.preference))
        everyone = dict.fromkeys(words, Preference(dict.fromkeys(self.names, 1.0)))

        as_text = [{"preference_text": text} for text in texts]
        by_everyone = [{"preference": self.names}] * len(cases)
        told_as_text = ToldInWords("told as text", self.model, self.arguments.tokens, words)
        arms: dict[str, tuple[Baseline, list[Case], list[dict] | None]] = {
            # how they are told: who answers, what is asked, and what the PCM is given beside the context
            "weights": (self.trained(), cases, None),
            "nothing": (self.static("told nothing", everyone), cases, None),
            "text": (told_as_text, cases, as_text),
            "system, untrained": (self.static("system message, untrained", everyone), in_system, None),
            "system": (self.trained("system message", weights=everyone), in_system, by_everyone),
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


def parse_arguments() -> argparse.Namespace:
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
    parser.add_argument("--batch-size", type=int, default=ANSWERS_AT_ONCE)
    parser.add_argument("--quick", action="store_true", help="one prompt of each set, 16 tokens")
    arguments = parser.parse_args()

    if arguments.quick:
        arguments.output /= "quick"
        arguments.static_prompts, arguments.prompts, arguments.word_prompts, arguments.tokens = 1, 1, 1, 16
    if len({folder.name for folder in arguments.pcm}) < len(arguments.pcm):
        parser.error("--pcm takes folders of different names: what is written about a run is named after its folder")
    if arguments.word_prompts < 1:
        parser.error("--word-prompts must be at least 1")
    return arguments


def choose_static_weights(model, arguments: argparse.Namespace, console: Console) -> dict[str, Preference]:
    """Print the headroom, and choose the best static weights of each preference."""
    folder = arguments.output / "static-mixture"
    headroom = static_rewards(model, 0, arguments.static_prompts, arguments.tokens, folder, arguments.batch_size)
    show_headroom(headroom, console)
    return best_static_weights(model, headroom)


def write_results(report: dict, weights: dict[str, list[dict]], folder: Path):
    """Write the report, and α over every answer of each run."""
    write_text(folder / "evaluation.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for run, lines in weights.items():
        write_text(folder / f"expert-weights-{run}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def main():
    arguments = parse_arguments()
    console = Console(width=160, quiet=not distributed_state().is_main_process)
    measured = Measurement(arguments)

    # As often as there are PCMs, since one answer to a prompt is mostly chance. A run draws the same random numbers in
    # every arm, so that less of a difference is chance.
    seeds = range(max(len(arguments.pcm), 1))
    uniform = measured.static("uniform mixture")
    arms = {"uniform": [measured.answers(uniform, seed=seed) for seed in seeds]}
    static = None
    if "static" in arguments.measure:
        static = choose_static_weights(measured.model, arguments, console)
        best = measured.static("best static weights", static)
        arms["static"] = [measured.answers(best, seed=seed) for seed in seeds]
    if not arguments.pcm:
        return

    arms["pcm"], weights, words = [], {}, []
    for seed, folder in zip(seeds, arguments.pcm):
        measured.model.load_pcm(folder / "pcm.safetensors")
        answers = measured.answers(measured.trained(), seed=seed)
        arms["pcm"].append(answers)
        weights[folder.name] = weights_over(measured.model, measured.cases, answers)
        if "words" in arguments.measure:
            words.append(measured.in_words(seed))
    if "mean" in arguments.measure:
        means = [mean_weights(lines, measured.names) for lines in weights.values()]
        arms["mean"] = [measured.answers(measured.static("mean α", mean), seed=s) for s, mean in enumerate(means)]

    rewards = {arm: [measured.rewards(answers) for answers in runs] for arm, runs in arms.items()}
    if not distributed_state().is_main_process:
        return
    report = {"runs": list(weights)}
    report |= compare(rewards, [preference.label for preference in measured.preferences])
    show_comparison(report, console)
    if words:
        report["in words"] = {}
        for told, values in words[0].items():
            report["in words"][told] = {name: fmean(run[told][name] for run in words) for name in values}
        console.print(report["in words"])
    if static is not None:
        report["static weights"] = {label: dict(preference.weights) for label, preference in static.items()}
    write_results(report, weights, arguments.output / "pcm")


if __name__ == "__main__":
    main()
    distributed_state().destroy_process_group()
