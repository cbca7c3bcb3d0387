"""What trainers log is what docs/metrics.md documents."""

import re
from pathlib import Path

import pytest
from datasets import Dataset
from test_descriptions import TEXTS
from test_descriptions import make_trainer as make_description_trainer
from test_training import count_letters, make_trainer, tiny_ensemble, tiny_product

from modeling_pcm_ensemble.training.metrics import metric_name

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
NAMES = {"expert": "e[012]", "preference": r"e[012](\+e[012])*"}


def documented(trainer: str) -> dict[str, re.Pattern]:
    """Names in the tables of a trainer and of transformers' own, as patterns."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    tables = [section for section in sections if section.startswith((trainer, "Of transformers"))]
    names = re.findall(r"^\| `(\S+)` \|", "".join(tables), flags=re.MULTILINE)
    return {name: re.compile(re.sub(r"\\{(\w+)\\}", lambda found: NAMES[found[1]], re.escape(name))) for name in names}


def rebel_history(folder) -> list[dict]:
    history = []
    for model in (tiny_ensemble(), tiny_product()):
        options = {"text_only_fraction": 0.5, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
        trainer = make_trainer(folder, model, shared_reward=count_letters("aeiou"), **options)
        trainer.train()
        history += trainer.state.log_history
    return history


def description_history(folder) -> list[dict]:
    options = {"eval_dataset": Dataset.from_dict(TEXTS), "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_description_trainer(folder, tiny_ensemble(), max_steps=4, logging_steps=1, **options)
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize(
    ("trainer", "history"), [("RebelTrainer", rebel_history), ("DescriptionTrainer", description_history)]
)
def test_every_metric_that_is_logged_is_documented_and_the_other_way_round(trainer, history, tmp_path):
    logged = {name for entry in history(tmp_path) for name in entry}
    patterns = documented(trainer)
    assert not {name for name in logged if not any(pattern.fullmatch(name) for pattern in patterns.values())}
    unlogged = {name for name, pattern in patterns.items() if not any(map(pattern.fullmatch, logged))}
    assert unlogged <= {"eval_model_preparation_time"}  # of an evaluation before training


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("concise + friendly", "concise+friendly"),
        ("concise=2 + friendly=0.5", "concise=2+friendly=0.5"),
        ("very friendly + concise", "very_friendly+concise"),
    ],
)
def test_names_of_metrics_have_no_blanks(label, name):
    assert metric_name(label) == name
