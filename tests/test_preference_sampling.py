"""Which preferences training draws, and how it tells them."""

import random
from collections import Counter

import pytest
import torch
from test_training import make_trainer
from torch.testing import assert_close

from modeling_pcm_ensemble import preference_weights


def test_weights_are_drawn_from_all_mixtures_of_a_set(tmp_path):
    sampler = make_trainer(tmp_path, weight_distribution="dirichlet").preferences
    generator = random.Random(0)
    drawn = [sampler.draw(generator) for _ in range(2000)]
    weights = preference_weights([told.preference for told in drawn], sampler.names, 2000)
    assert {told.label for told in drawn} == {told.label for told in sampler.sets}
    assert_close(weights.sum(dim=1), torch.full((2000,), 2.0), atol=1e-4, rtol=0)
    shares = weights[weights[:, 0] > 0][:, 0] / 2  # uniform between 0 and 1
    assert_close(shares.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([0.25, 0.5, 0.75]), atol=0.05, rtol=0)


def test_a_share_of_preferences_is_told_in_words_half_of_it_as_a_system_message(tmp_path):
    sampler = make_trainer(tmp_path, text_only_fraction=0.4).preferences
    generator = random.Random(0)
    told = Counter(sampler.draw(generator).way for _ in range(4000))
    for way, share in (("weights", 0.6), ("preference_text", 0.2), ("system", 0.2)):
        assert told[way] / 4000 == pytest.approx(share, abs=0.03)
