"""Trains the Preference Control Model on what the mixture itself samples; the experts stay as they are."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..rewards.models import reward_function
from ..rewards.scoring import SHARED, Scorer
from .checkpoints import SETTINGS, CheckpointTrainer, digest_of
from .checks import DatasetCheck, check_arguments, column
from .losses import leave_one_out, ppo_loss, rebel_loss, rloo_loss
from .metrics import joined, means, reward_lists, rollout_metrics, weight_metrics
from .pcm_trainer import own_settings, padding_tokenizer
from .policies import policy_of
from .preference_sampling import PreferenceSampler, ToldPreference
from .rebel_config import RebelConfig
from .rollout_sampler import RolloutSampler
from .rollouts import Rollout, completion_weight_logits


class RebelTrainer(CheckpointTrainer):
    r"""
    Trains an ensemble's PCM online with REBEL, PPO or RLOO. A mixture's PCM learns shares. Where tilts add up, it
    learns how far each expert's tilt should go at a token, between nothing and twice what the user asks for.

    `trainer.ensemble` is the whole; `trainer.model`, which learns and of which checkpoints are made, is its PCM, in
    float32 if it was in less. `trainer.save_model(folder)` writes the ensemble in the experts' dtype.

    Args:
        model (`PCMEnsembleForCausalLM`): the ensemble, `merge="probabilities"`, `"product"` or `"adapters"`. A PCM
            that was trained where tilts add up serves every merge.
        reward_funcs (`Mapping`): each wanted expert's name → a function `(prompts, completions, **columns)` that gives
            a list of floats, or a sequence-classification model or repository.
        args (`RebelConfig`, *optional*): settings.
        train_dataset (`Dataset`): with a column `prompt`, texts or conversations; optionally `preference` (see
            [`preference_weights`]) and `reference` (one or more completions of the base model). Rewards get all
            columns.
        eval_dataset (`Dataset`, *optional*): answered under every preference set by [`evaluate`].
        processing_class (`PreTrainedTokenizerBase`, *optional*): defaults to the ensemble's tokenizer.
        callbacks, optimizers: as for [`~transformers.Trainer`].
        preference_sets (`list`, *optional*): preferences that prompts are answered under; defaults to every
            combination of one expert for each dimension.
        shared_reward (*optional*): one more reward, of the kinds above, that counts whatever is wanted, such as
            [`~rewards.answering.AnsweringReward`]; how much says `args.shared_reward_weight`.

    What is logged stands in docs/metrics.md of the repository.

    Raises:
        TypeError, ValueError: on input that would fail later, before anything runs.

    Source: arXiv 2407.04181 (the ensemble), arXiv 2404.16767 (REBEL).
    """

    args: RebelConfig
    # All but generation_batch_size: what fits into memory may change.
    settings_kept: ClassVar[set[str]] = SETTINGS | own_settings(RebelConfig) - {"generation_batch_size"}
    _rollout: Rollout | None = None
    _micro_batches_done = 0
    _micro_batches_saved = 0  # how many the last checkpoint has

    def __init__(
        self,
        model: PCMEnsembleForCausalLM,
        reward_funcs: Mapping,
        args: RebelConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks=None,
        optimizers=(None, None),
        *,
        preference_sets: list | None = None,
        shared_reward=None,
    ):
        args = args or RebelConfig(output_dir="rebel")
        check_arguments(model, reward_funcs, args)
        tokenizer = padding_tokenizer(model, processing_class)
        rewards = {name: reward_function(name, reward, args.device) for name, reward in reward_funcs.items()}
        if preference_sets is None and train_dataset is not None and None not in column(train_dataset, "preference"):
            preference_sets = []  # every row has its own
        self.preferences = PreferenceSampler(
            model.config, preference_sets, args.weight_distribution, args.text_only_fraction
        )

        self.check_dataset = DatasetCheck(model.config, tokenizer, self.preferences, set(rewards), args)
        if train_dataset is not None:
            self.check_dataset(train_dataset, "train_dataset")
        if eval_dataset is not None:
            self.check_dataset(eval_dataset, "eval_dataset")

        super().__init__(
            model,
            args,
            args.train_embeddings,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.policy = policy_of(model.config, args.exploration)
        self.reward_funcs = rewards
        if shared_reward is not None:
            rewards = rewards | {SHARED: reward_function(SHARED, shared_reward, args.device)}
        self.scorer = Scorer(rewards, args.shared_reward_weight)
        self.rollouts = RolloutSampler(model, tokenizer, self.scorer, self.policy, args)

    def train(self, *args, **kwargs):
        """Train as any trainer; a new run with a new rollout."""
        self._rollout, self._micro_batches_done, self._micro_batches_saved = None, 0, 0  # or a checkpoint's
        return super().train(*args, **kwargs)

    # What a checkpoint keeps beside what learns: the rollout at hand, and what the base model has answered

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        self._micro_batches_saved = self._micro_batches_done

    def _own_state(self, folder: Path) -> dict[str, Any]:
        rollout = {} if self._rollout is None else vars(self._rollout)
        torch.save(rollout, folder / f"rollout_{self.args.process_index}.pt")
        return {"micro_batches_done": self._micro_batches_done, "references": self.scorer.references}

    def _load_own_state(self, state: dict[str, Any], folder: Path):
        self._micro_batches_done = self._micro_batches_saved = state["micro_batches_done"]
        self.scorer.references, self.scorer.reference_rewards = state["references"], {}

        path = folder / f"rollout_{self.args.process_index}.pt"
        found = torch.load(path, map_location="cpu", weights_only=True)
        rollout = {name: tensor.to(self.args.device) for name, tensor in found.items()}
        self._rollout = Rollout(**rollout) if rollout else None

    def _run_settings(self) -> dict:
        return super()._run_settings() | {
            "shared reward": SHARED in self.scorer.reward_funcs,
            "weights of the experts": self._experts_digest,
        }

    @cached_property
    def _experts_digest(self) -> str:
        """A digest of the frozen experts, which what a checkpoint keeps of a rollout was recorded with."""
        return digest_of(self.ensemble.backbones.state_dict())

    # The data of a step: the trainer draws prompts itself, so that a step's data depends on its number alone.

    @property
    def _prompts_per_rollout(self) -> int:
        """How many prompts each process answers."""
        completions = self.args.per_device_train_batch_size * self.args.micro_batches_per_iteration
        return completions // self.args.num_generations

    def get_train_dataloader(self) -> DataLoader:
        """Return as many items as an epoch has micro-batches."""
        rollouts = max(len(self.train_dataset) // (self._prompts_per_rollout * self.args.world_size), 1)
        items: Any = range(rollouts * self.args.micro_batches_per_rollout)
        return DataLoader(items, collate_fn=lambda items: items)

    def _rows_of_rollout(self, number: int) -> list[dict]:
        """Return this process's rows of the dataset, from shuffled passes through it."""
        each = self._prompts_per_rollout
        start = (number * self.args.world_size + self.args.process_index) * each

        rows = []
        for drawn in range(start, start + each):
            epoch, place = divmod(drawn, len(self.train_dataset))
            shuffle = torch.Generator().manual_seed(self.args.seed + 7919 * epoch)
            order = torch.randperm(len(self.train_dataset), generator=shuffle)
            rows.append(self.train_dataset[order[place].item()])
        return rows

    def _next_micro_batch(self) -> Rollout:
        """Return whole groups of the current rollout, or of a new one where that is due."""
        number, step = divmod(self._micro_batches_done, self.args.micro_batches_per_rollout)
        if step == 0:
            self._rollout = self._new_rollout(number)
        rollout = cast(Rollout, self._rollout)  # a later step has its first one's, or a checkpoint's

        # Each iteration goes through all groups, in an order of its own.
        iteration, micro_batch = divmod(step, self.args.micro_batches_per_iteration)
        shuffle = torch.Generator().manual_seed(self._seed(number, iteration))
        order = torch.randperm(self._prompts_per_rollout, generator=shuffle)
        groups = order.chunk(self.args.micro_batches_per_iteration)[micro_batch]

        within = torch.arange(self.args.num_generations)
        index = (groups[:, None] * self.args.num_generations + within).flatten()  # (rows of the micro-batch,)
        return rollout.rows(index.to(rollout.prompt_ids.device))

    def _seed(self, *numbers: int) -> int:
        return hash((self.args.seed, self.args.process_index, *numbers)) % 2**31

    def _new_rollout(self, number: int) -> Rollout:
        """Sample and score a rollout, and log what came of it."""
        generator = random.Random(self._seed(number))
        prompts = self._rows_of_rollout(number)
        wishes = [self.preferences.draw(generator, row.get("preference")) for row in prompts]
        rows = [row for row in prompts for _ in range(self.args.num_generations)]
        told = [wish for wish in wishes for _ in range(self.args.num_generations)]

        start = time.perf_counter()
        rollout, scores = self.rollouts.sample(rows, told, self._seed(number), exploration=self.args.exploration)
        seconds = time.perf_counter() - start
        rollout.old_log_probs, expert_weights = self._old_log_probs(rollout)

        self._note({"rollout_tokens_per_second": rollout.completion_mask.sum().item() / seconds})
        self._note(rollout_metrics(rollout, scores, told, self.rollouts.ended(rollout)))
        self._note(weight_metrics(expert_weights, rollout.weights, told, self.preferences.names))
        return rollout

    @torch.no_grad()
    def _old_log_probs(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compute log π_t, `(rows, seq)`, as the update does, so that the first ratio is 1; and each row's mean weights
        of the experts, `(rows, experts)`.
        """
        size = self.args.per_device_train_batch_size
        log_probs, mean_weights = [], []
        for start in range(0, len(rollout), size):
            part = rollout.rows(slice(start, start + size))
            with self.compute_loss_context_manager():
                expert_weight_logits = self._expert_weight_logits(self.model, part)
                log_probs.append(self.policy.log_probs(expert_weight_logits, part.weights, part.recorded))
                expert_weights = self.policy.expert_weights(expert_weight_logits, part.weights)

            mask = part.completion_mask[..., None]  # (rows, seq, 1)
            mean_weights.append((expert_weights * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1))
        return torch.cat(log_probs), torch.cat(mean_weights)

    # The update

    def _expert_weight_logits(self, pcm, rollout: Rollout) -> torch.Tensor:
        pcm.train(self.args.gradient_checkpointing)  # which layers do in training only; there is no dropout then
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "prefix_ids")
        return completion_weight_logits(pcm, **{name: getattr(rollout, name) for name in names})

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Return the loss of a micro-batch of whole groups, a [`Rollout`]."""
        expert_weight_logits = self._expert_weight_logits(model, inputs)
        log_probs = self.policy.log_probs(expert_weight_logits, inputs.weights, inputs.recorded)  # (rows, seq)
        log_ratios = (log_probs - inputs.old_log_probs) * inputs.completion_mask
        loss = self._policy_loss(log_ratios, inputs.rewards, inputs.completion_mask)

        kl = self.policy.kl(log_probs, expert_weight_logits, inputs.weights, inputs.recorded)  # (rows, seq)
        measures = self.policy.measures(expert_weight_logits, inputs.weights, inputs.shares)

        args, mask = self.args, inputs.completion_mask
        penalty = args.beta * kl
        if args.entropy_coef:
            penalty = penalty - args.entropy_coef * measures["expert_weight_entropy"]
        if args.description_coef:
            share = measures["described_share"]
            penalty = penalty - args.description_coef * share.clamp(min=torch.finfo(share.dtype).tiny).log()
        # Over the most tokens there could be, so that a batch may be split in any way.
        loss = loss + (penalty * mask).sum() / (len(mask) * args.max_completion_length)

        with torch.no_grad():
            per_token = {"kl": kl} | measures
            self._note({name: ((values * mask).sum() / mask.sum()).item() for name, values in per_token.items()})
            self._note({"log_ratio": log_ratios.sum(dim=1).abs().mean().item()})
        return (loss, expert_weight_logits) if return_outputs else loss

    def _policy_loss(self, log_ratios: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Compute the loss without penalties, from the log-ratio of each token, `(rows, seq)`, and each row's reward,
        `(rows,)`.
        """
        args, groups = self.args, (-1, self.args.num_generations)
        rewards = rewards.view(groups)  # (prompts, completions)
        if args.loss_type == "rebel":
            return rebel_loss(log_ratios.sum(dim=1).view(groups), rewards, args.eta)

        advantages = leave_one_out(rewards).flatten()  # (rows,)
        if args.loss_type == "ppo":
            return ppo_loss(log_ratios, advantages, mask, args.epsilon, args.max_completion_length)
        return rloo_loss(log_ratios.sum(dim=1), advantages)

    def _prepare_inputs(self, inputs) -> Any:
        return inputs

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Make a step as any trainer; a rollout or reward that fails leaves a checkpoint behind."""
        inputs = self._all_or_none(self._next_micro_batch)
        self._micro_batches_done += 1

        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.device.type != "cpu":
            torch.accelerator.synchronize()  # what is timed has run
        seconds = time.perf_counter() - start
        self._note({"update_tokens_per_second": inputs.completion_mask.sum().item() / seconds})
        return loss

    def _all_or_none(self, call: Callable):
        """Return what `call` gives. Where it fails on any process, all of them write a checkpoint and raise."""
        value, error = None, None
        noted = {name: list(values) for name, values in self._metrics.items()}
        try:
            value = call()
        except Exception as caught:
            error = caught

        messages = gather_object([error and f"{type(error).__name__}: {error}"])
        failed = [message for message in messages if message]
        if not failed:
            return value

        self._metrics = defaultdict(list, noted)  # to which processes that did not fail have added
        error = error or RuntimeError(f"Another process failed: {failed[0]}")
        if self.is_in_train and self._micro_batches_done > self._micro_batches_saved:
            try:
                self._save_checkpoint(self.model_wrapped, trial=None)
            except Exception as unsaved:  # torch's and safetensors' errors of a full disk are no OSError
                raise error from unsaved
        raise error

    # Evaluation

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Answer every prompt under every preference set once, and return the mean rewards: over all, by preference and
        by expert. Processes share the work.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("There is nothing to evaluate on. Pass `eval_dataset`.")
        self.check_dataset(dataset, "eval_dataset")

        rewards = joined(gather_object(self._all_or_none(lambda: self._evaluation_rewards(dataset))))
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means(rewards).items()}
        with self._training_metrics_held():
            self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluation_rewards(self, dataset) -> list[dict[str, list[float]]]:
        """Return the rewards of this process's share of the prompts and preferences, batch by batch."""
        pairs = [(row, wish) for row in dataset for wish in self._evaluated(row)]
        pairs = pairs[self.args.process_index :: self.args.world_size]
        size = self.args.per_device_eval_batch_size
        quiet = self.args.disable_tqdm or not self.is_world_process_zero()

        rewards = []
        for start in tqdm(range(0, len(pairs), size), desc="evaluating", disable=quiet, leave=False):
            batch = pairs[start : start + size]
            told = [wish for _, wish in batch]
            _, scores = self.rollouts.sample([row for row, _ in batch], told, self._seed(-1, start))
            rewards.append(reward_lists(scores, told))
        return rewards

    def _evaluated(self, row: dict) -> list[ToldPreference]:
        """Return what a row is answered under: its own preference, or every set."""
        if row.get("preference") is not None:
            return [ToldPreference(self.preferences.parse(row["preference"]))]
        return self.preferences.sets
