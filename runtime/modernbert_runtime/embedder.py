"""Text in, vectors out: the one class that most callers need.

It joins bundle, tokenizer, batches and engine. Calls of `embed` keep no state and share nothing; calls of `aembed`
share batches (see `async_batcher`). It is not a server.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from modernbert_runtime.arguments import check_count
from modernbert_runtime.async_batcher import MAX_WAITING_TOKENS, AsyncBatcher
from modernbert_runtime.batching import BATCH_TOKENS
from modernbert_runtime.chunking import TextChunks, TokenVectors, check_spans, check_windows
from modernbert_runtime.engine import Engine, PackedEngine
from modernbert_runtime.engines import EngineName
from modernbert_runtime.errors import InputError
from modernbert_runtime.loading import open_bundle
from modernbert_runtime.long_text import late_chunks, plain_chunks
from modernbert_runtime.manifest import Manifest
from modernbert_runtime.memory import MemoryBudget
from modernbert_runtime.outputs import OutputDtype, OutputFormat
from modernbert_runtime.pipeline import Pipeline
from modernbert_runtime.runner import BatchRunner
from modernbert_runtime.stats import EmbedderStats
from modernbert_runtime.tokenizer import TextTokenizer, TokenizedText, Truncation, check_texts


class Embedder:
    """Embeds texts with one bundle and one engine. Make it with `Embedder.load`; safe to use from several threads.

    Args:
        engine: gives `sentence_embedding`, [batch, dimension].
        tokenizer: of the same bundle.
        manifest: of the same bundle.
        pad_id: token id that fills short rows; the attention mask hides it.
        batch_tokens: most tokens of one batch, padding included. A longer text still goes through, on its own.
        max_waiting_tokens: most tokens that wait in `aembed` for their batch; beyond, it raises Overloaded.
        memory: what batches may take; None sets no limit.
    """

    def __init__(
        self,
        engine: Engine | PackedEngine,
        tokenizer: TextTokenizer,
        manifest: Manifest,
        *,
        pad_id: int = 0,
        batch_tokens: int = BATCH_TOKENS,
        max_waiting_tokens: int = MAX_WAITING_TOKENS,
        memory: MemoryBudget | None = None,
    ) -> None:
        check_count("max_waiting_tokens", max_waiting_tokens)
        self._tokenizer = tokenizer
        self._manifest = manifest
        self._runner = BatchRunner(
            engine, dimension=manifest.dimension, pad_id=pad_id, batch_tokens=batch_tokens, memory=memory
        )
        self._pipeline = Pipeline(tokenizer, self._runner)
        self._batcher = AsyncBatcher(
            self._runner.vectors,
            lambda text, index: self._runner.finite_vectors([text], [index])[0],
            dimension=manifest.dimension,
            batch_tokens=batch_tokens,
            max_waiting_tokens=max_waiting_tokens,
            max_rows=memory.max_rows if memory is not None else None,
            packed=self._runner.packed,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        engine: EngineName = "auto",
        precision: str | None = None,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        truncation: Truncation = "right",
        batch_tokens: int = BATCH_TOKENS,
        max_memory: int | str | None = None,
        max_waiting_tokens: int = MAX_WAITING_TOKENS,
        engine_options: Mapping[str, str] | None = None,
        packed: bool | None = None,
        verify_hashes: bool = True,
    ) -> "Embedder":
        """Load a bundle.

        Args:
            path: directory that `modernbert export` wrote.
            engine: what computes; "auto" takes, in this order, tensorrt where plans for this GPU were built by this
                user, onnxruntime on a GPU where it has the CUDA provider, openvino where it is installed and the
                bundle has an artifact for it, onnxruntime on the CPU. The log says which and why.
            precision: such as "fp32"; None takes the one that the bundle lists first.
            providers: ONNX Runtime execution providers, the preferred one first, such as ["CUDAExecutionProvider"],
                or ["TensorrtExecutionProvider", "CUDAExecutionProvider"], which builds and caches its engines when a
                length is first met; None leaves it to `engine`.
            threads: threads within one operator; None leaves it to the engine, within a container's CPU limit.
            truncation: what happens to texts above `max_length`: "right" drops the end, "left" the start, "error"
                raises TextTooLong.
            batch_tokens: most tokens of one batch, padding included; the default is for CPUs, GPUs want more.
            max_memory: most that this process may hold while a batch runs, in bytes or as "2GB": batches are cut to
                keep to it, one runs at a time, and a text that alone would exceed it is refused, as is one that is too
                large to be tokenized (300 bytes for each of its own). What is resident after loading counts; what the
                caller collects later, such as results, does not. Only onnxruntime on the CPU keeps to it.
            max_waiting_tokens: most tokens that wait in `aembed` for their batch.
            engine_options: the engine's own settings by its own names; see `OnnxRuntimeEngine`, `OpenVinoEngine`,
                and for tensorrt `gpu_engines.open_plans`.
            packed: run texts one behind the other and compute no padding, for which the bundle must have been exported
                so, with onnxruntime on the CPU; None does where both hold, False never.
            verify_hashes: compare the files with the manifest first, which reads them once more.

        Raises:
            InputError: an argument out of its range.
            BundleError: the directory is no whole, unaltered embedding bundle, or lacks this precision.
            EngineError: the engine is not installed or cannot load the model.
        """
        opened = open_bundle(
            path,
            task="embedding",
            output="sentence_embedding",
            engine=engine,
            precision=precision,
            providers=providers,
            threads=threads,
            truncation=truncation,
            max_memory=max_memory,
            engine_options=engine_options,
            packed=packed,
            verify_hashes=verify_hashes,
        )
        return cls(
            opened.engine,
            opened.tokenizer,
            opened.manifest,
            pad_id=opened.pad_id,
            batch_tokens=batch_tokens,
            max_waiting_tokens=max_waiting_tokens,
            memory=opened.memory,
        )

    @property
    def dimension(self) -> int:
        """Length of one embedding, before `dimensions` cuts it."""
        return self._manifest.dimension

    @property
    def engine(self) -> str:
        """What runs the model and in what, such as "openvino (CPU, bf16)"."""
        return self._runner.engine.name

    @property
    def max_length(self) -> int:
        """Most tokens of one text, special tokens and prompt included."""
        return self._manifest.max_length

    def stats(self) -> EmbedderStats:
        """What this embedder has done since it was loaded: texts, tokens, padding, batches, speed."""
        return self._runner.counters.snapshot(waiting_tokens=self._batcher.waiting_tokens)

    def embed(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        output_dtype: OutputDtype = "float32",
        normalize: bool | None = None,
        progress: bool = False,
    ) -> NDArray[Any]:
        """Embed texts.

        A text's vector does not depend on the others beyond rounding. Truncation is logged once per call; to see it
        per text, call `tokenize` and then `embed_tokens`. Long lists are tokenized while the engine runs; where a text
        can be refused for its length (truncation "error", max_memory), all are tokenized before the first one runs.

        Args:
            texts: a list of str; "" is a valid text.
            prompt_name: put this prompt of the manifest before every text.
            dimensions: keep that many values of each vector (of models trained for it, Matryoshka), at unit length
                again if the whole vector has it; None keeps all.
            output_dtype: "float32"; "float16"; "int8", in 256 steps over the range that the manifest has for each
                dimension; "binary", a bit per value in uint8, set where it is positive. The last two are
                sentence-transformers' "int8" and "ubinary".
            normalize: True scales vectors to unit length; False refuses a bundle that does; None is as the bundle.
            progress: show a progress bar on stderr.

        Returns:
            [len(texts), dimensions] in this format, in the order given; for "binary" [len(texts), dimensions / 8]
            rounded up.

        Raises:
            InputError: bad texts (the message names the first bad item), an unknown prompt, or a format that this
                bundle cannot give.
            TextTooLong: a text exceeds max_length and truncation is "error", or it would exceed max_memory.
            EngineError: the engine failed or returned values that are not finite.
        """
        output = self._output(dimensions, output_dtype, normalize)
        prefix = self._prompt(prompt_name)
        texts = check_texts(texts)
        return self._pipeline.embed(texts, prefix, output, progress=progress)

    async def aembed(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        output_dtype: OutputDtype = "float32",
        normalize: bool | None = None,
        timeout: float | None = None,
    ) -> NDArray[Any]:
        """As `embed`, without blocking the event loop, and in batches that concurrent callers share.

        May be called from any number of tasks, event loops and threads. Short requests go first, but each lets only a
        bounded amount of later work pass (see `async_batcher.TokenQueue`), so for bulk work beside queries send many
        small lists. A text that fails harms no other caller; its own call raises. What has not started when the
        caller is cancelled or its time is up never runs; what runs is finished and dropped.

        Args:
            texts: a list of str, not to be changed meanwhile; "" is a valid text.
            prompt_name, dimensions, output_dtype, normalize: as for `embed`.
            timeout: seconds from the call to the result; None waits as long as it takes.

        Returns:
            As `embed`.

        Raises:
            InputError, TextTooLong: as for `embed`.
            Overloaded: more tokens would wait than `max_waiting_tokens`.
            DeadlineExceeded (also a TimeoutError): the timeout passed.
            EngineError: the engine failed on one of these texts, or the embedder was closed.
        """
        output = self._output(dimensions, output_dtype, normalize)
        prefix = self._prompt(prompt_name)

        def tokenize() -> list[TokenizedText]:
            tokens = self._tokenizer.encode(texts, prefix=prefix)
            self._pipeline.report_truncation([text.num_dropped for text in tokens])
            self._runner.check_room(tokens)
            return tokens

        return await self._batcher.embed(tokenize, finish=output.convert, timeout=timeout)

    def embed_queries(
        self,
        texts: Sequence[str],
        *,
        dimensions: int | None = None,
        output_dtype: OutputDtype = "float32",
        normalize: bool | None = None,
        progress: bool = False,
    ) -> NDArray[Any]:
        """As `embed`, with the manifest's prompt "query" if it has one."""
        return self.embed(
            texts,
            prompt_name=self._prompt_if_any("query"),
            dimensions=dimensions,
            output_dtype=output_dtype,
            normalize=normalize,
            progress=progress,
        )

    def embed_documents(
        self,
        texts: Sequence[str],
        *,
        dimensions: int | None = None,
        output_dtype: OutputDtype = "float32",
        normalize: bool | None = None,
        progress: bool = False,
    ) -> NDArray[Any]:
        """As `embed`, with the manifest's prompt "document" if it has one."""
        return self.embed(
            texts,
            prompt_name=self._prompt_if_any("document"),
            dimensions=dimensions,
            output_dtype=output_dtype,
            normalize=normalize,
            progress=progress,
        )

    async def aembed_queries(
        self,
        texts: Sequence[str],
        *,
        dimensions: int | None = None,
        output_dtype: OutputDtype = "float32",
        normalize: bool | None = None,
        timeout: float | None = None,
    ) -> NDArray[Any]:
        """As `aembed`, with the manifest's prompt "query" if it has one."""
        return await self.aembed(
            texts,
            prompt_name=self._prompt_if_any("query"),
            dimensions=dimensions,
            output_dtype=output_dtype,
            normalize=normalize,
            timeout=timeout,
        )

    async def aembed_documents(
        self,
        texts: Sequence[str],
        *,
        dimensions: int | None = None,
        output_dtype: OutputDtype = "float32",
        normalize: bool | None = None,
        timeout: float | None = None,
    ) -> NDArray[Any]:
        """As `aembed`, with the manifest's prompt "document" if it has one."""
        return await self.aembed(
            texts,
            prompt_name=self._prompt_if_any("document"),
            dimensions=dimensions,
            output_dtype=output_dtype,
            normalize=normalize,
            timeout=timeout,
        )

    def tokenize(self, texts: Sequence[str], *, prompt_name: str | None = None) -> list[TokenizedText]:
        """The token ids of each text as the model will see them, and how many tokens truncation dropped.

        Raises:
            InputError: as for `embed`.
            TextTooLong: a text exceeds max_length and truncation is "error".
        """
        return self._tokenizer.encode(texts, prefix=self._prompt(prompt_name))

    def embed_tokens(
        self,
        tokens: Sequence[TokenizedText],
        *,
        dimensions: int | None = None,
        output_dtype: OutputDtype = "float32",
        normalize: bool | None = None,
        progress: bool = False,
    ) -> NDArray[Any]:
        """Embed what `tokenize` of this same embedder returned; arguments, result and errors as `embed`."""
        output = self._output(dimensions, output_dtype, normalize)
        self._tokenizer.check_tokens(tokens)
        return self._pipeline.embed_tokens(tokens, output, progress=progress)

    def embed_token_vectors(
        self, texts: Sequence[str], *, prompt_name: str | None = None, progress: bool = False
    ) -> list[TokenVectors]:
        """A vector for each token of each text: the model's last hidden state, neither pooled nor normalised.

        Takes 4 * dimension bytes per token: 25 MB for 8,192 tokens of 768.

        Args:
            texts, prompt_name, progress: as for `embed`.

        Raises:
            As `embed`.
        """
        spanned = self._tokenizer.encode_with_spans(texts, prefix=self._prompt(prompt_name))
        self._pipeline.report_truncation([item.tokens.num_dropped for item in spanned])
        vectors = dict(self._pipeline.token_vectors(spanned, progress=progress))
        return [vectors[index] for index in range(len(spanned))]

    def embed_chunks(
        self,
        texts: Sequence[str],
        *,
        size: int = 256,
        overlap: int = 32,
        spans: Sequence[Sequence[tuple[int, int]]] | None = None,
        late: bool = False,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        output_dtype: OutputDtype = "float32",
        normalize: bool | None = None,
        progress: bool = False,
    ) -> list[TextChunks]:
        """Embed texts, of any length, in chunks: a vector for each chunk, and which characters it stands for.

        Plain chunks are embedded one by one: chunk i has exactly the vector of `embed([text[start:end]])`. Late ones
        (arXiv:2409.04701) are cut after the model has read the whole text, up to max_length under the truncation
        policy: each vector is the mean over the chunk's tokens, which have seen what stands around the chunk.

        Args:
            texts: as for `embed`; "" has no chunks.
            size: most tokens of a chunk, the prompt and special tokens not counted. Words stay whole if they fit.
            overlap: tokens that neighbouring chunks share at least; 0 cuts without overlap.
            spans: chunks of your own instead, such as sentences: for each text a list of (start, end) in characters.
            late: late chunking; only for bundles with pooling mean.
            prompt_name, dimensions, output_dtype, normalize, progress: as for `embed`.

        Returns:
            One `TextChunks` per text.

        Raises:
            As `embed`; also InputError: size or overlap out of range, spans that leave their text, or a span
            without tokens (late).
        """
        output = self._output(dimensions, output_dtype, normalize)
        prefix = self._prompt(prompt_name)
        texts = check_texts(texts)
        check_windows(size, overlap)
        given = check_spans(spans, texts) if spans is not None else None
        if not late:
            return plain_chunks(
                self._pipeline, texts, prefix, given, output, size=size, overlap=overlap, progress=progress
            )
        if self._manifest.pooling != "mean":
            raise InputError(
                f"late=True needs a bundle with pooling mean, not {self._manifest.pooling}: its vectors are no means "
                "over tokens; use late=False"
            )
        return late_chunks(
            self._pipeline,
            texts,
            prefix,
            given,
            output,
            size=size,
            overlap=overlap,
            normalized=self._manifest.normalize,
            progress=progress,
        )

    def close(self) -> None:
        """Close the engine; later calls raise EngineError, and so do calls of `aembed` that have texts waiting.

        Waits for a batch of `aembed` that is running; in an event loop use `aclose`.
        """
        self._batcher.close()
        self._runner.engine.close()

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

    def _output(self, dimensions: int | None, output_dtype: OutputDtype, normalize: bool | None) -> OutputFormat:
        return OutputFormat.of(self._manifest, dimensions=dimensions, output_dtype=output_dtype, normalize=normalize)

    def _prompt(self, name: str | None) -> str:
        prompts = self._manifest.prompts
        if name is None:
            return ""
        if not isinstance(name, str) or name not in prompts:
            raise InputError(
                f"prompt_name must be one of {', '.join(prompts) or '(this bundle has none)'}, not {name!r}: "
                "or put the prompt into the texts"
            )
        return prompts[name]

    def _prompt_if_any(self, name: str) -> str | None:
        return name if name in self._manifest.prompts else None
