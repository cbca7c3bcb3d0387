"""
Does the trained PCM win? Compare it with what a user would do instead, and write a report.

    python examples/smollm2/evaluate.py --output evaluation
    python examples/smollm2/evaluate.py --merge adapters                # another way of merging
    accelerate launch examples/smollm2/evaluate.py --output evaluation  # on all GPUs

1. Best static weights: tried for each preference on training prompts, as shares of a mixture and as strengths.
2. Every baseline answers every prompt under the paper's eight preferences.
3. Judges compare each answer with the trained PCM's: the rewards of training, proxies that nothing was trained on,
   whether the prompt is answered, styles that are learned from prompted answers, and, where they are given, a language
   model (--judge-url) and people's votes (--votes).
4. The report: report.md, report.json and pictures in OUTPUT.

Run again, it goes on where it stopped; other judges judge the same answers. --model takes another ensemble of the
paper's six experts as adapters on one model (without the average by PEFT, which needs their files), --prompt-file
another set. --against NAMES compares with these baselines and vanilla alone. --ablations compares the PCM with itself:
without what it reads, and with other numbers of the experts' best tokens. --quick takes ten prompts, two preferences
and three baselines.
"""

import argparse
import hashlib
import sys
from pathlib import Path

from common import (
    ANSWERS_AT_ONCE,
    DEVICE,
    KOALA,
    READINGS_AT_ONCE,
    chats,
    evaluation_prompts,
    merged_by,
    paper_preferences,
    sampled_from,
)
from rich.console import Console
from rich.markdown import Markdown
from static_weights import best_static_weights, static_rewards

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo
from modeling_pcm_ensemble.configuration_pcm_ensemble import TOP_K_MERGES
from modeling_pcm_ensemble.evaluation import (
    AnsweringJudge,
    Baseline,
    ChatEndpoint,
    HumanVotes,
    Judge,
    LanguageModelJudge,
    LearnedJudge,
    PlainModel,
    PromptedModel,
    RewardJudge,
    SingleExpert,
    StaticWeights,
    TrainedEnsemble,
    WeightAverage,
    WithoutContext,
    WithoutDescription,
    distributed_state,
    evaluate,
    make_cases,
    with_settings,
    without_pcm,
    write_report,
)
from modeling_pcm_ensemble.evaluation.held_out_proxies import held_out_rewards
from modeling_pcm_ensemble.evaluation.report import win_rate_table
from modeling_pcm_ensemble.rewards.proxies import proxy_rewards
from modeling_pcm_ensemble.rewards.quality import TextQuality

TOP_K = (1, 5, 20, 100)  # tokens of each expert that are kept
SPACES = {"probabilities": "mixture", "product": "product", "adapters": "added adapters"}


def make_baselines(model, arguments) -> list[Baseline]:
    """Make the trained PCM first, then whatever it is compared with."""
    tokens, top_k = arguments.tokens, kept_tokens(model)
    ours = TrainedEnsemble("trained PCM", model, tokens, top_k=sampled_from(model, top_k))
    uniform = StaticWeights("uniform mixture", merged_by(without_pcm(model), "probabilities", top_k), tokens)
    vanilla, prompting, *merged = single_models(model, arguments)
    if arguments.quick:
        return [ours, vanilla, prompting, uniform]
    if arguments.ablations:
        return [ours, vanilla, uniform, *ablations(model, tokens)]

    experts = [SingleExpert(f"{name} alone", uniform.model, tokens, name) for name in model.config.expert_names]
    return [
        ours,
        vanilla,
        prompting,
        *merged,
        uniform,
        *(() if arguments.model else other_trained(model, arguments)),
        *static(model, arguments),
        *experts,
        *(single_models(model, arguments, top_k) if top_k else []),
    ]


def chosen(baselines: list[Baseline], against: list[str]) -> list[Baseline]:
    """Leave out whatever was not asked for by name, where names are given, but for ours and vanilla, the first two."""
    names = [baseline.name for baseline in baselines]
    if unknown := set(against) - set(names):
        raise ValueError(f"There is no baseline {', '.join(sorted(unknown))}. There are {', '.join(names)}.")
    return [b for place, b in enumerate(baselines) if place < 2 or not against or b.name in against]


def kept_tokens(model) -> int | None:
    """How many of its best tokens each expert keeps where that can be said, and else the merged distribution."""
    return demo.EXPERT_TOP_K if model.config.merge == "adapters" else model.config.expert_top_k


def other_trained(model, arguments) -> list[Baseline]:
    """Make the shipped PCMs under every other merge."""
    baselines: list[Baseline] = []
    for merge, name in SPACES.items():
        if merge != model.config.merge:
            other = demo.trained_ensemble(dtype=model.dtype, merge=merge).to(model.device)
            top_k = sampled_from(other, demo.EXPERT_TOP_K)
            baselines.append(TrainedEnsemble(f"trained PCM, {name}", other, arguments.tokens, top_k=top_k))
    return baselines


def static(model, arguments) -> list[Baseline]:
    """Make the weights as asked, and the best of as many answers to training prompts, that stay the same, by space."""
    tokens, kept = arguments.tokens, kept_tokens(model)
    baselines: list[Baseline] = []
    for merge, name in SPACES.items():
        space = merged_by(without_pcm(model), merge, kept)
        top_k = sampled_from(space, kept)
        if space.config.adds_up:
            baselines.append(StaticWeights(f"{name}, weights as asked", space, tokens, top_k=top_k))

        folder = arguments.output / f"static-{name.replace(' ', '-')}"
        tried = static_rewards(space, top_k, arguments.static_prompts, tokens, folder, arguments.batch_size)
        weights = best_static_weights(space, tried)
        baselines.append(StaticWeights(f"best static {name}", space, tokens, weights=weights, top_k=top_k))
    return baselines


def ablations(model, tokens: int) -> list[Baseline]:
    """Make the trained PCM with a part left out, or with other numbers of the experts' best tokens."""
    top_k = sampled_from(model, kept_tokens(model))
    baselines: list[Baseline] = [
        WithoutDescription("PCM without description", model, tokens, top_k=top_k),
        WithoutContext("PCM without context", model, tokens, top_k=top_k),
    ]

    for k in TOP_K if model.config.merge in TOP_K_MERGES else ():
        if k != model.config.expert_top_k:
            name = f"PCM, experts' top {k}"
            baselines.append(TrainedEnsemble(name, with_settings(model, expert_top_k=k), tokens))
    if model.config.expert_top_k:
        baselines.append(TrainedEnsemble("PCM, experts whole", with_settings(model, expert_top_k=None), tokens))
    return baselines


def single_models(model, arguments, top_k: int = 0) -> list[Baseline]:
    """Make what gives one distribution, sampled whole or, as the PCM's experts are, from its `top_k` best tokens."""
    base, tokenizer, tokens = model.backbones[0], model.tokenizer, arguments.tokens
    descriptions = {expert["name"]: expert["description"] for expert in model.config.experts}
    adapters, logits = (merged_by(without_pcm(model), merge, None) for merge in ("adapters", "logits"))

    part = f", {top_k} best tokens" if top_k else ""
    baselines: list[Baseline] = [
        PlainModel(f"vanilla{part}", base, tokenizer, tokens, top_k=top_k),
        PromptedModel(f"prompting{part}", base, tokenizer, tokens, descriptions, top_k=top_k),
        StaticWeights(f"Personalized Soup{part}", adapters, tokens, top_k=top_k, average=True),
        StaticWeights(f"MOD, averaged logits{part}", logits, tokens, top_k=top_k),
    ]
    if not (arguments.model or arguments.quick or arguments.ablations):
        folders = {expert: str(demo.ARTIFACTS / expert) for expert in demo.PREFERENCES}
        name, options = f"weight average (PEFT){part}", {"top_k": top_k, "dtype": base.dtype}
        average = WeightAverage(name, demo.fetch_smollm2(), folders, tokenizer, tokens, **options)
        average.model.to(base.device)
        baselines.append(average)
    return baselines


def make_judges(rewards, prompts, arguments) -> list[Judge]:
    judges: list[Judge] = [
        RewardJudge("training rewards", rewards),
        RewardJudge("held-out proxies", held_out_rewards()),
    ]
    if not arguments.quick:
        judges += [AnsweringJudge(prompts), LearnedJudge()]

    if arguments.judge_url:
        name = f"{arguments.judge_model} at {arguments.judge_url}"
        endpoint = ChatEndpoint(arguments.judge_url, arguments.judge_model)
        descriptions = {expert: description for expert, (_, description) in demo.PREFERENCES.items()}
        judges.append(LanguageModelJudge(name, endpoint, descriptions, arguments.output / "language-model.jsonl"))
    if arguments.votes:
        judges.append(HumanVotes(arguments.votes))
    return judges


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("evaluation"))
    parser.add_argument(
        "--model", help="an ensemble's folder or repository; by default the trained one of this project"
    )
    parser.add_argument("--merge", choices=SPACES, help="of the project's own ensemble; by default probabilities")
    parser.add_argument("--prompt-file", type=Path, default=KOALA, help='a JSON list of {"prompt": …}')
    parser.add_argument("--prompts", type=int, help="the shortest of these only; by default all")
    parser.add_argument("--static-prompts", type=int, default=32, help="training prompts that static weights are from")
    parser.add_argument("--tokens", type=int, default=72, help="most tokens of an answer")
    parser.add_argument("--batch-size", type=int, default=ANSWERS_AT_ONCE)
    parser.add_argument("--cost-rounds", type=int, default=3, help="how often each answers for its cost; 0: none")
    parser.add_argument("--judge-url", help="an endpoint of OpenAI's form, such as http://localhost:8000/v1")
    parser.add_argument("--judge-model", default="judge", help="the judge's name there")
    parser.add_argument("--votes", type=Path, help="people's votes, see HumanVotes")
    parser.add_argument("--against", nargs="+", default=[], metavar="NAME", help="these baselines alone")
    parser.add_argument("--ablations", action="store_true", help="see above; the report is in OUTPUT/ablations")
    parser.add_argument("--quick", action="store_true", help="see above; in OUTPUT/quick")

    arguments = parser.parse_args()
    if arguments.model and arguments.merge:
        parser.error("--merge is of the project's own ensemble; that of --model is in its configuration")
    arguments.merge = arguments.merge or "probabilities"
    if arguments.quick:
        arguments.output /= "quick"
        arguments.prompts, arguments.tokens = 10, 24
    return arguments


def load_model(source: str | None, merge: str) -> PCMEnsembleForCausalLM:
    dtype = demo.fast_dtype(DEVICE)
    if source is None:
        return demo.trained_ensemble(dtype=dtype, merge=merge)

    model = PCMEnsembleForCausalLM.from_pretrained(source, dtype=dtype)
    experts = model.config.experts
    if {expert["name"] for expert in experts} != set(demo.PREFERENCES):
        raise ValueError(f"{source} has the experts {', '.join(model.config.expert_names)}; the paper's are wanted.")
    if len(model.backbones) > 1 or not all(e["adapter"] and e["description"] and not e["prompt"] for e in experts):
        raise ValueError(f"The experts of {source} must be described adapters on one base model, without prompts.")
    return model


def report_facts(arguments, num_prompts: int, baselines: list[Baseline]) -> dict:
    """Say what was compared: the part of a report that is not measured."""
    against = "itself with parts changed" if arguments.ablations else "what a user would do instead"
    asked = f"{num_prompts} prompts of {arguments.prompt_file.stem}"
    static = {}
    for baseline in baselines:
        if isinstance(baseline, StaticWeights) and baseline.weights:
            chosen = {label: dict(preference.weights) for label, preference in baseline.weights.items()}
            static[baseline.name] = chosen

    return {
        "title": f"The trained PCM against {against}, on {asked}",
        "command": " ".join(["python", "examples/smollm2/evaluate.py", *sys.argv[1:]]),
        "dataset": arguments.prompt_file.stem,
        "static weights": static,
    }


def main():
    arguments = parse_arguments()
    # Read before another PCM may be put there
    digest = hashlib.sha256((demo.ARTIFACTS / demo.pcm_file(arguments.merge)).read_bytes()).hexdigest()
    prompts = chats(evaluation_prompts(arguments.prompts, arguments.prompt_file))
    model = load_model(arguments.model, arguments.merge).to(distributed_state().device)
    preferences = paper_preferences(model)
    if arguments.quick:
        preferences = [preferences[0], preferences[-1]]

    quality = TextQuality(model.backbones[0], model.tokenizer, batch_size=READINGS_AT_ONCE)
    judges = make_judges(proxy_rewards(quality), prompts, arguments)
    ours, *others = chosen(make_baselines(model, arguments), arguments.against)
    report = evaluate(
        ours,
        others,
        make_cases(prompts, preferences),
        judges,
        arguments.output,
        model=model,
        quality=quality,
        batch_size=arguments.batch_size,
        cost_rounds=arguments.cost_rounds,
    )
    if report is None:  # another process writes it
        return

    facts = report_facts(arguments, len(prompts), others)
    if not arguments.model:
        facts["pcm sha256"] = digest
    folder = arguments.output / "ablations" if arguments.ablations else arguments.output
    write_report(facts | report, folder)

    console = Console()
    for judge, entry in report["judges"].items():
        console.print(f"\nWin rate of the {ours.name}, judge: {judge}")
        console.print(Markdown(win_rate_table(entry)))
    console.print(f"Written to {folder / 'report.md'}")


if __name__ == "__main__":
    main()
    distributed_state().destroy_process_group()
