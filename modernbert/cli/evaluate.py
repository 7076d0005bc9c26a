"""`modernbert evaluate`: a checkpoint through PyTorch, or a bundle through the runtime, on the same texts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.cli.common import console, progress, quiet_libraries, sizes


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL|BUNDLE", help="Checkpoint, hub id, or exported bundle.")],
    retrieval: Annotated[
        Path | None, typer.Option(help="Directory with documents.jsonl (corpus.jsonl), queries.jsonl and qrels.tsv.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help=".jsonl, .csv or .parquet with the columns sentence1, sentence2 and score.")
    ] = None,
    irrelevant_grade: Annotated[
        float, typer.Option(help="Grade that means not relevant; above 0 where lower grades are better.")
    ] = 0.0,
    matryoshka: Annotated[
        str,
        typer.Option(metavar="N,...", help="Sizes to cut vectors to beside the full one; default: the model's own."),
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """Score an embedding model: nDCG and recall on a retrieval set, Spearman's correlation on scored pairs."""
    if (retrieval is None) == (pairs is None):
        raise typer.BadParameter("give exactly one of --retrieval and --pairs")
    quiet_libraries()
    from modernbert.training.evaluation import read_retrieval_set, retrieval_metrics, spearman, truncated
    from modernbert.training.pairs import read_scored_pairs

    wanted = sizes(matryoshka)
    judged = read_retrieval_set(retrieval, irrelevant_grade=irrelevant_grade) if retrieval else None
    scored = read_scored_pairs(pairs) if pairs else None
    with _embedding(model) as embedding:
        if judged is not None:
            first = embedding.queries(list(judged.queries.values()))
            second = embedding.documents(list(judged.documents.values()))
            about = f"{len(judged.queries):,} queries, {len(judged.documents):,} documents"
        else:
            assert scored is not None
            first, second = embedding.plain(scored[0]), embedding.plain(scored[1])
            about = f"{len(scored[2]):,} pairs"
        full = first.shape[1]
        rows: list[dict[str, Any]] = []
        for size in sorted({full, *(wanted or embedding.sizes)}, reverse=True):
            cut = truncated(first, size), truncated(second, size)
            metrics = (
                asdict(retrieval_metrics(*cut, judged))
                if judged is not None
                else {"spearman": spearman(*cut, scored[2])}  # type: ignore[index]
            )
            rows.append({"dimensions": size, **metrics})
    _show(model, about, rows, as_json=json)


@dataclass(frozen=True, kw_only=True)
class _Embedding:
    """Texts to vectors [n, dim]; queries and documents with the model's prompts. `sizes` are what it was trained at."""

    queries: Callable[[Sequence[str]], Any]
    documents: Callable[[Sequence[str]], Any]
    plain: Callable[[Sequence[str]], Any]
    sizes: list[int]


@contextlib.contextmanager
def _embedding(model: str) -> Iterator[_Embedding]:
    import json

    if (Path(model) / "manifest.json").is_file():
        from functools import partial

        from modernbert_runtime import Embedder

        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        with Embedder.load(model) as embedder:
            yield _Embedding(
                queries=partial(embedder.embed_queries, progress=True),
                documents=partial(embedder.embed_documents, progress=True),
                plain=partial(embedder.embed, progress=True),
                sizes=config.get("matryoshka_dimensions") or [],
            )
        return
    from modernbert.training.embedder import sentence_transformer

    with progress() as tell:
        tell("loading the checkpoint")
        torch_model = sentence_transformer(model)
        tell("embedding")
        options = dict(show_progress_bar=False)
        yield _Embedding(
            queries=lambda texts: torch_model.encode_query(list(texts), **options),
            documents=lambda texts: torch_model.encode_document(list(texts), **options),
            plain=lambda texts: torch_model.encode(list(texts), **options),
            sizes=list(getattr(torch_model[0].model.config, "matryoshka_dimensions", None) or []),
        )


def _show(model: str, about: str, rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        import json

        # JSON has no NaN.
        rows = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
        print(json.dumps({"model": model, "on": about, "results": rows}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*(name.replace("_at_", "@").replace("_", " ") for name in rows[0]), title=f"{model}: {about}")
    for row in rows:
        table.add_row(*(str(value) if isinstance(value, int) else f"{value:.4f}" for value in row.values()))
    Console(width=None if console.is_terminal else 100).print(table)
