"""Drop-in: the tools that people already use load an exported bundle as it is and give the vectors of PyTorch.

Each peer is a script in `peers/`, run in an environment of its own under `.venv-peers/`, which the first run makes from
the requirements file beside it (minutes, about 2.5 GB) and later runs keep until that file changes. None of them sees
this project's code, save the runtime, which is installed with the `cpu` extra alone.

    pytest -m peers
"""

import functools
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import transformers
from conftest import SPECIAL_TOKENS, randomise
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modernbert.config import ModernBertConfig
from modernbert.data.tokenizer import train_tokenizer
from modernbert_export.export import export

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[1]
PEERS = Path(__file__).parent / "peers"

# Nothing here is the default, so that a peer that overlooks a field of config.json gives other vectors.
RADIUS = 32
CONFIG = dict(
    local_attention=2 * RADIUS,
    layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 80_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
    },
)
MAX_LENGTH = 512

# Tokens of the texts made of short words, special tokens included. The last is cut at MAX_LENGTH.
LENGTHS = (3, RADIUS - 1, RADIUS, RADIUS + 1, RADIUS + 2, 2 * RADIUS + 1, 257, MAX_LENGTH, 700)
SHORT_WORDS = ("the", "of", "is", "in", "to", "and", "or", "not", "if", "for")  # one token each in any vocabulary


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A script in `peers/`, what it is called with, and where it runs; `environment` None is that of the tests.

    `per_token`: it gives a row for each token and not for each text.
    """

    environment: str | None
    script: str
    arguments: tuple[str, ...] = ()
    per_token: bool = False


OWN_RUNTIME = "modernbert-cpu"  # an environment with this project and its extra `cpu`, nothing else
ENGINE = "with_onnx_engine.py"
SENTENCE_TRANSFORMERS = "with_sentence_transformers.py"
PEER_TABLE = {
    "sentence-transformers-torch": Peer(environment=None, script=SENTENCE_TRANSFORMERS, arguments=("torch",)),
    "sentence-transformers-5-torch": Peer(environment="optimum", script=SENTENCE_TRANSFORMERS, arguments=("torch",)),
    "sentence-transformers-5-onnx": Peer(environment="optimum", script=SENTENCE_TRANSFORMERS, arguments=("onnx",)),
    "transformers": Peer(environment=None, script="with_transformers.py"),
    "transformers-4": Peer(environment="optimum", script="with_transformers.py"),
    "onnxruntime": Peer(environment="onnxruntime", script=ENGINE, arguments=("onnxruntime", "sentence_embedding")),
    "onnxruntime-tokens": Peer(
        environment="onnxruntime", script=ENGINE, arguments=("onnxruntime", "last_hidden_state"), per_token=True
    ),
    "openvino": Peer(environment="openvino", script=ENGINE, arguments=("openvino", "sentence_embedding")),
    "openvino-tokens": Peer(
        environment="openvino", script=ENGINE, arguments=("openvino", "last_hidden_state"), per_token=True
    ),
    "fastembed": Peer(environment="fastembed", script="with_fastembed.py"),
    "modernbert-runtime": Peer(environment=OWN_RUNTIME, script="with_modernbert_runtime.py"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint, its bundle, and what transformers makes of the texts: a row for each token, and for each text."""

    checkpoint: Path
    bundle: Path
    texts: list[str]
    tokens: np.ndarray
    vectors: np.ndarray


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Our own tokenizer, as `modernbert tokenizer train` makes it, and that of the public ModernBERT models."""
    if request.param == "wordpiece":
        tokenizer = train_tokenizer(list(topics.values()), vocab_size=4096)
    else:
        file = request.getfixturevalue("data") / "tokenizer" / "tokenizer.json"
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **SPECIAL_TOKENS)
    directory = tmp_path_factory.mktemp(request.param)
    checkpoint, bundle = directory / "checkpoint", directory / "bundle"
    write_checkpoint(tokenizer, checkpoint)
    export(str(checkpoint), bundle, max_length=MAX_LENGTH)
    texts = sample_texts()
    tokens = token_states(checkpoint, texts)
    assert {len(rows) for rows in tokens} >= {min(length, MAX_LENGTH) for length in LENGTHS}
    return Case(
        checkpoint=checkpoint, bundle=bundle, texts=texts, tokens=np.concatenate(tokens), vectors=pooled(tokens)
    )


@pytest.mark.parametrize("name", PEER_TABLE)
def test_peer_gives_the_vectors_of_pytorch(case: Case, name: str, tmp_path: Path) -> None:
    peer = PEER_TABLE[name]
    texts, out = tmp_path / "texts.json", tmp_path / "out.npy"
    texts.write_text(json.dumps(case.texts))
    run(python_of(peer.environment), "-I", PEERS / peer.script, case.bundle, texts, out, *peer.arguments)
    assert_same(np.load(out), case.tokens if peer.per_token else case.vectors)


def test_command_line_embeds_where_torch_is_not_installed(case: Case, tmp_path: Path) -> None:
    one_line = [index for index, text in enumerate(case.texts) if "\n" not in text]
    lines, out = tmp_path / "file.txt", tmp_path / "v.npy"
    lines.write_text("".join(case.texts[index] + "\n" for index in one_line))
    run(python_of(OWN_RUNTIME).with_name("modernbert"), "embed", case.bundle, lines, "--out", out)
    assert_same(np.load(out), case.vectors[one_line])


@pytest.mark.parametrize(
    "change",
    [
        {"local_attention": CONFIG["local_attention"] + 2},
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
        {
            "rope_parameters": {
                **CONFIG["rope_parameters"],
                "full_attention": {"rope_type": "default", "rope_theta": 160_000.0},
            }
        },
        {
            "rope_parameters": {
                **CONFIG["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            }
        },
    ],
    ids=["window", "layers", "global theta", "local theta"],
)
def test_the_texts_tell_a_wrong_model_from_the_right_one(case: Case, change: dict[str, object]) -> None:
    wrong = token_states(case.checkpoint, case.texts, **change)
    with pytest.raises(AssertionError, match="cosine"):
        assert_same(pooled(wrong), case.vectors)


def assert_same(rows: np.ndarray, expected: np.ndarray) -> None:
    assert rows.shape == expected.shape
    rows, expected = rows.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = ((rows * expected).sum(axis=1) / norms).min()
    # The fidelity that the project promises for fp32, in any engine.
    assert cosine >= 0.999999, f"the worst cosine is {cosine:.9f}, the largest error {abs(rows - expected).max():.2e}"
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-4)


def write_checkpoint(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """A small ModernBERT with random weights and its tokenizer, written by transformers."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    config = ModernBertConfig.preset("tiny", vocab_size=-(-len(tokenizer) // 64) * 64, **special, **CONFIG)
    model = transformers.ModernBertModel(config)
    randomise(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def sample_texts() -> list[str]:
    """Prose, oddities, and texts of exact length; unsorted, so that padded batches mix long and short."""
    texts = ["", "x", "  two  spaces ", "naïve café, 東京, 🤖", "a [MASK] b", topics["assert"], topics["lambda"]]
    texts += [topics["with"][:1500], topics["for"]]
    texts += [" ".join(random.Random(length).choices(SHORT_WORDS, k=length - 2)) for length in LENGTHS]
    random.Random(0).shuffle(texts)
    return texts


def token_states(checkpoint: Path, texts: Sequence[str], **change: object) -> list[np.ndarray]:
    """`last_hidden_state` [tokens, hidden] of each text, which goes through transformers alone, without padding."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH)
    config = transformers.ModernBertConfig.from_pretrained(checkpoint, **change)
    model = transformers.ModernBertModel.from_pretrained(checkpoint, config=config, attn_implementation="eager").eval()
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([encoding.ids])).last_hidden_state[0].numpy()
            for encoding in tokenizer.encode_batch(texts)
        ]


def pooled(tokens: Sequence[np.ndarray]) -> np.ndarray:
    """Mean pooling and unit length."""
    means = np.stack([rows.astype(np.float64).mean(axis=0) for rows in tokens])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


@functools.cache  # once a session, whatever is edited meanwhile
def python_of(environment: str | None) -> Path:
    """The interpreter of an environment, which is made when there is none or its requirements have changed."""
    if environment is None:
        return Path(sys.executable)
    directory = ROOT / ".venv-peers" / environment
    python, stamp = directory / "bin" / "python", directory / "requirements.sha256"
    sources = [PEERS / f"{environment}.txt"]
    if environment == OWN_RUNTIME:
        sources = [PEERS / "onnxruntime.txt", *own_sources()]
    digest = hashlib.sha256(sys.version.encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    run(sys.executable, "-m", "venv", directory)
    if environment == OWN_RUNTIME:
        copy = directory / "copy"  # setuptools builds inside the sources
        for path in own_sources():
            (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy / path.relative_to(ROOT))
        run(python, "-m", "pip", "install", "--quiet", f"{copy}[cpu]", "--constraint", PEERS / "onnxruntime.txt")
        shutil.rmtree(copy)
    else:
        run(python, "-m", "pip", "install", "--quiet", "--requirement", PEERS / f"{environment}.txt")
    stamp.write_text(digest)
    return python


def own_sources() -> list[Path]:
    """The files of this project that an installation is made from."""
    folders = ("modernbert", "export/modernbert_export", "runtime/modernbert_runtime")
    modules = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    return [ROOT / "pyproject.toml", ROOT / "README.md", *(path for path in modules if path.suffix != ".pyc")]


def run(*command: str | Path) -> None:
    """Runs a command that sees neither this project's folders nor any hub; its words are shown when it fails."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env={**env, "HF_HUB_OFFLINE": "1"}, cwd="/", capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-8000:]}")
