"""The model card of an ensemble, from its configuration and its evaluation."""

import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from modeling_pcm_ensemble import PCMEnsembleConfig, PCMEnsembleForCausalLM
from modeling_pcm_ensemble.configuration_pcm_ensemble import ENDPOINT

from .clean_process import names_to_ask_for

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("card_template.md")
GENERATED = "<!-- Written by hub_upload, which replaces it each time as long as this line stands here. -->"
CHAT_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True{options})
tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True{revision})
chat = [{{"role": "user", "content": "What is gravity?"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, preference={preference}, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
TEXT_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True{options})
tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True{revision})
inputs = tokenizer("What is gravity?", return_tensors="pt")
output = model.generate(inputs["input_ids"], preference={preference}, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
TOKEN_CODE = """\
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True{options})
print(model.generate(torch.tensor([[3, 4, 5]]), preference={preference}, max_new_tokens=8, do_sample=False))"""


MERGING = {
    "probabilities": "The next token is drawn from Σ α π, the weighted sum of the experts' distributions.",
    "logits": "The next token is drawn from the distribution whose logits are Σ α logits.",
    "product": (
        "What each expert changes of a reference, log π − log π₀, is added to it at the expert's weight, so that all "
        "wishes act on every token. The reference is {reference}."
    ),
    "adapters": "The experts' LoRA adapters are added up at these weights, so that all wishes act on every token.",
}
WEIGHTS = {
    False: "Weights are shares: they are 0 or more, and only their ratios count.",
    True: "Weights are strengths: 1 is an expert's full tilt, 0.5 half of it, and one below 0 steers away from it.",
}
ROWS = (
    "A request costs the pass of every expert that it wants{}; experts on one backbone share it as rows of one batch."
)
COST = {
    "product": ROWS.format(", and of the reference"),
    "adapters": "A request costs the pass of one model, whatever the number of experts that it wants.",
}


def model_card(
    model: PCMEnsembleForCausalLM,
    repo_id: str,
    *,
    thin: bool = False,
    revision: str | None = None,
    report: dict | None = None,
    training: dict | None = None,
    datasets: list[str] | None = None,
    loading: dict[str, Any] | None = None,
    api: HfApi | None = None,
) -> ModelCard:
    r"""
    Describe an ensemble. `PRINTED` stands in a block of its own where the output of its code belongs.

    Args:
        model (`PCMEnsembleForCausalLM`): the ensemble.
        repo_id (`str`), revision (`str`, *optional*): where it will be.
        thin (`bool`): whether its backbones are fetched from elsewhere.
        report (`dict`, *optional*): an evaluation's, see [`read_report`]: win rates for the metadata and the text.
        training (`dict`, *optional*): what a trainer wrote into `pcm_training.json`.
        datasets (`list[str]`, *optional*): what the PCM was trained on, for the metadata.
        loading (`dict`, *optional*): what `from_pretrained` is given to ask endpoints.
        api (`HfApi`, *optional*): asks the experts' repositories for their licences.

    Returns:
        `ModelCard`: with metadata and text.
    """
    config, name = model.config, repo_id.split("/")[-1]
    sources = _sources(config)
    licences = {source: _licence(source, api or HfApi()) for source in sources}
    unnamed = sum(source is None for source in _backbone_sources(config))
    licence, note = _common_licence(licences, unnamed)

    data = ModelCardData(
        base_model=sources or None,
        base_model_relation="merge",
        license=licence,
        license_name="see-experts" if licence == "other" else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pcm-ensemble", "ensemble", "personalization", "custom_code"],
        model_name=name,
        eval_results=_eval_results(report),
        datasets=datasets or None,
    )

    backbones = [source["repository"] for source in _backbone_sources(config) if source]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        generated=GENERATED,
        name=name,
        repo_id=repo_id,
        experts=[_row(config, expert) for expert in config.experts],
        code=_code(model, repo_id, revision, loading or {}),
        endpoints=sorted({backbone.endpoint for backbone in config.backbones if backbone.model_type == ENDPOINT}),
        merging=MERGING[config.merge].format(reference=config.reference or "the backbone without an expert"),
        weights=WEIGHTS[config.adds_up],
        cost=COST.get(config.merge, ROWS.format("")),
        default="all experts have the weight 1"
        if config.default_preference is None
        else f"`{config.default_preference}`",
        pcm_layers=config.pcm.num_hidden_layers,
        pcm_type=config.pcm.model_type,
        training=_training_facts(model, training),
        evaluation=report and _evaluation_facts(report),
        max_length=config.max_position_embeddings,
        thin=thin and ", ".join(sorted(set(backbones))),
        licence_note=note,
    )


def code_blocks(text: str) -> list[str]:
    """Return the Python in a card."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def _code(model: PCMEnsembleForCausalLM, repo_id: str, revision: str | None, loading: dict[str, Any]) -> str:
    """How to use the model, as its tokenizer allows."""
    names, tokenizer = names_to_ask_for(model.config), model.tokenizer
    preference = {names[0]: 1.0, names[1]: 0.5} if len(names) > 1 else names[0]
    code = TOKEN_CODE
    if tokenizer is not None:
        code = CHAT_CODE if tokenizer.chat_template else TEXT_CODE

    pinned = f', revision="{revision}"' if revision else ""
    return code.format(
        repo_id=repo_id,
        preference=json.dumps(preference, ensure_ascii=False),
        revision=pinned,
        options=pinned + "".join(f", {name}={json.dumps(value)}" for name, value in loading.items()),
    )


def _backbone_sources(config: PCMEnsembleConfig) -> list[dict[str, str] | None]:
    return [getattr(backbone, "source", None) for backbone in config.backbones]


def _sources(config: PCMEnsembleConfig) -> list[str]:
    """Repositories of backbones, PCM and adapters, each once."""
    entries = [*_backbone_sources(config), getattr(config.pcm, "source", None)]
    entries += [expert["source"] for expert in config.experts]
    return list(dict.fromkeys(entry["repository"] for entry in entries if entry))


def _row(config: PCMEnsembleConfig, expert: dict[str, Any]) -> dict[str, str]:
    """The cells of an expert's line in the table."""
    source, backbone = _backbone_sources(config)[expert["backbone"]], config.backbones[expert["backbone"]]
    parts = [source["repository"] if source else f"backbone {expert['backbone']}"]
    if backbone.model_type == ENDPOINT:
        parts = [f"{backbone.served_model or 'a model'} behind {backbone.endpoint}"]
    if expert["adapter"]:
        parts.append(f"a LoRA adapter of rank {expert['adapter']['r']}")
    if expert["prompt"]:
        parts.append("a prompt of its own")

    cells = {name: expert[name] or "" for name in ("name", "dimension", "description")}
    cells["made_of"] = " with ".join(parts)
    return {name: " ".join(text.split()).replace("|", "\\|") for name, text in cells.items()}


def _licence(source: str, api: HfApi) -> str | None:
    """What the card of a repository says."""
    try:
        data = api.model_info(source).card_data
    except (OSError, ValueError, HfHubHTTPError):
        return None
    found = data.license if data is not None else None
    return ", ".join(found) if isinstance(found, list) else found


def _common_licence(licences: dict[str, str | None], unnamed: int) -> tuple[str | None, str | None]:
    """The licence that all parts have, or `other`; and what a reader has to know, of which the author is warned."""
    known = set(licences.values()) - {None}
    unknown = [source for source, licence in licences.items() if licence is None]
    unknown += [f"{unnamed} backbones that are not from the Hub"] if unnamed else []

    notes = []
    if len(known) > 1:
        parts = ", ".join(f"{source}: {licence}" for source, licence in licences.items() if licence)
        notes.append(f"The parts have different licences, and all of them apply: {parts}.")
    if unknown:
        notes.append(f"The licence of {', '.join(unknown)} is not known.")
    for note in notes:
        logger.warning(f"{note} Check that you may share the ensemble, and complete its model card.")

    licence = known.pop() if len(known) == 1 and not unknown else None
    return ("other" if known or (licence and "," in licence) else licence), " ".join(notes) or None


def read_report(path: str | os.PathLike) -> dict:
    """
    Read an evaluation's report.json.

    Raises:
        OSError, ValueError: if it is none.
    """
    with open(path, encoding="utf-8") as file:
        report = json.load(file)
    if missing := {"judges", "ours", "title", "command"} - set(report):
        raise ValueError(f"{path} is no report of an evaluation: it lacks {', '.join(sorted(missing))}.")
    return report


def _eval_results(report: dict | None):
    if report is None:
        return None
    from modeling_pcm_ensemble.evaluation.report import eval_results  # brings matplotlib

    return eval_results(report, report.get("dataset", "prompts"), report["title"])


def _evaluation_facts(report: dict) -> str:
    from modeling_pcm_ensemble.evaluation.report import win_rate_table

    parts = [f"{report['title']}. Made by `{report['command']}`."]
    for judge, baselines in report["judges"].items():
        parts += [f"Win rate of the {report['ours']}, judge: {judge}", win_rate_table(baselines)]
    return "\n\n".join(parts)


def _training_facts(model, training: dict | None) -> str:
    if training is not None:
        settings = ", ".join(f"{name} {value}" for name, value in training["settings"].items())
        return f"It was trained by `{training['trainer']}` for {training['steps']} updates ({settings})."
    if not model.pcm.head.weight.any():
        return "It is not trained: its head is zero, so that the experts' weights are those that a request gives."
    return "It was trained; how is not recorded in this repository."
