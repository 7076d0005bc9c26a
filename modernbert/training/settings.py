"""What a pretraining run is told, checked where it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from modernbert.attention import BACKENDS
from modernbert.data.ordering import require_segments
from modernbert.errors import InputError
from modernbert.model import AttentionName

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Settings of `modernbert.training.pretrain.pretrain`.

    Args:
        max_steps: optimizer steps; the text is repeated as often as it takes, masked and reordered anew each time.
        batch_tokens: tokens of a step, on all ranks together; a step has `batch_tokens // max_length` bins.
        micro_batch_tokens: most tokens that a device takes at once; gradients of several such micro-batches make a
            step. All that its share of a step has when absent.
        max_length: most tokens of a piece, special tokens included, and the tokens of a bin.
        learning_rate: its peak.
        warmup_steps: of the linear rise to it; 6 % of the steps when absent.
        decay_steps: of the fall to 0 at the end; 20 % of the steps when absent.
        mlm_probability: share of tokens to predict.
        sop_segments: segments of sentence ordering, 2, 3 or 4; 0 leaves it out.
        sop_weight: of its loss against the masked-LM loss.
        precision: what matrices are multiplied in; weights and optimizer stay fp32.
        attention: backend to train with.
        gradient_checkpointing: compute layers again in the backward pass in place of keeping what they computed.
        compile: run the model through torch.compile.
        fsdp: shard parameters, gradients and optimizer over the ranks (FSDP2) in place of copying them (DDP).
        workers: processes that make batches beside the one that trains.
        log_every: steps between two lines of the log.
        checkpoint_every: steps between two checkpoints, a multiple of `log_every`; the last two are kept.
        tensorboard: also write the log for TensorBoard.
        seed: of initial weights, order, masking and reordering.

    Raises:
        InputError: a value is out of range.
    """

    max_steps: int
    batch_tokens: int = 65_536
    micro_batch_tokens: int | None = None
    max_length: int = 1024
    learning_rate: float = 8e-4
    warmup_steps: int | None = None
    decay_steps: int | None = None
    mlm_probability: float = 0.3
    sop_segments: int = 2
    sop_weight: float = 1.0
    precision: Precision = "fp32"
    attention: AttentionName = "banded"
    gradient_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    workers: int = 0
    log_every: int = 1
    checkpoint_every: int = 1000
    tensorboard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {
            "max_steps": 1, "max_length": 8, "log_every": 1, "checkpoint_every": 1, "workers": 0, "seed": 0,
            "warmup_steps": 0, "decay_steps": 0, "sop_weight": 0,
        }.items():  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise InputError(f"{name} must be at least {least}, not {value}")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.batch_tokens < self.max_length:
            raise InputError(f"batch_tokens must be at least max_length, {self.max_length}, not {self.batch_tokens}")
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < self.max_length:
            raise InputError(
                f"micro_batch_tokens must be at least max_length, {self.max_length}, not {self.micro_batch_tokens}"
            )
        if self.precision not in get_args(Precision):
            raise InputError(f"precision must be one of {', '.join(get_args(Precision))}, not {self.precision!r}")
        if self.attention not in BACKENDS:
            raise InputError(f"attention must be one of {', '.join(BACKENDS)}, not {self.attention!r}")
        require_segments(self.sop_segments)
        if self.checkpoint_every % self.log_every:
            raise InputError(
                f"checkpoint_every must be a multiple of log_every, {self.log_every}, not {self.checkpoint_every}: "
                "a run could not be resumed in the middle of what one line of the log sums up"
            )
        if self.warmup + self.decay > self.max_steps:
            raise InputError(
                f"warmup_steps {self.warmup} and decay_steps {self.decay} must fit into max_steps {self.max_steps}"
            )

    @property
    def warmup(self) -> int:
        """Steps of the rise."""
        return max(self.max_steps * 6 // 100, 1) if self.warmup_steps is None else self.warmup_steps

    @property
    def decay(self) -> int:
        """Steps of the fall."""
        return self.max_steps * 20 // 100 if self.decay_steps is None else self.decay_steps

    def micro_batches(self, ranks: int) -> tuple[int, int]:
        """Bins of a micro-batch, and micro-batches that a rank takes for a step.

        Raises:
            InputError: the bins of a step cannot be shared equally.
        """
        bins = self.batch_tokens // self.max_length
        share, rest = divmod(bins, ranks)
        if rest or not share:
            raise InputError(
                f"batch_tokens {self.batch_tokens} make {bins} bins of max_length {self.max_length}, which {ranks} "
                "ranks cannot share equally; change it to a multiple of max_length times ranks"
            )
        most = share if self.micro_batch_tokens is None else self.micro_batch_tokens // self.max_length
        size = max(size for size in range(1, share + 1) if share % size == 0 and size <= most)
        return size, share // size

    def that_decide(self) -> dict[str, Any]:
        """What the result depends on. Ranks, micro-batches and workers may change when a run is resumed."""
        free = {"micro_batch_tokens", "workers", "tensorboard", "checkpoint_every", "fsdp"}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in free}
