"""What somebody would do in place of a trained PCM, each behind the same call."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM

Conversation = list[dict[str, str]]
Preference = dict[str, float]  # expert → weight above 0


class Baseline(ABC):
    r"""
    A way to answer prompts under preferences: all that an evaluation knows of it.

    Attributes:
        name (`str`): stands in tables.
    """

    name: str

    @abstractmethod
    def generate(self, prompts: list[Conversation], preferences: list[Preference]) -> list[str]:
        """Answer each conversation once, under the preference beside it. Random numbers are seeded by the caller."""

    def applies(self, preference: Preference) -> bool:
        """Whether it can be compared under a preference."""
        return True

    def settings(self) -> str:
        """Whatever its answers depend on beside its name: answers kept under others are not taken for its."""
        return ""


def label(preference: Preference) -> str:
    """A preference in tables: `elementary + concise`, `elementary=2 + concise=0.5`."""
    equal = set(preference.values()) == {1.0}
    return " + ".join(name if equal else f"{name}={weight:g}" for name, weight in preference.items())


@dataclass
class PlainModel(Baseline):
    r"""
    The base model as it is, or, given descriptions, told the preference in its system prompt.

    Args:
        name (`str`): see [`Baseline`].
        model (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`): the base model.
        max_new_tokens (`int`): most tokens of an answer.
        descriptions (`Mapping[str, str]`, *optional*): what is said for each wanted expert.
        top_k (`int`): tokens that are sampled from; 0 for all.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    descriptions: Mapping[str, str] | None = None
    top_k: int = 0

    def settings(self) -> str:
        return json.dumps([self.max_new_tokens, self.descriptions, self.top_k, digest(self.model)])

    def generate(self, prompts: list[Conversation], preferences: list[Preference]) -> list[str]:
        if self.descriptions is not None:
            if missing := {name for preference in preferences for name in preference} - set(self.descriptions):
                raise ValueError(f"Baseline {self.name!r} has no description of {', '.join(sorted(missing))}.")
            words = [" ".join(self.descriptions[name] for name in preference) for preference in preferences]
            prompts = [[{"role": "system", "content": text}, *prompt] for text, prompt in zip(words, prompts)]
        return sample_answers(self.model, self.tokenizer, prompts, self.max_new_tokens, top_k=self.top_k)


@dataclass
class Mixture(Baseline):
    r"""
    The ensemble, whole or with a part changed or left out.

    Args:
        name (`str`): see [`Baseline`].
        model (`PCMEnsembleForCausalLM`): left as it was after each call.
        max_new_tokens (`int`): most tokens of an answer.
        use_pcm (`bool`): whether α is the PCM's; else it is the weights given.
        use_description (`bool`): whether the PCM reads what is wanted, or the context alone.
        use_context (`bool`): whether α follows the context, or is held at what it is for an empty prompt.
        merge (`str`, *optional*): in place of the ensemble's own; without its `expert_top_k` then.
        expert_top_k (`int`, *optional*): in place of the ensemble's own; 0 keeps all tokens.
        top_k (`int`): tokens of the merged distribution that are sampled from; 0 for all.
        weights (`Mapping[str, Preference]`, *optional*): other weights, by [`label`].
        words (`Mapping[str, str]`, *optional*): what the PCM reads in place of the descriptions, by [`label`]; every
            expert is active then, and the PCM must choose.
        only (`str`, *optional*): this expert alone, compared under preferences that want it.

    Raises:
        ValueError: if more than one of `weights`, `words`, `only` and `use_context=False` is given.
    """

    name: str
    model: PCMEnsembleForCausalLM
    max_new_tokens: int
    use_pcm: bool = True
    use_description: bool = True
    use_context: bool = True
    merge: str | None = None
    expert_top_k: int | None = None
    top_k: int = 0
    weights: Mapping[str, Preference] | None = None
    words: Mapping[str, str] | None = None
    only: str | None = None

    def __post_init__(self):
        given = {"weights": self.weights, "words": self.words, "only": self.only, "use_context": not self.use_context}
        if len(names := [name for name, value in given.items() if value]) > 1:
            raise ValueError(f"Baseline {self.name!r} has {' and '.join(names)}, which exclude each other.")

    def settings(self) -> str:
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}
        config = self.model.config
        options |= {"merge": config.merge, "expert_top_k": config.expert_top_k} | self._config_changes()
        read = ("name", "backbone", "prompt_ids", *(("description_ids",) if self.use_pcm else ()))
        experts = [[expert[field] for field in read] for expert in config.experts]
        return json.dumps([options, experts, digest(self.model if self.use_pcm else self.model.backbones)])

    def applies(self, preference: Preference) -> bool:
        return self.only is None or self.only in preference

    def generate(self, prompts: list[Conversation], preferences: list[Preference]) -> list[str]:
        options = {"preference": preferences}
        if self.only is not None:
            options["preference"] = self.only
        elif self.weights is not None:
            options["preference"] = [self.weights[label(preference)] for preference in preferences]
        elif self.words is not None:
            options = {"preference_text": [self.words[label(preference)] for preference in preferences]}
        elif not self.use_context:
            options["preference"] = self._weights_of_descriptions(preferences)
        if not self.use_description:
            options["preference_ids"] = torch.full((1,), -1)
        pcm = nullcontext() if self.use_pcm and self.use_context else untrained_pcm(self.model)
        with changed(self.model.config, self._config_changes()), pcm:
            return sample_answers(
                self.model, self.model.tokenizer, prompts, self.max_new_tokens, top_k=self.top_k, **options
            )

    def _config_changes(self) -> dict:
        changes = {} if self.merge is None else {"merge": self.merge}
        if changes or self.expert_top_k is not None:
            changes["expert_top_k"] = self.expert_top_k or None
        return changes

    def _weights_of_descriptions(self, preferences: list[Preference]) -> list[Preference]:
        """α where the answer to an empty prompt would begin."""
        inputs = chat_inputs(self.model, self.model.tokenizer, [[{"role": "user", "content": ""}]])
        rows = {name: tensor.expand(len(preferences), -1) for name, tensor in inputs.items()}
        expert_weights = self.model.compute_expert_weights(**rows, preference=preferences)[:, -1]
        names = self.model.config.expert_names
        return [{n: w for n, w in zip(names, row) if w > 0} for row in expert_weights.tolist()]


class WeightAverage(Baseline):
    r"""
    PEFT's `linear` average of the adapters: one model for each preference, Personalized Soup as a user of PEFT makes
    it. Its factors A and B are averaged apart, so that the sum is not exactly Σ w_i B_i A_i (that is
    `Mixture(merge="adapters", use_pcm=False)`).

    Args:
        name (`str`): see [`Baseline`].
        model (`str`): the base model, a folder or repository.
        adapters (`Mapping[str, str]`): each expert's PEFT adapter.
        tokenizer (`PreTrainedTokenizerBase`), max_new_tokens, top_k (`int`): as for [`PlainModel`].
        model_kwargs: passed to `from_pretrained`.

    Source: arXiv 2310.11564.
    """

    def __init__(
        self,
        name: str,
        model: str,
        adapters: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        top_k: int = 0,
        **model_kwargs,
    ):
        from peft import PeftModel

        self.name, self.tokenizer, self.max_new_tokens, self.top_k = name, tokenizer, max_new_tokens, top_k
        self.model = None
        for expert, folder in adapters.items():
            if self.model is None:
                base = AutoModelForCausalLM.from_pretrained(model, **model_kwargs)
                self.model = PeftModel.from_pretrained(base, folder, adapter_name=expert).eval()
            else:
                self.model.load_adapter(folder, adapter_name=expert)

    def settings(self) -> str:
        return json.dumps([self.max_new_tokens, self.top_k, digest(self.model)])

    def generate(self, prompts: list[Conversation], preferences: list[Preference]) -> list[str]:
        answers: dict[int, str] = {}
        for preference in {tuple(sorted(p.items())): p for p in preferences}.values():
            rows = [i for i, p in enumerate(preferences) if p == preference]
            self._average(preference)
            mine = [prompts[i] for i in rows]
            texts = sample_answers(self.model, self.tokenizer, mine, self.max_new_tokens, top_k=self.top_k)
            answers |= dict(zip(rows, texts))
        return [answers[i] for i in range(len(prompts))]

    def _average(self, preference: Preference):
        shares = [weight / sum(preference.values()) for weight in preference.values()]
        if "average" in self.model.peft_config:
            self.model.set_adapter(next(iter(preference)))
            self.model.delete_adapter("average")
        with torch.random.fork_rng():  # it draws the weights that it then replaces
            self.model.add_weighted_adapter(list(preference), shares, "average", combination_type="linear")
        self.model.set_adapter("average")
        self.model.eval()  # the new modules would drop out


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Conversation],
    max_new_tokens: int,
    **options,
) -> list[str]:
    """One answer to each conversation at temperature 1, from all tokens unless options, `generate`'s, say other."""
    inputs = chat_inputs(model, tokenizer, prompts)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": max_new_tokens}
    sequences = model.generate(**inputs, **sampling | options)
    return tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Conversation]):
    """Conversations up to where an answer begins, padded on the left."""
    return tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    ).to(model.device)


def digest(module: torch.nn.Module) -> str:
    """Of all weights of a module but PEFT's average, which comes and goes."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if ".average." not in name:
            found.update(name.encode() + tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


@contextmanager
def changed(config, changes: Mapping) -> Iterator[None]:
    """A config with other values inside."""
    before = {name: getattr(config, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        config.validate()
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def untrained_pcm(model: PCMEnsembleForCausalLM) -> Iterator[None]:
    """The ensemble with α = w / Σw inside, which a head of zeros gives."""
    learnt = model.pcm.head.weight.data
    try:
        model.pcm.head.weight.data = torch.zeros_like(learnt)
        yield
    finally:
        model.pcm.head.weight.data = learnt
