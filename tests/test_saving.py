"""Checkpoints: what comes back is what was saved, in a process that has never heard of this package."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, tiny_qwen2, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from modeling_pcm_ensemble import PCMEnsembleConfig, PCMEnsembleForCausalLM, __version__
from modeling_pcm_ensemble.checkpoint_build import set_end_tokens

CONTEXT = torch.tensor([[21, 22, 23, 24, 25]])
PREFERENCE = {"a": 1.0, "c": 0.5}


@pytest.fixture
def ensemble() -> PCMEnsembleForCausalLM:
    tied = tiny_llama(1, tie_word_embeddings=True)
    model = PCMEnsembleForCausalLM.from_experts(
        {
            "a": {"model": tied, "prompt": "Be brief.", "dimension": "length"},
            "b": tied,
            "c": {"model": tiny_gpt2(2), "prompt": "Be kind."},
            "d": tiny_qwen2(3),
        },
        pcm=tiny_llama(4),
        pcm_layers=1,
        tokenizer=tiny_tokenizer(),
        default_preference={"b": 1.0, "d": 2.0},
    )
    torch.manual_seed(5)
    torch.nn.init.normal_(model.pcm.head.weight)
    return model


def run_without_the_package(code: str, *arguments: str) -> str:
    """Run code in a Python that cannot import this package, however it is installed; give what it printed."""
    hide = "import sys; sys.modules['modeling_pcm_ensemble'] = None\n"
    command = [sys.executable, "-W", "error::FutureWarning", "-c", hide + textwrap.dedent(code), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    return result.stdout


def test_remote_code_gives_identical_logits_through_every_auto_class(ensemble, tmp_path):
    folder = str(tmp_path / "ensemble")
    ensemble.save_pretrained(folder)
    with torch.no_grad():
        expected = {
            "logits": ensemble(CONTEXT, preference=PREFERENCE).logits,
            "default": ensemble(CONTEXT).logits,
            "text": ensemble(CONTEXT, preference_text="be quick").logits,
        }
    save_file(expected, str(tmp_path / "expected.safetensors"))
    code = """
        import sys, torch
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
        folder, expected = sys.argv[1], load_file(sys.argv[2])
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert config.expert_names == ["a", "b", "c", "d"], config
        context = torch.tensor([[21, 22, 23, 24, 25]])
        for auto_class in (AutoModel, AutoModelForCausalLM):
            model = auto_class.from_pretrained(folder, trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules."), type(model)
            with torch.no_grad():
                assert torch.equal(model(context, preference={"a": 1.0, "c": 0.5}).logits, expected["logits"])
                assert torch.equal(model(context).logits, expected["default"])
                assert torch.equal(model(context, preference_text="be quick").logits, expected["text"])
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        print(repr(tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)))
        model.save_pretrained(sys.argv[3])
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[3], trust_remote_code=True)
        again = AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True)
        with torch.no_grad():
            assert torch.equal(again(context).logits, expected["default"])
    """
    printed = run_without_the_package(code, folder, str(tmp_path / "expected.safetensors"), str(tmp_path / "again"))
    assert printed.strip() == repr("<s>user\nHi<e>\n")


def test_the_uploaded_files_import_only_what_every_user_has(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path)
    assert not (tmp_path / "demo.py").exists()
    code = """
        import sys
        from pathlib import Path
        from transformers.dynamic_module_utils import get_imports
        found = {name for path in Path(sys.argv[1]).glob("*.py") for name in get_imports(path)}
        print(sorted(found - set(sys.stdlib_module_names)))
    """
    assert (
        run_without_the_package(code, str(tmp_path)).strip()
        == "['huggingface_hub', 'safetensors', 'torch', 'transformers']"
    )


def test_the_config_comes_back_as_it_was(ensemble, tmp_path):
    ensemble.config.save_pretrained(tmp_path)
    config = PCMEnsembleConfig.from_pretrained(tmp_path)
    assert config.to_dict() == ensemble.config.to_dict()
    assert [type(backbone).__name__ for backbone in config.backbones] == ["LlamaConfig", "GPT2Config", "Qwen2Config"]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_an_installed_package_needs_no_remote_code(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), PCMEnsembleConfig)
    for auto_class in (AutoModel, AutoModelForCausalLM):
        model = auto_class.from_pretrained(tmp_path)
        assert type(model) is PCMEnsembleForCausalLM
        assert torch.equal(model(CONTEXT).logits, ensemble(CONTEXT).logits)


def test_what_is_loaded_is_frozen_but_for_the_pcm_and_tied_as_before(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path)
    model = PCMEnsembleForCausalLM.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in model.backbones.parameters())
    assert all(parameter.requires_grad for parameter in model.pcm.parameters())
    assert not model.training
    llama = model.backbones[0]
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert "backbones.0.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    for name, tensor in ensemble.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_sharded_checkpoint_comes_back_whole_and_replaces_what_stood_there(ensemble, tmp_path):
    folder = tmp_path / "ensemble"
    ensemble.save_pretrained(folder, max_shard_size="50KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(PCMEnsembleForCausalLM.from_pretrained(folder)(CONTEXT).logits, ensemble(CONTEXT).logits)
    torch.nn.init.ones_(ensemble.pcm.head.weight)
    (folder / "README.md").write_text("mine")
    ensemble.save_pretrained(folder)
    assert {path.name for path in folder.glob("model*.safetensors*")} == {"model.safetensors"}
    assert torch.equal(PCMEnsembleForCausalLM.from_pretrained(folder)(CONTEXT).logits, ensemble(CONTEXT).logits)
    assert (folder / "README.md").read_text() == "mine"
    assert os.listdir(tmp_path) == [folder.name]


def test_dtype_and_attention_reach_every_part_at_loading(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path)
    model = PCMEnsembleForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    configs = model.config.sub_config_items().values()
    assert {config._attn_implementation for config in configs} == {"eager"}
    assert {config.dtype for config in configs} == {torch.bfloat16}
    assert model.pcm.body.config is model.config.pcm


def test_generation_settings_and_tokenizer_are_saved_along(ensemble, tmp_path):
    ensemble.generation_config.max_new_tokens = 7
    ensemble.save_pretrained(tmp_path)
    model = PCMEnsembleForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.max_new_tokens == 7
    assert model.tokenizer.chat_template == ensemble.tokenizer.chat_template
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert tokenizer("Hi")["input_ids"] == ensemble.tokenizer("Hi")["input_ids"]
    assert model.generate(CONTEXT, preference_text="be quick", do_sample=False).shape == (1, 12)


def test_an_ensemble_without_a_tokenizer_is_saved_without_one(prompted, tmp_path):
    prompted.save_pretrained(tmp_path)
    model = PCMEnsembleForCausalLM.from_pretrained(tmp_path)
    assert model.tokenizer is None
    assert torch.equal(model(CONTEXT).logits, prompted(CONTEXT).logits)


ADAPTER_OF_NO_EXPERT = {"backbones.adapters.0.model.layers.0.mlp.up_proj.lora_A": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda w: w.pop("pcm.head.weight"), r"1 missing \(the first is pcm.head.weight", id="missing"),
        pytest.param(lambda w: w.update(ADAPTER_OF_NO_EXPERT), r"1 unexpected \(the first is backbones", id="adapter"),
        pytest.param(lambda w: w.update({"pcm.head.weight": torch.ones(9, 32)}), "1 mismatched", id="shape"),
    ],
)
def test_weights_that_do_not_belong_to_the_config_are_refused(ensemble, tmp_path, change, words):
    ensemble.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        PCMEnsembleForCausalLM.from_pretrained(tmp_path)


def test_saving_and_loading_logs_no_warning(ensemble, tmp_path, transformers_log):
    ensemble.save_pretrained(tmp_path)
    model = PCMEnsembleForCausalLM.from_pretrained(tmp_path)
    model.generate(CONTEXT, preference=PREFERENCE, max_new_tokens=3)
    assert transformers_log() == []


def test_variants_stand_beside_one_another(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path)
    expected = ensemble(CONTEXT).logits
    torch.nn.init.ones_(ensemble.pcm.head.weight)
    ensemble.save_pretrained(tmp_path, variant="v2", max_shard_size="50KB")
    ensemble.save_pretrained(tmp_path, variant="v2")
    assert torch.equal(PCMEnsembleForCausalLM.from_pretrained(tmp_path)(CONTEXT).logits, expected)
    second = PCMEnsembleForCausalLM.from_pretrained(tmp_path, variant="v2")
    assert torch.equal(second(CONTEXT).logits, ensemble(CONTEXT).logits)
    assert {p.name for p in tmp_path.glob("*.safetensors*")} == {"model.safetensors", "model.v2.safetensors"}


def test_the_tokenizer_comes_from_where_the_model_came_from(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path / "sub")
    model = PCMEnsembleForCausalLM.from_pretrained(tmp_path, subfolder="sub")
    assert model.tokenizer("Hi")["input_ids"] == ensemble.tokenizer("Hi")["input_ids"]


def test_a_value_set_at_loading_is_checked_too(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="`merge` must be one of"):
        PCMEnsembleForCausalLM.from_pretrained(tmp_path, merge="foo")


def test_loading_does_not_change_what_the_weights_say(ensemble, tmp_path):
    """The zero head of a new PCM must not overwrite a trained one."""
    ensemble.save_pretrained(tmp_path)
    assert_close(PCMEnsembleForCausalLM.from_pretrained(tmp_path).pcm.head.weight, ensemble.pcm.head.weight)


def test_a_config_that_names_its_own_weights_is_refused(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path / "ensemble")
    tiny_llama(1).save_pretrained(tmp_path / "expert")
    for path in tmp_path.glob("*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": "adapter_model.bin"}))
    with pytest.raises(ValueError, match="names its weights itself, by `transformers_weights`"):
        PCMEnsembleForCausalLM.from_pretrained(tmp_path / "ensemble")
    with pytest.raises(ValueError, match="names its weights itself, by `transformers_weights`"):
        PCMEnsembleForCausalLM.from_experts({"a": str(tmp_path / "expert")}, pcm=tiny_llama(4))


@pytest.mark.parametrize("name", ["../outside.safetensors", "{tmp_path}/outside.safetensors", "pytorch_model.bin"])
def test_an_index_that_names_weights_elsewhere_is_refused(ensemble, tmp_path, name):
    """Of an ensemble, and of an expert's model."""
    ensemble.save_pretrained(tmp_path / "ensemble", max_shard_size="50KB")
    ensemble.backbones[0].save_pretrained(tmp_path / "expert", max_shard_size="50KB")
    for folder in (tmp_path / "ensemble", tmp_path / "expert"):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        first = min(index["weight_map"].values())
        (folder / first).rename(tmp_path / "outside.safetensors")
        moved = {key: name.format(tmp_path=tmp_path) if v == first else v for key, v in index["weight_map"].items()}
        path.write_text(json.dumps(index | {"weight_map": moved}))
    with pytest.raises(ValueError, match="They must be safetensors beside it"):
        PCMEnsembleForCausalLM.from_pretrained(tmp_path / "ensemble")
    with pytest.raises(ValueError, match="They must be safetensors beside it"):
        PCMEnsembleForCausalLM.from_experts({"a": str(tmp_path / "expert")}, pcm=tiny_llama(4))


def test_pickles_are_never_loaded(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path / "ensemble")
    ensemble.backbones[0].save_pretrained(tmp_path / "expert")
    for folder in ("ensemble", "expert"):
        weights = load_file(tmp_path / folder / "model.safetensors")
        torch.save(weights, tmp_path / folder / "pytorch_model.bin")
        (tmp_path / folder / "model.safetensors").unlink()
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match=r"model\.safetensors"):
            PCMEnsembleForCausalLM.from_pretrained(tmp_path / "ensemble", **options)
        with pytest.raises(OSError, match=r"model\.safetensors"):
            PCMEnsembleForCausalLM.from_experts({"a": str(tmp_path / "expert")}, pcm=tiny_llama(4), **options)


def test_trust_in_remote_code_is_not_passed_on_to_experts(tmp_path):
    with pytest.raises(ValueError, match="`trust_remote_code` is not passed on to experts"):
        PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(4), trust_remote_code=True)


def test_python_that_runs_in_a_checkpoints_folder_is_told_what_it_imports(ensemble, tmp_path):
    """Python looks there first, and finds the checkpoint's own modeling_pcm_ensemble.py."""
    ensemble.save_pretrained(tmp_path)
    code = "import modeling_pcm_ensemble; print(modeling_pcm_ensemble.__version__)"
    alone, safe = (
        subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        for flags in ([], ["-P"])
    )
    assert "ImportError: " in alone.stderr
    assert "is a checkpoint's code, and hides the package of the same name" in alone.stderr
    assert safe.stdout.strip() == __version__, safe.stderr


def test_a_changed_end_token_leaves_a_generation_config_one_that_may_be_saved_as_it_was_published(tmp_path):
    """
    It fails when transformers saves changed ones too, so that `set_end_tokens` need not write what marks one as
    published, or when transformers marks it in another way.
    """
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.5, "eos_token_id": 2}')
    published, changed = (GenerationConfig.from_pretrained(tmp_path) for _ in range(2))
    try:
        published.save_pretrained(tmp_path / "unchanged")
    except ValueError:
        pytest.skip("This transformers (5.21) saves no such generation config, changed or not.")

    set_end_tokens(published, [2, 7])
    published.save_pretrained(tmp_path / "published")
    assert GenerationConfig.from_pretrained(tmp_path / "published").eos_token_id == [2, 7]

    changed.eos_token_id = [2, 7]
    with pytest.raises(ValueError, match="temperature"):
        changed.save_pretrained(tmp_path / "changed")
