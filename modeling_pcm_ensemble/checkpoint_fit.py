"""Whether models can be parts of one ensemble: they run as rows, and share a vocabulary and a dtype, but no tensor."""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint_structure import check_nothing_shared
from .configuration_pcm_ensemble import PCMEnsembleConfig
from .memory import Memory
from .rows import Rows
from .submodel import Submodel

# Differences between two orders of summation, by the logits' spread: in 16 bits they are near 0.01 of it.
TOLERANCE, TOLERANCE_16_BITS = 0.005, 0.1


def check_fit(
    backbones: Sequence[PreTrainedModel],
    labels: Sequence[str],
    pcm_body: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
):
    """
    Check that models go together.

    Args:
        backbones (`Sequence[PreTrainedModel]`): the experts'.
        labels (`Sequence[str]`): what to call each of them in errors.
        pcm_body (`PreTrainedModel`): the PCM's.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): which all of them must know the tokens of.

    Raises:
        ValueError: if a vocabulary is too small, dtypes differ, or two backbones share a tensor in memory.
    """
    models, all_labels = [*backbones, pcm_body], [*labels, "the PCM"]
    _check_sizes(models, all_labels, tokenizer)
    _check_dtypes(models, all_labels)
    check_nothing_shared(backbones, labels)


def check_same_vocabulary(
    label: str,
    tokenizer: PreTrainedTokenizerBase,
    other_label: str,
    other: PreTrainedTokenizerBase,
    may_differ_in_size: bool,
):
    """
    Check that two tokenizers mean the same by each token.

    Args:
        label, other_label (`str`): what to call the two in errors.
        may_differ_in_size (`bool`): whether one may lack tokens of the other. Such were added, for training for
            instance, and who passes a tokenizer has chosen.

    Raises:
        ValueError: naming a token that they read differently.
    """
    tokens, other_tokens = ({index: token for token, index in t.get_vocab().items()} for t in (tokenizer, other))
    for index in sorted(tokens | other_tokens):
        token, other_token = tokens.get(index), other_tokens.get(index)
        if token == other_token or (may_differ_in_size and None in (token, other_token)):
            continue

        hint = "Use models with the same tokenizer."
        if None in (token, other_token):
            hint += " If it was added for training, such as a padding token, pass the `tokenizer=` to use."
        raise ValueError(
            f"All parts must share one vocabulary: token {index} is {token!r} in {label}, but {other_token!r} in "
            f"{other_label}. {hint}"
        )


@torch.no_grad()
def check_serves_rows(model: PreTrainedModel, label: str):
    """
    Try the model on two short rows, one of them padded, in two calls with a cache, and compare each row alone.

    This finds models that look ahead, whose state no mask reaches or no second text enters (some recurrent ones), that
    count positions in a way of their own, or that have no cache. No flag of transformers tells all of these.

    Raises:
        ValueError: if the model does not run so, or predicts something else.
    """
    model.eval()
    a, b, c, d = 3, 4, 5, 6
    ids, mask = torch.tensor([[a, b, c, d], [0, b, c, d]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    ids, mask = ids.to(model.device), mask.to(model.device)
    try:
        read = Submodel(PCMEnsembleConfig(), has_lm_head=True)
        memory = Memory(DynamicCache(config=model.config))
        read(model, Rows(ids[:, :2], mask[:, :2]), memory)
        found = read(model, Rows(ids[:, 2:], mask), memory).values[:, -1].float()  # (2, vocab)
        alone = [model(input_ids=row).logits[0].float() for row in (ids[:1], ids[1:, 1:], ids[:1, :3])]
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The model of {label}, a {type(model).__name__}, does not run with a mask, positions and a cache, as "
            f"every expert must ({type(error).__name__}: {error}). Use a causal LM with attention."
        ) from error

    # Each row with the other and a cache, as alone; and a text's third token without the fourth, as with it.
    pairs = [(found[0], alone[0][-1]), (found[1], alone[1][-1]), (alone[2][-1], alone[0][2])]
    tolerance = TOLERANCE if model.dtype in (torch.float32, torch.float64) else TOLERANCE_16_BITS
    if any((one - other).std() > tolerance * other.std() for one, other in pairs):
        raise ValueError(
            f"The model of {label}, a {type(model).__name__}, predicts something else with padding and a cache than "
            "alone, or looks at later tokens. Use a causal LM with attention and ordinary positions."
        )


def _check_dtypes(models: list[PreTrainedModel], labels: list[str]):
    """A checkpoint is loaded in one dtype, so that an ensemble of several would come back as another."""
    if len({model.dtype for model in models}) > 1:
        found = ", ".join(f"{label} {model.dtype}" for label, model in zip(labels, models))
        raise ValueError(f"All parts must have one dtype, got {found}. Pass `dtype=`, or cast loaded models before.")


def _check_sizes(models: list[PreTrainedModel], labels: list[str], tokenizer: PreTrainedTokenizerBase | None):
    """Refuse vocabularies that lack tokens of the tokenizer; without one, vocabularies of different sizes."""
    sizes = [model.config.get_text_config().vocab_size for model in models]
    if tokenizer is None:
        if len(set(sizes)) > 1:
            found = ", ".join(f"{label} {size}" for label, size in zip(labels, sizes))
            raise ValueError(
                f"The models' vocabularies have different sizes ({found}), and there is no tokenizer to tell whether "
                "that is padding. Pass `tokenizer=`."
            )
        return

    for label, size in zip(labels, sizes):
        if size < len(tokenizer):
            raise ValueError(
                f"All parts must share one vocabulary: the tokenizer has {len(tokenizer)} tokens, but the model of "
                f"{label} only {size}. Use models with the same tokenizer. Where tokens were added to it, pass "
                f"`tokenizer=` without them, or load this model, call `resize_token_embeddings({len(tokenizer)})` "
                "and pass it as `model`."
            )


__all__ = ["check_fit", "check_same_vocabulary", "check_serves_rows"]
