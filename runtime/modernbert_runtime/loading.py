"""A bundle for one task, opened: its tokenizer, an engine that runs, and what batches may take.

What every class that callers load has in common; none of them opens a bundle by itself.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from modernbert_runtime.bundle import Bundle
from modernbert_runtime.engine import Engine, PackedEngine
from modernbert_runtime.engines import EngineName, open_engine
from modernbert_runtime.errors import BundleError, InputError
from modernbert_runtime.manifest import Manifest
from modernbert_runtime.memory import MemoryBudget, in_gb, parse_bytes, resident_bytes
from modernbert_runtime.tokenizer import TextTokenizer, Truncation

logger = logging.getLogger(__name__)

# Who takes a bundle of each task, for whoever tried another way.
TAKEN_BY: Mapping[str, str] = {
    "embedding": "Embedder, or `modernbert embed`",
    "text-classification": "TextClassifier or Reranker, or `modernbert predict`",
    "token-classification": "TokenClassifier, or `modernbert predict`",
    "fill-mask": "FillMask, or `modernbert predict`",
}


@dataclass(frozen=True, kw_only=True)
class OpenedBundle:
    """A bundle that is ready to compute.

    Args:
        bundle: its files and manifest.
        tokenizer: with its truncation policy.
        engine: of the artifact that was chosen.
        pad_id: token id that fills short rows.
        memory: what batches may take; None sets no limit.
    """

    bundle: Bundle
    tokenizer: TextTokenizer
    engine: Engine | PackedEngine
    pad_id: int
    memory: MemoryBudget | None

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self.bundle.manifest


def open_bundle(
    path: str | Path,
    *,
    task: str,
    output: str,
    engine: EngineName = "auto",
    precision: str | None = None,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    truncation: Truncation = "right",
    max_memory: int | str | None = None,
    engine_options: Mapping[str, str] | None = None,
    packed: bool | None = False,
    verify_hashes: bool = True,
) -> OpenedBundle:
    """Open a bundle that was exported for `task`, whose graph gives `output`. For the rest see `Embedder.load`.

    Raises:
        InputError: an argument out of its range.
        BundleError: the directory is no whole, unaltered bundle for this task, or lacks this precision.
        EngineError: the engine is not installed or cannot load the model.
    """
    limit = parse_bytes("max_memory", max_memory) if max_memory is not None else None
    if limit is not None and providers is not None:
        raise InputError("max_memory counts memory of the CPU and providers compute elsewhere: lower batch_tokens")
    bundle = Bundle.open(path, verify_hashes=verify_hashes)
    manifest = bundle.manifest
    if manifest.task != task:
        raise BundleError(
            f"task must be {task}, and this bundle is for {manifest.task}: load it with {TAKEN_BY[manifest.task]}; or "
            f"export with --task {task}"
        )
    before = resident_bytes() if limit is not None else 0
    with bundle.weights_checked_meanwhile() as checking, ThreadPoolExecutor(1, "modernbert-load") as pool:
        tokenizing = pool.submit(_tokenizer, bundle, truncation)
        opened = open_engine(
            checking,
            output=output,
            engine=engine,
            precision=precision,
            providers=providers,
            threads=threads,
            bounded_memory=limit is not None,
            options=engine_options,
            packed=packed,
        )
    tokenizer = tokenizing.result()
    artifact = opened.artifact
    memory = None
    if limit is not None:
        # Pages of weights that nothing has touched yet are not resident, and will be.
        loaded = before + bundle.size_of(artifact)
        memory = MemoryBudget.of(artifact.activation_bytes, limit=limit, resident=max(resident_bytes(), loaded))
        tokenizer.limit_memory(memory)
    logger.info(
        "loaded %s for %s: %s (%s), %s, target %s, precision %s, dimension %d, max_length %d, truncation %s%s",
        bundle.root,
        task,
        opened.engine.name,
        opened.reason,
        artifact.file,
        artifact.target,
        artifact.precision,
        manifest.dimension,
        manifest.max_length,
        truncation,
        f", {in_gb(memory.room)} for a batch, texts of up to {memory.max_length} tokens" if memory else "",
    )
    return OpenedBundle(bundle=bundle, tokenizer=tokenizer, engine=opened.engine, pad_id=bundle.pad_id(), memory=memory)


def _tokenizer(bundle: Bundle, truncation: Truncation) -> TextTokenizer:
    return TextTokenizer(bundle.path_of("tokenizer.json"), max_length=bundle.manifest.max_length, truncation=truncation)
