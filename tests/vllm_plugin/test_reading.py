"""How much is kept of what users let the PCM read."""

import torch

from modeling_pcm_ensemble.vllm.reading import MOST_TOKENS, Prefix, PrefixReading

LENGTH = 1024
ROWS = MOST_TOKENS // LENGTH


def test_what_is_kept_stays_within_its_bound_whatever_a_step_needs():
    reading, read = PrefixReading(), []

    def record(prefix: Prefix):
        read.append(prefix)
        reading.recorded.append(torch.zeros(1, len(prefix.tokens), 2))
        assert sum(len(kept.tokens) for kept in [*reading.states, prefix]) <= MOST_TOKENS

    def step(first: int):
        """All requests that may run, each with the longest description; half of them were there before."""
        wanted = [(Prefix(0, (first + row,) * LENGTH),) for row in range(ROWS)]
        reading.begin(wanted, record)
        rows, _, width, _ = reading.stacked(0, list(range(ROWS)), keep=True).shape
        assert rows * width <= MOST_TOKENS

    for first in (0, ROWS // 2, ROWS, 0):
        step(first)
    assert len(read) == 3 * ROWS
