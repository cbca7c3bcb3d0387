"""Loading and saving an ensemble, whole or thin, as any transformers model."""

import copy
import os
import shutil
import tempfile
from functools import partial

from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import PushToHubMixin, logging
from transformers.utils.hub import resolve_revision
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint_build import HUB_OPTIONS, load_tokenizer
from .checkpoint_staging import check_no_adapter, finish_save, last_saved, staged_folder
from .checkpoint_structure import check_loading, check_not_injected, check_structure
from .checkpoint_thin import thin_checkpoint, whole_state
from .checkpoint_trust import check_weight_names
from .compile_attention import GROUPED_SDPA  # noqa: F401, which registers it
from .configuration_pcm_ensemble import PCMEnsembleConfig
from .preference import check_config

logger = logging.get_logger(__name__)

PUSH_OPTIONS = ("repo_id", "commit_message", "private", "create_pr", "revision", "commit_description", "tags")
FULL_PRECISION = ("pcm", r"backbones\.\d+\.(lm_head|embed_out)")  # regular expressions


class PCMEnsemblePreTrainedModel(PreTrainedModel):
    """What every transformers model has: loading, saving, pushing; and the tokenizer that goes with it."""

    config: PCMEnsembleConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("past_key_values",)

    def __init__(self, config: PCMEnsembleConfig):
        super().__init__(config)
        self._tokenizer = None
        self._tokenizer_options = {}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args, output_loading_info: bool = False, **kwargs
    ):
        """
        Load an ensemble as any model.

        Raises:
            ValueError: if configuration and weights disagree, or a thin checkpoint's backbones are not those it names.
            OSError: if files cannot be fetched, nor found in the cache; if an interrupted save cannot be finished, or
                another process saves to the folder meanwhile.
        """
        source, config = pretrained_model_name_or_path, kwargs.get("config")
        folder = None if source is None else os.path.join(source, kwargs.get("subfolder") or "")
        saved = _finish_save(folder, config)

        kwargs |= {"ignore_mismatched_sizes": kwargs.get("ignore_mismatched_sizes", True), "use_safetensors": True}
        options = {name: kwargs[name] for name in (*HUB_OPTIONS, "subfolder") if name in kwargs}
        if isinstance(config, PreTrainedConfig):
            thin, found = config.thin, vars(config)
        else:
            found = cls._config_dict(config or source, options)
            thin = found.get("thin")
        if (model_type := found.get("model_type", cls.config_class.model_type)) != cls.config_class.model_type:
            raise ValueError(
                f"{str(source)!r} holds a model of the type {model_type!r}, and no ensemble. Make one of it: "
                "`PCMEnsembleForCausalLM.from_experts`."
            )

        code_options = {name: value for name, value in options.items() if name != "trust_remote_code"}
        if source is not None:
            check_weight_names(source, found, kwargs.get("variant"), **code_options)
        if (quantization := kwargs.get("quantization_config")) is not None:
            kwargs["quantization_config"] = _of_backbones(quantization)

        load = super().from_pretrained if thin is None else partial(cls._from_thin, thin)
        model, loading = load(source, *args, output_loading_info=True, **kwargs)
        if last_saved(folder) != saved:
            raise OSError(
                f"{folder!r} was saved to while it was loaded. Its configuration and weights may not belong together; "
                "load it again."
            )
        check_loading(loading, model.state_dict(), f"the checkpoint {model.name_or_path!r}")
        model._tokenizer_options = options
        return (model, loading) if output_loading_info else model

    @classmethod
    def _config_dict(cls, source: str | os.PathLike, options: dict) -> dict:
        try:
            found = cls.config_class.get_config_dict(source, **options)[0]
        except TypeError:  # transformers looks into what the file holds
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"config.json of {str(source)!r} must hold a JSON object. Save or fetch it again.")
        return found

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """
        Split what is being loaded over processes, as `distributed_config` says.

        Raises:
            ValueError: if tensor parallelism would split layers that adapters are added to, or unlike backbones.
        """
        if distributed_config.tp_size > 1:
            model.backbones.check_tensor_parallel()
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    @classmethod
    def _from_thin(cls, thin: dict, source: str | os.PathLike, *args, config=None, variant=None, **kwargs):
        """`from_pretrained` of a thin checkpoint."""
        options = {name: kwargs.pop(name) for name in (*HUB_OPTIONS, "subfolder") if name in kwargs}
        options.pop("trust_remote_code", None)  # trusts the ensemble's code, not the backbones'
        revision_options = {key: options[key] for key in ("token", "local_files_only", "cache_dir") if key in options}
        options["revision"] = resolve_revision(source, options.get("revision"), **revision_options)
        if isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config)
        else:
            config, kwargs = cls.config_class.from_pretrained(
                config or source, return_unused_kwargs=True, **kwargs, **options
            )
        config.thin = None  # what is loaded is whole
        state = whole_state(thin, source, variant, **options)
        model, loading = super().from_pretrained(None, *args, config=config, state_dict=state, **kwargs)
        model.name_or_path = config._name_or_path = str(source)
        model.generation_config = GenerationConfig.from_pretrained(source, **options)
        return model, loading

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, thin: bool = False, **kwargs
    ):
        r"""
        Save as any model, with the tokenizer if there is one. Of a checkpoint that stood there, nothing is left that
        loading reads, but weights of another `variant`; so save a tokenizer of your own afterwards.

        An interrupted save leaves the old checkpoint or the new one. Of the new one some files may still lie in
        `save_directory`/.saving, from where the next save or load moves them up. Another process or thread that saves
        to the same folder waits.

        Args:
            thin (`bool`): save only the PCM and the adapters, and name each backbone by its repository and commit on
                the Hub, from where `from_pretrained` fetches it.

        Raises:
            ValueError: if the folder holds a PEFT adapter, a part is not, or no longer, what its configuration makes,
                the configuration has a wrong value, backbones were quantised before the ensemble was built, or
                `thin`, and a backbone is not what a repository holds.
        """
        check_no_adapter(save_directory)
        check_config(self.config)
        sharded = getattr(self.config, "distributed_config", None)
        check_not_injected(self.pcm.body, "the PCM")
        if sharded is None and getattr(self, "hf_quantizer", None) is None:
            for index, backbone in enumerate(self.backbones):
                check_structure(backbone, f"backbone {index}")

        if thin and sharded is not None:
            raise ValueError("A model that is split over processes is saved whole. Load that, and save it thin.")
        if getattr(self, "hf_quantizer", None) is None and any(hasattr(b, "hf_quantizer") for b in self.backbones):
            raise ValueError(
                "Backbones that were quantised one by one cannot be saved. Save the ensemble of the whole models, and "
                "load that with `quantization_config`; what is loaded so can be saved."
            )
        if not self.should_save_on_this_rank(is_main_process):
            super().save_pretrained(save_directory, is_main_process=False, **kwargs)
            self.barrier_after_gathered_checkpoint_save(sharded)
            return

        push = kwargs.pop("push_to_hub", False)
        hub_options = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        try:
            tokenizer = self.tokenizer
        except OSError as error:  # weights must not be lost because a repository cannot be reached
            logger.warning(f"The ensemble is saved without its tokenizer, which could not be loaded: {error}")
            tokenizer = None

        for part in (self.pcm.body, *self.backbones):
            part.config.dtype = part.dtype  # `to()` leaves it behind, and `dtype="auto"` reads it
        if thin and "state_dict" in kwargs:
            raise ValueError("`thin=True` chooses what is saved itself. Leave `state_dict` out.")
        if thin:
            token = {"token": kwargs["token"]} if "token" in kwargs else {}
            kwargs["state_dict"], sources = thin_checkpoint(self, **token)
            kwargs.pop("max_shard_size", None)  # it is always one file

        with staged_folder(save_directory) as staging:
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            super().save_pretrained(staging, **kwargs)
            if thin:  # in a copy: another thread may be saving this model whole
                config = copy.deepcopy(self.config)
                config.thin = sources
                config.save_pretrained(staging)
        self.barrier_after_gathered_checkpoint_save(sharded)
        if push:
            repo_id = hub_options.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repo_id, thin=thin, token=kwargs.get("token"), **hub_options)

    def push_to_hub(self, repo_id: str, *, thin: bool = False, **kwargs) -> str:
        """Push as any model; `thin` as in [`save_pretrained`]."""
        if not thin:
            return super().push_to_hub(repo_id, **kwargs)
        with tempfile.TemporaryDirectory() as folder:  # before the repository is made, so that what fails leaves none
            self.save_pretrained(folder, thin=True, token=kwargs.get("token"))
            pushed = copy.copy(self)
            pushed.save_pretrained = lambda target, **_: shutil.copytree(folder, target, dirs_exist_ok=True)
            return PushToHubMixin.push_to_hub(pushed, repo_id, **kwargs)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer given to `from_experts`, else the checkpoint's own, loaded at first use; None without one."""
        if self._tokenizer is None and self.name_or_path:
            self._tokenizer = load_tokenizer(self.name_or_path, config=self.config, **self._tokenizer_options)
        return self._tokenizer

    def get_input_embeddings(self) -> nn.Module:
        """The PCM's, which is the part that learns."""
        return self.pcm.body.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.pcm.body.set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """
        Resize every part's, experts' output layers and the adapters on them too; arguments and result (the PCM's) as
        for any model.

        Raises:
            ValueError: if tokens of an expert's prompt or description would be out of the vocabulary.
        """
        self._check_holds_prefixes(new_num_tokens)
        for part in (self.pcm.body, *self.backbones):
            part.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        for index, bank in self.backbones.adapters.items():
            bank.fit(self.backbones[int(index)])
        self.backbones.train()  # what is new is frozen too
        self.config.vocab_size = min(c.get_text_config().vocab_size for c in self.config.sub_config_items().values())
        self.vocab_size = self.config.vocab_size
        return self.get_input_embeddings()

    def _check_holds_prefixes(self, num_tokens: int | None):
        used = {token for expert in self.config.experts for token in expert["prompt_ids"] + expert["description_ids"]}
        used.add(self.config.prefix_bos_token_id or 0)
        if num_tokens is not None and num_tokens <= max(used):
            raise ValueError(
                f"`new_num_tokens` {num_tokens} is too small: experts' prompts and descriptions have tokens up to "
                f"{max(used)}. Use at least {max(used) + 1}, or build the ensemble with a smaller vocabulary."
            )

    def load_pcm(self, path: str | os.PathLike):
        """
        Load the PCM's weights from a safetensors file. Weights that it leaves out, such as embeddings that were frozen
        while the PCM was trained, stay as they are.

        Raises:
            RuntimeError: if the file holds a weight that the PCM has not, or that has another shape there.
        """
        self.pcm.load_state_dict(self.pcm.state_dict() | load_file(path))


def _finish_save(folder: str | None, config) -> tuple[int, int] | None:
    """
    Finish an interrupted save to the folder of the weights; refuse a configuration that was read before that. Give
    which save the folder is of.
    """
    saved = last_saved(folder)
    while folder is not None and finish_save(folder):
        if isinstance(config, PreTrainedConfig):
            raise OSError(
                f"An interrupted save to {folder!r} has just been finished. `config` may have been read before that; "
                "read it again, and load again."
            )
        saved = last_saved(folder)
    return saved


def _of_backbones(quantization: QuantizationConfigMixin | dict) -> QuantizationConfigMixin:
    """The same, but that the PCM and, as in any model, the output layers keep full precision."""
    if isinstance(quantization, dict):
        quantization = AutoQuantizationConfig.from_dict(quantization)
    quantization = copy.deepcopy(quantization)
    name = next(n for n in ("llm_int8_skip_modules", "modules_to_not_convert") if hasattr(quantization, n))
    setattr(quantization, name, [*(getattr(quantization, name) or ()), *FULL_PRECISION])
    return quantization


__all__ = ["PCMEnsemblePreTrainedModel"]
