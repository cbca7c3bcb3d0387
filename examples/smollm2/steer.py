"""
Do answers follow the weights? Ask every way to merge the six experts alike, on grids of weights, and measure.

    python examples/smollm2/steer.py                                       # all ways, then the report
    python examples/smollm2/steer.py --ways "static mixture" "static product"  # these alone, no report
    python examples/smollm2/steer.py --costs                               # of a token, in turns, of what is measured
    python examples/smollm2/steer.py --report                              # of all results that are there

1. Before any way: the base model answers each prompt several times, which rewards are normalised by; and the base
   model and the experts alone fix where hypervolumes are measured from. The first process that comes does it.
2. Every way answers each prompt at every point of every line: pairs of experts (shares of the weight .1 to .9), and
   triples of one expert for each dimension.
3. Judges measure the answers: the rewards of training, and proxies that nothing was trained on. What they found is
   in OUTPUT/results, a file for each way.
4. One plain model and all ways answer in turns, which says what they cost: OUTPUT/results/costs.json.
5. The report: report.md and pictures in OUTPUT.

Ways "in words" are told the weights by degrees, in wordings that no PCM was trained on. Ways of the PCM of strengths
take --pcm, by default the shipped one.

Run again, it goes on where it stopped; with --output examples/smollm2/artifacts/steering, from the results that ship,
which are of bfloat16, and the references that they were measured against. Processes with different --ways may run at
once. --quick takes two pairs, one triple, two prompts and two ways.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from common import (
    ANSWERS_AT_ONCE,
    DEVICE,
    KOALA,
    PCM_PROMPTS,
    READINGS_AT_ONCE,
    chats,
    evaluation_prompts,
    merged_by,
    spread,
    training_prompts,
)
from huggingface_hub.utils import WeakFileLock
from rich.console import Console
from rich.markdown import Markdown

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo
from modeling_pcm_ensemble.checkpoint_staging import write_text
from modeling_pcm_ensemble.demo_wordings import in_words
from modeling_pcm_ensemble.evaluation import (
    Baseline,
    PlainModel,
    PromptedInWords,
    PromptedModel,
    SingleExpert,
    StaticWeights,
    ToldInWords,
    TrainedEnsemble,
    WeightAverage,
    without_pcm,
)
from modeling_pcm_ensemble.evaluation.held_out_proxies import held_out_rewards
from modeling_pcm_ensemble.evaluation.steering import Line, SteeringTest, collect_references, make_lines
from modeling_pcm_ensemble.evaluation.steering_report import summary_tables, write_steering_report
from modeling_pcm_ensemble.rewards.answering import AnsweringReward
from modeling_pcm_ensemble.rewards.proxies import proxy_rewards
from modeling_pcm_ensemble.rewards.quality import TextQuality
from modeling_pcm_ensemble.rewards.scoring import SHARED

QUICK_WAYS = ("static mixture", "added adapters in words")
TEXTS = 8  # of each point


def make_ways(model: PCMEnsembleForCausalLM, lines: list[Line], arguments) -> dict[str, Callable[[str], Baseline]]:
    """Say by name how every way is made. All sample from 20 tokens, as each expert of a mixture does."""
    base, tokenizer, tokens, top_k = model.backbones[0], model.tokenizer, arguments.tokens, demo.EXPERT_TOP_K
    descriptions = {name: description for name, (_, description) in demo.PREFERENCES.items()}
    folders = {name: str(demo.ARTIFACTS / name) for name in demo.PREFERENCES}
    preferences = [preference for line in lines for preference in line.preferences()]
    words = {p.label: [in_words(p, seed=seed) for seed in range(TEXTS)] for p in preferences}

    merges = ("logits", "product", "adapters")
    logits, product, adapters = (merged_by(without_pcm(model), merge, top_k) for merge in merges)

    @cache
    def with_strengths() -> PCMEnsembleForCausalLM:
        ensemble = demo.adapter_ensemble(merge="product", dtype=base.dtype).to(base.device)
        ensemble.load_pcm(arguments.pcm)
        return ensemble

    def controlled(merge: str) -> PCMEnsembleForCausalLM:
        return merged_by(with_strengths(), merge, top_k)

    def average(name: str) -> Baseline:
        source = demo.fetch_smollm2()
        way = WeightAverage(name, source, folders, tokenizer, tokens, top_k=top_k, dtype=base.dtype)
        way.model.to(base.device)
        return way

    return {
        "static mixture": lambda name: StaticWeights(name, model, tokens),
        "mixture with its PCM": lambda name: TrainedEnsemble(name, model, tokens),
        "MOD, averaged logits": lambda name: StaticWeights(name, logits, tokens, top_k=top_k),
        "static product": lambda name: StaticWeights(name, product, tokens),
        "static added adapters": lambda name: StaticWeights(name, adapters, tokens, top_k=top_k),
        "averaged adapters": lambda name: StaticWeights(name, adapters, tokens, top_k=top_k, average=True),
        "weight average (PEFT)": average,
        "prompting, without degrees": lambda name: PromptedModel(
            name, base, tokenizer, tokens, descriptions, top_k=top_k
        ),
        "prompting in words": lambda name: PromptedInWords(name, base, tokenizer, tokens, words, top_k=top_k),
        "mixture with the PCM of strengths": lambda name: TrainedEnsemble(name, controlled("probabilities"), tokens),
        "mixture in words": lambda name: ToldInWords(name, controlled("probabilities"), tokens, words),
        "product with its PCM": lambda name: TrainedEnsemble(name, controlled("product"), tokens),
        "product in words": lambda name: ToldInWords(name, controlled("product"), tokens, words),
        "added adapters with their PCM": lambda name: TrainedEnsemble(
            name, controlled("adapters"), tokens, top_k=top_k
        ),
        "added adapters in words": lambda name: ToldInWords(name, controlled("adapters"), tokens, words, top_k=top_k),
    }


def make_test(model: PCMEnsembleForCausalLM, lines: list[Line], arguments: argparse.Namespace) -> SteeringTest:
    """Prepare the test, and measure the experts alone where no process has done so."""
    prompts = chats(spread(evaluation_prompts(path=arguments.prompt_file), arguments.prompts))
    base = PlainModel("vanilla", model.backbones[0], model.tokenizer, arguments.tokens)
    quality = TextQuality(model.backbones[0], model.tokenizer, batch_size=READINGS_AT_ONCE)
    answering = AnsweringReward(quality, training_prompts(PCM_PROMPTS))
    folder = arguments.output / "answers"
    folder.mkdir(parents=True, exist_ok=True)

    with WeakFileLock(f"{folder}.lock"):  # the first process makes what all of them need
        references = collect_references(base, prompts, arguments.output / "references.json", arguments.references)
        test = SteeringTest(
            lines,
            prompts,
            {
                "training rewards": proxy_rewards(quality) | {SHARED: answering},
                "held-out proxies": held_out_rewards(),
            },
            references,
            quality,
            answers=arguments.answers,
            batch_size=arguments.batch_size,
        )
        path = arguments.output / "results" / "experts alone.json"
        if not path.exists() or json.loads(path.read_text())["asked"] != test.asked():
            alone = {name: SingleExpert(f"{name} alone", model, arguments.tokens, name) for name in demo.PREFERENCES}
            write_text(path, json.dumps(test.measure_experts(alone, folder / "experts alone")) + "\n")
    return test


def measure(arguments: argparse.Namespace):
    """Measure the ways that were asked for, or all, and what those cost that have been measured."""
    model = demo.trained_ensemble(dtype=demo.fast_dtype(DEVICE)).to(DEVICE)
    lines = make_lines({name: dimension for name, (dimension, _) in demo.PREFERENCES.items()})
    if arguments.quick:  # of one dimension, of two, and of three
        lines = [*lines[:2], lines[-1]]

    ways = make_ways(model, lines, arguments)
    wanted = arguments.ways or list(ways)
    if unknown := {*wanted, arguments.against} - set(ways):
        raise ValueError(f"There is no way {', '.join(map(repr, unknown))}. There are {', '.join(map(repr, ways))}.")

    test = make_test(model, lines, arguments)
    results = arguments.output / "results"
    if not arguments.costs:
        for name in wanted:
            way, path = ways[name](name), results / f"{name}.json"
            if not test.has_measured(way, path):
                write_text(path, json.dumps(test.measure(way, arguments.output / "answers" / name)) + "\n")

    if arguments.costs or arguments.quick or not arguments.ways:
        measured = [make(name) for name, make in ways.items() if (results / f"{name}.json").exists()]
        plain = PlainModel("one plain model", model.backbones[0], model.tokenizer, arguments.tokens)
        costs = test.measure_costs(plain, measured, rounds=1 if arguments.quick else 3)
        write_text(results / "costs.json", json.dumps(costs, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("evaluation/steering"))
    parser.add_argument("--ways", nargs="*", help="these alone, by name, without a report; by default all")
    parser.add_argument("--costs", action="store_true", help="of what was measured before, in turns; no way anew")
    parser.add_argument("--report", action="store_true", help="write the report of what was measured before")
    parser.add_argument("--against", default="static mixture", help="the way that the others are compared with")
    parser.add_argument("--pcm", type=Path, default=demo.ARTIFACTS / demo.PCM_OF_STRENGTHS, help="of strengths")
    parser.add_argument("--prompt-file", type=Path, default=KOALA, help='a JSON list of {"prompt": …}')
    parser.add_argument("--prompts", type=int, default=16, help="so many of these, of all lengths")
    parser.add_argument("--answers", type=int, default=1, help="to each prompt at each point")
    parser.add_argument("--references", type=int, default=4, help="the base model's answers to each prompt")
    parser.add_argument("--tokens", type=int, default=72, help="most tokens of an answer")
    parser.add_argument("--batch-size", type=int, default=ANSWERS_AT_ONCE)
    parser.add_argument("--quick", action="store_true", help="see above; in OUTPUT/quick")

    arguments = parser.parse_args()
    if not arguments.pcm.exists():
        parser.error(f"--pcm: there is no file {arguments.pcm}")
    if arguments.costs and arguments.ways:
        parser.error("--costs measures all ways that have results, in turns; leave out --ways")
    if arguments.quick:
        arguments.output /= "quick"
        arguments.prompts, arguments.answers, arguments.tokens = 2, 1, 24
        arguments.ways = arguments.ways or QUICK_WAYS
    return arguments


def main():
    arguments = parse_arguments()
    if not arguments.report:
        measure(arguments)
        if (arguments.ways or arguments.costs) and not arguments.quick:
            return

    command = " ".join(["python", "examples/smollm2/steer.py", *sys.argv[1:]])
    report = write_steering_report(arguments.output / "results", arguments.output, arguments.against, command)
    Console(width=160).print(Markdown(summary_tables(report)))
    print(f"Written to {arguments.output / 'report.md'}")


if __name__ == "__main__":
    main()
