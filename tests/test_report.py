"""Whole evaluations and their reports."""

import json

import pytest
from huggingface_hub import ModelCard, ModelCardData
from matplotlib.image import imread
from test_baselines import PROMPTS, folders, model  # noqa: F401
from test_comparison import CASES, LENGTH, Parrot

from modeling_pcm_ensemble import Preference
from modeling_pcm_ensemble.evaluation import (
    HumanVotes,
    PlainModel,
    RewardJudge,
    SingleExpert,
    TrainedEnsemble,
    eval_results,
    evaluate,
    judge_answers,
    make_cases,
    summarise,
    write_report,
)
from modeling_pcm_ensemble.evaluation.pictures import draw_expert_weights
from modeling_pcm_ensemble.evaluation.report import worse_by
from modeling_pcm_ensemble.evaluation.run import mean_truncation_bound
from modeling_pcm_ensemble.rewards.quality import TextQuality

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT's call
LONG = RewardJudge(
    "long", dict.fromkeys("abc", lambda prompts, completions, **_: [len(a[-1]["content"]) for a in completions])
)
AGAIN = RewardJudge("again", LONG.rewards)


def test_a_whole_evaluation_goes_on_where_it_stopped_and_fills_a_report(model, tmp_path):  # noqa: F811
    base, cases = model.backbones[0], make_cases(PROMPTS, [Preference({"a": 1.0, "b": 1.0}), Preference({"c": 1.0})])
    ours, vanilla = TrainedEnsemble("ours", model, 6), PlainModel("vanilla", base, model.tokenizer, 6)
    others = [vanilla, SingleExpert("a alone", model, 6, "a"), Parrot("parrot", 9)]
    options = {"model": model, "quality": TextQuality(base, model.tokenizer), "batch_size": 3}
    with pytest.raises(RuntimeError, match="killed"):
        evaluate(ours, [*others[:2], Parrot("parrot", 9, fails_at=1)], cases, [LONG], tmp_path, **options)
    report = evaluate(ours, others, cases, [LONG, AGAIN], tmp_path, **options)
    assert set(report["judges"]["long"]) == {"vanilla", "a alone", "parrot"}
    assert list(report["judges"]["long"]["a alone"]["preferences"]) == ["a + b"]
    assert report["judges"]["long"]["parrot"]["win_rate"][0] == 0.0
    assert report["agreement"] == {"long, again": [1.0, 1.0]}
    assert report["rewards"]["vanilla"] == {"a": 0.5, "b": 0.5, "c": 0.5, "mean": 0.5}
    assert report["rewards"]["parrot"]["mean"] > 0.9
    assert set(report["quality"]["ours"]) == {"nll", "gain", "repetition", "words"}
    assert len(report["expert_weights"]["tokens"]) == len(report["expert_weights"]["values"])
    assert report["truncation"] is None
    write_report({"title": "t", "command": "c"} | report, tmp_path / "report")
    assert "a alone" in (tmp_path / "report" / "report.md").read_text()


def test_what_is_compared_shares_no_random_numbers(model, tmp_path):  # noqa: F811
    base, cases = model.backbones[0], make_cases(PROMPTS, [Preference({"a": 1.0})])
    ours, *others = (PlainModel(name, base, model.tokenizer, 6) for name in ("ours", "vanilla", "again"))
    options = {"model": model, "quality": TextQuality(base, model.tokenizer), "cost_rounds": 0}
    report = evaluate(ours, others, cases, [LONG], tmp_path, **options)
    write_report({"title": "t", "command": "c"} | report, tmp_path / "report")
    assert "Cost" not in (tmp_path / "report" / "report.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "answers-0.jsonl").read_text().splitlines()]
    answers = {name: [line["answer"] for line in lines if line["baseline"] == name] for name in ("ours", "again")}
    assert len(answers["ours"]) == len(cases)
    assert not set(answers["ours"]) & set(answers["again"])


def test_how_far_a_top_k_may_be_from_the_whole_is_told_over_answers(model):  # noqa: F811
    cases = make_cases(PROMPTS, [Preference({"a": 1.0, "b": 1.0})])
    answers = ["hello", None, *["world"] * (len(cases) - 2)]
    bounds = []
    for top_k in (5, 20, 99):
        model.config.expert_top_k = top_k
        found = mean_truncation_bound(model, cases, answers)
        assert found["tokens"] == 5 * min(len(cases) - 1, 8)
        bounds.append(found["bound"])
    assert 1 > bounds[0] > bounds[1] > bounds[2]
    assert bounds[2] == pytest.approx(0.0, abs=1e-5)


def test_how_much_worse_a_text_is_counts_against_whatever_should_be_low_or_high():
    base = {"nll": 2.0, "gain": 0.5, "repetition": 0.01}
    assert worse_by(base, base) == {"nll": 0.0, "gain": 0.0, "repetition": 0.0}
    worse = worse_by({"nll": 2.5, "gain": 0.4, "repetition": 0.03}, base)
    assert worse == pytest.approx({"nll": 25.0, "gain": 5.0, "repetition": 2.0})
    assert worse_by({"nll": 2.0, "gain": -0.3, "repetition": 0.0}, base | {"gain": -0.1})["gain"] == pytest.approx(
        10.0
    )


def test_votes_on_a_few_pairs_are_a_report_too(tmp_path, model):  # noqa: F811
    cases, ours, loud = make_cases(PROMPTS, [Preference({"a": 1.0})]), Parrot("ours"), Parrot("loud", 2)
    votes = tmp_path / "votes.csv"
    votes.write_text(
        "prompt,preference,first,second,choice\nwhat is it?,a,what is it?,what is it? what is it?,first\n"
    )
    options = {"model": model, "quality": TextQuality(model.backbones[0], model.tokenizer)}
    others = [Parrot("vanilla", 3), loud]  # nobody has voted on the first
    report = evaluate(ours, others, cases, [LONG, HumanVotes(votes)], tmp_path, **options)
    assert report["judges"]["people"]["vanilla"]["win_rate"] is None
    assert report["judges"]["people"]["loud"]["win_rate"][0] == 1.0
    assert report["agreement"] == {"long, people": [0.0, 0.0]}
    write_report({"title": "t", "command": "c"} | report, tmp_path / "report")
    assert len(eval_results(report, "d", "D")) == 3


@pytest.mark.parametrize(
    ("others", "judges", "message"),
    [
        ([Parrot("vanilla"), Parrot("vanilla")], [LENGTH], "names of their own"),
        ([Parrot("other")], [LENGTH], "must be 'vanilla'"),
        ([Parrot("vanilla"), SingleExpert("x alone", None, 6, "x")], [LENGTH], "'x alone' applies under none"),
        ([Parrot("vanilla")], [LENGTH, LONG], "'long' cannot judge long, plain"),
    ],
)
def test_an_evaluation_that_would_fail_at_its_end_is_refused_at_its_start(others, judges, message, tmp_path):
    ours = Parrot("ours", fails_at=0)
    with pytest.raises(ValueError, match=message):
        evaluate(ours, others, CASES, judges, tmp_path, model=None, quality=None)


def example_report() -> dict:
    outcomes = {"other": judge_answers(LENGTH, CASES, ["longer"] * 6, ["short"] * 6)}
    return {
        "title": "A title",
        "command": "python run.py",
        "ours": "ours",
        "judges": {"length": summarise(outcomes, CASES)},
        "agreement": {"length, people": [0.75, 0.5]},
        "rewards": {name: {"long": 0.6, "plain": 0.5, "short": 0.4, "mean": 0.5} for name in ("ours", "other")},
        "base": "other",
        "quality": {
            "ours": {"nll": 2.5, "gain": 0.4, "repetition": 0.03},
            "other": {"nll": 2.0, "gain": 0.5, "repetition": 0.01},
        },
        "cost": {n: {"seconds_per_token": 0.1, "working_mb": 3.0, "weights_mb": 4.0} for n in ("ours", "other")},
        "truncation": {"bound": 0.0421, "tokens": 512},
        "expert_weights": {"title": "What? [$x$]", "names": ["a", "b"], "tokens": ["A", "\n"], "values": [[1, 0]] * 2},
    }


def test_a_report_says_what_was_counted(tmp_path):
    report = example_report()
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    text = (tmp_path / "report.md").read_text()
    assert "| other | 100.0 % [29.2, 100.0] | 0.250 | +0.0 % |" in text
    assert "| length, people | 75% | 0.50 |" in text
    assert "Over 512 tokens of answers, the mixture is at most 0.042 of the probability" in text
    assert "worse than other the ours is: nll +25.0 %, gain +5.0 %, repetition +2.0 %" in text
    for name in ("win_rates.png", "rewards.png", "cost.png", "expert_weights.png"):
        assert (tmp_path / name).stat().st_size > 5000
        assert f"({name})" in text


def test_strengths_are_drawn_as_lines_whatever_their_size(tmp_path):
    entry = example_report()["expert_weights"] | {"values": [[1.9, -0.4], [1.5, -0.1]]}
    for name, more in (("shares", {}), ("strengths", {"adds_up": True})):
        draw_expert_weights(entry | more, tmp_path / f"{name}.png")
    shares, strengths = (imread(tmp_path / f"{name}.png") for name in ("shares", "strengths"))
    white = (strengths[..., :3] == 1).all(axis=-1).mean()
    assert white > (shares[..., :3] == 1).all(axis=-1).mean() + 0.2  # areas fill what lines leave


def test_results_go_through_a_model_card(tmp_path):
    results = eval_results(example_report(), "koala", "Koala")
    card = ModelCard.from_template(
        ModelCardData(model_name="m", eval_results=results), template_str="---\n{{ card_data }}\n---\n"
    )
    card.save(tmp_path / "README.md")
    (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert (result.metric_type, result.metric_value) == ("win_rate", 1.0)
