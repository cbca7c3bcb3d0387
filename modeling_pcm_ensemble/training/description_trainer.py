"""Teaches a Preference Control Model what descriptions ask for."""

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments

from ..configuration_pcm_ensemble import PCMEnsembleConfig
from ..merging import log_expert_weights
from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..preference import encode_description
from ..rows import stack_padded
from .checks import check_columns, check_ensemble, check_lengths
from .losses import expert_weight_cross_entropy, log_described_share
from .pcm_trainer import PCMTrainer, padding_tokenizer
from .preference_sampling import PreferenceSampler, ToldPreference, default_preference_sets, reward_shares
from .prompts import descriptions, tokenize, with_words
from .rollouts import completion_weight_logits


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
        args (`DescriptionConfig`, *optional*): settings.
        train_dataset (`Dataset`): with columns `prompt`, texts or conversations, and `completion`, texts.
        eval_dataset (`Dataset`, *optional*): likewise; each row is told one preference, the same at each evaluation.
        processing_class (`PreTrainedTokenizerBase`, *optional*): defaults to the ensemble's tokenizer.
        callbacks, optimizers: as for [`~transformers.Trainer`].
        preference_sets (`list`, *optional*): preferences that are described; defaults to every combination of at most
            one expert for each dimension. All experts at weight 1 are always among them.
        paraphrases (`Mapping`, *optional*): an expert's name → other wordings of its description, so that the PCM
            learns what is meant and not how it is put. Half of the rows are told in the descriptions, which it reads
            under weights too; in the other half, each description is drawn from it and its paraphrases.

    What is logged stands in docs/metrics.md of the repository.

    Raises:
        TypeError, ValueError: on a model that is no ensemble, experts without `dimension` where no sets are given,
            paraphrases of no expert, or a dataset without these columns, with an empty completion or a text that the
            models have no room for.
    """

    def __init__(
        self,
        model: PCMEnsembleForCausalLM,
        args: DescriptionConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks=None,
        optimizers=(None, None),
        *,
        preference_sets: list | None = None,
        paraphrases: Mapping[str, list[str]] | None = None,
    ):
        args = args or DescriptionConfig(output_dir="descriptions")
        check_ensemble(model)
        tokenizer = padding_tokenizer(model, processing_class)
        sets = default_preference_sets(model.config, whole=False) if preference_sets is None else preference_sets
        self.preferences = PreferenceSampler(model.config, [*sets, model.config.expert_names], text_only_fraction=1.0)

        paraphrases = paraphrases or {}
        _check_paraphrases(paraphrases, model.config.expert_names)
        self.wordings: list[list[list[int]]] = []  # of each expert, as tokens
        for expert in model.config.experts or []:
            others = [encode_description(tokenizer, text) for text in paraphrases.get(expert["name"], ())]
            self.wordings.append([expert["description_ids"], *others])

        longest = _worded(model.config, [max(wordings, key=len) for wordings in self.wordings])
        for dataset, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset")):
            if dataset is not None:
                _check_texts(dataset, name, longest, tokenizer)

        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=_described_share,
        )
        self._tokenizer = tokenizer
        self._before = copy.deepcopy(model.pcm).eval()
        self._generator = random.Random(args.seed + 7919 * args.process_index)

    # What a row is told, and what α should be then

    def _prepare_inputs(self, inputs) -> dict[str, torch.Tensor]:
        """Tell each of a batch's rows a preference."""
        return self._told(inputs, [self._generator] * len(inputs))

    def _told(self, rows: list[dict], generators: list[random.Random]) -> dict[str, torch.Tensor]:
        """
        Draw each row's preference, and how it is worded.

        Returns:
            `dict`: what [`completion_weight_logits`] takes; `targets`, `(rows, seq, experts)`, the weights that are
            wanted; and `shares`, `(rows, experts)`, the weights of the preference.
        """
        told = [self.preferences.draw(generator) for generator in generators]
        shares = reward_shares(told, self.preferences.names).to(self.args.device)

        by_weights = [replace(wish, way="weights") for wish in told]
        with torch.no_grad(), self.compute_loss_context_manager():
            texts = self._tensors(rows, by_weights, [self.ensemble.config] * len(rows))
            before = completion_weight_logits(self._before, **texts)
        targets = log_expert_weights(before, shares.log()).exp()

        reworded = self._tensors(rows, told, [self._reworded(generator) for generator in generators])
        return reworded | {"targets": targets, "shares": shares}

    def _tensors(
        self, rows: list[dict], told: list[ToldPreference], configs: list[PCMEnsembleConfig]
    ) -> dict[str, torch.Tensor]:
        """Return what [`completion_weight_logits`] takes; each row has its descriptions from its own config."""
        tokenizer = self._tokenizer
        prompts = [
            with_words(row["prompt"], wish, config, tokenizer) for row, wish, config in zip(rows, told, configs)
        ]
        prompt_ids, prompt_mask = stack_padded(tokenize(tokenizer, prompts))  # (rows, prompt tokens)
        completions = [tokenizer(row["completion"], add_special_tokens=False)["input_ids"] for row in rows]
        completion_ids, completion_mask = stack_padded(completions, padding_side="right")  # (rows, seq)

        tensors = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "prefix_ids": descriptions(configs, told),
        }
        return {name: tensor.to(self.args.device) for name, tensor in tensors.items()}

    def _reworded(self, generator: random.Random) -> PCMEnsembleConfig:
        """Return the config, as it is or, half of the time, with one of each expert's wordings."""
        if all(len(wordings) == 1 for wordings in self.wordings) or generator.random() < 0.5:
            return self.ensemble.config
        return _worded(self.ensemble.config, [generator.choice(wordings) for wordings in self.wordings])

    # Losses

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """
        Return the cross-entropy of α, if all experts ran, from what it was under weights, in nats a token; and, with
        `return_outputs`, the share of α that the described experts have at each token, `(rows, seq)`.
        """
        texts = {name: tensor for name, tensor in inputs.items() if name not in ("targets", "shares")}
        expert_weight_logits = completion_weight_logits(model, **texts)  # (rows, seq, experts)
        mask = inputs["completion_mask"]
        loss = (expert_weight_cross_entropy(expert_weight_logits, inputs["targets"]) * mask).sum() / mask.sum()

        share = log_described_share(expert_weight_logits.detach(), inputs["shares"] > 0).exp()
        if model.training:
            self._note({"described_share": ((share * mask).sum() / mask.sum()).item()})
        return (loss, share) if return_outputs else loss

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Return the loss on `eval_dataset`, and the described share, as any trainer returns its metrics."""
        with self._training_metrics_held():
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """Return a batch's loss, each row's mean described share, and its number of tokens."""
        # A row's own generator: it is told the same whatever was drawn before, and on whichever process.
        generators = [random.Random(f"{self.args.seed} {row}") for row in inputs]
        with torch.no_grad(), self.compute_loss_context_manager():
            told = self._told(inputs, generators)
            loss, share = self.compute_loss(model, told, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None

        tokens = told["completion_mask"].sum(dim=1)  # (rows,)
        return loss, (share * told["completion_mask"]).sum(dim=1) / tokens, tokens


def _described_share(prediction: EvalPrediction) -> dict[str, float]:
    """Return the mean over all tokens, from means of rows and their numbers of tokens."""
    shares, tokens = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    return {"described_share": float((shares * tokens).sum() / tokens.sum())}


def _check_paraphrases(paraphrases: Mapping, names: list[str]):
    if unknown := set(paraphrases) - set(names):
        raise ValueError(f"`paraphrases` names {', '.join(sorted(unknown))}, but the experts are {', '.join(names)}.")
    for name, texts in paraphrases.items():
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise TypeError(f"`paraphrases` of {name!r} must be a list of texts, none of them empty, got {texts!r}.")


def _worded(config: PCMEnsembleConfig, description_ids: list[list[int]]) -> PCMEnsembleConfig:
    """Return a config with other wordings of its descriptions."""
    config = copy.copy(config)
    config.experts = [expert | {"description_ids": ids} for expert, ids in zip(config.experts or [], description_ids)]
    return config


def _check_texts(dataset, name: str, config: PCMEnsembleConfig, tokenizer: PreTrainedTokenizerBase):
    check_columns(dataset, name, "prompt", "completion")
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in dataset["completion"]]
    if 0 in lengths:
        raise ValueError(f"Row {lengths.index(0)} of `{name}` has an empty completion: nothing to weight for.")
    check_lengths(dataset, name, config, tokenizer, lengths, in_words=True)
