"""Processors that take tokens away or depend on the logits' zero, and the scoring of given text."""

import copy

import pytest
import torch
from conftest import VOCAB, left_pad, make_ensemble, reference, tiny_llama, tiny_qwen2
from peft import PeftModel
from test_lora import lora_ensemble, peft_adapter
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo
from modeling_pcm_ensemble.merging import MIXTURES

ROWS = [[21, 22, 23, 24], [31, 32]]
WEIGHTS = [[1.0, 0.0, 0.0], [0.5, 1.0, 2.0]]


class Allow(LogitsProcessor):
    """Forbids all tokens but some, as a grammar does; `rows[i]` are those of row i."""

    def __init__(self, rows: list[list[int]]):
        self.rows = rows

    def __call__(self, input_ids, scores):
        mask = torch.full_like(scores, float("-inf"))
        for row, allowed in enumerate(self.rows):
            mask[row, allowed] = 0
        return scores + mask


def unlikely(model, row: list[int], weights: list[float]) -> list[int]:
    """Tokens that no active expert has among its most probable 60, of 99, the best by the whole mixture first."""
    expected = reference(model, row, weights)
    active = torch.tensor(weights) > 0
    ranks = expected["expert_log_probs"][active, -1].argsort(-1, descending=True).argsort(-1)  # (active, vocab)
    order = expected["log_probs"][-1].argsort(descending=True)
    return [token for token in order.tolist() if (ranks[:, token] >= 60).all()]


@pytest.fixture
def cut(prompted) -> PCMEnsembleForCausalLM:
    prompted.config.expert_top_k = 3
    return prompted


@pytest.mark.parametrize("use_cache", [True, False])
def test_where_a_processor_leaves_only_what_no_expert_kept_the_whole_mixture_decides(cut, use_cache):
    allowed = [unlikely(cut, row, weights) for row, weights in zip(ROWS, WEIGHTS)]
    assert all(len(tokens) >= 3 for tokens in allowed)
    options = {
        "allow": {"logits_processor": LogitsProcessorList([Allow(allowed)])},
        "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: allowed[row]},
    }
    for option in options.values():
        output = cut.generate(
            **left_pad(ROWS), preference=WEIGHTS, max_new_tokens=1, do_sample=False, use_cache=use_cache, **option
        )
        assert output[:, -1].tolist() == [tokens[0] for tokens in allowed]

        torch.manual_seed(0)
        of_each_sample = LogitsProcessorList([Allow([tokens for tokens in allowed for _ in range(200)])])
        output = cut.generate(
            **left_pad(ROWS), preference=WEIGHTS, max_new_tokens=1, do_sample=True, top_k=0, use_cache=use_cache,
            num_return_sequences=200, logits_processor=of_each_sample,
        )  # fmt: skip
        for row, drawn in enumerate(output[:, -1].view(2, 200)):
            probs = reference(cut, ROWS[row], WEIGHTS[row])["log_probs"][-1][allowed[row]].softmax(-1)
            counts = torch.tensor([(drawn == token).sum() for token in allowed[row]])
            assert counts.sum() == 200
            assert_close(counts / 200, probs, atol=0.12, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
    ],
    ids=["greedy", "beams", "sampled", "sampled beams", "drafts"],
)
@pytest.mark.parametrize("taken", ["suppressed", "bad words", "end"])
def test_generation_goes_on_where_all_kept_tokens_are_taken_away(cut, options, taken):
    row, weights = ROWS[0], WEIGHTS[0]
    best = reference(cut, row, weights)["log_probs"][-1].topk(3).indices.tolist()
    removed = {
        "suppressed": {"suppress_tokens": best},
        "bad words": {"bad_words_ids": [[token] for token in best]},
        "end": {"min_new_tokens": 2, "eos_token_id": best},
    }
    torch.manual_seed(0)
    output = cut.generate(
        **left_pad([row]), preference=weights, max_new_tokens=2, pad_token_id=0, **removed[taken], **options
    )
    assert output.shape == (1, len(row) + 2)
    assert not set(output[0, len(row) :].tolist()) & set(best)


def test_samples_under_a_top_k_are_those_of_a_mixture_that_has_nothing_else(cut):
    class Cut(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.masked_fill(scores.log_softmax(-1) < -90, float("-inf"))

    drawn = []
    for processors in (None, LogitsProcessorList([Cut()])):
        torch.manual_seed(0)
        drawn.append(
            cut.generate(
                **left_pad(ROWS), preference=WEIGHTS, do_sample=True, top_k=0, temperature=1.5, max_new_tokens=8,
                num_return_sequences=50, logits_processor=processors,
            )
        )  # fmt: skip
    assert torch.equal(*drawn)


@pytest.mark.parametrize("options", [{"guidance_scale": 1.5}, {"exponential_decay_length_penalty": (0, 1.5)}], ids=str)
def test_processors_that_compute_with_improbable_tokens_are_refused_with_a_top_k(cut, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` cannot be used with `expert_top_k`"):
        cut.generate(**left_pad(ROWS), max_new_tokens=1, eos_token_id=50, pad_token_id=0, **options)


PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"encoder_repetition_penalty": 1.5},
    {"exponential_decay_length_penalty": (2, 1.4), "eos_token_id": 50, "pad_token_id": 0},
    {"sequence_bias": {(50,): 2.0}, "repetition_penalty": 1.2},
    {"logits_processor": LogitsProcessorList([lambda ids, scores: torch.where(scores > 0, scores * 2, scores)])},
]


@pytest.mark.parametrize("options", PENALTIES, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("merge", [*MIXTURES, "product"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_one_active_expert_writes_what_that_model_writes_under_the_same_processors(merge, options, use_cache):
    alone = tiny_qwen2(2)
    alone.generation_config.eos_token_id = None
    model = make_ensemble([tiny_llama(1), alone], [(0, [5], [6]), (1, [], [7])], merge=merge, reference="e0")
    if merge == "product":
        torch.nn.init.zeros_(model.pcm.head.weight)  # strength 1
    for seed in range(3):
        torch.manual_seed(seed)
        ids = torch.randint(3, VOCAB, (2, 5))
        settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": use_cache} | options
        expected = alone.generate(ids, **settings)
        assert torch.equal(model.generate(ids, preference="e1", **settings), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's call
@pytest.mark.parametrize("merge", ["probabilities", "product", "adapters"])
@pytest.mark.parametrize("options", PENALTIES[:3], ids=lambda options: next(iter(options)))
def test_one_active_adapter_writes_what_peft_writes_under_the_same_processors(merge, options, tmp_path):
    backbone = tiny_llama(1)
    adapters = {name: peft_adapter(tmp_path / name, backbone, seed) for seed, name in enumerate("ab")}
    model = lora_ensemble(backbone, adapters)
    model.config.merge = merge
    torch.nn.init.zeros_(model.pcm.head.weight)  # an expert's full tilt is at strength 1
    alone = PeftModel.from_pretrained(copy.deepcopy(backbone), adapters["b"]).eval()
    ids = torch.tensor([[21, 22, 23, 24]])
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None} | options
    expected = alone.generate(input_ids=ids, **settings)
    assert torch.equal(model.generate(ids, preference="b", **settings), expected)


@pytest.mark.real_model
@pytest.mark.parametrize("options", PENALTIES[:3], ids=lambda options: next(iter(options)))
def test_smollm2_as_the_one_expert_writes_what_it_writes_alone(options):
    alone = AutoModelForCausalLM.from_pretrained(demo.fetch_smollm2(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.fetch_smollm2())
    model = PCMEnsembleForCausalLM.from_experts({"a": alone}, pcm=alone, pcm_layers=1, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "List ten fruits, one per line."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = alone.generate(**inputs, max_new_tokens=24, do_sample=False, **options)
    assert torch.equal(model.generate(**inputs, max_new_tokens=24, do_sample=False, **options), expected)


def test_a_penalty_from_the_experts_own_settings_counts_as_in_that_expert():
    alone = tiny_llama(3)
    alone.generation_config.update(repetition_penalty=1.4, eos_token_id=None)
    model = PCMEnsembleForCausalLM.from_experts({"a": alone}, pcm=alone, pcm_layers=1)
    ids = torch.tensor([[21, 22, 23]])
    expected = alone.generate(ids, max_new_tokens=15, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=15, do_sample=False), expected)
    free = alone.generate(ids, max_new_tokens=15, do_sample=False, repetition_penalty=1.0)
    assert not torch.equal(free, expected)


@pytest.mark.parametrize("merge", MIXTURES)
def test_between_two_experts_the_zero_moves_with_their_weights(merge):
    """Two experts that differ by a constant in all logits are one model, wherever its zero is."""
    model = make_ensemble([tiny_llama(1), tiny_llama(1)], [(0, [], []), (1, [], [])], merge=merge)
    model.backbones[1].lm_head.register_forward_hook(lambda module, inputs, output: output + 8)
    torch.nn.init.zeros_(model.pcm.head.weight)
    context = torch.tensor([ROWS[0]])
    logits = model(context, preference={"e0": 1.0, "e1": 3.0}, normalize_logits=False).logits
    assert_close(logits, tiny_llama(1)(context).logits + 6, atol=1e-4, rtol=0)


def test_given_text_has_a_finite_likelihood_and_the_loss_is_that_of_the_logits(cut):
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            output = cut(ids, labels=ids, preference=WEIGHTS)
        log_probs = output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        assert log_probs.isfinite().all()
        assert (log_probs < -90).any()
        assert_close(output.loss, -log_probs.mean(), atol=1e-3, rtol=0)


def test_choices_that_no_expert_kept_rank_as_by_the_whole_mixture(cut):
    choices = unlikely(cut, ROWS[1], WEIGHTS[1])
    ids = torch.tensor([[*ROWS[1], choice] for choice in choices])

    def likelihoods(top_k):
        cut.config.expert_top_k = top_k
        with torch.no_grad():
            logits = cut(ids, preference=[WEIGHTS[1]] * len(ids)).logits
        return logits[:, -2].gather(-1, ids[:, -1:])[:, 0]

    assert_close(likelihoods(3), likelihoods(None) - 100, atol=1e-4, rtol=0)
    assert likelihoods(3).argsort().tolist() == likelihoods(None).argsort().tolist()
