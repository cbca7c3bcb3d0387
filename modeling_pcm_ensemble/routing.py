"""Which (row, expert) pairs run under a batch's preferences."""

from copy import copy
from dataclasses import replace
from typing import NamedTuple

import torch

from .configuration_pcm_ensemble import ADAPTERS, PRODUCT, PCMEnsembleConfig
from .preference import MOST_STRENGTH, Preference, description_of


class ExpertRows(NamedTuple):
    """
    The batch rows that one expert runs on; with `expert` None, rows of the bare backbone, a product's reference, or
    rows whose experts' adapters are added up on it.
    """

    expert: int | None
    rows: torch.Tensor | None  # (active rows,), None when all rows of the batch are active
    num_rows: int


class Route:
    r"""
    Which (row, expert) pairs run. Fixed when a text begins; kept on the cache.

    A backbone's pairs are its stacked batch rows, expert by expert and in each expert row by row.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        preferences (`list[Preference]`): one for each row of the batch.
        device (`torch.device`): of the tensors.

    Attributes:
        merged_by (`dict`), experts (`list[dict]`): what a text depends on in the configuration, when it began.
        descriptions (`list[tuple[int, ...]]`): what the PCM reads before each row's context.
        weights (`torch.FloatTensor` of shape `(batch, experts)`): w, 0 for experts that are not wanted.
        mixes_adapters (`bool`): whether a row's experts are added up as weights, so that each row is one pair of the
            only backbone.
        expert_rows (`dict[int, list[ExpertRows]]`): by backbone.
        pair_rows (`dict[int, torch.Tensor]`): by backbone, the row of each pair, `(pairs,)`.

    Raises:
        ValueError: under `merge="adapters"`, if a wanted expert is more, or less, than an adapter on one backbone, or
            a row wants none and there are several.
    """

    def __init__(
        self, config: PCMEnsembleConfig, preferences: list[Preference], device: torch.device | str | None = None
    ):
        self.config = config
        self.merged_by: dict[str, str | None] = {"merge": config.merge}
        if config.merge == PRODUCT:
            self.merged_by["reference"] = config.reference
        # Copies, since users may change prompts in place
        self.experts = [{field: copy(value) for field, value in expert.items()} for expert in config.experts]
        self.preferences = preferences
        self.descriptions = [description_of(config, preference) for preference in preferences]
        self.mixes_adapters = config.merge == ADAPTERS

        names = config.expert_names
        weights = torch.tensor(
            [[p.weights.get(name, 0.0) for name in names] for p in preferences], dtype=torch.float32
        )
        self.weights = weights.to(device)
        if self.mixes_adapters:
            self.expert_rows = {adapters_backbone(config, weights != 0): [ExpertRows(None, None, len(preferences))]}
        else:
            self.expert_rows = _expert_rows(config, weights != 0, device)

        every_row = torch.arange(len(preferences), device=device)
        self.pair_rows = {
            backbone: torch.cat([every_row if entry.rows is None else entry.rows for entry in entries])
            for backbone, entries in self.expert_rows.items()
        }
        self._pair_tables: dict[int, torch.Tensor] = {}

    @property
    def batch_size(self) -> int:
        return len(self.preferences)

    def check_config(self, config: PCMEnsembleConfig):
        """
        Refuse a configuration under which other pairs would run.

        Raises:
            ValueError: if it merges otherwise than when the text began, or has other experts.
        """
        for name, then in self.merged_by.items():
            if then != (now := getattr(config, name)):
                raise ValueError(
                    f"`past_key_values` was filled under `{name}={then!r}`, and `config.{name}` is {now!r} now. "
                    "Start without it."
                )
        if self.experts != config.experts:
            raise ValueError(
                "`past_key_values` was filled by other experts than the ensemble has now. Start without it."
            )

    def select(self, rows: torch.Tensor) -> tuple["Route", dict[int, torch.Tensor]]:
        """
        Build the route of a batch whose row i is this batch's row `rows[i]`.

        Returns:
            The new route, and for each backbone the index of the old pair behind each new one, shape `(new pairs,)`.
        """
        self.check_config(self.config)
        preferences = [self.preferences[row] for row in rows.tolist()]
        route = self
        if preferences != self.preferences:
            route = Route(self.config, preferences, self.weights.device)
        if self.mixes_adapters:
            return route, dict.fromkeys(route.expert_rows, rows)

        pairs = {}
        for backbone, entries in route.expert_rows.items():
            pair_of = self._pair_of(backbone)
            of_experts = [pair_of[rows if new is None else rows[new], _column(expert)] for expert, new, _ in entries]
            pairs[backbone] = torch.cat(of_experts)
        return route, pairs

    def _pair_of(self, backbone: int) -> torch.Tensor:
        """
        The pair's index for each (row, expert), shape `(batch, experts + 1)`, the bare backbone's last; of no use
        where there is none.
        """
        if backbone not in self._pair_tables:
            batch_size, num_experts = self.weights.shape
            table = torch.zeros(batch_size, num_experts + 1, dtype=torch.long, device=self.weights.device)

            start = 0
            for expert, rows, num_rows in self.expert_rows[backbone]:
                of_expert = torch.arange(start, start + num_rows, device=table.device)
                table[slice(None) if rows is None else rows, _column(expert)] = of_expert
                start += num_rows
            self._pair_tables[backbone] = table
        return self._pair_tables[backbone]

    def reweighted(self, weights: torch.Tensor) -> "Route":
        """
        Build the route of the same pairs at other weights.

        Args:
            weights (`torch.FloatTensor` of shape `(batch, experts)`): above 0 for the experts that each row runs; of
                any sign where tilts add up.

        Raises:
            ValueError: if other experts would be wanted than before, or a weight is no finite number.
        """
        self.check_config(self.config)
        weights, adds_up = weights.to(self.weights), self.config.adds_up
        same_pairs = torch.equal(weights != 0, self.weights != 0)  # False for another shape too
        in_range = weights.abs() <= MOST_STRENGTH if adds_up else weights.isfinite() & (weights >= 0)
        if not same_pairs or not in_range.all():
            accepted = f"other than 0, and between -{MOST_STRENGTH} and {MOST_STRENGTH}," if adds_up else "above 0"
            raise ValueError(
                f"`weights` must be finite, {accepted} for the experts that each row runs, and 0 for the others."
            )

        names = self.config.expert_names
        preferences = []
        for preference, description, row in zip(self.preferences, self.descriptions, weights.tolist()):
            wanted = {name: weight for name, weight in zip(names, row) if weight != 0}
            preferences.append(replace(preference, weights=wanted, description_ids=description))
        return Route(self.config, preferences, self.weights.device)

    def is_of(self, preferences: list[Preference]) -> bool:
        """Whether these preferences ask for the same weights under the same descriptions."""
        same_weights = [p.weights for p in preferences] == [p.weights for p in self.preferences]
        return same_weights and [description_of(self.config, p) for p in preferences] == self.descriptions

    @staticmethod
    def join(routes: list["Route"]) -> "Route":
        """The route of all rows, one batch after the other."""
        for route in routes:
            route.check_config(routes[0].config)
        preferences = [preference for route in routes for preference in route.preferences]
        return Route(routes[0].config, preferences, routes[0].weights.device)


def _expert_rows(config: PCMEnsembleConfig, active: torch.Tensor, device) -> dict[int, list[ExpertRows]]:
    """By backbone, the rows that each of its experts runs on; `active` is `(batch, experts)`."""
    if config.reference_index is not None:
        active[:, config.reference_index] = True  # every row's tilts are measured against it

    found: dict[int, list[ExpertRows]] = {}
    for index, (expert, is_active) in enumerate(zip(config.experts, active.T)):
        num_rows = int(is_active.sum())
        if num_rows:
            rows = None if num_rows == len(active) else is_active.nonzero()[:, 0].to(device)
            found.setdefault(expert["backbone"], []).append(ExpertRows(index, rows, num_rows))

    if config.merge == PRODUCT and config.reference is None:
        found.setdefault(0, []).append(ExpertRows(None, None, len(active)))  # the only backbone, bare
    return found


def _column(expert: int | None) -> int:
    """Where an expert stands in a table whose last column is the bare backbone's."""
    return -1 if expert is None else expert


def mergeable_names(config: PCMEnsembleConfig) -> list[str]:
    """Name the experts that may have a weight under `config.merge`."""
    if config.merge != ADAPTERS:
        return config.weighted_names
    return [expert["name"] for expert in config.experts if _adds_up(expert)]


def _adds_up(expert: dict) -> bool:
    """Whether an expert is an adapter and nothing else."""
    return expert["adapter"] is not None and not expert["prompt_ids"]


def adapters_backbone(config: PCMEnsembleConfig, active: torch.Tensor) -> int:
    """
    The backbone of `merge="adapters"`, which adds up LoRA weights, so that all active experts must be that and nothing
    else on one backbone; rows that want none run it bare.
    """
    possible = {expert["backbone"] for expert in config.experts if _adds_up(expert)}
    if not active.any(dim=1).all() and len(possible) != 1:
        raise ValueError(
            'Without an expert `merge="adapters"` is the bare backbone, and the adapters of this ensemble are on '
            f"{len(possible)} of them. Give each row an expert with a weight other than 0."
        )

    experts = [expert for expert, is_active in zip(config.experts, active.any(dim=0)) if is_active]
    for expert in experts:
        if not _adds_up(expert) or expert["backbone"] != experts[0]["backbone"]:
            raise ValueError(
                f'`merge="adapters"` cannot mix expert {expert["name"]!r}: it needs experts that are LoRA adapters on '
                'one backbone, without prompts. Use `merge="product"`.'
            )
    return experts[0]["backbone"] if experts else possible.pop()


__all__ = ["ExpertRows", "Route", "adapters_backbone", "mergeable_names"]
