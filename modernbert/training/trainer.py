"""transformers' Trainer with what pretraining adds: two losses, StableAdamW, a log, a stop at NaN.

The loss of a step is a mean over all labels of the step, whatever the ranks and micro-batches that share them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments

from modernbert.data.packed import Collator, PackedPieces, Visits
from modernbert.sentence_order import ModernBertForPreTraining, order_accuracy
from modernbert.training.flops import matrix_rate, training_flops
from modernbert.training.optimizer import stable_adamw
from modernbert.training.run_directory import RunDirectory, WholeCheckpoints

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PretrainingTrainer(Trainer):
    """Trains `ModernBertForPreTraining` on bins.

    Args:
        model: joint model.
        args: `max_steps`, batch size in bins and so on; `output_dir` is `run.partial`.
        data: the bins.
        collator: makes batches of them.
        run: where the log and the documents of a diverged batch go.
    """

    def __init__(
        self,
        model: ModernBertForPreTraining,
        args: TrainingArguments,
        *,
        data: PackedPieces,
        collator: Collator,
        run: RunDirectory,
    ) -> None:
        callbacks = [WholeCheckpoints(run)]
        super().__init__(model, args, data_collator=collator, train_dataset=data, callbacks=callbacks)
        self._config, self._run = model.config, run
        self._matrix_rate = matrix_rate(args.device, _DTYPES.get(self.precision, torch.float32)) * args.world_size
        self._sums = torch.zeros(4, dtype=torch.float64)  # masked-LM loss, ordering loss, orders, right ones
        self._flops = self._tokens = self._steps = 0
        self._since = time.perf_counter()

    @property
    def precision(self) -> str:
        """Name of the precision that autocast computes in."""
        return "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32"

    # Data, optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        args = self.args
        bins = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        assert isinstance(self.train_dataset, PackedPieces)
        return Visits(len(self.train_dataset), bins, args.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """StableAdamW for the model, wrapped or not."""
        if self.optimizer is None:  # type: ignore[has-type]  # set by Trainer
            trained = self.model if model is None else model
            self.optimizer = stable_adamw(trained, self.args.learning_rate, sharded=self.is_fsdp_enabled)
        return self.optimizer

    # Loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The micro-batches of a step; each learns how many orders the step has, on all ranks together."""
        self._steps += 1
        batches, num_labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and "order_labels" in batches[0]:
            orders = sum((batch["order_labels"] != -100).sum() for batch in batches)
            orders = self.accelerator.gather(torch.as_tensor(orders, device=device)).sum()
            for batch in batches:
                batch["num_orders_in_batch"] = orders
        return batches, num_labels

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch.

        Raises:
            TrainingError: the loss is not a number.
        """
        documents = inputs.pop("documents")
        lengths = inputs["cu_seqlens"].diff().tolist()
        self._tokens += sum(lengths)
        self._flops += training_flops(self._config, lengths, int((inputs["labels"] != -100).sum()))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._run.diverge(
                float(loss),
                step=self.state.global_step + 1,
                learning_rate=self._get_learning_rate(),
                batch={"documents": documents},
                advice="start again with a lower learning rate or without these documents",
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The joint loss; its parts are kept for the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self._sums[0] += outputs.masked_lm_loss.detach().double().cpu()
        if outputs.order_loss is not None:
            self._sums[1] += outputs.order_loss.detach().double().cpu()
            self._sums[2:] += torch.tensor(order_accuracy(outputs.order_logits, inputs["order_labels"]))
        return (loss, outputs) if return_outputs else loss

    # Log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the losses' parts, the ordering accuracy, speed and utilisation to what Trainer logs."""
        if "loss" in logs:
            sums = self.accelerator.reduce(self._sums.to(self.args.device, torch.float32)).tolist()
            seconds = time.perf_counter() - self._since
            if sums[2]:
                logs["masked_lm_loss"], logs["order_loss"] = sums[0] / self._steps, sums[1] / self._steps
                logs["order_accuracy"] = sums[3] / sums[2]
            world = self.args.world_size
            logs["tokens_per_second"] = self._tokens * world / seconds
            logs["model_flop_utilisation"] = self._flops * world / seconds / self._matrix_rate
            self._sums.zero_()
            self._tokens = self._flops = self._steps = 0
            self._since = time.perf_counter()
        super().log(logs, start_time)
        if "loss" in logs and self.is_world_process_zero():
            with self._run.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.state.log_history[-1]) + "\n")
        del self.state.log_history[:-1]  # the file has them; checkpoints would grow with the run
