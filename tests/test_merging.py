"""The mixture's mathematics, by hand and by property."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from modeling_pcm_ensemble.merging import (
    MIXTURES,
    ExpertLogits,
    mixture_log_probs,
    token_log_probs,
)
from modeling_pcm_ensemble.weighting import log_expert_weights

BATCH, SEQ = 3, 2


@pytest.mark.parametrize(
    ("expert_weights", "expected_probs"),
    [
        pytest.param([1.0, 0.0], [0.9, 0.1], id="first-only"),
        pytest.param([0.5, 0.5], [0.55, 0.45], id="even"),
        pytest.param([0.25, 0.75], [0.375, 0.625], id="uneven"),
    ],
)
@pytest.mark.parametrize("exact", [True, False])
def test_mixture_matches_hand_computed_probabilities(expert_weights, expected_probs, exact):
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    experts = [ExpertLogits(i, None, probs[i].log().view(1, 1, 2)) for i in range(2)]
    mixture = mixture_log_probs(experts, torch.tensor(expert_weights).log().view(1, 1, 2), exact=exact)
    assert_close(mixture.exp()[0, 0], torch.tensor(expected_probs))


def test_log_expert_weights_of_a_silent_pcm_are_the_users_weights():
    weights = torch.tensor([[1.0, 3.0, 0.0]])
    alpha = log_expert_weights(torch.zeros(1, 2, 3), weights.log()).exp()
    assert_close(alpha, torch.tensor([0.25, 0.75, 0.0]).expand(1, 2, 3))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("expert_top_k", [None, 2])
def test_improbable_tokens_keep_their_log_probability_and_impossible_ones_have_none(exact, expert_top_k):
    logits = torch.tensor([[[0.0, -90.0, -200.0, -210.0, float("-inf")]]])
    experts = [ExpertLogits(0, None, logits), ExpertLogits(1, None, logits - 1)]
    weights = torch.tensor([[[0.25, 0.75]]]).log()
    found = mixture_log_probs(experts, weights, exact=exact, expert_top_k=expert_top_k)[0, 0]
    dropped = 0 if expert_top_k is None else 100
    assert_close(found, torch.tensor([0.0, -90, -200 - dropped, -210 - dropped, float("-inf")]), atol=1e-4, rtol=0)


def random_case(seed: int, num_experts: int, vocab_size: int):
    """Random logits, weights of which some are 0, and the experts' rows that follow."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_experts, BATCH, SEQ, vocab_size, generator=generator)
    weights = torch.rand(BATCH, num_experts, generator=generator)
    weights[torch.rand(weights.shape, generator=generator) < 0.4] = 0
    weights[weights.sum(1) == 0, 0] = 1
    opinions = torch.randn(BATCH, SEQ, num_experts, generator=generator)
    return logits, weights, opinions


def mix(logits, weights, opinions, **options):
    experts = []
    for i, active in enumerate((weights > 0).T):
        if active.any():
            rows = None if active.all() else active.nonzero()[:, 0]
            experts.append(ExpertLogits(i, rows, logits[i] if rows is None else logits[i][rows]))
    return mixture_log_probs(experts, log_expert_weights(opinions, weights.log()), **options)


cases = given(
    seed=st.integers(0, 2**31 - 1),
    num_experts=st.integers(1, 5),
    vocab_size=st.integers(2, 17),
    exact=st.booleans(),
)


@cases
def test_mixture_sums_to_one(seed, num_experts, vocab_size, exact):
    for merge in MIXTURES:
        mixture = mix(*random_case(seed, num_experts, vocab_size), exact=exact, merge=merge)
        assert_close(mixture.exp().sum(-1), torch.ones(BATCH, SEQ))


@cases
def test_permuting_experts_permutes_the_weights_and_leaves_the_mixture_unchanged(seed, num_experts, vocab_size, exact):
    logits, weights, opinions = random_case(seed, num_experts, vocab_size)
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed))
    alpha = log_expert_weights(opinions, weights.log())
    assert_close(log_expert_weights(opinions[..., order], weights[:, order].log()), alpha[..., order])
    permuted = mix(logits[order], weights[:, order], opinions[..., order], exact=exact)
    assert_close(permuted, mix(logits, weights, opinions, exact=exact), atol=1e-5, rtol=1e-4)


@cases
def test_a_zero_weight_equals_leaving_the_expert_out(seed, num_experts, vocab_size, exact):
    logits, weights, opinions = random_case(seed, num_experts + 1, vocab_size)
    weights[:, -1] = 0
    weights[weights.sum(1) == 0, 0] = 1
    without = mix(logits[:-1], weights[:, :-1], opinions[..., :-1], exact=exact)
    assert_close(mix(logits, weights, opinions, exact=exact), without)


@cases
def test_scaling_all_weights_changes_nothing(seed, num_experts, vocab_size, exact):
    logits, weights, opinions = random_case(seed, num_experts, vocab_size)
    scaled = mix(logits, weights * 7.5, opinions, exact=exact)
    assert_close(scaled, mix(logits, weights, opinions, exact=exact), atol=1e-5, rtol=1e-4)


@cases
def test_equal_experts_give_the_expert_back_at_any_weights(seed, num_experts, vocab_size, exact):
    logits, weights, opinions = random_case(seed, num_experts, vocab_size)
    mixture = mix(logits[:1].expand_as(logits), weights, opinions, exact=exact)
    assert_close(mixture, logits[0].log_softmax(-1), atol=1e-5, rtol=1e-4)


@cases
def test_token_log_probs_are_those_of_the_experts_that_ran(seed, num_experts, vocab_size, exact):
    logits, weights, _ = random_case(seed, num_experts, vocab_size)
    tokens = torch.randint(vocab_size, (BATCH, SEQ), generator=torch.Generator().manual_seed(seed))
    experts = [ExpertLogits(i, row := (w > 0).nonzero()[:, 0], logits[i][row]) for i, w in enumerate(weights.T)]
    found = token_log_probs(experts, tokens, num_experts)
    expected = (
        logits.log_softmax(-1).permute(1, 2, 0, 3).gather(3, tokens[..., None, None].expand(-1, -1, num_experts, 1))
    )
    expected = expected[..., 0].masked_fill((weights == 0)[:, None], float("-inf"))
    assert_close(found, expected)


@cases
def test_tokens_that_no_expert_keeps_come_last_in_the_order_of_the_whole_mixture(seed, num_experts, vocab_size, exact):
    logits, weights, opinions = random_case(seed, num_experts, vocab_size)
    k = 1 + seed % max(vocab_size // 2, 1)
    cut = mix(logits, weights, opinions, exact=exact, expert_top_k=k)
    whole = mix(logits, weights, opinions, exact=exact)
    in_top_k = logits >= logits.topk(k, dim=-1).values[..., -1:]
    kept = (in_top_k & (weights.T > 0)[:, :, None, None]).any(dim=0)  # (batch, seq, vocab)

    assert_close(cut.masked_fill(~kept, float("-inf")).exp().sum(-1), torch.ones(BATCH, SEQ))
    assert cut.masked_fill(kept, float("-inf")).exp().sum() < 1e-40
    assert (cut.masked_fill(~kept, float("inf")).amin(-1) > cut.masked_fill(kept, float("-inf")).amax(-1)).all()
    assert_close(cut[~kept], whole[~kept] - 100, atol=1e-4, rtol=0)


@cases
def test_an_offset_for_the_experts_zero_is_the_weighted_mean_of_their_normalizers(
    seed, num_experts, vocab_size, exact
):
    logits, weights, opinions = random_case(seed, num_experts, vocab_size)
    alpha = log_expert_weights(opinions, weights.log()).exp()
    for k in (None, 2):
        found = mix(logits, weights, opinions, exact=exact, expert_top_k=k, normalize=False)
        offset = found - mix(logits, weights, opinions, exact=exact, expert_top_k=k)
        kept = logits if k is None else logits.topk(k, dim=-1).values
        expected = torch.einsum("bse,ebs->bs", alpha, kept.logsumexp(-1))
        assert_close(offset, expected[..., None].expand_as(offset), atol=1e-4, rtol=1e-4)
