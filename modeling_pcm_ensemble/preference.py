"""What a user may ask for, in any form, as one `Preference` for each row."""

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Real
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from .call_arguments import NUMBERS, check_tensor, has_class
from .configuration_pcm_ensemble import PCMEnsembleConfig

MOST_STRENGTH = 100  # of an expert whose tilt is added; far beyond any text, and far from what float16 cannot hold


@dataclass(frozen=True)
class Preference:
    r"""
    What one row asks for. The same object goes from `generate` to the cache, to training and to evaluation.

    Args:
        weights (`Mapping[str, float]`): the weights of the experts that run, none of them 0. In a mixture they are
            above 0; where tilts add up, one below 0 steers away from its expert.
        description_ids (`tuple[int, ...]`, *optional*):
            Tokens that the PCM reads first, in place of the descriptions of the experts that run. None leaves it
            those.

    Example:

    ```python
    >>> from modeling_pcm_ensemble import Preference

    >>> Preference.parse(["concise", "friendly"], names=["elementary", "concise", "friendly"]).label
    'concise + friendly'
    >>> Preference.parse([0, 2, 0.5], names=["elementary", "concise", "friendly"]).label
    'concise=2 + friendly=0.5'

    ```
    """

    weights: Mapping[str, float] = field(hash=False)
    description_ids: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.description_ids is not None:
            object.__setattr__(self, "description_ids", _as_tokens(self.description_ids))

    @property
    def label(self) -> str:
        """How it is printed: `concise + friendly`, or `concise=2 + friendly=0.5` where weights differ from 1."""
        if not self.weights:
            return "nothing"
        equal = set(self.weights.values()) == {1.0}
        return " + ".join(name if equal else f"{name}={weight:g}" for name, weight in self.weights.items())

    @classmethod
    def parse(cls, preference, names: list[str], adds_up: bool = False) -> "Preference":
        """
        Read one row's preference.

        Args:
            preference: in any form of [`preference_weights`] but one entry for each row, or a `Preference`.
            names (`list[str]`): the ensemble's experts.
            adds_up (`bool`): as for [`preference_weights`].

        Raises:
            TypeError, ValueError: as [`preference_weights`].
        """
        if has_class(preference, "Preference"):
            return cls(_named(_row_of(preference.weights, names, adds_up), names), preference.description_ids)
        return cls(_named(_row_of(preference, names, adds_up), names))

    @classmethod
    def parse_batch(
        cls,
        config: PCMEnsembleConfig,
        batch_size: int,
        preference=None,
        preference_text: str | Sequence[str | None] | None = None,
        preference_ids: torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> list["Preference"]:
        r"""
        Read what a call says, for each of its rows.

        Args:
            config (`PCMEnsembleConfig`): the ensemble's.
            batch_size (`int`): number of rows.
            preference (*optional*):
                Weights in any form of [`preference_weights`], a `Preference`, or a list of one for each row. None is
                `config.default_preference`, or every expert but the reference at weight 1 where there is none or the
                PCM is given another description below.
            preference_text (`str` or `list[str | None]`, *optional*): replaces the descriptions of the experts that
                run, for all rows or one for each; None leaves a row its own.
            preference_ids (`torch.LongTensor` of shape `(tokens,)` or `(batch, tokens)`, *optional*): the same as
                tokens; negative numbers, and `config.pad_token_id` at the ends, are padding.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): reads `preference_text`.

        Returns:
            `list[Preference]`, one for each row.

        Raises:
            TypeError, ValueError: as [`preference_weights`], or if the reference of a product has a weight, text and
                tokens are both given, do not fit the batch, or there is no tokenizer for the text.
        """
        told = _told(config, batch_size, preference, preference_text, preference_ids, tokenizer)
        names, adds_up = config.expert_names, config.adds_up
        wanted = config.weighted_names if preference is None else preference
        weights = preference_weights(wanted, names, batch_size, adds_up)

        default = None if preference is not None else config.default_preference
        if default is not None:
            # Who tells the PCM something else lets it choose among all experts.
            untold = torch.tensor([description_ids is None for description_ids in told])
            by_default = preference_weights(default, names, batch_size, adds_up)
            weights = torch.where(untold[:, None], by_default, weights)
        check_reference(config, weights)
        return [cls(_named(row, names), description_ids) for row, description_ids in zip(weights.tolist(), told)]


def preference_weights(preference, names: list[str], batch_size: int, adds_up: bool = False) -> torch.Tensor:
    r"""
    Turn a preference in any accepted form into one weight for each row and expert.

    Args:
        preference (`str`, `Mapping[str, float]`, `Preference`, `list` or `torch.Tensor`):
            One expert's name; a mapping name → weight; a [`Preference`]; a list of names (these experts, for every
            row); N numbers, a tensor `(N,)` or a list, in the order of `names`; or one entry for each row of the
            batch: a list of mappings, of `Preference`s or of lists (of names or of N numbers), or a tensor `(B, N)`.
        names (`list[str]`): the ensemble's N experts.
        batch_size (`int`): B, the number of rows.
        adds_up (`bool`): whether weights are strengths of tilts that add up, and not shares of a mixture
            (`config.adds_up`).

    Returns:
        `torch.FloatTensor` of shape `(batch, experts)`: shares >= 0 with at least one above 0 in each row; or
        strengths between -100 and 100, whose rows may be all 0, which is the reference.

    Raises:
        TypeError: if `preference`, or a part of it, is of a kind not listed above.
        ValueError: if a name is unknown or repeated, a weight is NaN, infinite, too small for float32 or not as above,
            or the number of rows or weights does not fit.
    """
    if isinstance(preference, torch.Tensor):
        check_tensor("preference", preference, "weights", NUMBERS)
        weights = preference.detach().cpu().double()
    elif _is_rows(preference):
        weights = torch.stack([_row_weights(row, names) for row in preference])
    else:
        weights = _row_weights(preference, names)

    if weights.dim() not in (1, 2):
        raise ValueError(
            f"`preference` has the shape {tuple(weights.shape)}. Pass a tensor of shape ({len(names)},) or "
            f"({batch_size}, {len(names)})."
        )
    _check_width(weights.shape[-1], names)
    if weights.dim() == 1:
        weights = weights.expand(batch_size, -1)
    if weights.shape[0] != batch_size:
        raise ValueError(
            f"`preference` has {weights.shape[0]} rows, but the batch has {batch_size}. Pass one entry for each row, "
            "or one preference for all of them. (A pipeline gives all entries to each of its batches. There, let "
            "`batch_size` be the number of prompts.)"
        )
    return _single_precision(weights, names, adds_up)


def check_config(config: PCMEnsembleConfig):
    """Refuse values that were set after the configuration was made, and a default preference of no use."""
    try:
        config.validate()
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error

    if config.default_preference is None:
        return
    try:
        with torch.device("cpu"):  # a model that is loaded is made on the meta device
            weights = preference_weights(config.default_preference, config.expert_names, 1, config.adds_up)
            check_reference(config, weights)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`default_preference` of the configuration cannot be used: {error}") from error


def check_reference(config: PCMEnsembleConfig, weights: torch.Tensor):
    """
    Refuse weights, `(batch, experts)`, of what a product measures tilts against.

    Raises:
        ValueError: if a row has one.
    """
    index = config.reference_index
    if index is not None and weights[:, index].any():
        raise ValueError(
            f"`preference` gives {config.reference!r} a weight, which is the `reference` that the others' tilts are "
            f"added to. Weights go to {', '.join(config.weighted_names)}."
        )


def _is_rows(preference) -> bool:
    if not isinstance(preference, (list, tuple)):
        return False
    kinds = {_kind(entry) for entry in preference}
    if len(kinds) != 1 or None in kinds:
        raise TypeError(
            "A list as `preference` must hold entries of one kind: names, numbers, mappings or lists; got "
            f"{sorted({type(entry).__name__ for entry in preference}) or 'an empty list'}."
        )
    return kinds <= {"mapping", "list", "Preference"}


def _kind(entry) -> str | None:
    if has_class(entry, "Preference"):
        return "Preference"
    kinds: dict[str, Any] = {"name": str, "number": Real, "mapping": Mapping, "list": (list, tuple)}
    return next((kind for kind, types in kinds.items() if isinstance(entry, types)), None)


def _row_weights(preference, names: list[str]) -> torch.Tensor:
    """Weights `(experts,)` of one row's preference."""
    if has_class(preference, "Preference"):
        preference = preference.weights
    if isinstance(preference, str):
        preference = {preference: 1.0}
    elif isinstance(preference, (list, tuple)) and not _is_rows(preference):
        if isinstance(preference[0], Real):
            _check_width(len(preference), names)
            return torch.tensor([_as_float(weight) for weight in preference], dtype=torch.float64)
        repeated = [name for name, count in Counter(preference).items() if count > 1]
        if repeated:
            raise ValueError(
                f"`preference` names {', '.join(map(repr, repeated))} more than once. Give weights to say how much: "
                f"{{{repeated[0]!r}: 2.0, …}}."
            )
        preference = dict.fromkeys(preference, 1.0)

    if not isinstance(preference, Mapping):
        raise TypeError(
            "`preference` must be an expert's name, a mapping from names to weights, a list of names, a list with one "
            f"mapping or list for each row, or a tensor; got {type(preference).__name__}."
        )

    weights = [0.0] * len(names)
    for name, weight in preference.items():
        if not isinstance(weight, Real):
            raise TypeError(
                f"In `preference` the weight of expert {name!r} must be a number, got {type(weight).__name__}."
            )
        weights[_expert_index(name, names)] = _as_float(weight)
    return torch.tensor(weights, dtype=torch.float64)


def _as_float(weight: Any) -> float:
    """The weight, infinite where a float would not hold it, which is refused later."""
    try:
        return float(weight)
    except OverflowError:
        return math.inf if weight > 0 else -math.inf


def _expert_index(name: str, names: list[str]) -> int:
    if name in names:
        return names.index(name)
    nearest = get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    raise ValueError(f"`preference` names the unknown expert {name!r}.{hint} The experts are {', '.join(names)}.")


def _check_width(num_weights: int, names: list[str]):
    if num_weights != len(names):
        raise ValueError(
            f"`preference` has {num_weights} weights, but the ensemble has {len(names)} experts ({', '.join(names)}). "
            "Pass one weight per expert."
        )


def _single_precision(weights: torch.Tensor, names: list[str], adds_up: bool) -> torch.Tensor:
    """Weights `(batch, experts)` of float64 as float32, in which none may vanish."""
    single = weights.float()
    wrong = ~(single.abs() <= MOST_STRENGTH) if adds_up else ~torch.isfinite(single) | (weights < 0)
    if wrong.any():
        row, expert = wrong.nonzero()[0].tolist()
        accepted = "finite numbers of at least 0"
        if adds_up:
            accepted = f"between -{MOST_STRENGTH} and {MOST_STRENGTH}; 1 is an expert's full tilt"
        elif weights[row, expert] < 0:
            accepted += ' (under `merge="product"` and `"adapters"` one below 0 steers away from an expert)'
        raise ValueError(
            f"`preference` gives expert {names[expert]!r} the weight {single[row, expert].item()} in row {row}. "
            f"Weights must be {accepted}."
        )

    smallest = torch.finfo(torch.float32).tiny
    vanishing = (weights != 0) & (single.abs() < smallest)
    if vanishing.any():
        row, expert = vanishing.nonzero()[0].tolist()
        raise ValueError(
            f"`preference` gives expert {names[expert]!r} the weight {weights[row, expert].item()} in row {row}. "
            f"Weights that are not 0 must be at least {smallest:.3g}, what float32 holds. Scale them all, or leave "
            "the expert out."
        )
    if adds_up:
        return single

    empty = ~(weights > 0).any(dim=-1)
    if empty.any():
        raise ValueError(
            f"`preference` leaves row {empty.nonzero()[0].item()} without an expert: all its weights are 0. Give at "
            "least one expert a weight above 0."
        )
    return single


def encode_description(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a preference's description, which ends in a line break so that descriptions can be joined."""
    return tokenizer(text.strip() + "\n", add_special_tokens=False)["input_ids"]


def description_of(config: PCMEnsembleConfig, preference: Preference) -> tuple[int, ...]:
    """
    What the PCM reads first: the preference's own words, or the descriptions of the experts that run, joined; nothing
    where all experts are wanted alike. An expert to steer away from is described too: the sign stays the weight's, and
    a PCM that was not told of the expert would leave it out.
    """
    if preference.description_ids is not None:
        return preference.description_ids
    weights = [preference.weights.get(name, 0.0) for name in config.weighted_names]
    if len(set(weights)) == 1:
        return ()

    # Sorted, so that the order in which the experts are listed does not matter.
    of_names = preference.weights
    described = sorted(e["description_ids"] for e in config.experts if of_names.get(e["name"], 0.0) != 0)
    return _after_bos(config, [token for ids in described for token in ids])


def _as_tokens(ids) -> tuple[int, ...]:
    try:
        return tuple(operator.index(token) for token in ids)
    except TypeError as error:
        raise TypeError(f"`description_ids` must be token ids, whole numbers, got {ids!r}.") from error


def _named(weights: list[float], names: list[str]) -> dict[str, float]:
    return {name: weight for name, weight in zip(names, weights) if weight != 0}


def _row_of(preference, names: list[str], adds_up: bool) -> list[float]:
    if isinstance(preference, torch.Tensor) and preference.dim() != 1:
        raise ValueError(f"`preference` has the shape {tuple(preference.shape)}. Pass ({len(names)},), one row's.")
    return preference_weights(preference, names, 1, adds_up)[0].tolist()


def _told(
    config: PCMEnsembleConfig, batch_size: int, preference, preference_text, preference_ids, tokenizer
) -> list[tuple[int, ...] | None]:
    """Each row's own words for the PCM, as tokens; None where it is told nothing of its own."""
    given = [preference] * batch_size if has_class(preference, "Preference") else preference
    entries = given if isinstance(given, (list, tuple)) else ()
    held = [entry.description_ids if has_class(entry, "Preference") else None for entry in entries]
    ways = {
        "`preference_text`": preference_text is not None,
        "`preference_ids`": preference_ids is not None,
        "the `description_ids` of `preference`": any(ids is not None for ids in held),
    }
    if len(names := [name for name, is_given in ways.items() if is_given]) > 1:
        raise ValueError(f"{' and '.join(names)} say the same thing. Pass one of them.")

    if preference_text is not None:
        return _text_descriptions(config, preference_text, batch_size, tokenizer)
    if preference_ids is not None:
        return _given_descriptions(config, preference_ids, batch_size)
    for ids in filter(None, held):
        _check_tokens(config, "description_ids", min(ids), max(ids))
    return held if len(held) == batch_size else [None] * batch_size


def _text_descriptions(config: PCMEnsembleConfig, text, batch_size: int, tokenizer) -> list[tuple[int, ...] | None]:
    texts = [text] * batch_size if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not all(isinstance(entry, str | None) for entry in texts):
        raise TypeError(f"`preference_text` must be a string or one string for each row, got {text!r}.")

    if len(texts) != batch_size:
        raise ValueError(
            f"`preference_text` has {len(texts)} entries, but the batch has {batch_size} rows. Pass one for each "
            "row, or one text for all of them. (A pipeline gives all entries to each of its batches. There, let "
            "`batch_size` be the number of prompts.)"
        )

    if tokenizer is None:
        raise ValueError(
            "`preference_text` needs a tokenizer, and this ensemble was built and saved without one. Pass "
            "`tokenizer=`, or `preference_ids` in its place."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`tokenizer` must be a tokenizer of transformers, got {type(tokenizer).__name__}.")
    return [None if entry is None else _after_bos(config, _read(tokenizer, entry)) for entry in texts]


def _read(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        return encode_description(tokenizer, text)
    except (TypeError, UnicodeError) as error:  # half a surrogate pair, say, is a string and no text
        raise ValueError(f"`preference_text` holds {text!r}, which the tokenizer cannot read: {error}") from error


def _after_bos(config: PCMEnsembleConfig, ids: Sequence[int]) -> tuple[int, ...]:
    if not ids or config.prefix_bos_token_id is None:
        return tuple(ids)
    return (config.prefix_bos_token_id, *ids)


def _given_descriptions(config: PCMEnsembleConfig, ids: torch.Tensor, batch_size: int) -> list[tuple[int, ...] | None]:
    check_tensor("preference_ids", ids, "token ids")
    if ids.dim() not in (1, 2) or (ids.dim() == 2 and len(ids) != batch_size):
        raise ValueError(
            f"`preference_ids` has the shape {tuple(ids.shape)}. Pass (tokens,) or ({batch_size}, tokens)."
        )
    if ids.numel():
        _check_tokens(config, "preference_ids", 0, int(ids.max()))

    ids = ids.cpu().long().expand(batch_size, -1)
    padding = ((ids < 0) | (ids == config.pad_token_id)).long()
    at_ends = padding.cumprod(dim=1) + padding.flip(1).cumprod(dim=1).flip(1) > 0
    kept = (ids >= 0) & ~at_ends  # (batch, tokens)
    return [tuple(row[mask].tolist()) for row, mask in zip(ids, kept)]


def _check_tokens(config: PCMEnsembleConfig, name: str, lowest: int, highest: int):
    if lowest < 0 or highest >= config.pcm.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"`{name}` holds {wrong}, but the PCM has {config.pcm.vocab_size} tokens.")


__all__ = ["Preference", "check_config", "description_of", "encode_description", "preference_weights"]
