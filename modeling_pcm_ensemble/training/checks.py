"""What cannot be trained, found before anything runs."""

from transformers import PreTrainedTokenizerBase

from ..call_arguments import has_class
from ..configuration_pcm_ensemble import PCMEnsembleConfig
from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from .preference_sampling import DrawnPreference, PreferenceSampler
from .rebel_config import RebelConfig
from .rollouts import tokenize, with_words


def check_model(model, args: RebelConfig):
    """Refuse what is no ensemble, or mixes otherwise than REBEL trains."""
    if not has_class(model, "PCMEnsembleForCausalLM"):
        raise TypeError(f"`model` must be a PCMEnsembleForCausalLM, got {type(model).__name__}.")
    if not isinstance(args, RebelConfig):
        raise TypeError(f"`args` must be a RebelConfig, got {type(args).__name__}.")
    if model.config.merge != "probabilities":
        raise ValueError(
            f'REBEL trains mixtures of probabilities, but the ensemble has `merge="{model.config.merge}"`.'
        )
    if not 0 <= args.reference_backbone < len(model.backbones):
        raise ValueError(
            f"`reference_backbone` is {args.reference_backbone}, but there are {len(model.backbones)} backbones."
        )
    dropout = {k: v for k, v in model.config.pcm.to_dict().items() if "dropout" in k or "pdrop" in k}
    if args.gradient_checkpointing and any(dropout.values()):
        raise ValueError(
            "Activation checkpointing would turn the PCM's dropout on, and REBEL's first log-ratio is of two equal "
            f"passes. Build the PCM without dropout, got {dropout}."
        )


def check_columns(dataset, name: str, *columns: str):
    """Refuse what is no dataset, is empty, or lacks columns."""
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


def check_dataset(
    dataset,
    name: str,
    model: PCMEnsembleForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    preferences: PreferenceSampler,
    rewards: set[str],
    args: RebelConfig,
):
    """Refuse a dataset without prompts, with preferences that have no reward, or with prompts that do not fit."""
    check_columns(dataset, name, "prompt")
    draws = list(preferences.sets)
    given = dataset["preference"] if "preference" in dataset.column_names else [None]
    if not draws and None in list(given):
        raise ValueError("`preference_sets` is empty. Pass at least one preference.")
    for row, preference in enumerate(given):
        try:
            draws += [preferences.preference(preference)] if preference is not None else []
        except (TypeError, ValueError) as error:
            raise ValueError(f"Row {row} of `{name}`: {error}") from error
    wanted = {expert for draw in draws for expert, w in zip(preferences.names, draw.weights) if w > 0}
    if missing := sorted(wanted - rewards):
        raise ValueError(f"`reward_funcs` lacks a reward for {', '.join(missing)}, which preferences ask for.")
    for row, reference in enumerate(dataset["reference"] if "reference" in dataset.column_names else ()):
        texts = reference if isinstance(reference, list) else [reference]
        if reference is not None and (not texts or not all(isinstance(text, str) for text in texts)):
            raise ValueError(
                f"Row {row} of `{name}`: `reference` must be a text or a list of texts, got {reference!r}."
            )
    completions = [args.max_completion_length] * len(dataset)
    check_lengths(dataset, name, model.config, tokenizer, completions, args.text_only_fraction > 0)


def check_lengths(
    dataset,
    name: str,
    config: PCMEnsembleConfig,
    tokenizer: PreTrainedTokenizerBase,
    completions: list[int],
    in_words: bool,
):
    """Refuse prompts that are none, or leave a model's context with so many tokens of completion and all words."""
    room = min(
        getattr(part.get_text_config(), "max_position_embeddings", None) or 10**9
        for part in config.sub_config_items().values()
    )
    experts = config.experts
    prefix = sum(len(e["description_ids"]) for e in experts) + max(len(e["prompt_ids"]) for e in experts)
    words = DrawnPreference("", (1.0,) * len(experts), "system" if in_words else None)
    for row, (prompt, completion) in enumerate(zip(dataset["prompt"], completions)):
        if not isinstance(prompt, (str, list)) or not prompt:
            raise ValueError(f"Row {row} of `{name}`: `prompt` must be a text or a conversation, got {prompt!r}.")
        length = len(tokenize(tokenizer, [with_words(prompt, words, config, tokenizer)])[0])
        if length + prefix + completion > room:
            raise ValueError(
                f"Row {row} of `{name}` has a prompt of {length} tokens. With {completion} tokens of completion and "
                f"up to {prefix} of prefixes it exceeds the models' context of {room} tokens."
            )
