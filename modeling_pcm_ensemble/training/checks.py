"""What cannot be trained, found before anything runs."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..call_arguments import has_class
from ..configuration_pcm_ensemble import ADAPTERS, PCMEnsembleConfig, max_positions
from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..preference import Preference
from ..rewards.scoring import SHARED
from .policies import policy_of
from .preference_sampling import PreferenceSampler, ToldPreference
from .prompts import tokenize, with_words
from .rebel_config import RebelConfig

UNLIMITED = 10**9  # tokens
MOST_RECORDED = 8 * 10**9  # bytes of a rollout


def check_ensemble(model):
    """
    Refuse what is no ensemble.

    Raises:
        TypeError: if it is none.
    """
    if not has_class(model, "PCMEnsembleForCausalLM"):
        raise TypeError(f"`model` must be a PCMEnsembleForCausalLM, got {type(model).__name__}.")


def check_arguments(model: PCMEnsembleForCausalLM, reward_funcs, args):
    """
    Refuse what REBEL cannot train.

    Raises:
        TypeError: if `model` is no ensemble, `reward_funcs` no mapping or `args` no settings.
        ValueError: if the ensemble mixes otherwise than REBEL trains, or does not fit the settings.
    """
    check_ensemble(model)
    if isinstance(reward_funcs, RebelConfig):
        raise TypeError(
            "`reward_funcs` is a RebelConfig. The order is RebelTrainer(model, reward_funcs, args, train_dataset), as "
            "in TRL."
        )
    if not isinstance(reward_funcs, Mapping):
        raise TypeError(f"`reward_funcs` must map the experts' names to rewards, got {type(reward_funcs).__name__}.")
    if not isinstance(args, RebelConfig):
        raise TypeError(f"`args` must be a RebelConfig, got {type(args).__name__}.")
    if SHARED in model.config.expert_names:
        raise ValueError(
            f"An expert is called {SHARED!r}, which is what the shared reward is called in what is logged."
        )
    policy_of(model.config)
    model.config.validate_merge()
    if model.config.merge == ADAPTERS and not args.exploration:
        raise ValueError(
            '`merge="adapters"` is trained on how answers change with the strengths that they are sampled under. Set '
            "`exploration`, say to 0.5, got 0."
        )
    if args.weight_distribution == "signed" and not model.config.adds_up:
        raise ValueError("`weight_distribution` 'signed' draws weights below 0, which a mixture cannot have.")
    if args.weight_distribution == "signed" and args.text_only_fraction:
        raise ValueError(
            "`weight_distribution` 'signed' draws weights below 0, which are not told in words: leave "
            f"`text_only_fraction` at 0, got {args.text_only_fraction}."
        )
    if model.config.adds_up and (args.entropy_coef or args.description_coef):
        raise ValueError(
            "`entropy_coef` and `description_coef` are of shares, which a product has none of. Leave both at 0, got "
            f"{args.entropy_coef} and {args.description_coef}."
        )
    _check_memory(model.config, args)
    if not 0 <= args.reference_backbone < len(model.backbones):
        raise ValueError(
            f"`reference_backbone` is {args.reference_backbone}, but there are {len(model.backbones)} backbones."
        )

    pcm_settings = model.config.sub_config_items()["pcm"].to_dict()
    dropout = {name: rate for name, rate in pcm_settings.items() if "dropout" in name or "pdrop" in name}
    if args.gradient_checkpointing and any(dropout.values()):
        raise ValueError(
            "Activation checkpointing would turn the PCM's dropout on, and REBEL's first log-ratio is of two equal "
            f"passes. Build the PCM without dropout, got {dropout}."
        )


def _check_memory(config: PCMEnsembleConfig, args):
    """Refuse rollouts of products that keep the whole vocabulary of large models."""
    rows = args.per_device_train_batch_size * args.micro_batches_per_iteration
    size = 2 * rows * args.max_completion_length * math.prod(policy_of(config).width)  # bytes, in half precision
    if config.expert_top_k is None and size > MOST_RECORDED:
        raise ValueError(
            f"A rollout would keep {size / 1e9:.0f} GB: every token of the vocabulary at every step. Set "
            "`model.config.expert_top_k`, say to 20."
        )


def check_columns(dataset, name: str, *columns: str):
    """
    Refuse what is no dataset, is empty, or lacks columns.

    Raises:
        TypeError: if it is no dataset.
        ValueError: if it is empty, or lacks columns.
    """
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"`{name}` must be a datasets.Dataset, say `Dataset.from_list(rows)`, got {type(dataset).__name__}."
        )

    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(
            f"`{name}` needs {' and '.join(f'`{column}`' for column in columns)}, lacks {', '.join(missing)}; its "
            f"columns are {', '.join(dataset.column_names)}."
        )
    if not len(dataset):
        raise ValueError(f"`{name}` is empty.")


@dataclass
class DatasetCheck:
    r"""
    Refuses datasets that [`RebelTrainer`] cannot answer or reward.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's, for the room that its models have.
        tokenizer (`PreTrainedTokenizerBase`): counts the tokens of prompts.
        preferences (`PreferenceSampler`): what rows without a preference of their own are answered under.
        rewarded (`Collection[str]`): the experts that have a reward.
        args (`RebelConfig`): how long completions are, and whether preferences are told in words.
    """

    config: PCMEnsembleConfig
    tokenizer: PreTrainedTokenizerBase
    preferences: PreferenceSampler
    rewarded: Collection[str]
    args: RebelConfig

    def __call__(self, dataset, name: str):
        """
        Check a dataset; errors call it `name`.

        Raises:
            TypeError: if it is no dataset.
            ValueError: if it lacks prompts, asks for experts without a reward, has references that are no texts, or
                prompts that do not fit; where one row is at fault, the message says which.
        """
        check_columns(dataset, name, "prompt")
        self._check_preferences(dataset, name)
        self._check_references(dataset, name)
        completions = [self.args.max_completion_length] * len(dataset)
        in_words = self.args.text_only_fraction > 0
        told = ToldPreference(everything(self.config), "system" if in_words else "weights")
        check_lengths(dataset, name, self.config, self.tokenizer, completions, told)

    def _check_preferences(self, dataset, name: str):
        asked = [wish.preference for wish in self.preferences.sets]
        given = column(dataset, "preference")
        if not asked and None in given:
            raise ValueError("`preference_sets` is empty. Pass at least one preference.")
        for row, preference in enumerate(given):
            if preference is None:
                continue
            try:
                asked.append(self.preferences.parse(preference))
            except (TypeError, ValueError) as error:
                raise ValueError(f"Row {row} of `{name}`: {error}") from error

        wanted = {expert for preference in asked for expert in preference.weights}
        if missing := sorted(wanted - set(self.rewarded)):
            raise ValueError(f"`reward_funcs` lacks a reward for {', '.join(missing)}, which preferences ask for.")

    def _check_references(self, dataset, name: str):
        for row, reference in enumerate(column(dataset, "reference")):
            texts = reference if isinstance(reference, list) else [reference]
            if reference is not None and (not texts or not all(isinstance(text, str) for text in texts)):
                raise ValueError(
                    f"Row {row} of `{name}`: `reference` must be a text or a list of texts, got {reference!r}."
                )


def everything(config: PCMEnsembleConfig) -> Preference:
    """Return the preference that wants every expert, whose descriptions are longest."""
    return Preference(dict.fromkeys(config.weighted_names, 1.0))


def check_lengths(
    dataset,
    name: str,
    config: PCMEnsembleConfig,
    tokenizer: PreTrainedTokenizerBase,
    completions: list[int],
    told: ToldPreference,
):
    r"""
    Refuse prompts that are none, or that leave too little of the models' context.

    Args:
        dataset (`Dataset`), name (`str`): what is checked, and what errors call it.
        config (`PCMEnsembleConfig`): the ensemble's.
        tokenizer (`PreTrainedTokenizerBase`): counts the tokens of prompts.
        completions (`list[int]`): tokens of each row's completion.
        told (`ToldPreference`): the longest preference, in the way that takes most room.

    Raises:
        ValueError: with the row.
    """
    limits = [max_positions(part) for part in config.sub_config_items().values()]
    room = min((limit for limit in limits if limit is not None), default=UNLIMITED)
    experts = config.experts or []
    own_words = len(told.preference.description_ids or ())
    descriptions = max(own_words, sum(len(expert["description_ids"]) for expert in experts))
    prefix = descriptions + max(len(expert["prompt_ids"]) for expert in experts)

    for row, (prompt, completion) in enumerate(zip(dataset["prompt"], completions)):
        if not isinstance(prompt, (str, list)) or not prompt:
            raise ValueError(f"Row {row} of `{name}`: `prompt` must be a text or a conversation, got {prompt!r}.")
        length = len(tokenize(tokenizer, [with_words(prompt, told, config, tokenizer)])[0])
        if length + prefix + completion > room:
            raise ValueError(
                f"Row {row} of `{name}` has a prompt of {length} tokens. With {completion} tokens of completion and "
                f"up to {prefix} of prefixes it exceeds the models' context of {room} tokens."
            )


def column(dataset, name: str) -> list:
    """Return a column, or one None where the dataset has none of this name."""
    return list(dataset[name]) if name in getattr(dataset, "column_names", ()) else [None]
