"""
Does the trained PCM still win under preferences of other kinds than the paper's eight?

    python examples/new_preferences.py --output evaluation/new

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
from pathlib import Path

from answers import ARTIFACTS, DEVICE, chats, evaluation_prompts, paper_preferences, spread
from rich.console import Console
from rich.markdown import Markdown

from modeling_pcm_ensemble import demo
from modeling_pcm_ensemble.checkpoint_staging import write_text
from modeling_pcm_ensemble.evaluation import (
    Mixture,
    PlainModel,
    RewardJudge,
    collect_answers,
    holm,
    judge_answers,
    label,
    make_jobs,
    processes,
    summarise,
)
from modeling_pcm_ensemble.evaluation.held_out_proxies import held_out_rewards
from modeling_pcm_ensemble.evaluation.report import draw_win_rates, win_rate_table
from modeling_pcm_ensemble.training.rewards import proxy_rewards

ADDED = {  # the seventh expert, judged as friendly
    "name": "cheerful",
    "prompt": "You are cheerful. Answer in a warm and happy way.",
    "description": "Generate a response that is warm, cheerful and happy.",
}


def kinds_of_preferences(paper: list[dict[str, float]]) -> dict[str, list[dict[str, float]]]:
    """Preferences by kind, but for those of the added expert."""
    names, generator = list(demo.PREFERENCES), random.Random(0)
    dimensions = {name: dimension for name, (dimension, _) in demo.PREFERENCES.items()}
    pairs = [pair for pair in itertools.combinations(names, 2) if dimensions[pair[0]] != dimensions[pair[1]]]
    return {
        "the paper's eight": paper,
        "two experts": [dict.fromkeys(pair, 1.0) for pair in pairs],
        "weights between 0 and 2": [{n: round(generator.uniform(0.1, 2), 1) for n in entry} for entry in paper],
        "five experts": [dict.fromkeys(five, 1.0) for five in itertools.combinations(names, 5)],
        "all six": [dict.fromkeys(names, 1.0)],
    }


def with_added(paper: list[dict[str, float]]) -> list[dict[str, float]]:
    """The paper's friendly preferences, of the added expert in place of the friendly one."""
    friendly = [entry for entry in paper if "friendly" in entry]
    return [{ADDED["name"] if name == "friendly" else name: 1.0 for name in entry} for entry in friendly]


def compare(kind: str, ours, others: list, preferences: list[dict], judges: list[RewardJudge], arguments) -> dict:
    """By judge, the win rates of `ours` against the others."""
    if arguments.quick:
        preferences = preferences[:1]
    jobs = make_jobs(chats(spread(evaluation_prompts(), arguments.prompts)), preferences)
    answers = {b.name: collect_answers(b, jobs, arguments.output, 0, arguments.batch_size) for b in [ours, *others]}
    found = {}
    for judge in judges:
        outcomes = {b.name: judge_answers(judge, jobs, answers[ours.name], answers[b.name]) for b in others}
        entries = [summarise({name: outcome}, jobs) for name, outcome in outcomes.items()]  # one by one: p as it is
        found[judge.name] = {f"{kind}: {name}": value for entry in entries for name, value in entry.items()}
    return found


def compare_all(model, judges: list[RewardJudge], arguments) -> list[dict]:
    tokens = arguments.tokens
    descriptions = {name: description for name, (_, description) in demo.PREFERENCES.items()}
    ours = Mixture("trained PCM", model, tokens)
    given = Mixture("weights as given", model, tokens, use_pcm=False)
    prompting = PlainModel("prompting", model.backbones[0], model.tokenizer, tokens, descriptions)
    paper = paper_preferences(model)
    found = [
        compare(kind, ours, [given, prompting], preferences, judges, arguments)
        for kind, preferences in kinds_of_preferences(paper).items()
    ]
    words = {label(entry): " ".join(demo.UNSEEN_PARAPHRASES[name] for name in entry) for entry in paper}
    told = Mixture("trained PCM, other words", model, tokens, words=words)
    asked = PlainModel("prompting", model.backbones[0], model.tokenizer, tokens, demo.UNSEEN_PARAPHRASES)
    found.append(compare("other words", told, [given, asked], paper, judges, arguments))
    name, expert = ADDED["name"], {"model": demo.fetch_smollm2()} | ADDED
    model.add_expert(expert.pop("name"), expert)
    prompting.descriptions = descriptions | {name: ADDED["description"]}
    found.append(compare("an added expert", ours, [given, prompting], with_added(paper), judges, arguments))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("evaluation/new"))
    parser.add_argument("--prompts", type=int, default=10, help="evaluation prompts, of all lengths")
    parser.add_argument("--tokens", type=int, default=72, help="most tokens of an answer")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="see above; in OUTPUT/quick")
    arguments = parser.parse_args()
    if arguments.prompts < 1:
        parser.error("--prompts must be at least 1")
    if arguments.quick:
        arguments.output /= "quick"
        arguments.prompts, arguments.tokens = 1, 16
    model = demo.trained_ensemble(ARTIFACTS, dtype=demo.fast_dtype(DEVICE)).to(processes().device)
    judges = []
    for judge, rewards in (
        ("training rewards", proxy_rewards(model.backbones[0], model.tokenizer)),
        ("held-out proxies", held_out_rewards()),
    ):
        judges.append(RewardJudge(judge, rewards | {ADDED["name"]: rewards["friendly"]}))
    found = compare_all(model, judges, arguments)
    if not processes().is_main_process:
        return
    report = {judge.name: {k: v for kind in found for k, v in kind[judge.name].items()} for judge in judges}
    for entries in report.values():
        for entry, p in zip(entries.values(), holm([entry["p"] for entry in entries.values()])):
            entry["p"] = p
    write_text(arguments.output / "new_preferences.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    draw_win_rates(report, arguments.output / "new_preferences.png")
    console = Console()
    for judge, entries in report.items():
        console.print(f"\nWin rate of the trained PCM, judge: {judge}")
        console.print(Markdown(win_rate_table(entries)))


if __name__ == "__main__":
    main()
    processes().destroy_process_group()
