"""What trainers of a Preference Control Model have in common."""

import copy
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from ..checkpoint_staging import check_no_adapter, staged_folder, write_text
from ..configuration_pcm_ensemble import ADDITIVE
from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from .metrics import joined, means

COMMON_SETTINGS = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed")


def own_settings(config_class: type[TrainingArguments]) -> set[str]:
    """Return the names of the settings that it has beside those of every trainer."""
    return {field.name for field in fields(config_class)} - {field.name for field in fields(TrainingArguments)}


def padding_tokenizer(
    model: PCMEnsembleForCausalLM, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """
    Return the tokenizer given, else the ensemble's, with a padding token.

    Raises:
        ValueError: if there is neither.
    """
    tokenizer = tokenizer or model.tokenizer
    if tokenizer is None:
        raise ValueError("The ensemble was built without a tokenizer. Pass `processing_class`.")
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _rows(rows: list) -> Any:
    """Return a batch as it is."""
    return rows


class PCMTrainer(Trainer):
    r"""
    Trains `ensemble.pcm`, in float32 if it was in less, and leaves the rest of the ensemble as it was. `self.model` is
    the PCM; batches are lists of the dataset's rows; [`save_model`] writes the ensemble.

    Args:
        ensemble (`PCMEnsembleForCausalLM`): moved to the trainer's device.
        args (`TrainingArguments`): settings.
        train_embeddings (`bool`, defaults to `False`): whether the PCM's token embeddings learn too.
        options: passed to [`~transformers.Trainer`].

    Raises:
        ValueError: if FSDP or DeepSpeed would shard the PCM, or a PCM of strengths would be trained on a mixture.
    """

    def __init__(
        self, ensemble: PCMEnsembleForCausalLM, args: TrainingArguments, train_embeddings: bool = False, **options
    ):
        if ensemble.config.pcm_trained_for in ADDITIVE and not ensemble.config.adds_up:
            raise ValueError(
                f"The PCM was trained for `merge={ensemble.config.pcm_trained_for!r}` and gives strengths, of which a "
                "mixture would teach it ratios alone. Train it where tilts add up, by `merge='product'`: it serves "
                "mixtures as it is."
            )
        self.ensemble = ensemble
        ensemble.to(args.device)  # type: ignore[arg-type]  # its decorator hides the signature
        args._n_gpu = min(args.n_gpu, 1)  # rows are Python lists, which `DataParallel` would not split
        if ensemble.pcm.dtype in (torch.float16, torch.bfloat16):
            ensemble.pcm.float()  # small updates vanish in half precision
        ensemble.pcm.body.get_input_embeddings().requires_grad_(train_embeddings)

        use_cache = ensemble.config.use_cache
        super().__init__(model=ensemble.pcm, args=args, data_collator=_rows, **options)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("A PCM's trainer shards nothing: it is small. Launch without FSDP and DeepSpeed.")
        ensemble.config.use_cache = use_cache  # the ensemble's own, which the trainer takes for the PCM's
        self.model_accepts_loss_kwargs = False  # the loss is a mean of its micro-batch
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def train(self, *args, **kwargs):
        """Train as any trainer. Afterwards the PCM is without the precision wrapper of training, and evaluates."""
        if self.train_dataset is None:
            raise ValueError("There is nothing to train on. Pass `train_dataset`.")
        check_no_adapter(str(self.args.output_dir))  # or it could not be saved there in the end
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.state.global_step:
                self.ensemble.config.pcm_trained_for = self.ensemble.config.merge
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.ensemble.pcm.eval()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Write the ensemble, in the experts' dtype, and what a model card says of the training."""
        if not self.args.should_save:
            return
        folder = str(output_dir or self.args.output_dir)
        check_no_adapter(folder)

        pcm = self.ensemble.pcm
        saved = copy.deepcopy(pcm)
        saved.to(self.ensemble.backbones[0].dtype)  # type: ignore[arg-type]  # as above
        self.ensemble.pcm = saved
        try:
            with staged_folder(folder) as staging:
                self.ensemble.save_pretrained(staging)
                write_text(os.path.join(staging, "pcm_training.json"), json.dumps(self._training_facts(), indent=1))
        finally:
            self.ensemble.pcm = pcm

    def _training_facts(self) -> dict:
        """Return what a model card says of the training."""
        names = (*COMMON_SETTINGS, *sorted(own_settings(type(self.args))))
        values = {name: getattr(self.args, name) for name in names}
        settings = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
        return {"trainer": type(self).__name__, "steps": self.state.global_step, "settings": settings}

    # Metrics: what is noted in the steps between two logs is logged as means.

    def _note(self, metrics: dict[str, float]):
        for name, value in metrics.items():
            self._metrics[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None):
        """Log, with the means, over all processes, of what was noted since the last time."""
        noted = joined(gather_object([dict(self._metrics)]))
        self._metrics.clear()
        super().log(logs | means(noted), start_time)

    @contextmanager
    def _training_metrics_held(self) -> Iterator[None]:
        """Keep what was noted of training out of an evaluation's log."""
        held, self._metrics = self._metrics, defaultdict(list)
        try:
            yield
        finally:
            self._metrics = held
