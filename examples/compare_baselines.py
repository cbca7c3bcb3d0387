"""
Does the mixture suit a preference better than what one would do without it? Compare it with the plain model and with
a prompt, by rewards that nothing was trained on.

    python examples/compare_baselines.py --output comparison
"""

import argparse
from pathlib import Path

from modeling_pcm_ensemble import Preference, demo
from modeling_pcm_ensemble.evaluation import (
    PlainModel,
    PromptedModel,
    RewardJudge,
    StaticWeights,
    collect_answers,
    judge_answers,
    make_cases,
    summarise,
)
from modeling_pcm_ensemble.evaluation.held_out_proxies import held_out_rewards

QUESTIONS = ["What is gravity?", "How do I cook rice?", "Why do cats purr?", "What is money?"]
PREFERENCES = [Preference({"elementary": 1.0, "concise": 1.0}), Preference({"friendly": 1.0})]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("comparison"), help="where answers are kept")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--quick", action="store_true", help="two questions, 12 tokens")
    arguments = parser.parse_args()
    questions = QUESTIONS[:2] if arguments.quick else QUESTIONS
    tokens = 12 if arguments.quick else arguments.tokens

    # Six experts that are prompts, and a PCM that is not trained: α is the preference's weights.
    model = demo.smollm2_ensemble()
    base, tokenizer = model.backbones[0], model.tokenizer
    descriptions = {expert["name"]: expert["description"] for expert in model.config.experts}
    ours = StaticWeights("mixture", model, tokens)  # of a trained PCM: `TrainedEnsemble`
    others = [
        PlainModel("the plain model", base, tokenizer, tokens),
        PromptedModel("prompting", base, tokenizer, tokens, descriptions),
    ]

    # Every question under every preference. Answers are kept: a run that was stopped goes on.
    cases = make_cases([[{"role": "user", "content": question}] for question in questions], PREFERENCES)
    answers = {}
    for baseline in [ours, *others]:
        answers[baseline.name] = collect_answers(baseline, cases, arguments.output)

    judge = RewardJudge("held-out proxies", held_out_rewards())
    outcomes = {}
    for other in others:
        outcomes[other.name] = judge_answers(judge, cases, answers[ours.name], answers[other.name])

    for name, entry in summarise(outcomes, cases).items():
        mean, low, high = entry["win_rate"]
        print(f"win rate against {name}: {mean:.0%}, 95 % interval {low:.0%} to {high:.0%}, p = {entry['p']:.2f}")


if __name__ == "__main__":
    main()
