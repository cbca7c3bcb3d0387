"""Teaches a Preference Control Model what descriptions ask for."""

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..call_arguments import has_class
from ..configuration_pcm_ensemble import PCMEnsembleConfig
from ..merging import log_expert_weights
from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..prefixes import encode_description, pad_left
from .checks import check_columns, check_lengths
from .losses import expert_weight_cross_entropy, log_described_share
from .pcm_trainer import PCMTrainer, padding_tokenizer
from .preference_sampling import DrawnPreference, PreferenceSampler, default_preference_sets, reward_shares
from .rollouts import completion_weight_logits, describe, tokenize, with_words


@dataclass
class DescriptionConfig(TrainingArguments):
    """
    Settings of [`DescriptionTrainer`]: those of [`~transformers.TrainingArguments`], with defaults of its own.
    """

    learning_rate: float = field(default=2.5e-4, metadata={"help": "Initial learning rate."})
    max_steps: int = field(default=240, metadata={"help": "Updates."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows of an update."})
    warmup_steps: float = field(default=4, metadata={"help": "Updates until the learning rate is reached."})
    logging_steps: float = field(default=4, metadata={"help": "Log every so many steps."})
    save_strategy: str = field(default="no", metadata={"help": "No other: it takes minutes."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The trainer reads text."})

    def __post_init__(self):
        super().__post_init__()
        if self.save_strategy != "no":
            raise ValueError(
                "DescriptionTrainer takes minutes and keeps no checkpoints. Leave `save_strategy` at 'no', and write "
                "the ensemble with `trainer.save_model(folder)`."
            )


class DescriptionTrainer(PCMTrainer):
    r"""
    Teaches a PCM to choose from words: with every expert active, α should be, at each token, what the PCM as it was
    gives under the weights that the words stand for. They are told as `preference_text` as often as in a system
    message. No expert runs and no reward is needed, since what words stand for is declared. What [`RebelTrainer`] has
    taught the PCM to do under equal weights hardly changes; an untrained PCM is taught the weights themselves. Under
    weights it reads descriptions too, without how much each counts: if words stand for unequal weights, it leans
    likewise there, beside the weights it is given.

    Args:
        model (`PCMEnsembleForCausalLM`): the ensemble. Its PCM learns, in float32 if it was in less, but for its token
            embeddings.
        args (`DescriptionConfig`): settings.
        train_dataset (`Dataset`): with columns `prompt`, texts or conversations, and `completion`, texts.
        processing_class (`PreTrainedTokenizerBase`, *optional*): defaults to the ensemble's tokenizer.
        preference_sets (`list`, *optional*): preferences that are described; defaults to every combination of at most
            one expert for each dimension. All experts at weight 1 are always among them.
        paraphrases (`Mapping`, *optional*): an expert's name → other wordings of its description, so that the PCM
            learns what is meant and not how it is put. Half of the rows are told in the descriptions, which it reads
            under weights too; in the other half, each description is drawn from it and its paraphrases.

    Raises:
        TypeError, ValueError: on a model that is no ensemble, experts without `dimension` where no sets are given,
            paraphrases of no expert, or a dataset without these columns, with an empty completion or a text that the
            models have no room for.
    """

    def __init__(
        self,
        model: PCMEnsembleForCausalLM,
        args: DescriptionConfig,
        train_dataset,
        processing_class: PreTrainedTokenizerBase | None = None,
        preference_sets: list | None = None,
        paraphrases: Mapping[str, list[str]] | None = None,
    ):
        if not has_class(model, "PCMEnsembleForCausalLM"):
            raise TypeError(f"`model` must be a PCMEnsembleForCausalLM, got {type(model).__name__}.")
        check_columns(train_dataset, "train_dataset", "prompt", "completion")
        sets = default_preference_sets(model.config, whole=False) if preference_sets is None else preference_sets
        self.preferences = PreferenceSampler(model.config, [*sets, model.config.expert_names], text_only_fraction=1.0)
        tokenizer = padding_tokenizer(model, processing_class)
        _check_paraphrases(paraphrases or {}, model.config.expert_names)
        self.wordings = [  # of each expert, as tokens
            [expert["description_ids"]]
            + [encode_description(tokenizer, text) for text in (paraphrases or {}).get(expert["name"], ())]
            for expert in model.config.experts
        ]
        longest = _worded(model.config, [max(ids, key=len) for ids in self.wordings])
        _check_texts(train_dataset, longest, tokenizer)
        super().__init__(model, args, train_dataset=train_dataset, processing_class=tokenizer)
        self._before = copy.deepcopy(model.pcm).eval()
        self._generator = random.Random(args.seed + 7919 * args.process_index)

    def _prepare_inputs(self, inputs: list[dict]) -> dict[str, torch.Tensor]:
        """
        What [`completion_weight_logits`] takes, `targets`, `(rows, seq, experts)`, and `shares`, `(rows, experts)`;
        each row's preference is drawn, and how it is worded.
        """
        draws = [self.preferences.draw(self._generator) for _ in inputs]
        shares = reward_shares(draws).to(self.args.device)
        unworded = [replace(draw, words=None) for draw in draws]
        with torch.no_grad(), self.compute_loss_context_manager():
            before = completion_weight_logits(
                self._before, **self._tensors(inputs, unworded, [self.ensemble.config] * len(draws))
            )
        targets = log_expert_weights(before, shares.log()).exp()
        texts = self._tensors(inputs, draws, [self._reworded() for _ in inputs])
        return texts | {"targets": targets, "shares": shares}

    def _tensors(
        self, rows: list[dict], draws: list[DrawnPreference], configs: list[PCMEnsembleConfig]
    ) -> dict[str, torch.Tensor]:
        """What [`completion_weight_logits`] takes."""
        tokenizer = self.processing_class
        prompts = [with_words(row["prompt"], *how, tokenizer) for row, *how in zip(rows, draws, configs)]
        prompt_ids = pad_left(tokenize(tokenizer, prompts))
        completions = [tokenizer(row["completion"], add_special_tokens=False)["input_ids"] for row in rows]
        completion_ids = pad_left([ids[::-1] for ids in completions]).flip(1)  # padded on the right
        tensors = {
            "prompt_ids": prompt_ids.clamp(min=0),
            "prompt_mask": (prompt_ids >= 0).long(),
            "completion_ids": completion_ids.clamp(min=0),
            "completion_mask": (completion_ids >= 0).long(),
            "prefix_ids": describe(configs, draws),
        }
        return {name: tensor.to(self.args.device) for name, tensor in tensors.items()}

    def _reworded(self) -> PCMEnsembleConfig:
        """The config, as it is or, half of the time, with one of each expert's wordings."""
        if all(len(ids) == 1 for ids in self.wordings) or self._generator.random() < 0.5:
            return self.ensemble.config
        return _worded(self.ensemble.config, [self._generator.choice(ids) for ids in self.wordings])

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """The cross-entropy of α, if all experts ran, from what it was under weights, in nats a token."""
        targets, shares, mask = inputs["targets"], inputs["shares"], inputs["completion_mask"]
        texts = {name: tensor for name, tensor in inputs.items() if name not in ("targets", "shares")}
        expert_weight_logits = completion_weight_logits(model, **texts)
        loss = (expert_weight_cross_entropy(expert_weight_logits, targets) * mask).sum() / mask.sum()
        share = log_described_share(expert_weight_logits.detach(), shares > 0).exp()
        self._note({"described_share": ((share * mask).sum() / mask.sum()).item()})
        return (loss, expert_weight_logits) if return_outputs else loss


def _check_paraphrases(paraphrases: Mapping, names: list[str]):
    if unknown := set(paraphrases) - set(names):
        raise ValueError(f"`paraphrases` names {', '.join(sorted(unknown))}, but the experts are {', '.join(names)}.")
    for name, texts in paraphrases.items():
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise TypeError(f"`paraphrases` of {name!r} must be a list of texts, none of them empty, got {texts!r}.")


def _worded(config: PCMEnsembleConfig, description_ids: list[list[int]]) -> PCMEnsembleConfig:
    """A config with other wordings of its descriptions."""
    config = copy.copy(config)
    config.experts = [expert | {"description_ids": ids} for expert, ids in zip(config.experts, description_ids)]
    return config


def _check_texts(dataset, config: PCMEnsembleConfig, tokenizer: PreTrainedTokenizerBase):
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in dataset["completion"]]
    if 0 in lengths:
        raise ValueError(f"Row {lengths.index(0)} of `train_dataset` has an empty completion: nothing to weight for.")
    check_lengths(dataset, "train_dataset", config, tokenizer, lengths, in_words=True)
