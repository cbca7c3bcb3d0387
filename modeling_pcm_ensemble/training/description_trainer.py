"""Teaches a Preference Control Model what descriptions ask for, before any reward is known."""

import random
from collections import defaultdict

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..prefixes import pad_left
from .losses import declared_weights_loss, log_described_share
from .preference_sampling import PreferenceSampler, default_preference_sets, reward_shares
from .rollouts import completion_weight_logits, describe, tokenize, with_words


class DescriptionTrainer(Trainer):
    r"""
    Teaches a PCM to choose from words: with every expert active, α should be the weights that the words stand for,
    half of them given as `preference_text`, half as a system message. No expert runs and no reward is needed, since
    what words stand for is declared; [`RebelTrainer`] then starts from a PCM that can tell preferences apart.

    Args:
        model (`PCMEnsembleForCausalLM`): the ensemble. Its PCM learns, in float32 if it was in less.
        args (`TrainingArguments`): settings.
        train_dataset (`Dataset`): with columns `prompt`, texts or conversations, and `completion`, any texts.
        processing_class (`PreTrainedTokenizerBase`, *optional*): defaults to the ensemble's tokenizer.
        preference_sets (`list`, *optional*): preferences that are described; defaults to every combination of at most
            one expert for each dimension. All experts at weight 1 are always among them.

    Raises:
        TypeError, ValueError: on a model that is no ensemble or a dataset without these columns.
    """

    def __init__(
        self,
        model: PCMEnsembleForCausalLM,
        args: TrainingArguments,
        train_dataset,
        processing_class: PreTrainedTokenizerBase | None = None,
        preference_sets: list | None = None,
    ):
        if not isinstance(model, PCMEnsembleForCausalLM):
            raise TypeError(f"`model` must be a PCMEnsembleForCausalLM, got {type(model).__name__}.")
        if missing := {"prompt", "completion"} - set(train_dataset.column_names):
            raise ValueError(f"`train_dataset` needs columns `prompt` and `completion`, lacks {', '.join(missing)}.")
        sets = default_preference_sets(model.config, whole=False) if preference_sets is None else preference_sets
        self.preferences = PreferenceSampler(model.config, [*sets, model.config.expert_names], text_only_fraction=1.0)
        self.ensemble, self._generator = model, random.Random(args.seed)
        model.pcm.float()  # small updates vanish in half precision
        model.pcm.body.get_input_embeddings().requires_grad_(False)
        args.remove_unused_columns = False  # the collator reads text
        super().__init__(
            model=model.pcm,
            args=args,
            train_dataset=train_dataset,
            data_collator=self._collate,
            processing_class=processing_class or model.tokenizer,
        )
        self.model_accepts_loss_kwargs = False
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def _collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """What [`completion_weight_logits`] takes, and `shares`, `(rows, experts)`; each row's preference is drawn."""
        config, tokenizer = self.ensemble.config, self.processing_class
        draws = [self.preferences.draw(self._generator) for _ in rows]
        prompts = [with_words(row["prompt"], draw, config, tokenizer) for row, draw in zip(rows, draws)]
        prompt_ids = pad_left(tokenize(tokenizer, prompts))
        completions = [tokenizer(row["completion"], add_special_tokens=False)["input_ids"] for row in rows]
        completion_ids = pad_left([ids[::-1] for ids in completions]).flip(1)  # padded on the right
        return {
            "prompt_ids": prompt_ids.clamp(min=0),
            "prompt_mask": (prompt_ids >= 0).long(),
            "completion_ids": completion_ids.clamp(min=0),
            "completion_mask": (completion_ids >= 0).long(),
            "prefix_ids": describe(config, draws),
            "shares": reward_shares(draws),
        }

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """Cross-entropy of α, if all experts ran, from the declared weights; in nats a token."""
        shares, mask = inputs.pop("shares"), inputs["completion_mask"]
        expert_weight_logits = completion_weight_logits(model, **inputs)
        loss = (declared_weights_loss(expert_weight_logits, shares) * mask).sum() / mask.sum()
        with torch.no_grad():
            share = log_described_share(expert_weight_logits, shares > 0).exp()
            self._metrics["described_share"].append(((share * mask).sum() / mask.sum()).item())
        return (loss, expert_weight_logits) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None):
        """Add the mean share of α that described experts had since the last time."""
        means = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        self._metrics.clear()
        super().log(logs | means, start_time)
