"""Modes of generate() beyond tests/test_generation.py."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from conftest import left_pad, tiny_gpt2, tiny_llama, tiny_qwen2
from scipy.stats import chisquare
from transformers import StoppingCriteria, WatermarkDetector, WatermarkingConfig

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

CONTEXT = torch.tensor([[21, 22, 23, 24, 25]])


def greedy(model, inputs=CONTEXT, **kwargs) -> list[list[int]]:
    options = {"max_new_tokens": 8, "do_sample": False} | kwargs
    return model.generate(inputs, **options).tolist()


def test_a_watermark_is_found_again(ensemble):
    watermark = WatermarkingConfig(bias=5.0, context_width=1)
    detector = WatermarkDetector(ensemble.config, "cpu", watermark)
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": True}
    torch.manual_seed(0)
    marked = ensemble.generate(CONTEXT.repeat(4, 1), watermarking_config=watermark, **options)[:, 5:]
    plain = ensemble.generate(CONTEXT.repeat(4, 1), **options)[:, 5:]
    assert detector(marked).all()
    assert not detector(plain).any()


@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
def test_quantised_caches_quantise_as_each_model_alone(backend):
    """Numbers of one row and one expert are rounded together, so that tokens are that expert's to the last."""
    if backend != "fp8":
        pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    experts = {"a": tiny_llama(1), "c": tiny_qwen2(3)}
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(4))
    integers = {"nbits": 4, "q_group_size": 8, "residual_length": 4, "axis_key": 1, "axis_value": 1}
    axes = {"axis_key": 0, "axis_value": 0} if backend == "quanto" else {}
    options = {"backend": backend} | ({} if backend == "fp8" else integers | axes)
    cache = {"cache_implementation": "quantized", "cache_config": options}
    settings = {"max_new_tokens": 16, "min_new_tokens": 16}
    for name, expert in experts.items():
        alone = greedy(expert, **cache, **settings)
        assert greedy(model, preference=name, **cache, **settings) == alone
        if backend != "fp8":  # four bits are few enough to see
            assert alone != greedy(expert, **settings)


@pytest.mark.parametrize("cache_implementation", ["offloaded", "offloaded_static"])
def test_offloaded_caches_give_the_same_tokens_or_say_what_they_need(ensemble, cache_implementation):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=f"'{cache_implementation}' moves keys and values off an accelerator"):
            greedy(ensemble, cache_implementation=cache_implementation)
        return
    expected = greedy(ensemble)
    assert greedy(ensemble.cuda(), CONTEXT.cuda(), cache_implementation=cache_implementation) == expected


def test_time_and_criteria_end_generation(ensemble):
    class Slow(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            time.sleep(0.05)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    found = greedy(ensemble, max_new_tokens=40, min_new_tokens=40, max_time=0.3, stopping_criteria=[Slow()])
    assert 5 < len(found[0]) < 20


def test_a_batch_of_sixty_four_rows_equals_each_row_alone(ensemble):
    rows = [list(range(10 + i % 30, 14 + i % 30 + i % 5)) for i in range(64)]
    preferences = [[{"a": 1.0}, {"b": 1.0, "c": 0.5}, {"a": 0.2, "b": 1.0, "c": 1.0}][i % 3] for i in range(64)]
    inputs = left_pad(rows)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = ensemble.generate(**inputs, preference=preferences, **options)[:, inputs["input_ids"].shape[1] :]
    for i in (0, 1, 2, 40, 63):
        alone = greedy(ensemble, torch.tensor([rows[i]]), preference=preferences[i], **options)
        assert together[i].tolist() == alone[0][len(rows[i]) :]


@pytest.mark.filterwarnings("ignore:.*exceed.*:UserWarning")
def test_the_context_may_reach_the_models_limit_and_no_more(ensemble):
    limit = ensemble.config.max_position_embeddings
    found = greedy(ensemble, max_new_tokens=limit - 5, min_new_tokens=limit - 5)
    assert len(found[0]) == limit
    with pytest.raises(ValueError, match="too long"):
        ensemble.generate(torch.full((1, limit + 1), 21), max_new_tokens=1)


def test_beams_times_return_sequences_are_the_best_beams(ensemble):
    beams = {"max_new_tokens": 5, "num_beams": 4, "do_sample": False}
    some = ensemble.generate(CONTEXT, num_return_sequences=3, **beams)
    assert some[0].tolist() == ensemble.generate(CONTEXT, **beams)[0].tolist()
    assert len({tuple(row) for row in some.tolist()}) == 3


@pytest.mark.parametrize("draft", ["a model", "an expert"])
def test_assisted_decoding_gives_the_greedy_answer(ensemble, draft):
    assistant = tiny_llama(9) if draft == "a model" else ensemble.backbones[1]
    assert greedy(ensemble, assistant_model=assistant) == greedy(ensemble)


@pytest.mark.parametrize("draft", ["a model", "an expert", "lookup"])
@torch.no_grad()
def test_sampling_with_drafts_has_the_mixtures_distribution(ensemble, draft):
    """Of the first and the second token, by a chi-squared test: the drafted token's, and one after it."""
    vocab = torch.arange(ensemble.config.vocab_size)
    contexts = torch.cartesian_prod(torch.arange(20, 40), vocab)[:, [0, 1, 0]]  # what followed once is looked up
    again = ensemble(contexts).logits[:, -1].softmax(-1).gather(1, contexts[:, 1:2])
    context = contexts[again.argmax()][None]
    assert 0.1 < again.max() < 0.9  # so that drafts are accepted, and refused
    options = {"a model": {"assistant_model": tiny_llama(9)}, "an expert": {"assistant_model": ensemble.backbones[1]}}
    options = options.get(draft, {"prompt_lookup_num_tokens": 2})
    first = ensemble(context).logits[0, -1].softmax(-1)  # (vocab,)
    following = torch.cat([context.repeat(len(vocab), 1), vocab[:, None]], dim=1)
    second = first @ ensemble(following).logits[:, -1].softmax(-1)
    torch.manual_seed(0)
    sampling = {"do_sample": True, "top_k": 0, "min_new_tokens": 2, "max_new_tokens": 2, "eos_token_id": []}
    found = torch.cat([ensemble.generate(context, **sampling, **options)[:, 3:] for _ in range(400)])
    for tokens, expected in ((found[:, 0], first), (found[:, 1], second)):
        expected = 400 * expected.double() / expected.double().sum()
        counts, likely = tokens.bincount(minlength=len(expected)), expected >= 5
        observed, expected = ([*x[likely].tolist(), x[~likely].sum().item()] for x in (counts, expected))
        assert len(observed) > 5
        assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "group-beam-search"),
        ({"num_beams": 4, "force_words_ids": [[5]]}, "constrained-beam-search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive-search"),
        ({"dola_layers": "low"}, "dola"),
    ],
    ids=["groups", "constraints", "contrastive", "dola"],
)
def test_modes_that_live_in_repositories_are_named(ensemble, options, name):
    with pytest.raises(ValueError, match=f"transformers-community/{name}"):
        ensemble.generate(CONTEXT, max_new_tokens=4, **options)


def test_two_threads_generate_under_different_preferences(ensemble):
    names = ["a", "b", "c"]
    expected = {name: greedy(ensemble, preference=name) for name in names}
    found = {name: [] for name in names}

    def work(name: str):
        for _ in range(5):
            found[name].append(greedy(ensemble, preference=name))

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [expected[name]] * 5 for name in names}


def test_two_ensembles_may_share_a_backbone_in_one_process():
    shared = tiny_llama(1)
    one = PCMEnsembleForCausalLM.from_experts({"a": shared, "b": tiny_gpt2(2)}, pcm=tiny_llama(4))
    before = greedy(one)
    other = PCMEnsembleForCausalLM.from_experts({"x": shared}, pcm=tiny_llama(5))
    assert greedy(other) == greedy(shared)
    assert greedy(one) == before


def test_processes_that_wait_for_one_another_generate_to_the_longest(ensemble, tmp_path):
    """`synced_gpus`, as under FSDP and DeepSpeed: two processes end at different tokens, and neither hangs."""
    ensemble.save_pretrained(tmp_path / "ensemble")
    script = """
        import os, sys, torch
        from modeling_pcm_ensemble import PCMEnsembleForCausalLM
        torch.distributed.init_process_group("gloo")
        model = PCMEnsembleForCausalLM.from_pretrained(sys.argv[1])
        tokens = 3 + 4 * torch.distributed.get_rank()
        ids = torch.tensor([[21, 22, 23, 24, 25]])
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        found = model.generate(ids, synced_gpus=True, **options)
        assert found.tolist() == model.generate(ids, synced_gpus=False, **options).tolist()
        torch.distributed.destroy_process_group()
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(tmp_path / "script.py"), str(tmp_path / "ensemble")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr


def test_transformers_own_continuous_batching_is_refused(ensemble):
    assert not hasattr(ensemble, "init_continuous_batching")  # `transformers serve` then does without
    with pytest.raises(NotImplementedError, match="pages one model's cache, and an ensemble has several"):
        ensemble.generate_batch([[21, 22, 23]])
