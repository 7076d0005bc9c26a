"""Text in, vectors out: the one class that most callers need.

It joins bundle, tokenizer, batches and engine. Calls of `embed` keep no state and share nothing; calls of `aembed`
share batches (see `async_batcher`). It is not a server.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.async_batcher import AsyncBatcher
from modernbert_runtime.batching import plan_batches
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.engine import Engine
from modernbert_runtime.errors import BundleError, EngineError, InputError
from modernbert_runtime.manifest import Manifest
from modernbert_runtime.onnxruntime_engine import OnnxRuntimeEngine
from modernbert_runtime.tokenizer import TextTokenizer, TokenizedText, Truncation

logger = logging.getLogger(__name__)


class Embedder:
    """Embeds texts with one bundle and one engine. Make it with `Embedder.load`; safe to use from several threads.

    Args:
        engine: gives `sentence_embedding`, [batch, dimension].
        tokenizer: of the same bundle.
        manifest: of the same bundle.
        pad_id: token id that fills short rows; the attention mask hides it.
        batch_tokens: most tokens of one batch, padding included. A longer text still goes through, on its own.
        max_waiting_tokens: most tokens that wait in `aembed` for their batch; beyond, it raises Overloaded.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        manifest: Manifest,
        *,
        pad_id: int = 0,
        batch_tokens: int = 8192,
        max_waiting_tokens: int = 262_144,
    ) -> None:
        if batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1, not {batch_tokens}")
        if max_waiting_tokens < 1:
            raise InputError(f"max_waiting_tokens must be at least 1, not {max_waiting_tokens}")
        self._engine = engine
        self._tokenizer = tokenizer
        self._manifest = manifest
        self._pad_id = pad_id
        self._batch_tokens = batch_tokens
        self._batcher = AsyncBatcher(
            self._compute,
            lambda text, index: self._run([text], [index])[0],
            dimension=manifest.dimension,
            batch_tokens=batch_tokens,
            max_waiting_tokens=max_waiting_tokens,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        engine: Literal["onnxruntime"] = "onnxruntime",
        precision: str | None = None,
        threads: int | None = None,
        truncation: Truncation = "right",
        batch_tokens: int = 8192,
        max_waiting_tokens: int = 262_144,
        verify_hashes: bool = True,
    ) -> "Embedder":
        """Load a bundle.

        Args:
            path: directory that `modernbert export` wrote.
            engine: what computes.
            precision: such as "fp32"; None takes the one that the bundle lists first.
            threads: threads within one operator; None leaves it to the engine.
            truncation: what happens to texts above `max_length`: "right" drops the end, "left" the start, "error"
                raises TextTooLong.
            batch_tokens: most tokens of one batch, padding included.
            max_waiting_tokens: most tokens that wait in `aembed` for their batch.
            verify_hashes: compare the files with the manifest first, which reads them once more.

        Raises:
            InputError: an argument out of its range.
            BundleError: the directory is no whole, unaltered embedding bundle, or lacks this precision.
            EngineError: the engine is not installed or cannot load the model.
        """
        if engine != "onnxruntime":
            raise InputError(f"engine must be onnxruntime, not {engine!r}")
        bundle = Bundle.open(path, verify_hashes=verify_hashes)
        manifest = bundle.manifest
        if manifest.task != "embedding":
            raise BundleError(f"task must be embedding, not {manifest.task!r}: export with --task embedding")
        tokenizer = TextTokenizer(
            bundle.path_of("tokenizer.json"), max_length=manifest.max_length, truncation=truncation
        )
        pad_id = _pad_id(bundle)
        artifact = bundle.artifact(target="portable", precision=precision)
        runner = OnnxRuntimeEngine(bundle.onnx_path(artifact), output="sentence_embedding", threads=threads)
        embedder = cls(
            runner,
            tokenizer,
            manifest,
            pad_id=pad_id,
            batch_tokens=batch_tokens,
            max_waiting_tokens=max_waiting_tokens,
        )
        logger.info(
            "loaded %s: %s, %s, target %s, precision %s, dimension %d, max_length %d, truncation %s",
            bundle.root,
            runner.name,
            artifact.file,
            artifact.target,
            artifact.precision,
            manifest.dimension,
            manifest.max_length,
            truncation,
        )
        return embedder

    @property
    def dimension(self) -> int:
        """Length of one embedding."""
        return self._manifest.dimension

    @property
    def max_length(self) -> int:
        """Most tokens of one text, special tokens and prompt included."""
        return self._manifest.max_length

    def embed(
        self, texts: Sequence[str], *, prompt_name: str | None = None, progress: bool = False
    ) -> NDArray[np.float32]:
        """Embed texts.

        A text's vector does not depend on the others beyond rounding. Truncation is logged once per call; to see it
        per text, call `tokenize` and then `embed_tokens`.

        Args:
            texts: a list of str; "" is a valid text.
            prompt_name: put this prompt of the manifest before every text.
            progress: show a progress bar on stderr.

        Returns:
            [len(texts), dimension], in the order given.

        Raises:
            InputError: bad texts (the message names the first bad item) or an unknown prompt.
            TextTooLong: a text exceeds max_length and truncation is "error".
            EngineError: the engine failed or returned values that are not finite.
        """
        return self.embed_tokens(self._tokenize_and_report(texts, prompt_name), progress=progress)

    async def aembed(
        self, texts: Sequence[str], *, prompt_name: str | None = None, timeout: float | None = None
    ) -> NDArray[np.float32]:
        """As `embed`, without blocking the event loop, and in batches that concurrent callers share.

        May be called from any number of tasks, event loops and threads. Short requests go first, but each lets only a
        bounded amount of later work pass (see `async_batcher.TokenQueue`), so for bulk work beside queries send many
        small lists. A text that fails harms no other caller; its own call raises. What has not started when the
        caller is cancelled or its time is up never runs; what runs is finished and dropped.

        Args:
            texts: a list of str, not to be changed meanwhile; "" is a valid text.
            prompt_name: put this prompt of the manifest before every text.
            timeout: seconds from the call to the result; None waits as long as it takes.

        Returns:
            [len(texts), dimension], in the order given.

        Raises:
            InputError, TextTooLong: as for `embed`.
            Overloaded: more tokens would wait than `max_waiting_tokens`.
            DeadlineExceeded (also a TimeoutError): the timeout passed.
            EngineError: the engine failed on one of these texts, or the embedder was closed.
        """
        return await self._batcher.embed(lambda: self._tokenize_and_report(texts, prompt_name), timeout=timeout)

    def embed_queries(self, texts: Sequence[str], *, progress: bool = False) -> NDArray[np.float32]:
        """As `embed`, with the manifest's prompt "query" if it has one."""
        return self.embed(texts, prompt_name=self._prompt_if_any("query"), progress=progress)

    def embed_documents(self, texts: Sequence[str], *, progress: bool = False) -> NDArray[np.float32]:
        """As `embed`, with the manifest's prompt "document" if it has one."""
        return self.embed(texts, prompt_name=self._prompt_if_any("document"), progress=progress)

    def tokenize(self, texts: Sequence[str], *, prompt_name: str | None = None) -> list[TokenizedText]:
        """The token ids of each text as the model will see them, and how many tokens truncation dropped.

        Raises:
            InputError, TextTooLong: as for `embed`.
        """
        prompts = self._manifest.prompts
        if prompt_name is not None and prompt_name not in prompts:
            raise InputError(
                f"prompt_name must be one of {', '.join(prompts) or '(this bundle has none)'}, not {prompt_name!r}: "
                "or put the prompt into the texts"
            )
        return self._tokenizer.encode(texts, prefix=prompts[prompt_name] if prompt_name is not None else "")

    def embed_tokens(self, tokens: Sequence[TokenizedText], *, progress: bool = False) -> NDArray[np.float32]:
        """Embed what `tokenize` of this same embedder returned.

        Returns:
            [len(tokens), dimension], in the order given.

        Raises:
            EngineError: as for `embed`.
        """
        vectors = np.empty((len(tokens), self.dimension), dtype=np.float32)
        batches: Iterable[NDArray[np.intp]] = plan_batches([len(t.input_ids) for t in tokens], self._batch_tokens)
        if progress:
            from rich.console import Console
            from rich.progress import track

            batches = track(batches, "embedding", console=Console(stderr=True))
        for batch in batches:
            vectors[batch] = self._run([tokens[index] for index in batch], batch)
        return vectors

    def close(self) -> None:
        """Close the engine; later calls raise EngineError, and so do calls of `aembed` that have texts waiting.

        Waits for a batch of `aembed` that is running; in an event loop use `aclose`.
        """
        self._batcher.close()
        self._engine.close()

    async def aclose(self) -> None:
        """As `close`, without blocking the event loop; for `contextlib.aclosing`."""
        import asyncio  # as in async_batcher

        await asyncio.to_thread(self.close)

    def __enter__(self) -> "Embedder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tokenize_and_report(self, texts: Sequence[str], prompt_name: str | None) -> list[TokenizedText]:
        tokens = self.tokenize(texts, prompt_name=prompt_name)
        cut = [index for index, item in enumerate(tokens) if item.num_dropped]
        if cut:
            logger.warning(
                "truncated %d of %d texts to max_length %d; the first is texts[%d], %d tokens dropped",
                len(cut),
                len(tokens),
                self.max_length,
                cut[0],
                tokens[cut[0]].num_dropped,
            )
        return tokens

    def _prompt_if_any(self, name: str) -> str | None:
        return name if name in self._manifest.prompts else None

    def _run(self, tokens: Sequence[TokenizedText], indices: Sequence[int] | NDArray[np.intp]) -> NDArray[Any]:
        """One batch, as `_compute`, checked; `indices` are what errors call its texts."""
        vectors = self._compute(tokens)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise EngineError(
                f"{self._engine.name} returned NaN or infinity for texts[{np.asarray(indices)[~finite].min()}]: "
                "run `modernbert verify` on the bundle, or choose another precision"
            )
        return vectors

    def _compute(self, tokens: Sequence[TokenizedText]) -> NDArray[Any]:
        """One batch: [len(tokens), dimension] in the engine's precision, perhaps with NaN."""
        length = max(len(text.input_ids) for text in tokens)
        input_ids = np.full((len(tokens), length), self._pad_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for row, text in enumerate(tokens):
            input_ids[row, : len(text.input_ids)] = text.input_ids
            attention_mask[row, : len(text.input_ids)] = 1
        vectors = self._engine.run(input_ids, attention_mask)
        if vectors.shape != (len(tokens), self.dimension):
            raise EngineError(
                f"{self._engine.name} returned shape {vectors.shape}, the manifest promises "
                f"{(len(tokens), self.dimension)}: export the bundle again"
            )
        return vectors


def _pad_id(bundle: Bundle) -> int:
    """`pad_token_id` of config.json; 0 where the bundle does not say."""
    if "config.json" not in bundle.manifest.files:
        return 0
    path = bundle.path_of("config.json")
    try:
        pad_id = json.loads(path.read_text(encoding="utf-8")).get("pad_token_id")
    except (ValueError, RecursionError, AttributeError) as error:  # not JSON, or not an object
        raise BundleError("config.json is not a JSON object: export the bundle again") from error
    if pad_id is None:
        return 0
    if not isinstance(pad_id, int) or isinstance(pad_id, bool) or pad_id < 0:
        raise BundleError(f"config.json: pad_token_id must be a token id, not {pad_id!r}: export the bundle again")
    return pad_id
