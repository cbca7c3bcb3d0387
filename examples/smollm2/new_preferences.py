"""
Does the trained PCM still win under preferences of other kinds than the paper's eight?

    python examples/smollm2/new_preferences.py --output evaluation/new

Kinds of preferences, beside the paper's eight for comparison: two experts, which training has seen less often; the
eight with other weights, between 0.1 and 2; five experts; all six; three of which one, a prompted expert, is added to
the ensemble after training; and the eight told in words that the PCM has never read. Under five or six, rewards of
opposite experts cancel, and what decides is mostly how sane the text is. Each is answered by the trained PCM, by the
weights as given (or, for words, by equal weights of the experts that are meant) and by the base model told in its
prompt. The table and its picture are in OUTPUT.

Run again, it goes on where it stopped. --quick takes one prompt and one preference of each kind.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

from common import ANSWERS_AT_ONCE, DEVICE, READINGS_AT_ONCE, chats, evaluation_prompts, paper_preferences, spread
from rich.console import Console
from rich.markdown import Markdown

from modeling_pcm_ensemble import Preference, demo
from modeling_pcm_ensemble.checkpoint_staging import write_text
from modeling_pcm_ensemble.demo_wordings import WORDINGS
from modeling_pcm_ensemble.evaluation import (
    Baseline,
    PromptedModel,
    RewardJudge,
    StaticWeights,
    ToldInWords,
    TrainedEnsemble,
    adjust_p_values,
    collect_answers,
    collect_text_features,
    distributed_state,
    judge_answers,
    make_cases,
    summarise,
)
from modeling_pcm_ensemble.evaluation.held_out_proxies import held_out_rewards
from modeling_pcm_ensemble.evaluation.pictures import draw_win_rates
from modeling_pcm_ensemble.evaluation.report import win_rate_table
from modeling_pcm_ensemble.rewards.proxies import proxy_rewards
from modeling_pcm_ensemble.rewards.quality import TextQuality

ADDED = {  # the seventh expert, judged as friendly
    "name": "cheerful",
    "prompt": "You are cheerful. Answer in a warm and happy way.",
    "description": "Generate a response that is warm, cheerful and happy.",
}
# Words that no training has had
UNSEEN = {name: texts[0] for name, texts in WORDINGS["sentences"]["held_out"].items()}


def kinds_of_preferences(paper: list[Preference]) -> dict[str, list[Preference]]:
    """Make preferences by kind, but for those of the added expert; `paper` are the eight."""
    names, generator = list(demo.PREFERENCES), random.Random(0)
    dimensions = {name: dimension for name, (dimension, _) in demo.PREFERENCES.items()}
    pairs = [pair for pair in itertools.combinations(names, 2) if dimensions[pair[0]] != dimensions[pair[1]]]
    weighted = []
    for preference in paper:
        weighted.append(Preference({name: round(generator.uniform(0.1, 2), 1) for name in preference.weights}))

    return {
        "the paper's eight": paper,
        "two experts": [equal(pair) for pair in pairs],
        "weights between 0 and 2": weighted,
        "five experts": [equal(five) for five in itertools.combinations(names, 5)],
        "all six": [equal(names)],
    }


def equal(names: Iterable[str]) -> Preference:
    return Preference(dict.fromkeys(names, 1.0))


def with_added(paper: list[Preference]) -> list[Preference]:
    """Make the paper's friendly preferences of the added expert in place of the friendly one."""
    friendly = [preference for preference in paper if "friendly" in preference.weights]
    replaced = {"friendly": ADDED["name"]}
    return [equal(replaced.get(name, name) for name in preference.weights) for preference in friendly]


def compare(
    kind: str,
    ours: Baseline,
    others: list[Baseline],
    preferences: list[Preference],
    judges: list[RewardJudge],
    quality: TextQuality,
    arguments,
) -> dict[str, dict]:
    """Measure, by judge, the win rates of `ours` against the others."""
    if arguments.quick:
        preferences = preferences[:1]
    cases = make_cases(chats(spread(evaluation_prompts(), arguments.prompts)), preferences)
    answers = {}
    for seed, baseline in enumerate([ours, *others]):  # a win is of answers that share no random numbers
        answers[baseline.name] = collect_answers(baseline, cases, arguments.output, seed, arguments.batch_size)
    collect_text_features(quality, cases, arguments.output, *answers.values())

    found: dict[str, dict] = {judge.name: {} for judge in judges}
    for judge, other in itertools.product(judges, others):
        outcome = judge_answers(judge, cases, answers[ours.name], answers[other.name])
        summary = summarise({other.name: outcome}, cases)  # one by one: p as it is
        found[judge.name][f"{kind}: {other.name}"] = summary[other.name]
    return found


def compare_all(model, judges: list[RewardJudge], quality: TextQuality, arguments) -> list[dict]:
    """Compare under every kind of preference. An expert is added to the model at the end."""
    tokens = arguments.tokens
    descriptions = {name: description for name, (_, description) in demo.PREFERENCES.items()}
    ours = TrainedEnsemble("trained PCM", model, tokens)
    given = StaticWeights("weights as given", model, tokens)
    paper = paper_preferences(model)

    def prompting(told: dict[str, str]) -> PromptedModel:
        return PromptedModel("prompting", model.backbones[0], model.tokenizer, tokens, told)

    found = []
    for kind, preferences in kinds_of_preferences(paper).items():
        found.append(compare(kind, ours, [given, prompting(descriptions)], preferences, judges, quality, arguments))

    words = {}
    for preference in paper:
        words[preference.label] = " ".join(UNSEEN[name] for name in preference.weights)
    told = ToldInWords("trained PCM, other words", model, tokens, words)
    others = [given, prompting(UNSEEN)]
    found.append(compare("other words", told, others, paper, judges, quality, arguments))

    name, expert = ADDED["name"], {"model": demo.fetch_smollm2()} | ADDED
    model.add_expert(expert.pop("name"), expert)
    others = [given, prompting(descriptions | {name: ADDED["description"]})]
    found.append(compare("an added expert", ours, others, with_added(paper), judges, quality, arguments))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("evaluation/new"))
    parser.add_argument("--prompts", type=int, default=10, help="evaluation prompts, of all lengths")
    parser.add_argument("--tokens", type=int, default=72, help="most tokens of an answer")
    parser.add_argument("--batch-size", type=int, default=ANSWERS_AT_ONCE)
    parser.add_argument("--quick", action="store_true", help="see above; in OUTPUT/quick")
    arguments = parser.parse_args()
    if arguments.prompts < 1:
        parser.error("--prompts must be at least 1")
    if arguments.quick:
        arguments.output /= "quick"
        arguments.prompts, arguments.tokens = 1, 16

    model = demo.trained_ensemble(dtype=demo.fast_dtype(DEVICE)).to(distributed_state().device)
    quality = TextQuality(model.backbones[0], model.tokenizer, batch_size=READINGS_AT_ONCE)
    judges = []
    for name, rewards in (("training rewards", proxy_rewards(quality)), ("held-out proxies", held_out_rewards())):
        judges.append(RewardJudge(name, rewards | {ADDED["name"]: rewards["friendly"]}))
    kinds = compare_all(model, judges, quality, arguments)
    if not distributed_state().is_main_process:
        return

    report: dict[str, dict] = {judge.name: {} for judge in judges}
    for name, entries in report.items():
        for kind in kinds:
            entries |= kind[name]
        for entry, p in zip(entries.values(), adjust_p_values([entry["p"] for entry in entries.values()])):
            entry["p"] = p
    write_text(arguments.output / "new_preferences.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    draw_win_rates(report, arguments.output / "new_preferences.png")

    console = Console()
    for judge, entries in report.items():
        console.print(f"\nWin rate of the trained PCM, judge: {judge}")
        console.print(Markdown(win_rate_table(entries)))


if __name__ == "__main__":
    main()
    distributed_state().destroy_process_group()
