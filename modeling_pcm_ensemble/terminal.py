"""Preferences from a command line, and answers side by side in a terminal. Needs rich, of the `examples` extra."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .modeling_pcm_ensemble import PCMEnsembleForCausalLM
from .preference import Preference


def parse_preference(text: str, names: list[str], adds_up: bool = False) -> Preference:
    """
    Read a preference as it is typed, such as `elementary=2,friendly`; for `type=` of an argument of argparse.

    Args:
        text (`str`): experts, and weights that are not 1.
        names (`list[str]`): the ensemble's experts.
        adds_up (`bool`): whether weights may be below 0, as where tilts add up (`config.adds_up`).

    Raises:
        ArgumentTypeError: if an expert is unknown, or a weight is not accepted.
    """
    weights = {}
    for part in text.split(","):
        name, is_weighted, weight = map(str.strip, part.partition("="))
        if name in weights:
            raise argparse.ArgumentTypeError(f"{name!r} is there twice in {text!r}. Give each expert one weight.")
        try:
            weights[name] = float(weight) if is_weighted else 1.0
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{part!r} must be an expert, or expert=number: friendly=0.5.") from error

    try:
        return Preference.parse(weights, names, adds_up)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class AnswerTable(BaseStreamer):
    r"""
    A streamer for `generate` that draws every row of a batch in a column of its own while it is written.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): decodes the tokens.
        titles (`list[str]`): of the columns, one for each row of the batch.
        live (`Live`): where it is drawn.
        finished (`dict[str, str]`, *optional*): columns that stand before these, title → text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        titles: list[str],
        live: Live,
        finished: dict[str, str] | None = None,
    ):
        self.tokenizer = tokenizer
        self.titles = titles
        self.live = live
        self.finished = finished or {}
        self.tokens: list[list[int]] | None = None  # one list for each row; None until the prompt has passed

    def put(self, value: torch.Tensor):
        if self.tokens is None:
            self.tokens = [[] for _ in self.titles]
            return

        for row, token in zip(self.tokens, value.tolist()):
            row.append(token)
        answers = self.answers()
        table = Table(expand=True)
        for title in answers:
            table.add_column(Text(title), ratio=1)  # whose brackets are no markup
        table.add_row(*map(Text, answers.values()))
        self.live.update(table)

    def end(self):
        self.live.refresh()

    def answers(self) -> dict[str, str]:
        """Return all columns so far, title → text."""
        texts = self.tokenizer.batch_decode(self.tokens or [], skip_special_tokens=True)
        return self.finished | dict(zip(self.titles, texts))


def stream_answers(
    model: PCMEnsembleForCausalLM,
    inputs: BatchEncoding,
    preferences: Mapping[str, Preference],
    tokens: int,
    console: Console,
) -> torch.Tensor:
    r"""
    Answer with the plain model, then under every preference at once, greedily, and draw it while it is written.

    Args:
        model (`PCMEnsembleForCausalLM`): the ensemble.
        inputs (`BatchEncoding`): one prompt, `input_ids` of shape `(1, seq)`.
        preferences (`Mapping[str, Preference]`): by the titles of their columns.
        tokens (`int`): most tokens of an answer.
        console (`Console`): where it is drawn.

    Returns:
        Prompt and answer under each preference, `(preferences, seq + tokens)`.

    Raises:
        ValueError: if the ensemble has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("The ensemble has no tokenizer, which reads answers. Build or save it with one.")
    base: Any = model.backbones[0]  # transformers types no model as one that generates
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False}
    with Live(console=console, refresh_per_second=8) as live:
        vanilla = AnswerTable(model.tokenizer, ["vanilla"], live)
        base.generate(**inputs, streamer=vanilla, **options)

        table = AnswerTable(model.tokenizer, list(preferences), live, vanilla.answers())
        rows = {name: value.expand(len(preferences), -1) for name, value in inputs.items()}
        sequences: Any = model.generate(**rows, preference=list(preferences.values()), streamer=table, **options)
        return sequences


def weights_table(
    model: PCMEnsembleForCausalLM, sequences: torch.Tensor, preferences: Mapping[str, Preference], start: int
) -> Table:
    r"""
    Lay out α or strengths, and what each expert contributed to the tokens that were written (see
    [`PCMEnsembleForCausalLM.attribute`]), as means over each answer.

    Args:
        model (`PCMEnsembleForCausalLM`), preferences (`Mapping[str, Preference]`): as for [`stream_answers`].
        sequences (`torch.LongTensor` of shape `(preferences, seq)`): what it gave.
        start (`int`): tokens of the prompt.
    """
    asked: dict[str, Any] = {"preference": list(preferences.values())}
    weights = model.compute_expert_weights(sequences, **asked)[:, start - 1 : -1]  # (preferences, tokens, experts)
    shares = model.attribute(sequences, **asked)[:, start - 1 :]  # (preferences, tokens, experts)
    written = _up_to_end(sequences[:, start:], model.generation_config.eos_token_id)[..., None]

    weights, shares = ((x * written).sum(dim=1) / written.sum(dim=1) for x in (weights, shares))
    title, cell = "α of each expert / its share of the text", "{:.0%} / {:.0%}"
    if model.config.adds_up:
        title, cell = "strength of each expert / nats that it adds to a token", "{:.2f} / {:+.2f}"

    table = Table(title=title, expand=True)
    for header in ("expert", *preferences):
        table.add_column(Text(header))
    for expert, name in enumerate(model.config.expert_names):
        pairs = zip(weights[:, expert].tolist(), shares[:, expert].tolist())
        table.add_row(Text(name), *(cell.format(weight, share) if round(weight, 2) else "" for weight, share in pairs))
    return table


def _up_to_end(tokens: torch.Tensor, end_ids: int | list[int] | None) -> torch.Tensor:
    """Tell tokens of an answer, its end among them, from the padding behind it, `(rows, tokens)`."""
    ids = [] if end_ids is None else [end_ids] if isinstance(end_ids, int) else end_ids
    is_end = torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype, device=tokens.device)).int()
    return is_end.cumsum(dim=1) == is_end  # no end before


__all__ = ["AnswerTable", "parse_preference", "stream_answers", "weights_table"]
