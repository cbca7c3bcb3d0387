"""Steering: measures against values worked out by hand or by brute force, and tests that go on where they stopped."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer
from matplotlib.image import imread
from scipy.stats import spearmanr
from test_baselines import PROMPTS, folders, model  # noqa: F401
from test_comparison import Parrot
from transformers import set_seed

from modeling_pcm_ensemble import Preference, demo
from modeling_pcm_ensemble.evaluation import (
    PlainModel,
    PromptedInWords,
    SingleExpert,
    StaticWeights,
    collect_answers,
    make_cases,
)
from modeling_pcm_ensemble.evaluation.baselines import wordings
from modeling_pcm_ensemble.evaluation.steering import (
    PAIR_SHARES,
    Line,
    SteeringTest,
    collect_references,
    make_line,
    make_lines,
)
from modeling_pcm_ensemble.evaluation.steering_measures import (
    LineRewards,
    hypervolume,
    inner_product,
    interval,
    measure_line,
    measure_lines,
    moved,
    over_lines,
    pareto_share,
    rank_correlation,
    reference_point,
    violations,
)
from modeling_pcm_ensemble.evaluation.steering_report import read_results, write_steering_report
from modeling_pcm_ensemble.rewards.quality import TextQuality
from modeling_pcm_ensemble.rewards.scoring import SHARED

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT's call
PAIR = make_line(("a", "b"), (0.1, 0.5, 0.9))
TRIPLE = make_line(("a", "b", "c"), (0.1, 0.6, 0.9))
DIMENSIONS = {name: dimension for name, (dimension, _) in demo.PREFERENCES.items()}


def length(sign: int):
    return lambda prompts, completions, **_: [sign * len(answer[-1]["content"]) / 20 for answer in completions]


JUDGES = {"length": {"a": length(1), "b": length(-1), "c": length(1), SHARED: length(2)}}


@pytest.fixture
def steering(model, tmp_path) -> SteeringTest:  # noqa: F811
    base = model.backbones[0]
    references = collect_references(
        PlainModel("base", base, model.tokenizer, 16), PROMPTS, tmp_path / "references.json", 3
    )
    quality = TextQuality(base, model.tokenizer)
    return SteeringTest([PAIR, TRIPLE], PROMPTS, JUDGES, references, quality, answers=2, batch_size=8)


def test_references_stay_whichever_dtype_the_base_model_has_now(model, tmp_path):  # noqa: F811
    base, path = model.backbones[0], tmp_path / "references.json"
    kept = collect_references(PlainModel("base", base, model.tokenizer, 16), PROMPTS, path, 2)
    other = PlainModel("base", base.to(torch.bfloat16), model.tokenizer, 16)
    assert collect_references(other, PROMPTS, path, 2) == kept
    assert len(collect_references(other, PROMPTS[:1], path, 2)) == 1
    longer = PlainModel("base", base, model.tokenizer, 20)
    assert collect_references(longer, PROMPTS[:1], path, 2) != collect_references(other, PROMPTS[:1], path, 2)
    assert len(collect_references(other, PROMPTS, path, 3)[0]) == 3


def test_a_line_has_shares_of_the_number_of_experts():
    assert PAIR.points == ((0.2, 1.8), (1.0, 1.0), (1.8, 0.2))
    assert [preference.label for preference in PAIR.preferences()] == ["a=0.2 + b=1.8", "a + b", "a=1.8 + b=0.2"]
    assert (0.3, 1.35, 1.35) in TRIPLE.points
    assert (0.15, 0.15, 2.7) in TRIPLE.points
    assert len(TRIPLE.points) == 10


def test_on_an_edge_one_weight_rises_and_the_others_stay_alike():
    assert PAIR.edge(0) == [0, 1, 2]
    assert PAIR.edge(1) == [2, 1, 0]
    along = [TRIPLE.points[point] for point in TRIPLE.edge(1)]
    assert [point[1] for point in along] == [0.3, 1.0, 1.8, 2.7]
    assert all(point[0] == point[2] for point in along)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (((1.0, 1.5), (1.0, 1.0)), "sum 2"),
        (((1.0, 0.5, 0.5),), "must have 2 weights"),
        (((1.0, 1.0),), "two points or more between which the weight of a rises"),
    ],
)
def test_points_that_cannot_be_measured_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        Line(("a", "b"), points)


def test_lines_are_all_pairs_and_triples_that_hold_each_pair_of_dimensions_once():
    lines = make_lines(DIMENSIONS)
    pairs = [line for line in lines if len(line.experts) == 2]
    triples = [line for line in lines if len(line.experts) == 3]
    assert (len(pairs), len(triples)) == (15, 4)
    assert all(len(line.points) >= 9 for line in lines)
    assert all(line.points[line.edge(0)[-1]][0] / len(line.experts) == pytest.approx(0.9) for line in lines)

    inside = [{one, other} for line in triples for one in line.experts for other in line.experts if one < other]
    across = [set(line.experts) for line in pairs if len({DIMENSIONS[expert] for expert in line.experts}) == 2]
    assert sorted(map(sorted, inside)) == sorted(map(sorted, across))
    assert len(make_lines({"a": "x", "b": "x", "c": "y"})) == 3


def test_rank_correlation_is_that_of_scipy_and_perfect_where_it_should_be():
    weights = np.array(PAIR.points)
    perfect = np.array([[0.1, 0.7], [0.3, 0.6], [0.9, 0.2]])[:, :, None]
    assert rank_correlation(weights, perfect)[:, 0] == pytest.approx([1.0, 1.0])
    assert rank_correlation(weights, 1 - perfect)[:, 0] == pytest.approx([-1.0, -1.0])
    assert rank_correlation(weights, np.ones((3, 2, 1)))[:, 0].tolist() == [0.0, 0.0]

    weights = np.array(TRIPLE.points)
    rewards = np.random.default_rng(0).random((10, 3, 5)).round(1)  # with ties
    for place in range(3):
        expected = [spearmanr(weights[:, place], rewards[:, place, draw]).statistic for draw in range(5)]
        assert rank_correlation(weights, rewards)[place] == pytest.approx(expected)


def test_moves_violations_and_inner_products_are_those_worked_out_by_hand():
    rewards = np.array([[0.2, 0.8], [0.6, 0.5], [0.5, 0.6]])[:, :, None]
    edges = [PAIR.edge(0), PAIR.edge(1)]
    assert moved(rewards, edges)[:, 0] == pytest.approx([0.3, 0.2])
    assert violations(rewards, edges)[:, 0].tolist() == [0.5, 0.5]  # from .6 to .5; from .6 to .5 the other way
    of_points = [0.1 * 0.2 + 0.9 * 0.8, 0.5 * 0.6 + 0.5 * 0.5, 0.9 * 0.5 + 0.1 * 0.6]
    assert inner_product(np.array(PAIR.points), rewards) == pytest.approx([np.mean(of_points)])
    assert inner_product(7 * np.array(PAIR.points), rewards) == pytest.approx([np.mean(of_points)])

    shared = np.array([[0.3], [0.6], [0.9]])
    measures = measure_line(LineRewards(PAIR, rewards, np.zeros(2), shared), np.zeros((1, 1), dtype=int))
    assert measures["shared"] == pytest.approx([0.6])
    assert measures["inner product"] == pytest.approx([(np.mean(of_points) + 0.5 * 0.6) / 1.5])


def test_pareto_shares_count_what_nothing_dominates():
    rewards = np.array([[0.2, 0.8], [0.5, 0.5], [0.5, 0.4], [0.5, 0.5]])[:, :, None]
    assert pareto_share(rewards).tolist() == [0.75]


def test_the_hypervolume_of_two_rewards_is_that_of_a_sweep():
    low = np.array([0.2, 0.4])
    rewards = np.random.default_rng(1).uniform(0.1, 0.8, (9, 2, 6))  # some below the reference
    for draw, found in enumerate(hypervolume(rewards, low)):
        area, reached = 0.0, low[1]
        for x, y in sorted(rewards[:, :, draw].tolist(), reverse=True):  # from the right, only what rises counts
            if x > low[0] and y > reached:
                area += (x - low[0]) * (y - reached)
                reached = y
        assert found == pytest.approx(area / (0.8 * 0.6))


def test_the_hypervolume_of_three_rewards_is_that_of_chance():
    rng = np.random.default_rng(2)
    reference, rewards = np.array([0.1, 0.3, 0.2]), rng.random((10, 3, 1))
    thrown = rng.uniform(reference, 1, (200_000, 3))
    dominated = (thrown[:, None] <= rewards[None, :, :, 0]).all(axis=2).any(axis=1)
    assert hypervolume(rewards, reference)[0] == pytest.approx(dominated.mean(), abs=0.005)
    assert hypervolume(rewards / 10, reference)[0] == 0.0


def test_the_reference_is_the_worst_of_the_base_model_and_the_lines_experts_alone():
    alone = {"a": {"a": 0.8, "b": 0.3, "c": 0.0}, "b": {"a": 0.6, "b": 0.45, "c": 0.0}, "c": {"a": 0.1, "b": 0.1}}
    assert reference_point(PAIR, alone).tolist() == [0.5, 0.3]


NINE = make_line(("a", "b"), PAIR_SHARES)


def simulated(rng, slope: float, prompts: int = 24) -> LineRewards:
    """Rewards that rise by `slope` between the ends, beside what a prompt and chance add."""
    shares = np.array(NINE.points) / 2  # (points, experts)
    noise = rng.normal(0, 0.1, (2, prompts)) + rng.normal(0, 0.15, (9, 2, prompts))
    rewards = 0.5 + slope * (shares[:, :, None] - 0.5) / 0.8 + noise
    return LineRewards(NINE, rewards, np.full(2, 0.3))


def test_intervals_cover_the_true_values_as_often_as_they_say():
    """What moves, the inner product, a difference between two ways that are the same; of ranks, what they average."""
    rng, found = np.random.default_rng(0), []
    for _ in range(150):
        ways = [[simulated(rng, 0.1) for _ in range(2)] for _ in range(2)]
        one, same = (over_lines(measure_lines(lines, 150)) for lines in ways)
        difference = one["hypervolume"] - same["hypervolume"]
        measures = (one["moved"], one["inner product"], difference, one["rank correlation"])
        found.append([interval(values) for values in measures])

    estimates, lows, highs = np.moveaxis(np.array(found), 2, 0)  # (repetitions, measures) each
    shares = np.arange(0.1, 1, 0.1)
    inner = 0.5 + 0.1 * np.mean((2 * shares - 1) * (shares - 0.5)) / 0.8
    true = [0.1, inner, 0.0, estimates[:, 3].mean()]
    covered = ((lows <= true) & (true <= highs)).mean(axis=0)
    assert (covered >= 0.87).all()
    assert covered[:3].max() <= 0.99
    assert ((lows <= estimates) & (estimates <= highs)).all()


def test_the_same_prompts_are_drawn_for_all_ways():
    entry = simulated(np.random.default_rng(0), 0.3)
    better = LineRewards(NINE, entry.rewards + 0.1, entry.reference)
    one, other = (over_lines(measure_lines([e], 50)) for e in (entry, better))
    assert other["inner product"] - one["inner product"] == pytest.approx(np.full(51, 0.1))
    assert (other["moved"] - one["moved"]) == pytest.approx(np.zeros(51))


def test_rewards_stand_at_their_point_expert_and_prompt(steering, tmp_path):
    class Obeys(Parrot):
        """Writes longer by the weight of `a`, and by prompt."""

        def generate(self, prompts, preferences):
            return ["x" * round(20 * p.weights["a"] + len(q[-1]["content"])) for q, p in zip(prompts, preferences)]

    result = steering.measure(Obeys("obeys"), tmp_path / "obeys")
    point, prompt = 2, 1  # of weights 1.8 and 0.2
    text = "x" * (36 + len(PROMPTS[prompt][-1]["content"]))
    differences = [(len(text) - len(reference)) / 20 for reference in steering.references[prompt]]
    found = np.array(result["lines"][0]["rewards"]["length"])
    assert found.shape == (3, 2, 2)
    assert found[point, 0, prompt] == pytest.approx(np.mean([1 / (1 + np.exp(-d)) for d in differences]), abs=1e-4)
    assert found[point, 1, prompt] == pytest.approx(1 - found[point, 0, prompt], abs=2e-4)
    assert np.array(result["lines"][1]["rewards"]["length"]).shape == (10, 3, 2)
    assert result["text"]["words"] == [1.0, 1.0]


def test_the_base_model_has_half_of_its_own_reward(steering):
    """So that it is a bound without being asked: each of its answers against each other one."""
    values = []
    for prompt, texts in enumerate(steering.references):
        for place, text in enumerate(texts):
            others = texts[:place] + texts[place + 1 :]
            values += [1 / (1 + np.exp((len(other) - len(text)) / 20)) for other in others]
        assert np.mean(values) == pytest.approx(0.5), prompt


def test_a_killed_run_goes_on_where_it_stopped(steering, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        steering.measure(Parrot("parrot", fails_at=2), tmp_path / "parrot")
    kept = len((tmp_path / "parrot" / "answers-0.jsonl").read_text().splitlines())
    assert kept == 2 * 8

    again = Parrot("parrot")
    result = steering.measure(again, tmp_path / "parrot")
    assert again.calls == 2 * 4 - 2  # 26 cases in four batches, for each of two answers
    whole = steering.measure(Parrot("parrot"), tmp_path / "whole")
    assert whole["lines"] == result["lines"]


def test_what_was_measured_of_the_same_way_is_not_measured_again(steering, tmp_path):
    class Wordy(Parrot):
        def settings(self):
            return "others"

    path = tmp_path / "parrot.json"
    assert not steering.has_measured(Parrot("parrot"), path)
    path.write_text(json.dumps(steering.measure(Parrot("parrot"), tmp_path / "parrot")))
    assert steering.has_measured(Parrot("parrot"), path)
    assert not steering.has_measured(Wordy("parrot"), path)
    steering.answers += 1
    assert not steering.has_measured(Parrot("parrot"), path)


def test_lines_without_a_pair_have_no_fronts(steering, tmp_path):
    steering = SteeringTest([TRIPLE], PROMPTS, JUDGES, steering.references, steering.quality)
    alone = {name: Parrot(f"{name} alone") for name in "abc"}
    found = {"experts": steering.measure_experts(alone, tmp_path), "way": steering.measure(Parrot("way"), tmp_path)}
    for name, entry in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entry))
    write_steering_report(tmp_path, tmp_path / "report", "way", "the command")
    assert "Fronts" not in (tmp_path / "report" / "report.md").read_text()


def test_what_cannot_be_measured_is_refused_before_it_is_asked(steering, tmp_path):
    with pytest.raises(ValueError, match="'picky' must answer at every point"):
        steering.measure(Parrot("picky"), tmp_path)
    with pytest.raises(ValueError, match="Judge 'half' has no reward for b, c"):
        SteeringTest([TRIPLE], PROMPTS, {"half": {"a": length(1)}}, [["x"], ["y"]], steering.quality)
    with pytest.raises(ValueError, match="references to 1 prompts, and 2 prompts"):
        SteeringTest([PAIR], PROMPTS, JUDGES, [["x"]], steering.quality)
    with pytest.raises(ValueError, match="twice"):
        SteeringTest([PAIR, PAIR], PROMPTS, JUDGES, [["x"], ["y"]], steering.quality)


def test_ways_of_tiny_models_are_measured_and_reported(model, steering, tmp_path):  # noqa: F811
    words = {p.label: f"be {p.label}" for line in steering.lines for p in line.preferences()}
    ways = [
        StaticWeights("mixture", model, 16),
        PromptedInWords("in words", model.backbones[0], model.tokenizer, 16, words),
        Parrot("parrot, twice", 2),
    ]
    results = tmp_path / "results"
    results.mkdir()
    alone = {name: SingleExpert(f"{name} alone", model, 16, name) for name in "abc"}
    found = {"experts": steering.measure_experts(alone, tmp_path / "alone")}
    found |= {way.name: steering.measure(way, tmp_path / way.name) for way in ways}
    calls = ways[-1].calls
    found["costs"] = steering.measure_costs(Parrot("plain"), ways)
    assert ways[-1].calls == calls + 3, "one batch in each of three rounds"
    for name, entry in found.items():
        (results / f"{name}.json").write_text(json.dumps(entry))

    report = write_steering_report(results, tmp_path / "report", "mixture", "the command")
    of_judge = report["judges"]["length"]
    assert list(of_judge["ways"]) == ["mixture", "in words", "parrot, twice"]
    assert list(of_judge["differences"]) == ["in words", "parrot, twice"]
    assert of_judge["ways"]["parrot, twice"]["moved"] == (0.0, 0.0, 0.0)  # for it does not read weights
    by_mixture = of_judge["ways"]["mixture"]["moved"][0]
    assert of_judge["differences"]["parrot, twice"]["moved"][0] == pytest.approx(-by_mixture)
    times = {name: cost["time"] for name, cost in report["costs"]["costs"].items()}
    assert times["mixture"] > times["parrot, twice"]
    assert times["plain"] == 1

    text = (tmp_path / "report" / "report.md").read_text()
    assert f"| mixture | {times['mixture']:.2f} |" in text
    for picture in ("fronts-length", "rewards-mixture", "rewards-in-words", "rewards-parrot--twice"):
        assert f"({picture}.png)" in text
        assert imread(tmp_path / "report" / f"{picture}.png").std() > 0.05

    found["mixture"]["asked"]["answers"] = 3
    (results / "mixture.json").write_text(json.dumps(found["mixture"]))
    with pytest.raises(ValueError, match=r"mixture\.json was measured with other answers"):
        read_results(results)

    (results / "mixture.json").unlink()
    (results / "costs.json").unlink()
    write_steering_report(results, tmp_path / "report", "in words", "the command")
    assert "## Cost" not in (tmp_path / "report" / "report.md").read_text()


def test_a_report_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results of experts alone"):
        read_results(tmp_path)
    (tmp_path / "experts.json").write_text('{"asked": {}, "alone": {}}')
    with pytest.raises(FileNotFoundError, match="no results of ways"):
        read_results(tmp_path)
    (tmp_path / "way.json").write_text('{"asked": {}, "way": "mine"}')
    with pytest.raises(ValueError, match=r"cannot be compared with 'ours'\. There are 'mine'"):
        write_steering_report(tmp_path, tmp_path / "report", "ours", "command")


def test_a_model_is_told_in_words_what_the_grid_asks_for():
    words = {"a=0.2 + b=1.8": "a", "a + b": "b"}
    told = PromptedInWords("in words", tiny_llama(0), tiny_tokenizer(), 8, words)
    plain = PlainModel("plain", told.model, told.tokenizer, 8)
    asked = [[{"role": "system", "content": text}, *prompt] for text, prompt in zip("ab", PROMPTS)]
    preferences = PAIR.preferences()

    answers = []
    for way, prompts in ((told, PROMPTS), (plain, asked), (plain, PROMPTS)):
        set_seed(0)
        answers.append(way.generate(prompts, preferences[:2]))
    assert answers[0] == answers[1] != answers[2]
    assert told.settings() != PromptedInWords("in words", told.model, told.tokenizer, 8, {}).settings()
    with pytest.raises(ValueError, match=r"'in words' has no words for 'a=1\.8 \+ b=0\.2'"):
        told.generate(PROMPTS, preferences[1:])


def test_each_prompt_gets_one_of_several_wordings_and_always_the_same():
    prompts = [[{"role": "user", "content": str(number)}] for number in range(32)]
    several = {"a": ["1", "2", "3", "4"], "b": "whole text", "c": []}

    said = wordings("m", several, prompts, [Preference({"a": 1.0})] * 32)
    assert set(said) == {"1", "2", "3", "4"}
    assert said[5:7] == wordings("m", several, prompts[5:7], [Preference({"a": 1.0})] * 2)
    assert wordings("m", several, prompts[:2], [Preference({"b": 1.0})] * 2) == ["whole text"] * 2
    with pytest.raises(ValueError, match="'m' has no words for 'c'"):
        wordings("m", several, prompts[:1], [Preference({"c": 1.0})])


def test_long_settings_do_not_stand_in_every_line(tmp_path):
    class Wordy(Parrot):
        def settings(self):
            return "long " * 9000 + str(self.times)

    cases = make_cases(PROMPTS, PAIR.preferences())
    for times in (1, 2):
        answers = collect_answers(Wordy("wordy", times), cases, tmp_path)
        assert answers[0].count(PROMPTS[0][-1]["content"]) == times
    assert (tmp_path / "answers-0.jsonl").stat().st_size < 9000


@pytest.mark.real_model
@pytest.mark.slow
def test_a_quick_measurement_of_the_shipped_experts_writes_its_report(tmp_path):
    script = Path(__file__).parents[1] / "examples" / "smollm2" / "steer.py"
    for _ in range(2):  # the second time all answers are there already
        run = subprocess.run([sys.executable, str(script), "--quick"], capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stderr

    folder = tmp_path / "evaluation" / "steering" / "quick"
    report = json.loads((folder / "report.json").read_text())
    assert set(report["judges"]) == {"training rewards", "held-out proxies"}
    assert list(report["costs"]["costs"]) == ["one plain model", "static mixture", "added adapters in words"]
    answers = (folder / "answers" / "static mixture" / "answers-0.jsonl").read_text().splitlines()
    assert len(answers) == 2 * (9 + 9 + 10)
    assert (folder / "report.md").exists()
