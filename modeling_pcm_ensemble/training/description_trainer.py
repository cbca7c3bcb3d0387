"""Teaches a Preference Control Model what descriptions ask for, and how much of it."""

import copy
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments

from ..configuration_pcm_ensemble import PCMEnsembleConfig
from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..preference import Preference, description_of, preference_weights
from ..rows import stack_padded
from ..weighting import joined_weights
from .checkpoints import CheckpointTrainer, digest_of
from .checks import check_columns, check_ensemble, check_lengths, everything
from .losses import expert_strength_cross_entropy, expert_weight_cross_entropy
from .pcm_trainer import padding_tokenizer
from .preference_sampling import WORDS, PreferenceSampler, ToldPreference, default_preference_sets
from .prompts import tokenize, with_words

PLAINLY = 0.3  # of the batches are told descriptions alone, which is how the PCM reads a preference given in weights
NEIGHBOURS = 4  # a batch's wordings are drawn from so many times its rows, of about one length
STRONGEST = 1.98  # that an expert is taught to be: 2σ(h) comes to 2 for no h


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
    save_strategy: str = field(default="no", metadata={"help": '"steps" keeps checkpoints of long runs.'})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The trainer reads text."})


class DescriptionTrainer(CheckpointTrainer):
    r"""
    Teaches a PCM to choose from words, with every expert active at weight 1. Words are told as `preference_text` as
    often as in a system message. What they mean is wanted at each token after them, of prompt and completion: it is
    learnt near the words first. No expert runs and no reward is needed, since what words mean is declared.

    - Where wishes add up (`config.adds_up`), an expert's strength 2σ(h) should be, at each token, what it was under
      weights, times the strength that the words mean; 0 for experts that they do not wish for.
    - In mixtures, α should be what it was under weights that are as the strengths.

    What [`RebelTrainer`] has taught the PCM to do under weights hardly changes; an untrained PCM is taught the
    strengths themselves. Under weights it reads descriptions, without how much each counts. Three of ten
    batches are therefore told in these, whatever other wordings there are.

    Args:
        model (`PCMEnsembleForCausalLM`): the ensemble. Its PCM learns, in float32 if it was in less, but for its token
            embeddings.
        args (`DescriptionConfig`, *optional*): settings.
        train_dataset (`Dataset`): with columns `prompt`, texts or conversations, and `completion`, texts.
        eval_dataset (`Dataset`, *optional*): likewise; each row is told one preference, the same at each evaluation.
        processing_class (`PreTrainedTokenizerBase`, *optional*): defaults to the ensemble's tokenizer.
        callbacks, optimizers: as for [`~transformers.Trainer`].
        preference_sets (`list`, *optional*): preferences that are told in the experts' descriptions; defaults to every
            combination of at most one expert for each dimension. All experts at weight 1 are always among them.
        wordings (`Sequence`, *optional*): other texts, each with what it means: pairs `(text, strengths)`, where
            strengths are by expert: 0 where an expert is denied or left out, 1 where no degree is told. In a mixture
            at least one must be above 0.

    What is logged stands in docs/metrics.md of the repository.

    Raises:
        TypeError, ValueError: on a model that is no ensemble, experts without `dimension` where no sets are given,
            wordings that are no such pairs, or a dataset without these columns, with an empty completion or a text
            that the models have no room for.

    Example:

    ```python
    >>> wordings = [("Be very kind.", {"friendly": 1.5}), ("Keep it short, and not too nice.", {"concise": 1.0})]
    >>> trainer = DescriptionTrainer(model, train_dataset=dataset, wordings=wordings)  # doctest: +SKIP

    ```
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
        wordings: Sequence[tuple[str, Mapping[str, float]]] = (),
    ):
        args = args or DescriptionConfig(output_dir="descriptions")
        check_ensemble(model)
        tokenizer = padding_tokenizer(model, processing_class)
        sets = default_preference_sets(model.config, whole=False) if preference_sets is None else preference_sets
        sets = [*sets, model.config.weighted_names]
        self.preferences = PreferenceSampler(model.config, sets, text_only_fraction=1.0)
        self.wordings = sorted(_as_preferences(wordings, model.config, tokenizer), key=_length)
        for preference in (*(wish.preference for wish in self.preferences.sets), *self.wordings):
            if min(preference.weights.values(), default=0.0) < 0:
                raise ValueError(
                    f"Words cannot mean {preference.label}: they make strengths between 0 and 2, and 0 is what they "
                    "deny. Give weights below 0 as weights."
                )

        for dataset, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset")):
            if dataset is not None:
                _check_texts(dataset, name, model.config, tokenizer, self.wordings)

        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=_means_over_tokens,
        )
        self._tokenizer = tokenizer
        names = model.config.expert_names
        self._weighted = [names.index(name) for name in model.config.weighted_names]  # a reference has no strength
        untrained = not model.pcm.head.weight.any()
        self._before = None if untrained else copy.deepcopy(model.pcm).eval()  # h is 0 where it is untrained
        self._generator = random.Random(args.seed + 7919 * args.process_index)

    # What a checkpoint keeps beside what learns: where the drawing of preferences stands

    def _own_state(self, folder: Path) -> dict[str, Any]:
        return {"generator": self._generator.getstate()}

    def _load_own_state(self, state: dict[str, Any], folder: Path):
        version, numbers, following = state["generator"]
        self._generator.setstate((version, tuple(numbers), following))

    def _run_settings(self) -> dict:
        wordings = [(wording.description_ids, wording.weights) for wording in self.wordings]
        return super()._run_settings() | {
            "wordings": hashlib.sha256(json.dumps(wordings).encode()).hexdigest(),
            "PCM before training": self._before and digest_of(self._before.state_dict()),
        }

    # What a row is told, and what the PCM should do then

    def _prepare_inputs(self, inputs) -> dict[str, torch.Tensor]:
        """Tell each of a batch's rows a preference."""
        return self._told(inputs, self._draw_batch(len(inputs)))

    def _told(self, rows: list[dict], told: list[ToldPreference]) -> dict[str, torch.Tensor]:
        """
        Tell each row a preference.

        Returns:
            `dict`: `texts`, what [`_expert_weight_logits`] takes; `mask`, `(rows, kept)`, the tokens that stand after
            the words; `targets`, `(rows, kept, experts)`, the strengths or, in mixtures, the weights that are wanted;
            and `wanted`, `(rows, experts)`, whether an expert is. Experts are those that have weights.
        """
        by_weights = [ToldPreference(Preference(wish.preference.weights)) for wish in told]
        texts, texts_by_weights = self._texts(rows, told), self._texts(rows, by_weights)

        # Both are padded on the left: what ends alike stands after the words.
        texts["kept"] = min(texts["ids"].shape[1], texts_by_weights["ids"].shape[1])
        ids, ids_by_weights = (some["ids"][:, -texts["kept"] :] for some in (texts, texts_by_weights))
        after_words = (ids == ids_by_weights).flip(1).cumprod(dim=1).flip(1)  # (rows, kept)
        mask = after_words * texts["attention_mask"][:, -texts["kept"] :]

        before = self._logits_before(texts_by_weights | {"kept": texts["kept"]})
        names, adds_up = self.ensemble.config.weighted_names, self.ensemble.config.adds_up
        meant = preference_weights([wish.preference for wish in told], names, len(told), adds_up).to(self.args.device)
        targets = self._opinions(before, meant)
        if adds_up:
            targets = targets.clamp(max=STRONGEST)
        return {"texts": texts, "mask": mask, "targets": targets, "wanted": meant > 0}

    def _logits_before(self, texts: dict[str, Any]) -> torch.Tensor:
        """Compute h, `(rows, kept, experts)`, as it was before training."""
        if self._before is None:
            shape = (len(texts["ids"]), texts["kept"], len(self._weighted))
            return torch.zeros(shape, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self._expert_weight_logits(self._before, **texts)

    def _draw_batch(self, rows: int) -> list[ToldPreference]:
        """
        Draw what a batch is told: descriptions, or wordings of about one length in one way, since texts before a
        prompt and in it would both be padded.
        """
        generator = self._generator
        if self._plainly(generator):
            return [self.preferences.draw(generator) for _ in range(rows)]

        way, neighbours = generator.choice(WORDS), NEIGHBOURS * rows
        start = generator.randrange(len(self.wordings)) // neighbours * neighbours
        drawn = generator.choices(self.wordings[start : start + neighbours], k=rows)
        return [ToldPreference(wording, way) for wording in drawn]

    def _draw(self, generator: random.Random) -> ToldPreference:
        """Draw what a row of an evaluation is told: descriptions, or a wording."""
        if self._plainly(generator):
            return self.preferences.draw(generator)
        return ToldPreference(generator.choice(self.wordings), generator.choice(WORDS))

    def _plainly(self, generator: random.Random) -> bool:
        return not self.wordings or generator.random() < PLAINLY

    def _expert_weight_logits(
        self, pcm, ids: torch.Tensor, attention_mask: torch.Tensor, prefixes: list[tuple[int, ...]], kept: int
    ) -> torch.Tensor:
        """Compute h at the last `kept` tokens, `(rows, kept, experts)`; `pcm` may be wrapped."""
        return pcm(ids, attention_mask, descriptions=prefixes, logits_to_keep=kept)[0][..., self._weighted]

    def _opinions(self, expert_weight_logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the strengths or, in mixtures, α under weights `(rows, experts)`."""
        joined = joined_weights(self.ensemble.config, expert_weight_logits, weights)
        return joined if self.ensemble.config.adds_up else joined.exp()

    def _texts(self, rows: list[dict], told: list[ToldPreference]) -> dict[str, Any]:
        """Return rows of prompt and completion as [`_expert_weight_logits`] takes them, padded on both sides."""
        tokenizer, config = self._tokenizer, self.ensemble.config
        prompts = [with_words(row["prompt"], wish, config, tokenizer) for row, wish in zip(rows, told)]
        prompt_ids, prompt_mask = stack_padded(tokenize(tokenizer, prompts))  # (rows, prompt tokens)
        completions = [tokenizer(row["completion"], add_special_tokens=False)["input_ids"] for row in rows]
        completion_ids, completion_mask = stack_padded(completions, padding_side="right")  # (rows, seq)
        ids, mask = torch.cat([prompt_ids, completion_ids], dim=1), torch.cat([prompt_mask, completion_mask], dim=1)

        prefixes = [() if wish.way == "system" else description_of(config, wish.preference) for wish in told]
        return {"ids": ids.to(self.args.device), "attention_mask": mask.to(self.args.device), "prefixes": prefixes}

    # Losses

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """
        Return the cross-entropy from what is wanted, in nats a token: of α or, where wishes add up, of the strengths;
        and, with `return_outputs`, each row's metrics, `(rows, 2)`: means over its tokens of the share that the wanted
        experts have, and of the absolute difference from what is wanted.
        """
        targets, wanted, mask = inputs["targets"], inputs["wanted"], inputs["mask"]
        expert_weight_logits = self._expert_weight_logits(model, **inputs["texts"])  # (rows, kept, experts)
        cross_entropy = expert_strength_cross_entropy if self.ensemble.config.adds_up else expert_weight_cross_entropy
        loss = (cross_entropy(expert_weight_logits, targets) * mask).sum() / mask.sum()

        opinions = self._opinions(expert_weight_logits.detach(), torch.ones_like(wanted, dtype=torch.float32))
        share = (opinions * wanted[:, None]).sum(dim=-1) / opinions.sum(dim=-1)  # (rows, kept)
        error = (opinions - targets).abs().mean(dim=-1)
        tokens = mask.sum(dim=1)  # (rows,)
        metrics = torch.stack([(metric * mask).sum(dim=1) / tokens for metric in (share, error)], dim=1)

        if model.training:
            self._note(_means_over_tokens(EvalPrediction(metrics.cpu().numpy(), tokens.cpu().numpy())))
        return (loss, metrics) if return_outputs else loss

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Return the loss and the metrics of training on `eval_dataset`, as any trainer returns its metrics."""
        with self._training_metrics_held():
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """Return a batch's loss, each row's metrics, and its number of tokens."""
        # A row's own generator: it is told the same whatever was drawn before, and on whichever process.
        generators = [random.Random(f"{self.args.seed} {row}") for row in inputs]
        with torch.no_grad(), self.compute_loss_context_manager():
            told = self._told(inputs, [self._draw(generator) for generator in generators])
            loss, metrics = self.compute_loss(model, told, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, metrics, told["mask"].sum(dim=1))


def _means_over_tokens(prediction: EvalPrediction) -> dict[str, float]:
    """Return means over all tokens, from means of rows, `(rows, 2)`, and their numbers of tokens, `(rows,)`."""
    metrics, tokens = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    share, error = np.average(metrics, axis=0, weights=tokens)
    return {"described_share": float(share), "error": float(error)}


def _as_preferences(
    wordings: Sequence, config: PCMEnsembleConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Preference]:
    """Read wordings: what is meant, told in these words."""
    preferences = []
    for number, wording in enumerate(wordings):
        if not isinstance(wording, (list, tuple)) or [type(part) for part in wording] != [str, dict]:
            raise TypeError(f"`wordings[{number}]` must be a text and a dict of strengths, got {wording!r}.")

        text, strengths = wording
        if not text.strip():
            raise ValueError(f"`wordings[{number}]` has an empty text.")
        try:
            preferences += Preference.parse_batch(config, 1, strengths, text, tokenizer=tokenizer)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`wordings[{number}]`, {text!r}: {error}") from error
    return preferences


def _length(wording: Preference) -> int:
    return len(wording.description_ids or ())


def _check_texts(
    dataset, name: str, config: PCMEnsembleConfig, tokenizer: PreTrainedTokenizerBase, wordings: list[Preference]
):
    check_columns(dataset, name, "prompt", "completion")
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in dataset["completion"]]
    if 0 in lengths:
        raise ValueError(f"Row {lengths.index(0)} of `{name}` has an empty completion: nothing to weight for.")

    longest = max(wordings, key=_length, default=everything(config))
    for preference in (everything(config), longest):
        check_lengths(dataset, name, config, tokenizer, lengths, ToldPreference(preference, "system"))
