"""Sampling from the mixture, with what every expert said of each token recorded on the way."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_pcm_ensemble import PCMEnsembleConfig
from ..merging import token_log_probs
from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..preferences import description_prefix
from ..prefixes import CachePart, pad_left
from ..rewards.scoring import Scorer, Scores, prompt_key
from .preference_sampling import DrawnPreference, reward_shares

STEPS_OF_A_PIECE = 12  # after so many tokens, rows that have ended leave the batch, and noise is drawn anew


@dataclass
class Rollout:
    r"""
    Sampled completions, and all that an update needs of the experts.

    Args:
        prompt_ids, prompt_mask (`torch.LongTensor` of shape `(rows, prompt tokens)`): padded on the left.
        completion_ids, completion_mask (`torch.LongTensor` of shape `(rows, seq)`): padded on the right.
        expert_log_probs (`torch.FloatTensor` of shape `(rows, seq, experts)`): log π_i of each token, -inf where an
            expert did not run.
        weights (`torch.FloatTensor` of shape `(rows, experts)`): the weights w of the preference.
        prefix_ids (`torch.LongTensor` of shape `(rows, tokens)`): what the PCM read first, padded on the left with -1.
        old_log_probs (`torch.FloatTensor` of shape `(rows, seq)`): log π_t.
        shares (`torch.FloatTensor` of shape `(rows, experts)`): how much each expert's reward counts.
        rewards (`torch.FloatTensor` of shape `(rows,)`).
    """

    prompt_ids: torch.LongTensor
    prompt_mask: torch.LongTensor
    completion_ids: torch.LongTensor
    completion_mask: torch.LongTensor
    expert_log_probs: torch.Tensor
    weights: torch.Tensor
    prefix_ids: torch.LongTensor
    old_log_probs: torch.Tensor | None = None
    shares: torch.Tensor | None = None
    rewards: torch.Tensor | None = None

    def rows(self, index: torch.LongTensor | slice) -> "Rollout":
        """Some rows."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Rollout(**{name: None if value is None else value[index] for name, value in values.items()})

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @staticmethod
    def join(parts: list["Rollout"], pad_token_id: int) -> "Rollout":
        """Stack rollouts, padded to the longest."""
        sides = {"prompt_ids": "left", "prompt_mask": "left", "prefix_ids": "left", "weights": None}
        fill = {"prompt_ids": pad_token_id, "completion_ids": pad_token_id, "prefix_ids": -1}
        joined = {}
        for field in fields(Rollout):
            values = [getattr(part, field.name) for part in parts]
            if values[0] is not None:
                side = sides.get(field.name, "right")
                joined[field.name] = _stack(values, side, fill.get(field.name, 0))
        return Rollout(**joined)


def _stack(values: list[torch.Tensor], side: str | None, fill: int) -> torch.Tensor:
    if side is None or values[0].dim() == 1:
        return torch.cat(values)
    width, padded = max(value.shape[1] for value in values), []
    for value in values:
        room = value.new_full((len(value), width - value.shape[1], *value.shape[2:]), fill)
        padded.append(torch.cat([room, value] if side == "left" else [value, room], dim=1))
    return torch.cat(padded)


class ExpertRecorder:
    """
    While it is entered, records the log-probability that each active expert of an ensemble gave to each token that
    `generate` took: a forward's logits are kept until the next forward, or the end, tells which token it was.
    """

    def __init__(self, model: PCMEnsembleForCausalLM):
        self.model = model
        self.columns, self.logits = [], None

    def __enter__(self) -> "ExpertRecorder":
        self.handle = self.model.register_forward_hook(self._after_forward, with_kwargs=True)
        return self

    def __exit__(self, *exception):
        self.handle.remove()

    def _after_forward(self, module, args, kwargs, output):
        if self.logits is not None:
            self._read(kwargs["input_ids"])
        self.logits = output.expert_logits

    def _read(self, token_ids: torch.LongTensor):
        config = self.model.config
        self.columns.append(token_log_probs(self.logits, token_ids, config.num_experts, config.expert_top_k))

    def expert_log_probs(self, last_token_ids: torch.LongTensor) -> torch.Tensor:
        """`(rows, new tokens, experts)`; `last_token_ids`, of shape `(rows, 1)`, no forward has read."""
        self._read(last_token_ids)
        self.logits = None
        return torch.cat(self.columns, dim=1)


class TokenSampler(LogitsProcessor):
    """
    Draws each row's token from the softmax of its logits, `(rows, vocab)`, and leaves `generate` that one to take.

    On a CPU one random number a row finds it in the cumulated probabilities; `torch.multinomial` draws a number for
    each token of the vocabulary, and takes twice as long for 64 rows of SmolLM2.

    Raises:
        ValueError: on a CPU, if logits are not finite; elsewhere that is torch's to say.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        probs = scores.softmax(dim=-1)
        tokens = self._search(probs) if probs.device.type == "cpu" else torch.multinomial(probs, 1)  # (rows, 1)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens, 0.0)

    def _search(self, probs: torch.Tensor) -> torch.LongTensor:
        cumulated = probs.cumsum(dim=-1, dtype=torch.float64)  # (rows, vocab)
        if not cumulated[:, -1].isfinite().all():
            raise ValueError("The mixture's logits are not finite, so that no token can be drawn. Check the weights.")
        drawn = torch.rand(len(probs), 1, dtype=torch.float64) * cumulated[:, -1:]
        return torch.searchsorted(cumulated, drawn, right=True).clamp(max=probs.shape[-1] - 1)


def rollout_config(model: PCMEnsembleForCausalLM, max_new_tokens: int, pad_token_id: int) -> GenerationConfig:
    """Settings under which [`generate_from`] samples from π itself: temperature 1, nothing cut off."""
    return GenerationConfig(
        do_sample=False,  # the sampler is a logits processor
        max_new_tokens=max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=pad_token_id,
    )


def generate_from(model: PreTrainedModel, config: GenerationConfig, **inputs) -> torch.LongTensor:
    """Sample from `model` under `config` alone. Its own settings, say a penalty, would fill gaps in it."""
    own, model.generation_config = model.generation_config, config
    try:
        return model.generate(**inputs, logits_processor=[TokenSampler()])
    finally:
        model.generation_config = own


@contextmanager
def random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from `seed` inside, and leave random numbers outside as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def sample_rollout(
    model: PCMEnsembleForCausalLM,
    prompt_ids: torch.LongTensor,
    prompt_mask: torch.LongTensor,
    weights: torch.Tensor,
    prefix_ids: torch.LongTensor,
    config: GenerationConfig,
    exploration: float = 0.0,
) -> Rollout:
    """
    Complete each row once. Arguments as for [`Rollout`]; `config` from [`rollout_config`], and `exploration` as for
    [`RebelConfig`].
    """
    rows, device, pad = len(prompt_ids), prompt_ids.device, config.pad_token_id
    weights, prefix_ids = weights.to(device), prefix_ids.to(device)
    if exploration:
        leaning = torch.randn(weights.shape, device=device)  # of each completion, from its first token to its last

    def explored(alive: torch.LongTensor) -> torch.Tensor:
        """Weights to sample the next piece of these rows under."""
        if not exploration:
            return weights[alive]
        noise = (leaning[alive] + torch.randn_like(leaning[alive])) / 2**0.5
        return weights[alive] * (exploration * noise).exp()

    alive = torch.arange(rows, device=device)
    inputs = {"preference": explored(alive), "preference_ids": prefix_ids}
    completion_ids = torch.full((rows, config.max_new_tokens), pad, device=device)
    dtype = torch.promote_types(model.backbones[0].dtype, torch.float32)
    expert_log_probs = torch.zeros(*completion_ids.shape, model.config.num_experts, dtype=dtype, device=device)
    expert_log_probs.masked_fill_(weights[:, None] == 0, float("-inf"))
    sequences, mask = prompt_ids, prompt_mask
    for start in range(0, config.max_new_tokens, STEPS_OF_A_PIECE):
        few = copy.copy(config)
        few.max_new_tokens = min(STEPS_OF_A_PIECE, config.max_new_tokens - start)
        few.return_dict_in_generate = True
        inputs |= {"input_ids": sequences, "attention_mask": mask}
        with ExpertRecorder(model) as recorder:
            output = generate_from(model, few, **inputs, output_expert_logits=True)
            new_ids = output.sequences[:, sequences.shape[1] :]
            taken = slice(start, start + new_ids.shape[1])
            expert_log_probs[alive, taken] = recorder.expert_log_probs(new_ids[:, -1:])
        completion_ids[alive, taken] = new_ids
        # Rows that have ended leave the batch, which `generate` would carry on to the longest row's end.
        kept = (~is_end(new_ids, config).any(dim=1)).nonzero()[:, 0]
        if not len(kept):
            break
        if len(kept) < len(alive):
            output.past_key_values.batch_select_indices(kept)
        sequences, alive = output.sequences[kept], alive[kept]
        mask = torch.cat([mask[kept], torch.ones_like(new_ids[kept])], dim=1)
        cache = output.past_key_values
        cache.route = replace(cache.route, weights=explored(alive))
        inputs = {"past_key_values": cache}
    length = taken.stop
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids[:, :length],
        completion_mask=written_tokens(completion_ids[:, :length], config),
        expert_log_probs=expert_log_probs[:, :length],
        weights=weights,
        prefix_ids=prefix_ids,
    )


def completion_weight_logits(
    pcm,
    prompt_ids: torch.LongTensor,
    prompt_mask: torch.LongTensor,
    completion_ids: torch.LongTensor,
    completion_mask: torch.LongTensor,
    prefix_ids: torch.LongTensor,
) -> torch.Tensor:
    """
    h where each completion token was predicted, `(rows, seq, experts)`. Arguments as for [`Rollout`]; `pcm` may be
    wrapped.
    """
    expert_weight_logits, _ = pcm(
        torch.cat([prompt_ids, completion_ids], dim=1),
        torch.cat([prompt_mask, completion_mask], dim=1),
        prefix_ids,
        CachePart(),
        completion_ids.shape[1] + 1,
    )
    return expert_weight_logits[:, :-1]  # the last token predicts no other


def is_end(completion_ids: torch.LongTensor, config: GenerationConfig) -> torch.BoolTensor:
    """Which tokens end a completion, `(rows, seq)`."""
    if config.eos_token_id is None:
        return torch.zeros_like(completion_ids, dtype=torch.bool)
    ends = torch.tensor(config.eos_token_id, device=completion_ids.device).reshape(-1)
    return torch.isin(completion_ids, ends)


def written_tokens(completion_ids: torch.LongTensor, config: GenerationConfig) -> torch.LongTensor:
    """1 for the tokens up to the first end token, `(rows, seq)`."""
    ended = is_end(completion_ids, config).long()
    return (ended.cumsum(dim=1) - ended == 0).long()


def describe(configs: list[PCMEnsembleConfig], draws: list[DrawnPreference]) -> torch.LongTensor:
    """
    What the PCM reads before each row's prompt, `(rows, tokens)`, padded on the left with -1: the descriptions of the
    wanted experts, as the row's config has them, unless they stand in the prompt.
    """
    rows = [
        [] if draw.words == "system" else description_prefix(config, list(draw.weights))
        for config, draw in zip(configs, draws)
    ]
    prefix_ids = pad_left(rows)
    return torch.full((len(rows), 1), -1) if prefix_ids is None else prefix_ids


def with_words(prompt, draw: DrawnPreference, config, tokenizer: PreTrainedTokenizerBase):
    """A prompt as the experts and the PCM get it: with the preference in it where that is how it is told."""
    if draw.words != "system":
        return prompt
    wanted = [e["description_ids"] for e, weight in zip(config.experts, draw.weights) if weight > 0]
    text = " ".join(tokenizer.decode(ids).strip() for ids in wanted)
    if isinstance(prompt, str):
        return f"{text}\n\n{prompt}"
    if prompt[0]["role"] == "system":
        return [{"role": "system", "content": f"{prompt[0]['content']}\n{text}"}, *prompt[1:]]
    return [{"role": "system", "content": text}, *prompt]


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list) -> list[list[int]]:
    """Tokens of each prompt: a text as it is, a conversation with the opening of an answer."""
    return [
        tokenizer(prompt)["input_ids"]
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in prompts
    ]


class RolloutSampler:
    r"""
    Answers prompts with the mixture, and scores the answers.

    Args:
        model (`PCMEnsembleForCausalLM`): the ensemble.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        scorer (`Scorer`): holds rewards and references.
        args (`RebelConfig`): settings.
    """

    def __init__(self, model: PCMEnsembleForCausalLM, tokenizer: PreTrainedTokenizerBase, scorer: Scorer, args):
        self.model, self.tokenizer, self.scorer, self.args = model, tokenizer, scorer, args
        self.generation_config = rollout_config(model, args.max_completion_length, tokenizer.pad_token_id)

    def sample(
        self, rows: list[dict], draws: list[DrawnPreference], seed: int, exploration: float = 0.0
    ) -> tuple[Rollout, Scores]:
        """
        Answer each row of a dataset under its preference, or, with `exploration`, near it (see [`RebelConfig`]); and
        score by the preference's weights. Random numbers outside stay as they were.
        """
        self.model.eval()
        self._add_references(rows)
        size = self.args.rollout_batch_size or len(rows)
        with random_numbers(seed, self.args.device):
            starts = range(0, len(rows), size)
            quiet = self.args.disable_tqdm or len(starts) < 2 or self.args.process_index > 0
            parts = [
                self._sample_batch(rows[start : start + size], draws[start : start + size], exploration)
                for start in tqdm(starts, desc="rollout", leave=False, disable=quiet)
            ]
        shares = reward_shares(draws)
        rollout = Rollout.join(parts, self.generation_config.pad_token_id)
        completions = as_completions(rows, self._texts(rollout.completion_ids, rollout.completion_mask))
        scores = self.scorer.score(rows, completions, shares, self.model.config.expert_names)
        rollout.shares = shares.to(self.args.device)
        rollout.rewards = torch.tensor(scores.rewards, device=self.args.device)
        return rollout, scores

    def _sample_batch(self, rows: list[dict], draws: list[DrawnPreference], exploration: float) -> Rollout:
        config = self.model.config
        prompts = [with_words(row["prompt"], draw, config, self.tokenizer) for row, draw in zip(rows, draws)]
        weights = torch.tensor([draw.active_weights for draw in draws])
        inputs = self._inputs(prompts)
        return sample_rollout(
            self.model,
            inputs["input_ids"],
            inputs["attention_mask"],
            weights,
            describe([config] * len(draws), draws),
            self.generation_config,
            exploration,
        )

    def _inputs(self, prompts: list):
        """Left-padded tokens and their mask."""
        return self.tokenizer.pad(
            {"input_ids": tokenize(self.tokenizer, prompts)}, padding_side="left", return_tensors="pt"
        ).to(self.args.device)

    def ended(self, rollout: Rollout) -> torch.Tensor:
        """Whether each completion was written to its end, `(rows,)`."""
        return is_end(rollout.completion_ids, self.generation_config).any(dim=1)

    def _texts(self, completion_ids: torch.LongTensor, mask: torch.LongTensor) -> list[str]:
        rows = [ids[:length] for ids, length in zip(completion_ids.tolist(), mask.sum(dim=1).tolist())]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _add_references(self, rows: list[dict]):
        """Completions of the base model for prompts that have none yet: the dataset's, or new ones."""
        new = {prompt_key(row): row for row in rows}
        new = {key: row for key, row in new.items() if key not in self.scorer.references}
        for key, row in list(new.items()):
            if row.get("reference") is not None:
                given = row["reference"] if isinstance(row["reference"], list) else [row["reference"]]
                self.scorer.references[key] = as_completions([row] * len(given), given)
                del new[key]
        if not new:
            return
        repeated = [row for row in new.values() for _ in range(self.args.num_references)]
        inputs = self._inputs([row["prompt"] for row in repeated])
        base = self.model.backbones[self.args.reference_backbone]
        with random_numbers(self.args.seed, self.args.device):
            sequences = generate_from(base, self.generation_config, **inputs)
        completion_ids = sequences[:, inputs["input_ids"].shape[1] :]
        mask = written_tokens(completion_ids, self.generation_config)
        completions = iter(as_completions(repeated, self._texts(completion_ids, mask)))
        for key in new:
            self.scorer.references[key] = [next(completions) for _ in range(self.args.num_references)]


def as_completions(rows: list[dict], texts: list[str]) -> list:
    """Answers as rewards get them: texts, or conversations where the prompts are."""
    return [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts)
    ]
