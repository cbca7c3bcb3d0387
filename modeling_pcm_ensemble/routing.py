"""Which (row, expert) pairs run under a batch's preferences."""

from dataclasses import replace
from typing import NamedTuple

import torch

from .configuration_pcm_ensemble import ADAPTERS, PCMEnsembleConfig
from .preference import Preference, description_of


class ExpertRows(NamedTuple):
    """The batch rows that one expert runs on; with `expert` None, rows whose experts' adapters are mixed into one."""

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
        descriptions (`list[tuple[int, ...]]`): what the PCM reads before each row's context.
        log_weights (`torch.FloatTensor` of shape `(batch, experts)`): log w, -inf for experts that are not wanted.
        mixes_adapters (`bool`): whether a row's experts are mixed as weights, so that each row is one pair of the
            only backbone.
        expert_rows (`dict[int, list[ExpertRows]]`): by backbone.
        pair_rows (`dict[int, torch.Tensor]`): by backbone, the row of each pair, `(pairs,)`.

    Raises:
        ValueError: under `merge="adapters"`, if a wanted expert is more, or less, than an adapter on one backbone.
    """

    def __init__(
        self, config: PCMEnsembleConfig, preferences: list[Preference], device: torch.device | str | None = None
    ):
        self.config = config
        self.preferences = preferences
        self.descriptions = [description_of(config, preference) for preference in preferences]
        self.mixes_adapters = config.merge == ADAPTERS

        names = config.expert_names
        weights = torch.tensor(
            [[p.weights.get(name, 0.0) for name in names] for p in preferences], dtype=torch.float32
        )
        active = weights > 0  # (batch, experts)
        if self.mixes_adapters:
            _check_adapters(config, active)
        self.log_weights = weights.log().to(device)
        self.expert_rows = _expert_rows(config, active, self.mixes_adapters, device)

        every_row = torch.arange(len(preferences), device=device)
        self.pair_rows = {
            backbone: torch.cat([every_row if entry.rows is None else entry.rows for entry in entries])
            for backbone, entries in self.expert_rows.items()
        }
        self._pair_tables: dict[int, torch.Tensor] = {}

    @property
    def batch_size(self) -> int:
        return len(self.preferences)

    def select(self, rows: torch.Tensor) -> tuple["Route", dict[int, torch.Tensor]]:
        """
        Build the route of a batch whose row i is this batch's row `rows[i]`.

        Returns:
            The new route, and for each backbone the index of the old pair behind each new one, shape `(new pairs,)`.
        """
        preferences = [self.preferences[row] for row in rows.tolist()]
        route = self
        if preferences != self.preferences:
            route = Route(self.config, preferences, self.log_weights.device)
        if self.mixes_adapters:
            return route, dict.fromkeys(route.expert_rows, rows)

        pairs = {}
        for backbone, entries in route.expert_rows.items():
            pair_of = self._pair_of(backbone)
            of_experts = [pair_of[rows if new is None else rows[new], expert] for expert, new, _ in entries]
            pairs[backbone] = torch.cat(of_experts)
        return route, pairs

    def _pair_of(self, backbone: int) -> torch.Tensor:
        """The pair's index for each (row, expert), shape `(batch, experts)`; of no use where there is none."""
        if backbone not in self._pair_tables:
            table = torch.zeros(self.log_weights.shape, dtype=torch.long, device=self.log_weights.device)

            start = 0
            for expert, rows, num_rows in self.expert_rows[backbone]:
                table[slice(None) if rows is None else rows, expert] = torch.arange(
                    start, start + num_rows, device=table.device
                )
                start += num_rows
            self._pair_tables[backbone] = table
        return self._pair_tables[backbone]

    def reweighted(self, weights: torch.Tensor) -> "Route":
        """
        Build the route of the same pairs at other weights.

        Args:
            weights (`torch.FloatTensor` of shape `(batch, experts)`): above 0 for the experts that each row runs.

        Raises:
            ValueError: if other experts would be wanted than before, or a weight is no finite number.
        """
        weights = weights.to(self.log_weights)
        same_pairs = torch.equal(weights > 0, self.log_weights > -torch.inf)  # False for another shape too
        if not same_pairs or not weights.isfinite().all():
            raise ValueError(
                "`weights` must be finite, above 0 for the experts that each row runs, and 0 for the others."
            )

        names = self.config.expert_names
        preferences = []
        for preference, description, row in zip(self.preferences, self.descriptions, weights.tolist()):
            wanted = {name: weight for name, weight in zip(names, row) if weight > 0}
            preferences.append(replace(preference, weights=wanted, description_ids=description))
        return Route(self.config, preferences, self.log_weights.device)

    def is_of(self, preferences: list[Preference]) -> bool:
        """Whether these preferences ask for the same weights under the same descriptions."""
        same_weights = [p.weights for p in preferences] == [p.weights for p in self.preferences]
        return same_weights and [description_of(self.config, p) for p in preferences] == self.descriptions

    @staticmethod
    def join(routes: list["Route"]) -> "Route":
        """The route of all rows, one batch after the other."""
        preferences = [preference for route in routes for preference in route.preferences]
        return Route(routes[0].config, preferences, routes[0].log_weights.device)


def _expert_rows(
    config: PCMEnsembleConfig, active: torch.Tensor, mixes_adapters: bool, device
) -> dict[int, list[ExpertRows]]:
    """By backbone, the rows that each of its experts runs on; `active` is `(batch, experts)`."""
    found: dict[int, list[ExpertRows]] = {}
    for index, (expert, is_active) in enumerate(zip(config.experts, active.T)):
        num_rows = int(is_active.sum())
        if num_rows:
            rows = None if num_rows == len(active) else is_active.nonzero()[:, 0].to(device)
            found.setdefault(expert["backbone"], []).append(ExpertRows(index, rows, num_rows))
    if mixes_adapters:
        return {backbone: [ExpertRows(None, None, len(active))] for backbone in found}
    return found


def _check_adapters(config: PCMEnsembleConfig, active: torch.Tensor):
    """`merge="adapters"` mixes LoRA weights, so all active experts must be that and nothing else on one backbone."""
    experts = [expert for expert, is_active in zip(config.experts, active.any(dim=0)) if is_active]
    for expert in experts:
        if expert["adapter"] is None or expert["prompt_ids"] or expert["backbone"] != experts[0]["backbone"]:
            raise ValueError(
                f'`merge="adapters"` cannot mix expert {expert["name"]!r}: it needs experts that are LoRA adapters on '
                'one backbone, without prompts. Use `merge="probabilities"`.'
            )


__all__ = ["ExpertRows", "Route"]
