"""From rows of a dataset and their preferences to scored rollouts."""

import zlib

import torch
from tqdm import tqdm
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..preference import preference_weights
from ..rewards.scoring import Scorer, Scores, prompt_key
from .policies import Policy
from .preference_sampling import ToldPreference, reward_shares
from .prompts import as_completions, descriptions, tokenize, with_words
from .rebel_config import RebelConfig
from .rollouts import Rollout, sample_rollout
from .token_sampling import generate_from, is_end, random_numbers, rollout_config, written_tokens


class RolloutSampler:
    r"""
    Answers prompts with the ensemble, and scores the answers.

    Args:
        model (`PCMEnsembleForCausalLM`): the ensemble.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        scorer (`Scorer`): holds rewards and references.
        policy (`Policy`): says what is recorded.
        args (`RebelConfig`): settings.
    """

    def __init__(
        self,
        model: PCMEnsembleForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        scorer: Scorer,
        policy: Policy,
        args: RebelConfig,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.scorer = scorer
        self.policy = policy
        self.args = args
        self.generation_config = rollout_config(model, args.max_completion_length, tokenizer.pad_token_id)

    def sample(
        self, rows: list[dict], told: list[ToldPreference], seed: int, exploration: float = 0.0
    ) -> tuple[Rollout, Scores]:
        """
        Answer each row of a dataset under its preference, or, with `exploration`, near it (see [`RebelConfig`]); and
        score by the preference's weights. Random numbers outside stay as they were.
        """
        self.model.eval()
        self._add_references(rows)
        size = self.args.generation_batch_size or len(rows)
        starts = range(0, len(rows), size)
        quiet = self.args.disable_tqdm or len(starts) < 2 or self.args.process_index > 0
        parts = []
        with random_numbers(seed, self.args.device):
            for start in tqdm(starts, desc="rollout", leave=False, disable=quiet):
                batch = slice(start, start + size)
                parts.append(self._sample_batch(rows[batch], told[batch], exploration))
        rollout = Rollout.join(parts, self.generation_config.pad_token_id)

        completions = as_completions(rows, self._texts(rollout.completion_ids, rollout.completion_mask))
        shares = reward_shares(told, self.model.config)
        scores = self.scorer.score(rows, completions, shares, self.model.config.expert_names)
        rollout.shares = shares.to(self.args.device)
        rollout.rewards = torch.tensor(scores.rewards, device=self.args.device)
        return rollout, scores

    def _sample_batch(self, rows: list[dict], told: list[ToldPreference], exploration: float) -> Rollout:
        config, names = self.model.config, self.model.config.expert_names
        prompts = [with_words(row["prompt"], wish, config, self.tokenizer) for row, wish in zip(rows, told)]
        inputs = self._inputs(prompts)
        active = [wish.active(config.weighted_names) for wish in told]
        weights = preference_weights(active, names, len(told), config.adds_up)  # (rows, experts)

        return sample_rollout(
            self.model,
            inputs["input_ids"],
            inputs["attention_mask"],
            weights,
            descriptions(config, told),
            self.generation_config,
            self.policy,
            exploration,
        )

    def _inputs(self, prompts: list) -> BatchEncoding:
        """Return left-padded tokens and their mask."""
        encoded = {"input_ids": tokenize(self.tokenizer, prompts)}
        return self.tokenizer.pad(encoded, padding_side="left", return_tensors="pt").to(self.args.device)

    def ended(self, rollout: Rollout) -> torch.Tensor:
        """Return whether each completion was written to its end, `(rows,)`."""
        return is_end(rollout.completion_ids, self.generation_config).any(dim=1)

    def _texts(self, completion_ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
        lengths = mask.sum(dim=1).tolist()
        written = [ids[:length] for ids, length in zip(completion_ids.tolist(), lengths)]
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)

    def _add_references(self, rows: list[dict]):
        """Give each prompt completions of the base model, where it has none yet: the dataset's, or new ones."""
        references = self.scorer.references
        unanswered = {}
        for row in rows:
            key = prompt_key(row)
            if key in references:
                continue
            if row.get("reference") is None:
                unanswered[key] = row
            else:
                given = row["reference"] if isinstance(row["reference"], list) else [row["reference"]]
                references[key] = as_completions([row] * len(given), given)
        if not unanswered:
            return

        repeated = [row for row in unanswered.values() for _ in range(self.args.num_references)]
        base = self.model.backbones[self.args.reference_backbone]
        size = self.args.generation_batch_size or len(repeated)
        texts = []
        # Other prompts draw other numbers: under the same, one unlucky draw would meet all references.
        seed = zlib.crc32(f"{self.args.seed} {next(iter(unanswered))}".encode())
        with random_numbers(seed, self.args.device):
            for start in range(0, len(repeated), size):
                inputs = self._inputs([row["prompt"] for row in repeated[start : start + size]])
                sequences = generate_from(base, self.generation_config, **inputs)
                completion_ids = sequences[:, inputs["input_ids"].shape[1] :]
                texts += self._texts(completion_ids, written_tokens(completion_ids, self.generation_config))

        completions = iter(as_completions(repeated, texts))
        for key in unanswered:
            references[key] = [next(completions) for _ in range(self.args.num_references)]
