"""RebelTrainer's settings and arguments: what is refused, and under which names they are given."""

import copy
import importlib
import pickle
import sys
from inspect import signature

import pytest
from datasets import Dataset
from test_training import PROMPTS, REWARDS, make_trainer, tiny_ensemble

from modeling_pcm_ensemble.training import RebelConfig, RebelTrainer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rewards": {"e0": REWARDS["e0"]}}, "`reward_funcs` lacks a reward for e1, e2"),
        ({"rewards": REWARDS | {"e0": 3}}, "The reward of 'e0' must be a function"),
        ({"prompts": []}, "`train_dataset` is empty"),
        ({"prompts": ["hi", ""]}, "Row 1 of `train_dataset`: `prompt` must be a text or a conversation, got ''"),
        ({"prompts": ["hi", None]}, "Row 1 of `train_dataset`: `prompt` must be a text or a conversation, got None"),
        ({"prompts": ["hi", "x" * 60]}, "Row 1 of `train_dataset` has a prompt of 60 tokens"),
        ({"columns": {"preference": ["e0"] * 5 + ["e9"]}}, "Row 5 of `train_dataset`: .*unknown expert 'e9'"),
        ({"preference_sets": []}, "`preference_sets` is empty"),
        ({"num_generations": 1, "per_device_train_batch_size": 4}, "`num_generations` must be at least 2"),
        ({"num_generations": 4}, "must be a multiple of `num_generations`"),
        ({"loss_type": "dpo"}, "`loss_type` must be one of rebel, ppo, rloo, got 'dpo'"),
        ({"eta": 0.0}, "`eta` must be above 0"),
        ({"eta": float("nan")}, "`eta` must be above 0, got nan"),
        ({"beta": float("nan")}, "`beta` must not be below 0, got nan"),
        ({"generation_batch_size": -1}, "`generation_batch_size` must be above 0"),
        ({"exploration": float("nan")}, "`exploration` must be between 0 and 10"),
        ({"exploration": 1.0, "loss_type": "ppo"}, "`exploration` needs `loss_type` 'rebel'"),
        ({"exploration": 1.0, "beta": 0.1}, "`exploration` needs .* `beta` 0"),
        ({"text_only_fraction": 1.5}, "`text_only_fraction` must be between 0 and 1"),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, "must be a multiple of `gradient_accumul"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_trained_is_refused_before_anything_runs(options, words, tmp_path):
    with pytest.raises((TypeError, ValueError), match=words):
        make_trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("clip", "epsilon"),
        ("kl_coef", "beta"),
        ("rollout_batch_size", "generation_batch_size"),
        ("preference_weights", "weight_distribution"),
    ],
)
def test_a_setting_that_was_renamed_is_refused_with_its_new_name(old, new):
    with pytest.raises(TypeError, match=f"`{old}` of RebelConfig is called `{new}` now"):
        RebelConfig("rebel", **{old: 1})
    assert hasattr(RebelConfig, new)


def test_settings_may_be_copied(tmp_path):
    config = RebelConfig(str(tmp_path), epsilon=0.3)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_the_order_of_arguments_is_trls(tmp_path):
    assert list(signature(RebelTrainer).parameters)[:6] == [
        "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class",
    ]  # fmt: skip
    config, dataset = RebelConfig(str(tmp_path)), Dataset.from_dict({"prompt": PROMPTS})
    with pytest.raises(TypeError, match=r"is a RebelConfig. The order is RebelTrainer\(model, reward_funcs, args"):
        RebelTrainer(tiny_ensemble(), config, REWARDS, dataset)
    with pytest.raises(TypeError, match="`reward_funcs` must map the experts' names to rewards, got function"):
        RebelTrainer(tiny_ensemble(), REWARDS["e0"], config, dataset)


def test_training_without_its_extra_says_how_to_get_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("modeling_pcm_ensemble.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install 'pcm-ensemble\[training\]'"):
        importlib.import_module("modeling_pcm_ensemble.training")
