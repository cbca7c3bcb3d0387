"""What a user may say about a preference, turned into log-weights and a route."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Real
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from .call_arguments import NUMBERS, check_tensor
from .configuration_pcm_ensemble import PCMEnsembleConfig
from .prefixes import encode_description, pad_left


def preference_weights(preference, names: list[str], batch_size: int) -> torch.Tensor:
    r"""
    Turn a preference in any accepted form into one weight for each row and expert.

    Args:
        preference (`str`, `Mapping[str, float]`, `list` or `torch.Tensor`):
            One expert's name; a mapping name → weight; a list of names (these experts, for every row); N numbers, a
            tensor `(N,)` or a list, in the order of `names`; or one entry for each row of the batch: a list of
            mappings, a list of lists (of names or of N numbers), or a tensor `(B, N)`.
        names (`list[str]`): the ensemble's N experts.
        batch_size (`int`): B, the number of rows.

    Returns:
        `torch.FloatTensor` of shape `(batch, experts)`: weights >= 0 with at least one above 0 in each row.

    Raises:
        TypeError: if `preference`, or a part of it, is of a kind not listed above.
        ValueError: if a name is unknown or repeated, a weight is negative, NaN, infinite or too small for float32, a
            row has no weight above 0, or the number of rows or weights does not fit.
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
    return _single_precision(weights, names)


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
            preference_weights(config.default_preference, config.expert_names, 1)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`default_preference` of the configuration cannot be used: {error}") from error


def _is_rows(preference) -> bool:
    if not isinstance(preference, (list, tuple)):
        return False
    kinds = {_kind(entry) for entry in preference}
    if len(kinds) != 1 or None in kinds:
        raise TypeError(
            "A list as `preference` must hold entries of one kind: names, numbers, mappings or lists; got "
            f"{sorted({type(entry).__name__ for entry in preference}) or 'an empty list'}."
        )
    return kinds <= {"mapping", "list"}


def _kind(entry) -> str | None:
    kinds = {"name": str, "number": Real, "mapping": Mapping, "list": (list, tuple)}
    return next((kind for kind, types in kinds.items() if isinstance(entry, types)), None)


def _row_weights(preference, names: list[str]) -> torch.Tensor:
    """Weights `(experts,)` of one row's preference."""
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


def _as_float(weight: Real) -> float:
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


def _single_precision(weights: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Weights `(batch, experts)` of float64 as float32, in which none may vanish."""
    single = weights.float()
    wrong = ~torch.isfinite(single) | (weights < 0)
    if wrong.any():
        row, expert = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"`preference` gives expert {names[expert]!r} the weight {single[row, expert].item()} in row {row}. "
            "Weights must be finite numbers of at least 0."
        )

    smallest = torch.finfo(torch.float32).tiny
    vanishing = (weights > 0) & (single < smallest)
    if vanishing.any():
        row, expert = vanishing.nonzero()[0].tolist()
        raise ValueError(
            f"`preference` gives expert {names[expert]!r} the weight {weights[row, expert].item()} in row {row}. "
            f"Weights above 0 must be at least {smallest:.3g}, what float32 holds. Scale them all, or leave the "
            "expert out."
        )

    empty = ~(weights > 0).any(dim=-1)
    if empty.any():
        raise ValueError(
            f"`preference` leaves row {empty.nonzero()[0].item()} without an expert: all its weights are 0. Give at "
            "least one expert a weight above 0."
        )
    return single


class ExpertRows(NamedTuple):
    """The batch rows that one expert runs on."""

    expert: int
    rows: torch.LongTensor | None  # (active rows,), None when all rows of the batch are active
    num_rows: int


@dataclass
class Route:
    r"""
    Which (row, expert) pairs run. Fixed at prefill; kept on the cache.

    A backbone's pairs are its stacked batch rows, expert by expert and in each expert row by row.

    Args:
        weights (`torch.FloatTensor` of shape `(batch, experts)`): the preference's weights.
        backbone_of (`list[int]`): each expert's backbone.
        prefix_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
            What the PCM reads before the context, padded on the left with -1.
        merges_adapters (`bool`):
            Whether a row's experts are mixed as weights, so that each row is one pair of the only backbone.
    """

    weights: torch.Tensor
    backbone_of: list[int]
    prefix_ids: torch.LongTensor | None = None
    merges_adapters: bool = False
    log_weights: torch.Tensor = field(init=False)
    expert_rows: dict[int, list[ExpertRows]] = field(init=False)  # by backbone
    pair_rows: dict[int, torch.LongTensor] = field(init=False)  # by backbone, the row of each pair, (pairs,)
    pair_tables: dict[int, torch.LongTensor] = field(init=False, default_factory=dict)  # see `_pair_of`

    def __post_init__(self):
        self.log_weights = self.weights.log()  # (batch, experts), -inf where excluded
        self.expert_rows = {}
        active = self.weights > 0
        num_active = active.sum(dim=0).tolist()
        for expert, backbone in enumerate(self.backbone_of):
            if num_active[expert]:
                rows = None if num_active[expert] == len(active) else active[:, expert].nonzero()[:, 0]
                self.expert_rows.setdefault(backbone, []).append(ExpertRows(expert, rows, num_active[expert]))
        if self.merges_adapters:
            self.expert_rows = {backbone: [ExpertRows(-1, None, len(active))] for backbone in self.expert_rows}
        every_row = torch.arange(len(active), device=active.device)
        self.pair_rows = {
            backbone: torch.cat([every_row if entry.rows is None else entry.rows for entry in expert_rows])
            for backbone, expert_rows in self.expert_rows.items()
        }

    @property
    def batch_size(self) -> int:
        return self.weights.shape[0]

    def select(self, rows: torch.LongTensor) -> tuple["Route", dict[int, torch.LongTensor]]:
        """
        Build the route of a batch whose row i is this batch's row `rows[i]`.

        Returns:
            The new route, and for each backbone the index of the old pair behind each new one, shape `(new pairs,)`.
        """
        prefix_ids = None if self.prefix_ids is None else self.prefix_ids[rows]
        route = self
        if not torch.equal(self.weights[rows], self.weights) or prefix_ids is not None:
            route = Route(self.weights[rows], self.backbone_of, prefix_ids, self.merges_adapters)
        if self.merges_adapters:
            return route, dict.fromkeys(route.expert_rows, rows)
        pairs = {}
        for backbone, expert_rows in route.expert_rows.items():
            if backbone not in self.pair_tables:
                self.pair_tables[backbone] = self._pair_of(backbone)
            pair_of = self.pair_tables[backbone]
            pairs[backbone] = torch.cat(
                [pair_of[rows if new is None else rows[new], expert] for expert, new, _ in expert_rows]
            )
        return route, pairs

    def _pair_of(self, backbone: int) -> torch.LongTensor:
        """The pair's index for each (row, expert), shape `(batch, experts)`, -1 where there is none."""
        experts = torch.tensor([entry.expert for entry in self.expert_rows[backbone]], device=self.weights.device)
        active = (self.weights[:, experts] > 0).T  # (experts on this backbone, batch)
        index = active.flatten().cumsum(0).view_as(active) - 1
        pair_of = torch.full(self.weights.shape, -1, device=self.weights.device)
        pair_of[:, experts] = index.where(active, -1).T
        return pair_of

    def to(self, device: torch.device) -> "Route":
        prefix_ids = None if self.prefix_ids is None else self.prefix_ids.to(device)
        return Route(self.weights.to(device), self.backbone_of, prefix_ids, self.merges_adapters)

    def same_as(self, other: "Route") -> bool:
        """Whether both routes run the same pairs at the same weights under the same description."""
        if (self.prefix_ids is None) != (other.prefix_ids is None):
            return False
        same_prefix = self.prefix_ids is None or torch.equal(self.prefix_ids, other.prefix_ids)
        return same_prefix and torch.equal(self.weights, other.weights)


def build_route(
    config: PCMEnsembleConfig,
    batch_size: int,
    preference=None,
    preference_text: str | list[str | None] | None = None,
    preference_ids: torch.LongTensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Route:
    r"""
    Decide who runs and what the PCM reads, on the CPU.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        batch_size (`int`): number of rows.
        preference (*optional*):
            Weights in any form of [`preference_weights`]. None is `config.default_preference`, or every expert at
            weight 1 where there is none or the PCM is given another description below.
        preference_text (`str` or `list[str | None]`, *optional*): replaces the active experts' descriptions, for all
            rows or one for each; None leaves a row its own.
        preference_ids (`torch.LongTensor` of shape `(tokens,)` or `(batch, tokens)`, *optional*): the same as tokens;
            negative numbers, and `config.pad_token_id` at the ends, are padding.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): reads `preference_text`.

    Raises:
        TypeError, ValueError: as [`preference_weights`], or if text and tokens are both given, do not fit the batch,
            or there is no tokenizer for the text.
    """
    weights = preference_weights(
        config.expert_names if preference is None else preference, config.expert_names, batch_size
    )
    if preference is None and preference_ids is None and config.default_preference is not None:
        default = preference_weights(config.default_preference, config.expert_names, batch_size)
        texts = preference_text if isinstance(preference_text, (list, tuple)) else [preference_text] * batch_size
        untold = [entry is None for entry in texts]
        if len(untold) == batch_size:  # else refused below
            weights = torch.where(torch.tensor(untold)[:, None], default, weights)
    weights = weights.cpu()
    if preference_text is not None:
        if preference_ids is not None:
            raise ValueError("`preference_text` and `preference_ids` say the same thing. Pass one of them.")
        prefix_ids = pad_left(_text_prefixes(config, preference_text, weights.tolist(), tokenizer))
    elif preference_ids is not None:
        prefix_ids = _given_prefixes(config, preference_ids, batch_size)
    else:
        prefix_ids = pad_left([description_prefix(config, row) for row in weights.tolist()])
    if config.merge == "adapters":
        _check_adapters(config, weights)
    backbone_of = [expert["backbone"] for expert in config.experts]
    return Route(weights, backbone_of, prefix_ids, merges_adapters=config.merge == "adapters")


def _check_adapters(config: PCMEnsembleConfig, weights: torch.Tensor):
    """`merge="adapters"` mixes LoRA weights, so all active experts must be that and nothing else on one backbone."""
    active = [expert for expert, is_active in zip(config.experts, (weights > 0).any(dim=0)) if is_active]
    for expert in active:
        if expert["adapter"] is None or expert["prompt_ids"] or expert["backbone"] != active[0]["backbone"]:
            raise ValueError(
                f'`merge="adapters"` cannot mix expert {expert["name"]!r}: it needs experts that are LoRA adapters on '
                'one backbone, without prompts. Use `merge="probabilities"`.'
            )


def description_prefix(config: PCMEnsembleConfig, weights: list[float]) -> list[int]:
    """The descriptions of a row's active experts, joined; empty when all are active at equal weight."""
    if len(set(weights)) == 1:
        return []
    # Sorted, so that the order in which the experts are listed does not matter.
    active = sorted(expert["description_ids"] for expert, weight in zip(config.experts, weights) if weight > 0)
    return _after_bos(config, [token for ids in active for token in ids])


def _text_prefixes(config: PCMEnsembleConfig, text, weights: list[list[float]], tokenizer) -> list[list[int]]:
    texts = [text] * len(weights) if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not all(isinstance(entry, str | None) for entry in texts):
        raise TypeError(f"`preference_text` must be a string or one string for each row, got {text!r}.")
    if len(texts) != len(weights):
        raise ValueError(
            f"`preference_text` has {len(texts)} entries, but the batch has {len(weights)} rows. Pass one for each "
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
    return [
        description_prefix(config, row) if entry is None else _after_bos(config, _read(tokenizer, entry))
        for entry, row in zip(texts, weights)
    ]


def _read(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        return encode_description(tokenizer, text)
    except (TypeError, UnicodeError) as error:  # half a surrogate pair, say, is a string and no text
        raise ValueError(f"`preference_text` holds {text!r}, which the tokenizer cannot read: {error}") from error


def _after_bos(config: PCMEnsembleConfig, ids: list[int]) -> list[int]:
    return [config.prefix_bos_token_id, *ids] if ids and config.prefix_bos_token_id is not None else ids


def _given_prefixes(config: PCMEnsembleConfig, ids: torch.LongTensor, batch_size: int) -> torch.LongTensor:
    check_tensor("preference_ids", ids, "token ids")
    if ids.dim() not in (1, 2) or (ids.dim() == 2 and len(ids) != batch_size):
        raise ValueError(
            f"`preference_ids` has the shape {tuple(ids.shape)}. Pass (tokens,) or ({batch_size}, tokens)."
        )
    if ids.numel() and ids.max() >= config.pcm.vocab_size:
        raise ValueError(f"`preference_ids` holds {ids.max().item()}, but the PCM has {config.pcm.vocab_size} tokens.")
    ids = ids.cpu().long().expand(batch_size, -1)
    padding = ((ids < 0) | (ids == config.pad_token_id)).long()
    at_ends = padding.cumprod(dim=1) + padding.flip(1).cumprod(dim=1).flip(1) > 0
    return ids.masked_fill((ids < 0) | at_ends, -1)
