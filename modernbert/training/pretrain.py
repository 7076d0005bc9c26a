"""Pretraining: masked language modelling and sentence ordering, from documents to a checkpoint.

    documents -> pieces on disk -> bins -> batches (modernbert.data) -> PretrainingTrainer -> OUT

The same call runs on one CPU, on one GPU and, started by torchrun, on many.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from modernbert.config import ModernBertConfig, load_config
from modernbert.data.documents import Document
from modernbert.data.packed import Collator, PackedPieces, special_tokens
from modernbert.data.pieces import Counts, Pieces, write_pieces
from modernbert.data.tokenizer import rounded_vocab_size, save_tokenizer
from modernbert.errors import InputError
from modernbert.model import ModernBertForMaskedLM
from modernbert.output import whole_directory
from modernbert.sentence_order import ModernBertForPreTraining, load_masked_lm
from modernbert.tiling import tile
from modernbert.training.optimizer import schedule_arguments
from modernbert.training.progress import quiet_transformers, train_with_progress
from modernbert.training.run_directory import RunDirectory
from modernbert.training.settings import PretrainSettings
from modernbert.training.trainer import PretrainingTrainer

# The embeddings stay in the root's group: the decoder, which is there too, shares their weights.
_FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["ModernBertLayer"]}


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """How a run went: `losses` are means over successive stretches of steps."""

    steps: int
    losses: tuple[float, ...]
    seconds: float

    @classmethod
    def of(cls, trainer: Trainer) -> TrainingReport:
        """Reads it from a trainer that is done."""
        history = trainer.state.log_history
        losses = tuple(entry["loss"] for entry in history if "loss" in entry)
        return cls(steps=trainer.state.global_step, losses=losses, seconds=history[-1]["train_runtime"])


@dataclass(frozen=True, kw_only=True)
class PretrainingReport:
    """What a run trained on, how full its bins were, and the lines of its log, one for every `log_every` steps."""

    counts: Counts
    fill: float
    log: tuple[dict[str, float], ...]

    @property
    def losses(self) -> tuple[float, ...]:
        """The losses in the order of the steps."""
        return tuple(line["loss"] for line in self.log)


def config_for(tokenizer: PreTrainedTokenizerFast, preset: str, **overrides: Any) -> ModernBertConfig:
    """A preset with the tokenizer's special tokens, and its vocabulary rounded up to a multiple of 64."""
    return ModernBertConfig.preset(
        preset,
        **{
            "vocab_size": rounded_vocab_size(len(tokenizer)),
            "pad_token_id": tokenizer.pad_token_id,
            "cls_token_id": tokenizer.cls_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            **overrides,
        },
    )


def extended(model: Path, *, max_length: int | None = None, global_theta: float | None = None) -> ModernBertConfig:
    """The configuration of a model for a second phase on longer texts.

    ModernBERT went from 1,024 to 8,192 tokens with a theta of 160,000 in place of 10,000 in the global layers; local
    layers keep theirs, because their window does not grow (arXiv:2412.13663, section 2.2).

    Args:
        model: directory of the first phase's model.
        max_length: tokens that the model shall take; never fewer than before.
        global_theta: base of the rotary frequencies in global layers; as before when absent.

    Raises:
        InputError: there is no ModernBERT, or a value is out of range.
    """
    config = load_config(model)
    values = {**config.to_dict(), "max_position_embeddings": max(config.max_position_embeddings, max_length or 0)}
    extended = ModernBertConfig.from_dict(values)
    return extended if global_theta is None else with_global_theta(extended, global_theta)


def enlarged(model: Path, preset: str) -> ModernBertConfig:
    """The configuration of a larger model that shall start from this one: all but the sizes is as it is here.

    Raises:
        InputError: there is no ModernBERT, or no such preset.
    """
    small, large = load_config(model), ModernBertConfig.preset(preset)
    grown = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_types")
    return ModernBertConfig.from_dict({**small.to_dict(), **{name: getattr(large, name) for name in grown}})


def with_global_theta(config: ModernBertConfig, theta: float) -> ModernBertConfig:
    """The same with another base of the rotary frequencies in global layers.

    Raises:
        InputError: it is not above 0.
    """
    values = copy.deepcopy(config.to_dict())
    values["rope_parameters"]["full_attention"]["rope_theta"] = float(theta)
    return ModernBertConfig.from_dict(values)


def require_vocabulary(config: ModernBertConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Checks that the model has a row for every token and pads with the token that the tokenizer pads with.

    Raises:
        InputError: they do not belong together.
    """
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocab_size is {config.vocab_size}; "
            "use the tokenizer that the model was made with"
        )
    if tokenizer.pad_token_id != config.pad_token_id:
        raise InputError(
            f"the tokenizer pads with id {tokenizer.pad_token_id}, the model with {config.pad_token_id}; "
            "use the tokenizer that the model was made with"
        )


def pretrain(
    config: ModernBertConfig,
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterable[Document],
    out: Path,
    settings: PretrainSettings,
    *,
    weights: Path | None = None,
    tile_from: Path | None = None,
    resume: bool = False,
    tell: Callable[[str], None] = lambda message: None,
) -> PretrainingReport:
    """Trains on documents and writes the model with its tokenizer to `out`, in transformers' layout.

    Until it is done the run lives in a directory beside `out` (`modernbert.training.run_directory`), from which it can
    be resumed; that directory is removed in the end. Processes that torchrun started share the work.

    Args:
        config: of the model; see `config_for`, `extended` and `enlarged`.
        tokenizer: turns the documents into tokens.
        documents: read once, as far as the steps can use them, and not again when a run is resumed.
        out: directory to create.
        settings: see there.
        weights: directory of a model to train further; new weights when absent.
        tile_from: directory of a smaller model whose weights are tiled (`modernbert.tiling`) in place of new ones.
        resume: continue the run that stands beside `out`, from its last checkpoint.
        tell: told what is being done before the steps begin.

    Raises:
        InputError: no text, a tokenizer or length that does not fit the model, an output or run that exists, or one to
            resume that does not.
        TrainingError: the loss is not a number. What the run has left so far stays.
    """
    config = copy.deepcopy(config)  # models write into theirs
    require_vocabulary(config, tokenizer)
    if settings.max_length > config.max_position_embeddings:
        raise InputError(f"max_length must be at most {config.max_position_embeddings}, not {settings.max_length}")
    collator = Collator.of(
        tokenizer, mlm_probability=settings.mlm_probability, segments=settings.sop_segments, seed=settings.seed
    )
    run, processes = RunDirectory(out), PartialState(cpu=_on_cpu())
    main = processes.is_main_process
    arguments = _training_arguments(settings, run.partial, processes.num_processes)
    model = _joint_model(config, weights, tile_from, settings)
    identity = {**settings.that_decide(), **_identity(config, tokenizer, weights, tile_from)}
    with run.opened(identity, resume=resume, main=main):
        if main:
            _write_data(documents, tokenizer, run, settings, tell)
        processes.wait_for_everyone()
        pieces = Pieces(run.data)
        data = PackedPieces(pieces, settings.max_length, settings.sop_segments)
        newest = run.newest_checkpoint()
        if main:
            bins = f"{len(data):,} bins of {settings.max_length:,} tokens, {data.fill:.1%} filled"
            tell(f"{pieces.counts}; {bins}")
            run.rewind_log(newest)
        trainer = PretrainingTrainer(model, arguments, data=data, collator=collator, run=run)
        if settings.tensorboard and main:
            trainer.add_callback(TensorBoardCallback(_summary_writer(run.tensorboard)))
        train_with_progress(trainer, "pretraining", resume_from=newest)
        weights_now = trainer.accelerator.get_state_dict(trainer.model)  # of all ranks together, where they are sharded
        if main:
            with whole_directory(out) as partial, quiet_transformers():
                model.save(partial, weights_now)
                save_tokenizer(tokenizer, partial)
                run.keep_log(partial)
    processes.wait_for_everyone()
    report = PretrainingReport(counts=pieces.counts, fill=data.fill, log=run.read_log())
    processes.wait_for_everyone()
    if main:
        run.remove()
    return report


def _on_cpu() -> bool:
    return not torch.accelerator.is_available()


def _training_arguments(settings: PretrainSettings, directory: Path, ranks: int) -> TrainingArguments:
    micro_batch, accumulation = settings.micro_batches(ranks)
    if settings.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("precision 'fp16' needs a GPU; choose bf16 or fp32")
    arguments = TrainingArguments(
        output_dir=str(directory),
        use_cpu=_on_cpu(),
        ddp_find_unused_parameters=False,
        max_steps=settings.max_steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        **schedule_arguments(settings.warmup, settings.decay),
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        torch_compile=settings.compile,
        **({"fsdp": True, "fsdp_config": _FSDP} if settings.fsdp else {}),
        seed=settings.seed,
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_drop_last=True,
        remove_unused_columns=False,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        raise InputError(
            f"{arguments.n_gpu} GPUs are visible to one process; start one for each with "
            f"torchrun --nproc-per-node {arguments.n_gpu}, or show it one with CUDA_VISIBLE_DEVICES"
        )
    return arguments


def _joint_model(
    config: ModernBertConfig, weights: Path | None, tile_from: Path | None, settings: PretrainSettings
) -> ModernBertForPreTraining:
    transformers.set_seed(settings.seed)
    with quiet_transformers():
        if weights is not None:
            masked_lm = load_masked_lm(weights, config)
        elif tile_from is not None:
            masked_lm = tile(load_masked_lm(tile_from, load_config(tile_from)), config)
        else:
            masked_lm = ModernBertForMaskedLM(config)
    masked_lm.set_attention(settings.attention)
    if settings.gradient_checkpointing:
        # transformers 5.23 renamed it; older ones know the old name alone.
        enable = getattr(masked_lm, "activation_checkpointing_enable", None) or masked_lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model = ModernBertForPreTraining(masked_lm, settings.sop_segments, settings.sop_weight)
    if weights is not None:
        model.load_head(weights)
    return model


def _write_data(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    run: RunDirectory,
    settings: PretrainSettings,
    tell: Callable[[str], None],
) -> None:
    """Tokenises what the steps can use, unless the run has it already."""
    if run.data.is_dir():
        tell("continuing with the text that the run has read before")
        return
    with whole_directory(run.data) as partial:
        write_pieces(
            documents,
            tokenizer,
            partial,
            room=settings.max_length - special_tokens(settings.sop_segments),
            enough=settings.max_steps * settings.batch_tokens,
            tell=tell,
        )


def _summary_writer(directory: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # an extra

    return SummaryWriter(str(directory))


def _identity(
    config: ModernBertConfig, tokenizer: PreTrainedTokenizerFast, weights: Path | None, tile_from: Path | None
) -> dict[str, str | int | float | None]:
    """What model and tokenizer a run is about."""
    bookkeeping = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    fields = {f"config.{name}": value for name, value in config.to_dict().items() if name not in bookkeeping}
    tokens = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return {**fields, "tokenizer": tokens, "weights": str(weights), "tile_from": str(tile_from)}
