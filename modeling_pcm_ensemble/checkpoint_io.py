"""Loading and saving an ensemble, whole or thin, as any transformers model."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import PushToHubMixin, logging
from transformers.utils.hub import resolve_revision
from transformers.utils.quantization_config import QuantizationConfigMixin

from .backbones import ExpertBackbones
from .checkpoint_hub import HUB_OPTIONS
from .checkpoint_sources import load_tokenizer
from .checkpoint_staging import WEIGHTS, check_no_adapter, finish_save, last_saved, staged_folder
from .checkpoint_structure import check_loading, check_not_injected, check_structure, load_with_info
from .checkpoint_thin import thin_checkpoint, whole_state
from .checkpoint_trust import check_endpoints, check_weight_names, endpoint_addresses
from .compile_attention import GROUPED_SDPA  # noqa: F401, which registers it
from .configuration_pcm_ensemble import PCMEnsembleConfig
from .pcm import PreferenceControlModel
from .preference import check_config
from .requirements import endpoints

logger = logging.get_logger(__name__)

PUSH_OPTIONS = ("repo_id", "commit_message", "private", "create_pr", "revision", "commit_description", "tags")
FULL_PRECISION = ("pcm", r"backbones\.\d+\.(lm_head|embed_out)")  # regular expressions


class PCMEnsemblePreTrainedModel(PreTrainedModel):
    """What every transformers model has: loading, saving, pushing; and the tokenizer that goes with it."""

    config: PCMEnsembleConfig
    pcm: PreferenceControlModel
    backbones: ExpertBackbones
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012, as transformers declares it

    def __init__(self, config: PCMEnsembleConfig):
        super().__init__(config)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenizer_options: dict[str, Any] = {}  # where the checkpoint's own comes from

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        output_loading_info: bool = False,
        allow_endpoints: Sequence[str] = (),
        trust_endpoints: bool = False,
        endpoint_keys: Mapping[str, str | Callable[[], str]] | None = None,
        **kwargs,
    ):
        """
        Load an ensemble as any model.

        Args:
            pretrained_model_name_or_path, config, output_loading_info, kwargs: as for any model.
            allow_endpoints (`Sequence[str]`): addresses to which texts may be sent, where the checkpoint names them.
            trust_endpoints (`bool`): whether texts may be sent to whatever address the checkpoint names.
            endpoint_keys (`Mapping`, *optional*): by address, the name of the environment variable that holds its key,
                or a function that returns the key.

        Returns:
            The ensemble; with `output_loading_info=True` a pair of it and of what was missing or left over.

        Raises:
            PermissionError: if the checkpoint names an endpoint that is not allowed.
            ValueError: if configuration and weights disagree, or a thin checkpoint's backbones are not those it names.
            OSError: if files cannot be fetched, nor found in the cache; if an interrupted save cannot be finished, or
                another process saves to the folder meanwhile.
        """
        source = pretrained_model_name_or_path
        folder = None if source is None else os.path.join(source, kwargs.get("subfolder") or "")
        saved = _finish_save(folder, config)

        kwargs |= {"ignore_mismatched_sizes": kwargs.get("ignore_mismatched_sizes", True), "use_safetensors": True}
        options = {name: kwargs[name] for name in (*HUB_OPTIONS, "subfolder") if name in kwargs}
        found = cls._config_dict(config or source, options)
        if (model_type := found.get("model_type", PCMEnsembleConfig.model_type)) != PCMEnsembleConfig.model_type:
            raise ValueError(
                f"{str(source)!r} holds a model of the type {model_type!r}, and no ensemble. Make one of it: "
                "`PCMEnsembleForCausalLM.from_experts`."
            )

        allowed = None if trust_endpoints else endpoint_addresses("allow_endpoints", allow_endpoints)
        keys = dict(zip(endpoint_addresses("endpoint_keys", endpoint_keys or {}), (endpoint_keys or {}).values()))
        check_endpoints(found.get("backbones") or [], allowed, str(source))
        code_options = {name: value for name, value in options.items() if name != "trust_remote_code"}
        if source is not None:
            check_weight_names(source, found, kwargs.get("variant"), **code_options)
        if (quantization := kwargs.get("quantization_config")) is not None:
            kwargs["quantization_config"] = _of_backbones(quantization)

        if (thin := found.get("thin")) is None:
            model, loading = load_with_info(super().from_pretrained, source, *args, config=config, **kwargs)
        elif source is not None:
            model, loading = cls._from_thin(thin, source, *args, config=config, **kwargs)
        else:
            raise ValueError("The `config` is a thin checkpoint's. Give the folder or repository that it belongs to.")
        if last_saved(folder) != saved:
            raise OSError(
                f"{folder!r} was saved to while it was loaded. Its configuration and weights may not belong together; "
                "load it again."
            )
        check_loading(loading, model.state_dict(), f"the checkpoint {model.name_or_path!r}")
        model._tokenizer_options = options
        check_endpoints(model.config.backbones, allowed, str(source))  # what was read may have changed since
        for endpoint in model.backbones.endpoints.values():
            endpoint.allowed, endpoint.key = True, endpoints().Key(keys.get(endpoint.config.address))
        return (model, loading) if output_loading_info else model

    @classmethod
    def _config_dict(
        cls, source: PreTrainedConfig | str | os.PathLike | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        """What a configuration says, or config.json of a folder or repository."""
        if isinstance(source, PreTrainedConfig):
            return vars(source)
        if source is None:
            raise ValueError("There is nothing to load. Give a folder or repository, or a `config`.")

        found = None
        with suppress(TypeError):  # transformers looks into what the file holds
            found = PCMEnsembleConfig.get_config_dict(source, **options)[0]
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
    def _from_thin(
        cls, thin: dict[str, Any], source: str | os.PathLike, *args, config=None, variant: str | None = None, **kwargs
    ) -> tuple[Any, dict[str, Any]]:
        """`from_pretrained` of a thin checkpoint, with loading information."""
        options = {name: kwargs.pop(name) for name in (*HUB_OPTIONS, "subfolder") if name in kwargs}
        options.pop("trust_remote_code", None)  # trusts the ensemble's code, not the backbones'
        revision_options = {key: options[key] for key in ("token", "local_files_only", "cache_dir") if key in options}
        options["revision"] = resolve_revision(source, options.get("revision"), **revision_options)

        if isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config)
        else:
            config, kwargs = PCMEnsembleConfig.from_pretrained(
                config or source, return_unused_kwargs=True, **kwargs, **options
            )
        config.thin = None  # what is loaded is whole

        state = whole_state(thin, source, variant, **options)
        model, loading = load_with_info(
            super().from_pretrained, None, *args, config=config, state_dict=state, **kwargs
        )
        model.name_or_path = config._name_or_path = str(source)
        model.generation_config = GenerationConfig.from_pretrained(source, **options)
        return model, loading

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *args,
        thin: bool = False,
        **kwargs,
    ):
        r"""
        Save as any model, with the tokenizer if there is one. Of a checkpoint that stood there, nothing is left that
        loading reads, but weights of another `variant`; so save a tokenizer of your own afterwards.

        An interrupted save leaves the old checkpoint or the new one. Of the new one some files may still lie in
        `save_directory`/.saving, from where the next save or load moves them up. Another process or thread that saves
        to the same folder waits.

        Args:
            save_directory, is_main_process, state_dict, push_to_hub, kwargs: as for any model.
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
        self._check_can_be_saved(thin, sharded is not None)
        if thin and state_dict is not None:
            raise ValueError("`thin=True` chooses what is saved itself. Leave `state_dict` out.")
        if not self.should_save_on_this_rank(is_main_process):
            super().save_pretrained(save_directory, False, state_dict, False, *args, **kwargs)
            self.barrier_after_gathered_checkpoint_save(sharded)
            return

        push_options = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        tokenizer = self._tokenizer_to_save()
        for part in (self.pcm.body, *self.backbones):
            part.config.dtype = part.dtype  # `to()` leaves it behind, and `dtype="auto"` reads it
        if thin:
            token = {"token": kwargs["token"]} if "token" in kwargs else {}
            state_dict, sources = thin_checkpoint(self.state_dict(), self.backbones, self.pcm.body, **token)
            kwargs.pop("max_shard_size", None)  # it is always one file

        with staged_folder(save_directory) as staging:
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            super().save_pretrained(staging, is_main_process, state_dict, False, *args, **kwargs)
            if thin:  # in a copy: another thread may be saving this model whole
                config = copy.deepcopy(self.config)
                config.thin = sources
                config.save_pretrained(staging)

        self.barrier_after_gathered_checkpoint_save(sharded)
        if push_to_hub:
            repo_id = push_options.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repo_id, thin=thin, token=kwargs.get("token"), **push_options)

    def _check_can_be_saved(self, thin: bool, sharded: bool):
        """Refuse what could not be loaded again."""
        check_not_injected(self.pcm.body, "the PCM")
        quantised = getattr(self, "hf_quantizer", None) is not None
        if not sharded and not quantised:
            for index, backbone in enumerate(self.backbones):
                check_structure(backbone, f"backbone {index}")

        if thin and sharded:
            raise ValueError("A model that is split over processes is saved whole. Load that, and save it thin.")
        if not quantised and any(hasattr(backbone, "hf_quantizer") for backbone in self.backbones):
            raise ValueError(
                "Backbones that were quantised one by one cannot be saved. Save the ensemble of the whole models, and "
                "load that with `quantization_config`; what is loaded so can be saved."
            )

    def _tokenizer_to_save(self) -> PreTrainedTokenizerBase | None:
        try:
            return self.tokenizer
        except OSError as error:  # weights must not be lost because a repository cannot be reached
            logger.warning(f"The ensemble is saved without its tokenizer, which could not be loaded: {error}")
            return None

    # mypy takes transformers' own, which is wrapped, for no method.
    def push_to_hub(self, repo_id: str, *args, thin: bool = False, **kwargs) -> str:  # type: ignore[override]
        """
        Push as any model.

        Args:
            repo_id, kwargs: as for any model.
            thin (`bool`): as in [`save_pretrained`].

        Returns:
            The commit, as for any model.

        Raises:
            ValueError: as [`save_pretrained`].
        """
        if not thin:
            return PreTrainedModel.push_to_hub(self, repo_id, *args, **kwargs)

        kwargs.setdefault("commit_message", f"Upload {type(self).__name__}")
        with tempfile.TemporaryDirectory() as folder:  # before the repository is made, so that what fails leaves none
            self.save_pretrained(folder, thin=True, token=kwargs.get("token"))
            return _SavedFolder(folder).push_to_hub(repo_id, *args, **kwargs)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """
        The tokenizer given to `from_experts`, else the checkpoint's own; None without one.

        The checkpoint's own is loaded at first use: most loaded ensembles are given tokens, and one whose tokenizer
        cannot be fetched or read works with them.
        """
        if self._tokenizer is None and self.name_or_path:
            self._tokenizer = load_tokenizer(self.name_or_path, config=self.config, **self._tokenizer_options)
        return self._tokenizer

    def get_input_embeddings(self) -> nn.Module:
        """The PCM's, which is the part that learns."""
        return self.pcm.body.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        """Set the PCM's."""
        self.pcm.body.set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """
        Resize every part's, experts' output layers and the adapters on them too; arguments and result (the PCM's) as
        for any model.

        Raises:
            ValueError: if tokens of an expert's prompt or description would be out of the vocabulary.
        """
        self._check_holds_prefixes(new_num_tokens)

        embeddings = self.pcm.body.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        for backbone in self.backbones:
            backbone.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        for index, bank in self.backbones.banks.items():
            bank.fit(self.backbones[index])
        self.backbones.train()  # what is new is frozen too

        self.config.vocab_size = min(self.config.part_sizes().values())
        self.vocab_size = self.config.vocab_size
        return embeddings

    def _check_holds_prefixes(self, num_tokens: int | None):
        highest = self.config.prefix_bos_token_id or 0
        for expert in self.config.experts:
            highest = max([highest, *expert["prompt_ids"], *expert["description_ids"]])

        if num_tokens is not None and num_tokens <= highest:
            raise ValueError(
                f"`new_num_tokens` {num_tokens} is too small: experts' prompts and descriptions have tokens up to "
                f"{highest}. Use at least {highest + 1}, or build the ensemble with a smaller vocabulary."
            )

    def save_pcm(self, path: str | os.PathLike, dtype: torch.dtype | None = None):
        """
        Write those of the PCM's weights that learn to a safetensors file, which [`load_pcm`] reads. What is frozen
        now, such as token embeddings, is left out, also if it was trained before. The file's metadata say what the PCM
        was trained for, its layers, and its experts.

        Args:
            path (`str` or `os.PathLike`): the file.
            dtype (`torch.dtype`, *optional*): of the weights in the file; that of the PCM if not given.

        Raises:
            ValueError: if nothing of the PCM learns, or the file has the name of a checkpoint's weights.

        Example:

        ```python
        >>> file = os.path.join(folder, "pcm.safetensors")
        >>> model.save_pcm(file)
        >>> model.load_pcm(file)

        ```
        """
        learnt = {name: p.detach().to(dtype or p.dtype) for name, p in self.pcm.named_parameters() if p.requires_grad}
        if not learnt:
            raise ValueError("All of the PCM is frozen. Call `requires_grad_(True)` on the parts that were trained.")
        metadata = {
            "trained_for": self.config.pcm_trained_for or self.config.merge,
            "layers": str(self.config.num_hidden_layers),
            "experts": json.dumps(self.config.expert_names),
        }
        folder, name = os.path.split(path)
        if WEIGHTS.fullmatch(name):
            raise ValueError(f"{name} is what a whole checkpoint is called. Call a PCM's file pcm.safetensors, or so.")
        with staged_folder(folder) as staging:
            save_file(learnt, os.path.join(staging, name), metadata=metadata)

    def load_pcm(self, path: str | os.PathLike):
        """
        Load the PCM's weights from a safetensors file of [`save_pcm`]. Weights that it leaves out stay as they are.
        A file that does not say of how many layers it is has all of the body but token embeddings, or the head alone.
        One that does not say what it was trained for is of a mixture of probabilities.

        Raises:
            ValueError: if its PCM has another number of layers, weights that this one has not or has in other shapes,
                is of other experts, or was trained for shares of a mixture where this ensemble adds tilts.

        Example: see [`save_pcm`].
        """
        with safe_open(path, "pt") as file:
            metadata, stored = file.metadata() or {}, set(file.keys())
        self._check_pcm_file(path, metadata, stored)

        trained_for = metadata.get("trained_for", "probabilities")
        config = copy.copy(self.config)
        config.pcm_trained_for = trained_for
        config.validate_merge()

        weights, own = load_file(path), self.pcm.state_dict()
        if unlike := [name for name in weights if name not in own or own[name].shape != weights[name].shape]:
            raise ValueError(
                f"{path} holds a PCM of another architecture or size: this one has no {unlike[0]} of the shape "
                f"{tuple(weights[unlike[0]].shape)}. Build the ensemble with the `pcm` that it was trained with."
            )
        self.pcm.load_state_dict(own | weights)
        self.config.pcm_trained_for = trained_for

    def _check_pcm_file(self, path: str | os.PathLike, metadata: dict[str, str], stored: set[str]):
        """Refuse a PCM of another depth or of other experts."""
        layers, built = metadata.get("layers"), str(self.config.num_hidden_layers)
        if layers not in (None, built):
            raise ValueError(
                f"{path} holds a PCM of {layers} layers, and that of this ensemble has {built}. Build the ensemble "
                f"with `pcm_layers={layers}`."
            )

        embeddings = set(self.pcm.get_input_embeddings().parameters())
        body = {f"body.{name}" for name, p in self.pcm.body.named_parameters() if p not in embeddings}
        if layers is None and stored & body and body - stored:
            raise ValueError(
                f"{path} holds a part of the PCM's body, and does not say of how many layers. It was written by an "
                "earlier version, or for a PCM of fewer layers. If this one is right, load the tensors into "
                "`model.pcm`, and call `save_pcm`."
            )

        names = self.config.expert_names
        if (trained := json.loads(metadata.get("experts", json.dumps(names)))) != names:
            raise ValueError(
                f"{path} holds a PCM of the experts {', '.join(trained)}, and this ensemble has {', '.join(names)}. "
                "The PCM knows them by their order: give the experts these names, in this order."
            )


class _SavedFolder(PushToHubMixin):
    """What stands in a folder, pushed as transformers pushes what it saves itself."""

    def __init__(self, folder: str):
        self.folder = folder

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        shutil.copytree(self.folder, save_directory, dirs_exist_ok=True)


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
        whole = AutoQuantizationConfig.from_dict(quantization)
    else:
        whole = copy.deepcopy(quantization)

    names = [name for name in ("llm_int8_skip_modules", "modules_to_not_convert") if hasattr(whole, name)]
    if not names:
        raise ValueError(
            f"`quantization_config` is a {type(whole).__name__}, which would quantise the PCM and output layers. "
            "Use one that has `modules_to_not_convert` (torchao, quanto, …) or `llm_int8_skip_modules` (bitsandbytes)."
        )
    name = names[0]
    setattr(whole, name, [*(getattr(whole, name) or ()), *FULL_PRECISION])
    return whole


__all__ = ["PCMEnsemblePreTrainedModel"]
