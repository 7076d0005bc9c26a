"""`modernbert tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modernbert.cli.common import console, progress, quiet_libraries

tokenizer = typer.Typer(help="Tokenizers.", rich_markup_mode=None)


@tokenizer.callback()
def group() -> None:
    """Tokenizers."""  # without a callback typer would make the only command the group itself


@tokenizer.command()
def train(
    text: Annotated[
        list[str],
        typer.Argument(metavar="TEXT...", help="Text, JSON lines, Parquet, directories of them, hub datasets."),
    ],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    vocab_size: Annotated[int, typer.Option(help="Most tokens; rounded up to a multiple of 64.")] = 50_368,
    max_length: Annotated[int, typer.Option(help="Most tokens of an input, kept with the tokenizer.")] = 8192,
    cased: Annotated[bool, typer.Option("--cased", help="Upper and lower case differ.")] = False,
    field: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    text_unit: Annotated[
        str, typer.Option(help="A document of a .txt: the whole file, a paragraph or a line.")
    ] = "file",
) -> None:
    """Train a WordPiece tokenizer, and compare it with one of BERT's 30,522 tokens trained on the same text."""
    quiet_libraries()
    from modernbert.data.documents import Corpus
    from modernbert.data.tokenizer import rounded_vocab_size, save_tokenizer, train_tokenizer
    from modernbert.data.vocabulary import compare
    from modernbert.output import require_absent, whole_directory

    require_absent(out)
    texts = Corpus(text, field=field, text_unit=text_unit)  # type: ignore[arg-type]  # checked there
    with progress() as tell:
        tell("training")
        trained = train_tokenizer(texts, vocab_size=vocab_size, lowercase=not cased, max_length=max_length)
        tell("comparing")
        table = compare(trained, texts, lowercase=not cased)
    with whole_directory(out) as partial:
        save_tokenizer(trained, partial)
    if (size := rounded_vocab_size(vocab_size)) != vocab_size:
        console.print(f"vocab_size {vocab_size:,} is rounded up to {size:,}, a multiple of 64")
    if len(trained) < size:
        console.print(f"the text gives {len(trained):,} tokens, fewer than the {size:,} that were asked for")
    print(table)
    print(f"{out}: {len(trained):,} tokens")
