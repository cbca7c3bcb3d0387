"""Checkpoints of a run: what learns, and what its trainer needs beside it; whole, or not there at all."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from ..checkpoint_staging import STAGING, finish_save, staged_folder
from .pcm_trainer import PCMTrainer
from .preference_sampling import PreferenceSampler

WEIGHTS_FILE, STATE_FILE = "pcm.safetensors", "run_state.json"
SETTINGS = {"world_size", "seed", "per_device_train_batch_size", "gradient_accumulation_steps"}
EXPERT_SETTINGS = ("name", "backbone", "adapter", "dimension", "prompt_ids", "description_ids")


def digest_of(weights: Mapping[str, Any]) -> str:
    """Return a digest of weights and their names."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(name.encode())
        if isinstance(weight, torch.Tensor) and not weight.is_meta:  # what is quantised may have others beside
            digest.update(weight.detach().dequantize().float().cpu().numpy().tobytes())
    return digest.hexdigest()


class CheckpointTrainer(PCMTrainer):
    """
    The part of a PCM's trainer that saves and resumes. What a trainer needs beside the weights that learn, it adds by
    [`_own_state`] and [`_load_own_state`]; what must be the same for a run to go on, by [`_run_settings`] and
    `settings_kept`.
    """

    train_dataset: Any
    preferences: PreferenceSampler
    settings_kept: ClassVar[set[str]] = SETTINGS  # names of the settings that must be the same
    _staging: Path | None = None  # where a checkpoint is being written

    @property
    def _pcm(self):
        return self.accelerator.unwrap_model(self.model)

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    def train(self, *args, **kwargs):
        """Train as any trainer; from a checkpoint, after what a killed run had saved whole is in its place."""
        finish_save(self._output_dir)
        return super().train(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict=None):
        """Write what a checkpoint keeps of the ensemble: what learns."""
        if not self.args.should_save:
            return
        folder = Path(output_dir) if output_dir else self._output_dir
        folder.mkdir(parents=True, exist_ok=True)
        self.ensemble.save_pcm(folder / WEIGHTS_FILE)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Write the ensemble, or, into a checkpoint, what learns."""
        if self._staging is not None:
            self._save(output_dir)
        else:
            super().save_model(output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str):
        """Leave checkpoints here; `push_to_hub` pushes the ensemble."""

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint beside its place, and move it there when it is whole."""
        with ExitStack() as staged:
            self._staging = self._output_dir / STAGING
            staged.callback(setattr, self, "_staging", None)
            if self.args.should_save:
                staged.enter_context(staged_folder(self._output_dir))
            self._write_checkpoint(model, trial, self._staging)

        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(self._output_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,  # an earlier run may have left one of more updates here
            )
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, model, trial, staging: Path):
        """Write a checkpoint to the staging folder, every process its part."""
        self.accelerator.wait_for_everyone()
        final = self._output_dir / f"checkpoint-{self.state.global_step}"
        folder = staging / final.name
        folder.mkdir(parents=True, exist_ok=True)

        state = {"settings": self._run_settings(), "metrics": self._metrics} | self._own_state(folder)
        (folder / f"{self.args.process_index}_{STATE_FILE}").write_text(json.dumps(state))

        super()._save_checkpoint(model, trial)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _get_output_dir(self, trial):
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _own_state(self, folder: Path) -> dict[str, Any]:
        """Return what this process needs to go on, as JSON has it; what is no JSON may be written to `folder`."""
        return {}

    def _load_own_state(self, state: dict[str, Any], folder: Path):
        """Take on what [`_own_state`] has returned and written."""

    def _run_settings(self) -> dict:
        """Return what must be the same for a run to go on as it began."""
        config = self.ensemble.config
        pcm = config.sub_config_items()["pcm"].to_diff_dict()

        settings = {name: getattr(self.args, name) for name in sorted(self.settings_kept)} | {
            "endpoints": config.endpoint_facts,
            "experts": [{name: expert[name] for name in EXPERT_SETTINGS} for expert in config.experts or []],
            "expert_top_k": config.expert_top_k,
            "merge": config.merge,
            "reference": config.reference,
            "preference sets": [wish.label for wish in self.preferences.sets],
            "prompts": len(self.train_dataset),
            "rows of the dataset": self._dataset_digest,
            "pcm": {name: pcm[name] for name in sorted(pcm) if name not in ("transformers_version", "dtype")},
            "frozen weights of the PCM": self._frozen_digest(),
        }
        return json.loads(json.dumps(settings))  # as it is read again

    @cached_property
    def _dataset_digest(self) -> str:
        """A digest of all rows, in their order."""
        digest = hashlib.sha256()
        for row in self.train_dataset:
            digest.update(json.dumps(row, default=str).encode())
        return digest.hexdigest()

    def _frozen_digest(self) -> str:
        """Return a digest of the weights that checkpoints leave out."""
        return digest_of({name: p for name, p in self._pcm.named_parameters() if not p.requires_grad})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        folder, rank = Path(resume_from_checkpoint), self.args.process_index
        finish_save(folder.parent)
        self._check_settings(folder)

        state = json.loads((folder / f"{rank}_{STATE_FILE}").read_text())
        self._metrics = defaultdict(list, state["metrics"])
        self._load_own_state(state, folder)
        self._load_learnt(folder)

    def _check_settings(self, folder: Path):
        """Refuse a checkpoint of other settings, data or weights."""
        saved = json.loads((folder / f"0_{STATE_FILE}").read_text())["settings"]
        for name, value in self._run_settings().items():
            if saved.get(name) != value:
                raise ValueError(
                    f"The checkpoint {str(folder)!r} was made with {name} = {saved.get(name)!r}, but the trainer has "
                    f"{value!r}. Go on with the settings it was begun with, or start in another folder."
                )

    def _load_learnt(self, folder: Path):
        learnt = load_file(folder / WEIGHTS_FILE)
        missing, unexpected = self._pcm.load_state_dict(learnt, strict=False)
        trainable = {name for name, p in self._pcm.named_parameters() if p.requires_grad}
        if unexpected or trainable & set(missing):
            raise ValueError(f"{folder / WEIGHTS_FILE} holds another PCM's weights: {[*missing, *unexpected][:4]} …")

    def _load_best_model(self):
        self._load_learnt(Path(str(self.state.best_model_checkpoint)))
