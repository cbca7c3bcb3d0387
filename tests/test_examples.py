"""The training examples: what they keep, what they choose, and, slowly, that they run."""

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import make_ensemble, tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import CompileConfig, set_seed

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_lines_that_a_killed_run_had_written_whole_are_kept(example, tmp_path):
    lines = example("answers").KeptLines
    path = tmp_path / "deep" / "kept.jsonl"
    lines(path).add([{"key": "a", "value": 1}, {"key": "b", "value": 2}])
    with path.open("a") as file:
        file.write('{"key": "c", "val')
    kept = lines(path)
    assert ("b" in kept, "c" in kept) == (True, False)
    kept.add([{"key": "c", "value": 3}])
    assert [line["value"] for line in map(json.loads, path.read_text().splitlines())] == [1, 2, 3]
    assert lines(path)["c"] == {"key": "c", "value": 3}


def test_samples_do_not_depend_on_the_side_on_which_a_tokenizer_pads(example):
    model, tokenizer, samples = tiny_llama(0), tiny_tokenizer(), []
    for tokenizer.padding_side in ("left", "right"):
        set_seed(0)
        samples.append(example("answers").sample(model, tokenizer, ["what is a cat?", "x"], 6))
    assert samples[0] == samples[1]


def test_pairs_are_the_best_answer_against_the_worst_that_is_no_nonsense(example):
    def line(prompt: str, text: str, reward: float, guard: float = 0.0) -> dict:
        return {"prompt": prompt, "completion": text, "ended": True, "concise": reward, "guard": guard}

    rewarded = [
        line("p", "good", 2.0),
        line("p", "bad", -1.0),
        line("p", "nonsense", -9.0, guard=5.0),
        line("q", "wide", 9.0),
        line("q", "apart", -9.0),
        line("r", "alone", 1.0),
    ]
    pairs = example("train_experts").preference_pairs(rewarded, "concise", num_pairs=5)
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("wide", "apart"), ("good", "bad")]


def test_variance_of_alpha_is_ascribed_to_what_it_depends_on(example):
    explained = example("inspect_pcm").explained

    def answer(preference: str, tokens: list[int], weight) -> dict:
        experts = preference.split(" + ")
        rows = [[0.0] * 6 for _ in tokens]
        for place, read in enumerate([None, *tokens[:-1]]):
            rows[place][0 if experts[0] == "elementary" else 1] = weight(preference, place, read)
        return {"preference": preference, "token_ids": tokens, "experts": experts[:1], "expert_weights": rows}

    def shares(weight) -> dict:
        preferences = ("elementary + concise", "elementary + friendly")
        return explained([answer(p, [3, 5, 3, 5, i], weight) for p in preferences for i in range(9)])

    assert shares(lambda preference, place, read: 0.1 * place)["position"] > 0.99
    by_token = shares(lambda preference, place, read: 0.9 if read == 5 else 0.1)
    assert by_token["token"] > 0.99
    assert abs(by_token["preference"]) < 0.05
    assert shares(lambda preference, place, read: 0.2 if "concise" in preference else 0.7)["preference"] > 0.99


@pytest.mark.real_model
@pytest.mark.slow
def test_training_and_evaluation_run_from_end_to_end(tmp_path):
    def run(name: str, *options: str):
        command = [sys.executable, str(EXAMPLES / f"{name}.py"), *options]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr

    run("train_experts", "--quick", "--rounds", "2", "--experts", "unfriendly")
    assert json.loads((tmp_path / "experts" / "quick" / "report.json").read_text())["unfriendly"]["words"] > 0
    run("train_pcm", "--quick")
    for _ in range(2):  # the second time all answers are there already
        run("evaluate_pcm", "--quick", "--pcm", "pcm/quick/seed-0")
    found = tmp_path / "evaluation" / "quick" / "pcm"
    run("inspect_pcm", str(found))
    for path in (tmp_path / "pcm" / "quick" / "curves.png", found / "rewards.png", found / "expert_weights.png"):
        assert path.exists()
    report = json.loads((found / "evaluation.json").read_text())
    assert set(report["dimensions"]) == {"uniform", "static", "pcm", "mean"}
    assert 0 < report["in words"]["system"]["share of wanted experts"] < 1


def test_new_preferences_are_what_their_kind_says(example):
    module = example("new_preferences")
    paper = [dict.fromkeys(names, 1.0) for names in (("elementary", "concise", "friendly"), ("knowledgeable",))]
    kinds = module.kinds_of_preferences(paper)
    dimensions = {name: dimension for name, (dimension, _) in module.demo.PREFERENCES.items()}
    assert len(kinds["two experts"]) == 12
    assert all(len({dimensions[name] for name in pair}) == 2 for pair in kinds["two experts"])
    weights = [weight for entry in kinds["weights between 0 and 2"] for weight in entry.values()]
    assert len(weights) == 4
    assert all(0 < weight <= 2 for weight in weights)
    assert sorted(map(len, kinds["five experts"] + kinds["all six"])) == [5] * 6 + [6]
    assert module.with_added(paper) == [{"elementary": 1.0, "concise": 1.0, "cheerful": 1.0}]


def test_single_models_are_also_sampled_from_as_many_tokens_as_the_experts_keep(example):
    experts = {
        "a": {"model": tiny_llama(1), "description": "be a"},
        "b": {"model": tiny_gpt2(2), "description": "be b"},
    }
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(3), tokenizer=tiny_tokenizer())
    arguments = Namespace(tokens=8, model="elsewhere", quick=False, ablations=False)
    whole, best = (example("evaluate").single_models(model, arguments, top_k) for top_k in (0, 20))
    assert [baseline.name for baseline in best] == [f"{baseline.name}, 20 best tokens" for baseline in whole]
    assert ({baseline.top_k for baseline in whole}, {baseline.top_k for baseline in best}) == ({0}, {20})
    names = [baseline.name for baseline in example("evaluate").ablations(model, 8)]
    assert names[2:] == [f"PCM, experts' top {k}" for k in (1, 5, 20, 100)]
    model.config.expert_top_k = 20
    names = [baseline.name for baseline in example("evaluate").ablations(model, 8)]
    assert names[2:] == [*(f"PCM, experts' top {k}" for k in (1, 5, 100)), "PCM, experts whole"]


@pytest.mark.parametrize(("joins", "compiled"), [(True, False), (False, False), (True, True)], ids=str)
def test_scheduled_requests_get_the_answers_that_they_would_get_alone(example, joins, compiled):
    module = example("continuous_batching")
    model = make_ensemble([tiny_llama(1), tiny_gpt2(2)], [(0, [5, 6], [11]), (0, [], [13]), (1, [8], [14, 15])])
    model._tokenizer = tiny_tokenizer()
    preferences = [{"e0": 1.0, "e2": 0.5}, {"e1": 1.0}, {"e0": 1.0, "e1": 2.0}, {"e2": 1.0}, {"e1": 0.5, "e2": 1.0}]
    requests = [
        module.Request([21 + 3 * i + j for j in range(2 + i)], preference, max_new_tokens=1 + 2 * i)
        for i, preference in enumerate(preferences)
    ]
    scheduler, ended = module.Scheduler(model, 2, joins, CompileConfig(backend="eager") if compiled else None), []
    for request in requests:
        scheduler.add(request)
    while scheduler.waiting or scheduler.running:
        ended += scheduler.step()
        assert len(scheduler.running) <= 2
    assert {id(request) for request in ended} == {id(request) for request in requests}
    assert compiled == (model.backbones.submodels[0].compiled_step is not None)
    for request in requests:
        alone = model.generate(
            torch.tensor([request.input_ids]),
            preference=request.preference,
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
        )
        assert request.tokens == alone[0, len(request.input_ids) :].tolist()


@pytest.fixture(params=["dynamic", "static"])
def scheduler(example, request):
    """Of three rows, with what an expert without a prompt has more room for than one with."""
    model = make_ensemble([tiny_llama(1), tiny_gpt2(2)], [(0, [5] * 20, [11]), (0, [], [13]), (1, [8], [14, 15])])
    model._tokenizer = tiny_tokenizer()
    scheduler = example("continuous_batching").Scheduler(model, 3)
    scheduler.compiled = request.param == "static"  # the caches of compiled steps
    return scheduler


def run(scheduler) -> list:
    ended = []
    while scheduler.waiting or scheduler.running:
        ended += scheduler.step()
    return ended


def check_answered(scheduler, *requests):
    for request in requests:
        ids = torch.tensor([request.input_ids])
        options = {"max_new_tokens": max(len(request.tokens), 1), "do_sample": False}
        alone = scheduler.model.generate(ids, preference=request.preference, **options)
        assert request.tokens == alone[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("faulty", "words"),
    [
        ({"preference": {"e9": 1.0}}, "unknown expert 'e9'"),
        ({"preference": "e9"}, "unknown expert 'e9'"),
        ({"preference": {"e0": float("nan")}}, "the weight nan"),
        ({"preference": {"e0": 0.0}}, "without an expert"),
        ({"preference": {}}, "without an expert"),
        ({"preference": 3}, "`preference` must be"),
        ({"preference": [{"e0": 1.0}, {"e1": 1.0}]}, "has 2 rows, but the batch has 1"),
        ({"input_ids": [99]}, "`input_ids` holds 99"),
        ({"input_ids": [-1]}, "`input_ids` holds -1"),
        ({"input_ids": []}, "at least one token"),
        ({"input_ids": [1.5]}, "must be a list of token ids"),
        ({"input_ids": "hello"}, "must be a list of token ids"),
        ({"input_ids": [21] * 46, "preference": "e0"}, "context of 49 tokens is too long for expert 'e0'"),
        ({"max_new_tokens": 64}, "context of 64 tokens is too long for the PCM"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a number from 1 on, got 0"),
        ({"max_new_tokens": -3}, "`max_new_tokens` must be a number from 1 on, got -3"),
        ({"max_new_tokens": "4"}, "`max_new_tokens` must be a number from 1 on, got '4'"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_answered_is_refused_alone(example, scheduler, faulty, words):
    request = example("continuous_batching").Request
    good = [request([21, 22], {"e0": 1.0}, 4), request([31], {"e2": 1.0, "e1": 0.5}, 4), request([41], None, 3)]
    scheduler.add(good[0])
    scheduler.step()
    scheduler.add(good[1])
    with pytest.raises((TypeError, ValueError), match=words):
        scheduler.add(request(**{"input_ids": [21], "preference": {"e1": 1.0}, "max_new_tokens": 4} | faulty))
    scheduler.add(good[2])
    assert len(run(scheduler)) == 3
    assert [len(one.tokens) for one in good] == [4, 4, 3]
    check_answered(scheduler, *good)


def test_a_request_may_have_its_preference_in_any_form(example, scheduler):
    request = example("continuous_batching").Request
    forms = [None, "e1", ["e0", "e2"], [1.0, 0.5, 0.0], {"e2": 2.0}]
    requests = [request([21 + number, 22], form, 3) for number, form in enumerate(forms)]
    for one in requests:
        scheduler.add(one)
    run(scheduler)
    check_answered(scheduler, *requests)


def test_cancelled_requests_leave_the_others_alone(example, scheduler):
    request = example("continuous_batching").Request
    requests = [request([21 + number, 22], {f"e{number % 3}": 1.0}, 6) for number in range(5)]
    for one in requests:
        scheduler.add(one)
    scheduler.step()
    scheduler.step()
    cancelled, lowered = [requests[0], requests[4]], requests[2]
    lowered.max_new_tokens = 1
    for one in (*cancelled, requests[0], request([1], None, 2)):  # twice, and one that was never added
        scheduler.cancel(one)
    assert {*run(scheduler)} == {*requests} - {*cancelled}
    assert [len(one.tokens) for one in requests] == [2, 6, 3, 6, 0]
    check_answered(scheduler, *requests[:4])


def test_a_request_may_be_the_last_and_lowered(example, scheduler):
    request = example("continuous_batching").Request
    first, lowered = request([21, 22], "e0", 6), request([31], "e1", 6)
    scheduler.add(first)
    scheduler.add(lowered)
    scheduler.step()
    lowered.max_new_tokens = 1
    scheduler.cancel(first)
    assert run(scheduler) == [lowered]
    check_answered(scheduler, lowered)


def test_all_may_be_cancelled_and_others_come(example, scheduler):
    request = example("continuous_batching").Request
    first, second = request([21, 22], "e0", 9), request([31], "e1", 4)
    scheduler.add(first)
    scheduler.step()
    scheduler.cancel(first)
    assert not scheduler.running
    assert run(scheduler) == []
    scheduler.add(second)
    assert run(scheduler) == [second]
    check_answered(scheduler, second)


def test_requests_near_the_limit_do_not_end_those_beside_them(example, scheduler):
    """A long context of an expert without a prompt, beside a short one behind a long prompt."""
    request = example("continuous_batching").Request
    long, short = request([21] * 50, {"e1": 1.0}, 14), request([31] * 4, {"e0": 1.0}, 41)
    scheduler.add(long)
    scheduler.step()
    scheduler.add(short)
    assert {*run(scheduler)} == {long, short}
    assert (len(long.tokens), len(short.tokens)) == (14, 41)
    check_answered(scheduler, long, short)


def test_a_prefill_that_fails_loses_no_request(example, scheduler):
    request = example("continuous_batching").Request
    running, ending, waiting = request([21, 22], "e0", 6), request([41], "e1", 2), request([31], "e2", 4)
    scheduler.add(running)
    scheduler.add(ending)
    scheduler.step()
    scheduler.add(waiting)

    def fail(*_):
        raise MemoryError

    hook = scheduler.model.backbones[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        scheduler.step()
    hook.remove()
    assert {*run(scheduler)} == {running, ending, waiting}
    check_answered(scheduler, running, ending, waiting)


@pytest.mark.parametrize("text", ['{"prompt": "a"}', '["a"]', "[]", "3", '[{"prompt": 3}]'])
def test_a_file_that_is_no_list_of_prompts_is_refused(text, tmp_path, example):
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(ValueError, match="must be a JSON list of objects with a text"):
        example("answers").evaluation_prompts(path=tmp_path / "prompts.json")


def test_prompts_are_spread_over_all_lengths(example):
    spread = example("answers").spread
    assert spread(list("abcdefghi"), 3) == ["a", "e", "i"]
    assert spread(list("abc"), 1) == ["a"]
    assert spread(list("abc"), 5) == ["a", "b", "c"]


@pytest.mark.real_model
@pytest.mark.slow
def test_new_preferences_are_of_every_kind_and_judged(tmp_path):
    command = [sys.executable, str(EXAMPLES / "new_preferences.py"), "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "evaluation" / "new" / "quick" / "new_preferences.json").read_text())
    assert set(report) == {"training rewards", "held-out proxies"}
    assert len(report["held-out proxies"]) == 2 * 7


@pytest.mark.real_model
@pytest.mark.slow
def test_a_quick_evaluation_of_the_shipped_pcm_writes_its_report(tmp_path):
    command = [sys.executable, str(EXAMPLES / "evaluate.py"), "--quick"]
    for _ in range(2):  # the second time all answers are there already
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "evaluation" / "quick" / "report.json").read_text())
    assert set(report["judges"]["held-out proxies"]) == {"vanilla", "prompting", "uniform mixture"}
    assert len((tmp_path / "evaluation" / "quick" / "answers-0.jsonl").read_text().splitlines()) == 4 * 10 * 2
    assert (tmp_path / "evaluation" / "quick" / "report.md").exists()
