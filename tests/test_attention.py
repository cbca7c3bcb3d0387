"""`attn_implementation="grouped_sdpa"`: sdpa's numbers, by another way for one query on a CPU."""

import pytest
import torch
from conftest import left_pad
from torch.testing import assert_close
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_pcm_ensemble.compile_attention import grouped_sdpa

ROWS = [[21, 22, 23, 24, 25], [31, 32], [41, 42, 43, 44]]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_mixture_of_architectures_generates_as_with_sdpa(mixed, cache, padded):
    """Shared heads and none, sliding windows, learnt positions, prompts."""
    inputs = left_pad(ROWS) if padded else {"input_ids": torch.tensor(ROWS[:1])}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    expected = mixed.generate(**inputs, **options)
    mixed.set_attn_implementation("grouped_sdpa")
    found = mixed.generate(**inputs, **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert_close(torch.stack(found.scores), torch.stack(expected.scores), atol=1e-3, rtol=0)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_query_attends_as_in_sdpa(masked, scaling):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 11, 8), torch.randn(3, 2, 11, 8)
    mask = torch.rand(3, 1, 1, 11) < 0.7 if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
    found, _ = grouped_sdpa(module, query, key, value, mask, scaling=scaling)
    assert_close(found, expected)
