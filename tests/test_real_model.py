"""The real SmolLM2-135M-Instruct: what a newcomer does, and what only real weights and a real tokenizer can show."""

import copy
import itertools
import os
import random
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from benchmarks.common import random_adapter
from modeling_pcm_ensemble import PCMEnsembleForCausalLM, Preference, demo
from modeling_pcm_ensemble.demo_wordings import in_words

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's call
]
ROOT = Path(__file__).parent.parent
PAGES = ["docs/concepts.md", "docs/guides/evaluation.md", "docs/guides/speed.md", "docs/guides/training.md"]
QUESTIONS = ["What is gravity?", "Why should I brush my teeth before I go to bed?", "Who are you?"]


@pytest.fixture(scope="module")
def ensemble() -> PCMEnsembleForCausalLM:
    model = demo.smollm2_ensemble(dtype=torch.float32)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.pcm.head.weight, std=0.02)  # a PCM with opinions
    return model


def chat(model, questions):
    messages = [[{"role": "user", "content": question}] for question in questions]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True, "padding": True}
    return model.tokenizer.apply_chat_template(messages, padding_side="left", **options)


def text(model, output, inputs) -> list[str]:
    return model.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_one_prompted_expert_writes_what_the_plain_model_writes_under_its_system_prompt(ensemble):
    plain = ensemble.backbones[0]
    for name in ("elementary", "concise"):
        system = {"role": "system", "content": demo.PREFERENCES[name][1]}
        messages = [system, {"role": "user", "content": QUESTIONS[0]}]
        tokenizer = ensemble.tokenizer
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        expected = text(ensemble, plain.generate(**ids, max_new_tokens=30, do_sample=False), ids)
        inputs = chat(ensemble, QUESTIONS[:1])
        output = ensemble.generate(**inputs, preference=name, max_new_tokens=30, do_sample=False)
        assert text(ensemble, output, inputs) == expected


def test_rows_of_a_batch_write_what_they_write_alone(ensemble):
    preferences = [{"elementary": 1.0, "friendly": 0.5}, {"knowledgeable": 1.0}, dict.fromkeys(demo.PREFERENCES, 1.0)]
    inputs = chat(ensemble, QUESTIONS)
    batch = text(
        ensemble, ensemble.generate(**inputs, preference=preferences, max_new_tokens=16, do_sample=False), inputs
    )
    for question, preference, answer in zip(QUESTIONS, preferences, batch):
        alone = chat(ensemble, [question])
        output = ensemble.generate(**alone, preference=preference, max_new_tokens=16, do_sample=False)
        assert text(ensemble, output, alone) == [answer]


def test_logits_equal_the_formula_on_real_weights(ensemble):
    inputs = chat(ensemble, QUESTIONS[:1])
    weights = torch.tensor([1.0, 0, 0.5, 0, 2, 0])
    with torch.no_grad():
        output = ensemble(**inputs, preference=weights)
        plain = ensemble.backbones[0]
        mixture = 0
        for i in weights.nonzero()[:, 0].tolist():
            ids = torch.tensor([ensemble.config.experts[i]["prompt_ids"] + inputs["input_ids"][0].tolist()])
            probs = plain(ids).logits[0, -inputs["input_ids"].shape[1] :].softmax(-1)
            mixture = mixture + output.expert_weights[0, :, i, None] * probs
    assert_close(output.logits[0], mixture.log(), atol=1e-3, rtol=0)


def test_six_prompted_experts_weigh_one_model_and_the_pcm(ensemble):
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in ensemble.parameters()}
    plain = ensemble.backbones[0]
    pcm = sum(p.nbytes for p in ensemble.pcm.parameters())
    assert sum(storages.values()) == sum(p.nbytes for p in plain.parameters()) + pcm
    assert len(ensemble.config.backbones) == 1


def test_the_chat_template_adds_no_system_turn_of_its_own(ensemble):
    rendered = ensemble.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n"
    prompt = ensemble.tokenizer.decode(ensemble.config.experts[2]["prompt_ids"])
    assert prompt == f"<|im_start|>system\n{demo.PREFERENCES['concise'][1]}<|im_end|>\n"
    assert ensemble.config.prefix_bos_token_id is None  # <|im_start|> is BOS, but begins every turn


def test_a_lora_expert_gives_pefts_logits_on_real_weights(tmp_path):
    backbone = AutoModelForCausalLM.from_pretrained(demo.fetch_smollm2(), dtype=torch.float32)
    adapter = random_adapter(backbone, 0)
    adapter["tensors"] = {key: tensor.float() for key, tensor in adapter["tensors"].items()}
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": {"model": backbone, "adapter": adapter}, "base": backbone}, pcm=backbone, pcm_layers=1
    )
    model.export_adapter("a", tmp_path)
    inputs = model.tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs, preference="a").logits
        base = model(**inputs, preference="base").logits
        peft = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path).eval()
        expected = peft(input_ids=inputs["input_ids"]).logits.log_softmax(-1)
    assert (found - expected).abs().max() < 1e-4
    assert (found - base).abs().max() > 0.1


@pytest.mark.parametrize("wanted", [("elementary", "concise"), ("knowledgeable", "informative", "unfriendly")])
def test_the_shipped_pcm_chooses_experts_from_their_descriptions_alone(wanted):
    model = demo.trained_ensemble(dtype=torch.float32)
    words = " ".join(demo.PREFERENCES[name][1] for name in wanted)
    expert_weights = model.compute_expert_weights(**chat(model, QUESTIONS), preference_text=words)[:, -1]
    places = [model.config.expert_names.index(name) for name in wanted]
    assert (expert_weights[:, places].sum(dim=1) > 0.9).all()


def test_the_shipped_pcm_follows_the_preference_and_the_context():
    model = demo.trained_ensemble(dtype=torch.float32)
    inputs = chat(model, QUESTIONS[:1] * 2)
    ids = model.generate(
        **inputs, preference=["elementary", "concise", "friendly"], max_new_tokens=40, do_sample=False
    )
    wanted = [["elementary", "concise", "friendly"], ["elementary", "concise", "unfriendly"]]
    over_answer = model.compute_expert_weights(ids, preference=wanted)[:, inputs["input_ids"].shape[1] :]
    assert (over_answer.amax(dim=1) - over_answer.amin(dim=1)).amax() > 0.1
    elementary = model.config.expert_names.index("elementary")
    assert (over_answer[0, :, elementary] - over_answer[1, :, elementary]).abs().amax() > 0.01


@pytest.mark.parametrize("merge", ["product", "adapters", "probabilities"])
def test_the_shipped_pcm_of_strengths_obeys_weights_and_words_that_it_has_not_read(merge):
    model = demo.trained_ensemble(dtype=torch.float32, merge="product")
    model.config.merge, model.config.expert_top_k = merge, None
    names = model.config.expert_names
    inputs = chat(model, QUESTIONS)

    def begins(**told) -> dict[str, float]:
        """What each expert has where answers begin, a mean over questions."""
        found = model.compute_expert_weights(**inputs, **told)[:, -1].mean(dim=0)
        return dict(zip(names, found.tolist()))

    for concise, friendly in ((1.8, 0.2), (0.5, 1.5), (1.0, 1.0)):
        found = begins(preference={"concise": concise, "friendly": friendly})
        assert found["concise"] / found["friendly"] == pytest.approx(concise / friendly, rel=0.2)

    told = defaultdict(list)
    for first, second in itertools.permutations(["concise", "knowledgeable", "friendly"], 2):
        for seed in range(4):
            found = begins(preference_text=in_words(Preference({first: 1.8, second: 0.5}), seed=seed))
            told["very"].append(found.pop(first))
            told["a little"].append(found.pop(second))
            told["not named"] += found.values()
    means = {wish: sum(found) / len(found) for wish, found in told.items()}
    assert means["very"] > 1.5 * means["a little"] > 3 * means["not named"], means


@pytest.mark.parametrize("number", range(1, 7))
def test_the_shipped_pcm_of_strengths_leaves_weights_of_both_signs(number):
    model = demo.trained_ensemble(dtype=torch.float32, merge="adapters")
    generator = random.Random(number)
    factors = []
    for _ in range(4):
        wanted = {
            name: generator.choice([-1, 1]) * generator.uniform(0.1, 2.0)
            for name in generator.sample(model.config.expert_names, number)
        }
        found = model.compute_expert_weights(**chat(model, QUESTIONS), preference=wanted)[:, -1].mean(dim=0)
        strengths = dict(zip(model.config.expert_names, found.tolist()))
        factors += [strengths[name] / weight for name, weight in wanted.items()]
    assert sum(factors) / len(factors) == pytest.approx(1, abs=0.1), factors
    assert 0.7 < min(factors) <= max(factors) < 1.3, factors


def run(*command: str, cwd) -> str:
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    for message in ("Warning", "[transformers]", "Traceback"):
        assert message not in result.stderr
        assert message not in result.stdout
    return result.stdout


def test_the_quickstart_runs_without_a_warning_and_checks_itself(tmp_path):
    options = ["--tokens", "12", "--preference", "elementary=2,friendly", "concise=-0.5", "--output", "out"]
    printed = run(str(ROOT / "examples" / "quickstart.py"), *options, cwd=tmp_path)
    assert "a fresh interpreter loaded it and wrote the same text" in printed
    assert "tokens per second for 6 experts, base model and PCM" in printed
    assert re.search(r"elementary +│ (1\.[89]|2\.[01])\d /", printed)  # asked: 2
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_quickstart_refuses_an_unknown_preference_before_it_loads_a_model(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--preference", "frendly"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert "unknown expert 'frendly'. Did you mean 'friendly'" in result.stderr
    assert "Loading" not in result.stderr


def code_of(page: str) -> str:
    """A page's Python, on the model that is here, in the dtype that is fast here; blocks marked `py` are fragments."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE))
    code = code.replace("pcm_layers=4,", f'pcm_layers=4, dtype="{str(demo.fast_dtype()).removeprefix("torch.")}",')
    return code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(demo.fetch_smollm2()))


def test_the_readmes_code_prints_what_stands_there(tmp_path):
    (tmp_path / "readme.py").write_text(code_of("README.md"))
    printed = run("readme.py", cwd=tmp_path).strip().splitlines()
    shown = re.findall(r"^# (.*)$", code_of("README.md"), flags=re.MULTILINE)
    assert len(shown) == 2
    # The first words alone: which ones follow depends on how a machine rounds.
    assert [line[:45] for line in printed[-2:]] == [line[:45] for line in shown]


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_code_runs_after_the_readmes(page, tmp_path):
    before = code_of("README.md").partition("for preference in")[0]
    (tmp_path / "page.py").write_text(before + code_of(page))
    run("page.py", cwd=tmp_path)


def test_every_page_with_code_is_run():
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(page for page in pages if "```python" in (ROOT / page).read_text()) == sorted(PAGES)


def test_ci_runs_the_readmes_test_command():
    commands = re.findall(r"^python3 -m venv .*-m pytest.*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_two_processes_that_fetch_the_model_at_once_both_have_it(tmp_path):
    """As under `accelerate launch` on a fresh machine where the Hub cannot be reached."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ASSETS_CACHE": str(tmp_path / "assets")}
    script = "from modeling_pcm_ensemble import demo; print(demo.fetch_smollm2())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    clients = [subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) for _ in range(2)]
    outcomes = [client.communicate() for client in clients]
    assert [client.returncode for client in clients] == [0, 0], outcomes
    (folder,) = {out.splitlines()[-1] for out, _ in outcomes}
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 134e6
