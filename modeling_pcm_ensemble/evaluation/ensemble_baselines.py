"""Ways to answer that are an ensemble: whole, at weights that stay the same, or with a part left out."""

import copy
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from ..configuration_pcm_ensemble import ADDITIVE
from ..lora import adapted_layers
from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..preference import Preference
from .baselines import USUAL_SCALE, Baseline, Conversation, chat_inputs, digest, sample_answers, wordings

Module = TypeVar("Module", bound=torch.nn.Module)


# What an expert's answers depend on, beside its weights
EXPERT_FACTS = ("name", "backbone", "prompt_ids", "description_ids")


@dataclass
class EnsembleBaseline(Baseline):
    r"""
    What baselines that are an ensemble have in common.

    Args:
        name (`str`): see [`Baseline`].
        model (`PCMEnsembleForCausalLM`): the ensemble; see [`with_settings`] for one that merges otherwise.
        max_new_tokens (`int`): most tokens of an answer.
        top_k (`int`): tokens of the merged distribution that are sampled from; 0 for all.
    """

    uses_pcm: ClassVar[bool] = True

    name: str
    model: PCMEnsembleForCausalLM
    max_new_tokens: int
    top_k: int = field(default=0, kw_only=True)

    @abstractmethod
    def request(self, prompts: list[Conversation], preferences: list[Preference]) -> dict[str, Any]:
        """Say what each row asks of the ensemble, as arguments of its `generate`."""

    def generate(self, prompts: list[Conversation], preferences: list[Preference]) -> list[str]:
        options = {"top_k": self.top_k} | self.request(prompts, preferences)
        return sample_answers(self._sampled(), tokenizer_of(self.model), prompts, self.max_new_tokens, **options)

    def settings(self) -> str:
        config = self.model.config
        # The names that settings have had from the first version on, so that answers which are kept stay valid
        options = {
            "name": self.name,
            "max_new_tokens": self.max_new_tokens,
            "use_pcm": self.uses_pcm,
            "use_description": True,
            "use_context": True,
            "merge": config.merge,
            "expert_top_k": config.expert_top_k,
            "top_k": self.top_k,
            "weights": None,
            "words": None,
            "only": None,
        }
        if config.adds_up:  # since weights count as given, and not as shares
            options |= {"adds_up": True, "reference": config.reference}
        elif self.uses_pcm and config.pcm_trained_for in ADDITIVE:  # α is of strengths
            options["strengths"] = True
        if config.endpoint_facts:
            options["endpoints"] = config.endpoint_facts
        options |= self._differences()

        read = [name for name in EXPERT_FACTS if self.uses_pcm or name != "description_ids"]
        experts = [[expert[name] for name in read] for expert in config.experts or []]
        if scales := self._scales():
            options["scales"] = scales
        return json.dumps([options, experts, digest(self.model if self.uses_pcm else self.model.backbones)])

    def _scales(self) -> dict[str, list[float]]:
        """
        The scales of each expert's adapted layers, which no weights say, where they are not all the usual one: answers
        that are kept from before scales were written stay valid.
        """
        scales = {}
        for expert in self.model.config.experts or []:
            if expert["adapter"]:
                layers = adapted_layers(self.model.backbones[expert["backbone"]], expert["adapter"])
                scales[expert["name"]] = [scale for _, scale in layers.values()]
        return {name: values for name, values in scales.items() if set(values) != {USUAL_SCALE}}

    def _sampled(self) -> PCMEnsembleForCausalLM:
        """The ensemble that answers are sampled from."""
        return self.model

    def _differences(self) -> dict[str, Any]:
        """What `settings` has beside the defaults."""
        return {}


@dataclass
class TrainedEnsemble(EnsembleBaseline):
    r"""
    The ensemble as it is, its PCM choosing α.

    Args:
        weights (`Mapping[str, Preference]`, *optional*): what is asked for in place of each preference, by its label.
        others: as for [`EnsembleBaseline`].
    """

    weights: Mapping[str, Preference] | None = None

    def request(self, prompts: list[Conversation], preferences: list[Preference]) -> dict[str, Any]:
        if self.weights is not None:
            preferences = [self.weights[preference.label] for preference in preferences]
        return {"preference": preferences}

    def _differences(self) -> dict[str, Any]:
        if self.weights is None:
            return {}
        weights = {label: dict(preference.weights) for label, preference in self.weights.items()}
        words = {label: p.description_ids for label, p in self.weights.items() if p.description_ids is not None}
        return {"weights": weights} | ({"described": words} if words else {})


@dataclass
class StaticWeights(TrainedEnsemble):
    r"""
    The ensemble without its PCM: the preference's weights, at every token.

    Args:
        average (`bool`): divides weights by their sum first, as a mixture does anyway: added adapters become
            Personalized Soup, and a product MOD's.
        others: as for [`TrainedEnsemble`].
    """

    uses_pcm: ClassVar[bool] = False

    average: bool = field(default=False, kw_only=True)

    def request(self, prompts: list[Conversation], preferences: list[Preference]) -> dict[str, Any]:
        request = super().request(prompts, preferences)
        if self.average:
            request["preference"] = [averaged(preference) for preference in request["preference"]]
        return request

    def _sampled(self) -> PCMEnsembleForCausalLM:
        return without_pcm(self.model)

    def _differences(self) -> dict[str, Any]:
        return super()._differences() | ({"average": True} if self.average else {})


@dataclass
class SingleExpert(EnsembleBaseline):
    r"""
    One expert alone, compared under preferences that want it.

    Args:
        expert (`str`): its name.
        others: as for [`EnsembleBaseline`].
    """

    uses_pcm: ClassVar[bool] = False

    expert: str

    def applies(self, preference: Preference) -> bool:
        return self.expert in preference.weights

    def request(self, prompts: list[Conversation], preferences: list[Preference]) -> dict[str, Any]:
        return {"preference": self.expert}

    def _sampled(self) -> PCMEnsembleForCausalLM:
        return without_pcm(self.model)  # one of a product would change how far the expert goes

    def _differences(self) -> dict[str, Any]:
        return {"only": self.expert}


@dataclass
class ToldInWords(EnsembleBaseline):
    r"""
    The ensemble told in words alone: every expert is active, and the PCM must choose.

    Args:
        words (`Mapping[str, str | Sequence[str]]`): what the PCM reads in place of the experts' descriptions for each
            preference, see [`wordings`].
        others: as for [`EnsembleBaseline`].

    Raises:
        ValueError: from `generate`, if there are no words for a preference.
    """

    words: Mapping[str, str | Sequence[str]]

    def request(self, prompts: list[Conversation], preferences: list[Preference]) -> dict[str, Any]:
        return {"preference_text": wordings(self.name, self.words, prompts, preferences)}

    def _differences(self) -> dict[str, Any]:
        return {"words": self.words}


@dataclass
class WithoutDescription(EnsembleBaseline):
    """An ablation: the PCM reads the context alone, and not what is wanted. Arguments: [`EnsembleBaseline`]."""

    def request(self, prompts: list[Conversation], preferences: list[Preference]) -> dict[str, Any]:
        nothing = torch.full((1,), -1)
        return {"preference": preferences, "preference_ids": nothing}

    def _differences(self) -> dict[str, Any]:
        return {"use_description": False}


@dataclass
class WithoutContext(EnsembleBaseline):
    """An ablation: α stays what the PCM gives for an empty prompt. Arguments: [`EnsembleBaseline`]."""

    def request(self, prompts: list[Conversation], preferences: list[Preference]) -> dict[str, Any]:
        empty = chat_inputs(self.model, tokenizer_of(self.model), [[{"role": "user", "content": ""}]])
        rows = {name: tensor.expand(len(preferences), -1) for name, tensor in empty.items()}
        expert_weights = self.model.compute_expert_weights(**rows, preference=preferences)

        names = self.model.config.expert_names
        held = []
        for row in expert_weights[:, -1].tolist():  # where the answer would begin
            held.append(Preference({name: weight for name, weight in zip(names, row) if weight > 0}))
        return {"preference": held}

    def _sampled(self) -> PCMEnsembleForCausalLM:
        return without_pcm(self.model)

    def _differences(self) -> dict[str, Any]:
        return {"use_context": False}


def averaged(preference: Preference) -> Preference:
    """
    Return the preference at weights that add up to 1.

    Raises:
        ValueError: if they add up to 0 or less.
    """
    total = sum(preference.weights.values())
    if total <= 0:
        raise ValueError(f"The weights of {preference.label} add up to {total:g}, which no average has.")
    weights = {name: weight / total for name, weight in preference.weights.items()}
    return Preference(weights, preference.description_ids)


def tokenizer_of(model: PCMEnsembleForCausalLM) -> PreTrainedTokenizerBase:
    """
    Return the ensemble's tokenizer.

    Raises:
        ValueError: if it has none.
    """
    if model.tokenizer is None:
        raise ValueError("An ensemble is evaluated by its own tokenizer, and this one has none. Build it with one.")
    return model.tokenizer


def with_settings(model: PCMEnsembleForCausalLM, **settings) -> PCMEnsembleForCausalLM:
    r"""
    Make an ensemble that shares every weight with another one, and has other settings. It is for answering: training
    the PCM of one would change the other's.

    Args:
        model (`PCMEnsembleForCausalLM`): stays as it is.
        settings: fields of its configuration, such as `merge` and `expert_top_k`.

    Raises:
        StrictDataclassError: if the configuration would not take them.

    Example:

    ```python
    adapters = with_settings(without_pcm(model), merge="adapters", expert_top_k=None)
    soup = StaticWeights("Personalized Soup", adapters, 64, average=True)
    ```
    """
    other = _sharing(model)
    other.config = copy.copy(model.config)
    for name, value in settings.items():
        setattr(other.config, name, value)
    other.config.validate()
    return other


def without_pcm(model: PCMEnsembleForCausalLM) -> PCMEnsembleForCausalLM:
    """
    Make an ensemble whose weights are the user's, α = w / Σw or s = w, which a head of zeros gives. It shares every
    other weight with `model`, which stays as it is.
    """
    pcm = _sharing(model.pcm)
    pcm.head = copy.deepcopy(model.pcm.head)
    torch.nn.init.zeros_(pcm.head.weight)

    other = _sharing(model)
    other.pcm = pcm
    other.config = copy.copy(model.config)
    other.config.pcm_trained_for = None
    return other


def _sharing(module: Module) -> Module:
    """A module of the same parts, of which some can be replaced in it alone."""
    other = copy.copy(module)
    other._modules = module._modules.copy()
    return other


__all__ = [
    "EnsembleBaseline",
    "SingleExpert",
    "StaticWeights",
    "ToldInWords",
    "TrainedEnsemble",
    "WithoutContext",
    "WithoutDescription",
    "averaged",
    "tokenizer_of",
    "with_settings",
    "without_pcm",
]
