"""What saving leaves in a folder: nothing of an earlier checkpoint that loading reads, and files others can read."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_llama, tiny_tokenizer
from interruptions import WAYS, killed_at, stopped_at
from peft import PeftModel
from safetensors.torch import load_file

from modeling_pcm_ensemble import PCMEnsembleForCausalLM
from modeling_pcm_ensemble.checkpoint_staging import TOKENIZER, staged_folder, write_text
from modeling_pcm_ensemble.lora_peft_format import read_adapter, write_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT's call

TEMPLATES = {"default": "one", "tool_use": "two"}


def make_ensemble(template: str | dict | None = None, with_tokenizer: bool = True) -> PCMEnsembleForCausalLM:
    tokenizer = tiny_tokenizer(template) if with_tokenizer else None
    return PCMEnsembleForCausalLM.from_experts(
        {"a": tiny_llama(1)}, pcm=tiny_llama(4), pcm_layers=1, tokenizer=tokenizer
    )


@pytest.mark.parametrize(
    ("second", "template"),
    [
        pytest.param({"template": "three"}, "three", id="another-template"),
        pytest.param({"template": {"default": "4", "rag": "5"}}, {"default": "4", "rag": "5"}, id="other-templates"),
        pytest.param({"template": None}, None, id="no-template"),
        pytest.param({"with_tokenizer": False}, None, id="no-tokenizer"),
    ],
)
@pytest.mark.parametrize("first", ["one", TEMPLATES], ids=["one-template", "two-templates"])
def test_nothing_of_an_earlier_checkpoint_decides_what_is_loaded(tmp_path, first, second, template):
    make_ensemble(first).save_pretrained(tmp_path / "a", max_shard_size="20KB")
    for name in ("added_tokens.json", "chat_template.json", "spiece.model", "vocab.txt", "preprocessor_config.json"):
        (tmp_path / "a" / name).write_text("{}")
    mine = {"README.md", "notes.json", "my.safetensors", "logs/vocab.txt"}
    for name in mine:
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text("mine")
    model = make_ensemble(**second)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    found, expected = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "a", tmp_path / "b")
    )
    assert found == expected | mine
    tokenizer = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "a").tokenizer
    assert (tokenizer is not None) == second.get("with_tokenizer", True)
    assert getattr(tokenizer, "chat_template", None) == template


def test_every_file_that_a_tokenizer_reads_is_known():
    """By the text of the installed library, whose tokenizers would take minutes to import."""
    names = {"added_tokens.json", "chat_template.jinja", "special_tokens_map.json", "tokenizer_config.json"}
    for path in Path(transformers.__file__).parent.glob("**/token*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES\s*(?::[^=]*)?=\s*\{([^}]*)\}", path.read_text()):
            names |= set(re.findall(r':\s*"([^"]+)"', table))
    assert len(names) > 20
    assert not {name for name in names if not TOKENIZER.fullmatch(name)}


def test_a_folder_of_an_adapter_is_refused_before_anything_is_written(tmp_path):
    adapter = {"r": 2, "target_modules": ["q_proj"]}
    write_adapter(tmp_path, adapter, {}, "base")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=r"holds a PEFT adapter, adapter_config\.json.* Save to another folder"):
        make_ensemble().save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_an_adapter_is_not_written_beside_a_model(tmp_path):
    make_ensemble().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a model, config\.json.* folder of its own"):
        write_adapter(tmp_path, {"r": 2, "target_modules": ["q_proj"]}, {}, "base")
    assert PCMEnsembleForCausalLM.from_pretrained(tmp_path).config.expert_names == ["a"]


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_files_are_as_readable_as_the_umask_says(tmp_path, umask):
    model, before = make_ensemble("one"), os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "whole")
        model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
        write_adapter(tmp_path / "adapter", {"r": 2}, {"q.lora_A.weight": torch.ones(1)}, "base")
        write_text(tmp_path / "text" / "README.md", "text")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*") if path.is_file()}
    assert len(modes) > 50
    assert set(modes.values()) == {0o666 & ~umask}


def adapter_of(scale: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """An adapter whose weights and `lora_alpha` are both `scale`."""
    shapes = {"A": (2, 32), "B": (32, 2)}
    tensors = {
        f"model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.full(shape, float(scale))
        for layer in range(2)
        for side, shape in shapes.items()
    }
    return {"r": 2, "lora_alpha": scale, "target_modules": ["q_proj"]}, tensors


def scales(config: dict, tensors: dict[str, torch.Tensor]) -> tuple[int, int]:
    return config["lora_alpha"], int(next(iter(tensors.values()))[0, 0])


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_that_is_stopped_while_it_is_written_is_the_old_one_or_the_new_one(tmp_path, way):
    outcomes, finished, number = set(), False, 0
    while not finished:
        number += 1
        folder = tmp_path / str(number)
        write_adapter(folder, *adapter_of(8), "base")
        finished = stopped_at(number, way, lambda: write_adapter(folder, *adapter_of(64), "base"))  # noqa: B023
        try:  # PEFT does not finish what was interrupted, and may find nothing
            peft = PeftModel.from_pretrained(tiny_llama(1), folder, local_files_only=True)
            weight = peft.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
            assert (peft.peft_config["default"].lora_alpha, int(weight[0, 0])) in {(8, 8), (64, 64)}
        except ValueError as error:
            assert "adapter_config.json" in str(error)  # noqa: PT017
        found = scales(*read_adapter(folder, "The adapter", {}))
        assert found in {(8, 8), (64, 64)}
        assert found == (64, 64) or not finished
        outcomes.add(found)
        write_adapter(folder, *adapter_of(64), "base")
        assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert outcomes == {(8, 8), (64, 64)}


@pytest.mark.parametrize("way", WAYS)
def test_a_text_that_is_stopped_while_it_is_written_is_the_old_one_or_the_new_one(tmp_path, way):
    path, finished, number = tmp_path / "README.md", False, 0
    while not finished:
        number += 1
        write_text(path, "old")
        finished = stopped_at(number, way, lambda: write_text(path, "new"))
        assert path.read_text() in ("old", "new")
    assert path.read_text() == "new"
    write_text(path, "newer")
    assert os.listdir(tmp_path) == ["README.md"]


def test_what_a_folder_claims_to_have_left_whole_touches_nothing_beside_it(tmp_path):
    """A folder may come from strangers: names that lead out of it, and links, are not followed."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "vocab.txt").write_text("mine")
    model, folder = make_ensemble({"default": "one", "rag": "two"}), tmp_path / "a"
    model.save_pretrained(folder)
    killed_at("os.rename", ".saving/checkpoint_staging.py", lambda: model.save_pretrained(folder))
    mark = folder / ".saving" / ".whole"
    outside = ["../victim/vocab.txt", "../../victim", "model.safetensors/.."]
    mark.write_text(json.dumps(json.loads(mark.read_text()) + outside))
    (folder / "additional_chat_templates" / "rag.jinja").unlink()
    (folder / "additional_chat_templates").rmdir()
    (folder / "additional_chat_templates").symlink_to(victim)
    (folder / "vocab.json").symlink_to(victim / "vocab.txt")
    assert PCMEnsembleForCausalLM.from_pretrained(folder).tokenizer.chat_template == {"default": "one", "rag": "two"}
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"vocab.txt": "mine"}


@pytest.mark.parametrize("content", ["", "{", "{}", "3", "model.safetensors\nconfig.json"])
def test_a_damaged_mark_is_named(tmp_path, content):
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / ".whole").write_text(content)
    with pytest.raises(ValueError, match=r"\.whole is damaged. Remove '.*\.saving'"):
        PCMEnsembleForCausalLM.from_pretrained(tmp_path)


def test_files_may_have_any_name(tmp_path):
    names = ["a\u2028b", "c\x85d", "e f"]
    with staged_folder(tmp_path) as staging:
        for name in names:
            Path(staging, name).write_text(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_leftovers_of_a_dead_writer_are_removed_and_its_half_is_not_used(tmp_path):
    write_text(tmp_path / "a.json", json.dumps("old"))

    def write_half():
        with staged_folder(tmp_path) as staging:
            Path(staging, "a.json").write_text('"ne')
            Path(staging, "b.json").write_text("half of something else")
            os.mkdir(tmp_path / "stop")

    killed_at("os.mkdir", "stop", write_half)
    assert (tmp_path / ".saving" / "b.json").exists()
    write_text(tmp_path / "c.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": '"old"', "c.json": "new"}


def test_the_weights_of_another_variant_stay(tmp_path):
    model = make_ensemble()
    for variant in (None, "v2", "v2.x"):
        model.save_pretrained(tmp_path, variant=variant, max_shard_size="20KB")
    model.save_pretrained(tmp_path, variant="v2")
    found = {re.sub(r"-\d{5}-of-\d{5}", "-part", name) for name in os.listdir(tmp_path) if name.startswith("model.")}
    assert "model.v2.safetensors" in found
    assert "model.v2-part.safetensors" not in found
    assert "model.safetensors.index.v2.json" not in found
    assert {
        "model.safetensors.index.json",
        "model.safetensors.index.v2.x.json",
        "model.v2.x-part.safetensors",
    } <= found
    for variant in (None, "v2", "v2.x"):
        assert PCMEnsembleForCausalLM.from_pretrained(tmp_path, variant=variant).config.expert_names == ["a"]


def test_weights_can_be_saved_over_those_that_are_being_read(tmp_path):
    make_ensemble().save_pretrained(tmp_path)
    model = PCMEnsembleForCausalLM.from_pretrained(tmp_path)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())
