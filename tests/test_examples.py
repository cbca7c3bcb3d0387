"""The examples: what those of smollm2 keep and choose, and, some of them slowly, that all run."""

import importlib
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import set_seed

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, Preference, demo

EXAMPLES = Path(__file__).parent.parent / "examples"
SMOLLM2 = EXAMPLES / "smollm2"


@pytest.fixture
def example(monkeypatch):
    """Imports a script of examples/smollm2 by name."""
    monkeypatch.syspath_prepend(str(SMOLLM2))
    return importlib.import_module


def test_lines_that_a_killed_run_had_written_whole_are_kept(example, tmp_path):
    lines = example("train_experts").KeptLines
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
        samples.append(example("common").sample(model, tokenizer, ["what is a cat?", "x"], 6))
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
        command = [sys.executable, str(SMOLLM2 / f"{name}.py"), *options]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr

    run("train_experts", "--quick", "--rounds", "2", "--experts", "unfriendly")
    assert json.loads((tmp_path / "experts" / "quick" / "report.json").read_text())["unfriendly"]["words"] > 0
    run("train_pcm", "--quick")
    run("train_pcm", "--quick", "--merge", "adapters", "--output", "adapters")
    assert (tmp_path / "adapters" / "quick" / "seed-0" / "pcm.safetensors").exists()
    for _ in range(2):  # the second time all answers are there already
        run("measure_pcm", "--quick", "--pcm", "pcm/quick/seed-0")
    found = tmp_path / "evaluation" / "quick" / "pcm"
    run("inspect_pcm", str(found))
    for path in (tmp_path / "pcm" / "quick" / "curves.png", found / "rewards.png", found / "expert_weights.png"):
        assert path.exists()
    report = json.loads((found / "evaluation.json").read_text())
    assert set(report["dimensions"]) == {"uniform", "static", "pcm", "mean"}
    assert 0 < report["in words"]["system"]["share of wanted experts"] < 1


def test_a_pcm_of_other_options_is_not_taken_for_one_of_these(example, tmp_path):
    check_options, begun = example("train_pcm").check_options, {"merge": "product", "eta": 16.0, "output": tmp_path}
    for options in (begun, begun | {"output": tmp_path / "elsewhere"}):
        check_options(tmp_path, Namespace(**options))
    with pytest.raises(ValueError, match=r"was begun with eta=16\.0\. Take these options, or another --output"):
        check_options(tmp_path, Namespace(**begun | {"eta": 4.0}))


def test_new_preferences_are_what_their_kind_says(example):
    module = example("new_preferences")
    paper = [module.equal(names) for names in (("elementary", "concise", "friendly"), ("knowledgeable",))]
    kinds = module.kinds_of_preferences(paper)
    dimensions = {name: dimension for name, (dimension, _) in module.demo.PREFERENCES.items()}
    assert len(kinds["two experts"]) == 12
    assert all(len({dimensions[name] for name in pair.weights}) == 2 for pair in kinds["two experts"])
    weights = [weight for entry in kinds["weights between 0 and 2"] for weight in entry.weights.values()]
    assert len(weights) == 4
    assert all(0 < weight <= 2 for weight in weights)
    assert sorted(len(entry.weights) for entry in kinds["five experts"] + kinds["all six"]) == [5] * 6 + [6]
    assert module.with_added(paper) == [Preference({"elementary": 1.0, "concise": 1.0, "cheerful": 1.0})]


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


def test_baselines_are_chosen_by_name(example):
    baselines = [SimpleNamespace(name=name) for name in ("ours", "vanilla", "prompting", "uniform")]
    assert example("evaluate").chosen(baselines, []) == baselines
    assert example("evaluate").chosen(baselines, ["uniform"]) == [*baselines[:2], baselines[3]]
    with pytest.raises(ValueError, match=r"no baseline unifrom\. There are ours, vanilla, prompting, uniform"):
        example("evaluate").chosen(baselines, ["unifrom"])


@pytest.mark.parametrize("text", ['{"prompt": "a"}', '["a"]', "[]", "3", '[{"prompt": 3}]'])
def test_a_file_that_is_no_list_of_prompts_is_refused(text, tmp_path, example):
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(ValueError, match="must be a JSON list of objects with a text"):
        example("common").evaluation_prompts(path=tmp_path / "prompts.json")


def test_prompts_are_spread_over_all_lengths(example):
    spread = example("common").spread
    assert spread(list("abcdefghi"), 3) == ["a", "e", "i"]
    assert spread(list("abc"), 1) == ["a"]
    assert spread(list("abc"), 5) == ["a", "b", "c"]


@pytest.mark.real_model
@pytest.mark.slow
def test_new_preferences_are_of_every_kind_and_judged(tmp_path):
    command = [sys.executable, str(SMOLLM2 / "new_preferences.py"), "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "evaluation" / "new" / "quick" / "new_preferences.json").read_text())
    assert set(report) == {"training rewards", "held-out proxies"}
    assert len(report["held-out proxies"]) == 2 * 7


@pytest.mark.real_model
@pytest.mark.slow
def test_a_quick_evaluation_of_the_shipped_pcm_writes_its_report(tmp_path):
    command = [sys.executable, str(SMOLLM2 / "evaluate.py"), "--quick"]
    for _ in range(2):  # the second time all answers are there already
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "evaluation" / "quick" / "report.json").read_text())
    assert set(report["judges"]["held-out proxies"]) == {"vanilla", "prompting", "uniform mixture"}
    assert len((tmp_path / "evaluation" / "quick" / "answers-0.jsonl").read_text().splitlines()) == 4 * 10 * 2
    assert (tmp_path / "evaluation" / "quick" / "report.md").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_a_script_for_newcomers_is_short_and_listed(script):
    text = (EXAMPLES / script).read_text()
    assert len(text.splitlines()) < 80
    assert f"[{script}]({script})" in (EXAMPLES / "README.md").read_text()
    imported = re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE)
    assert not {path.stem for path in EXAMPLES.rglob("*.py")} & set(imported)


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("lora_experts", "plain"),
        ("train_pcm", "α of the short expert"),
        ("compare_baselines", "win rate against prompting"),
        ("continuous_batching", "has left with"),
    ],
)
def test_a_script_for_newcomers_runs(script, words, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert words in result.stdout


def test_experts_that_an_installation_does_not_have_are_named_with_the_way_to_them(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no expert elementary, .*run `pip install examples/smollm2` there, or pass"
    ):
        demo.trained_ensemble(tmp_path)
