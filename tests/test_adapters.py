"""The adapters for LangChain, LlamaIndex and Haystack inside the real packages, which have an environment of their own.

The vectors to be had are those of `expected_vector`, a few lines of numpy, with the bundle's prompts.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from test_peers import PEERS, ROOT, python_of, run
from test_runtime_tiny_bundle import PROMPTS, expected_vector, write_tiny_bundle

pytestmark = pytest.mark.peers

QUERIES = ["a b", "x y z"]
DOCUMENTS = ["a b c", "m n o p", "x y z w", "q", "b b b a"]


def test_adapters_in_their_frameworks(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle")
    for name, texts in (("queries", QUERIES), ("documents", DOCUMENTS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(texts))
    script, runtime = PEERS / "with_adapters.py", ROOT / "runtime"
    files = [tmp_path / name for name in ("queries.json", "documents.json", "out.npz")]
    run(python_of("adapters"), "-I", script, runtime, bundle, *files)

    expected = {
        "queries": np.array([expected_vector(text, PROMPTS["query"]) for text in QUERIES]),
        "documents": np.array([expected_vector(text, PROMPTS["document"]) for text in DOCUMENTS]),
    }
    best = (expected["queries"] @ expected["documents"].T).argmax(axis=1)
    found = np.load(tmp_path / "out.npz")
    assert len(found.files) == 14
    for name in found.files:
        kind = name.rpartition(".")[2]
        if kind == "best":
            assert found[name].tolist() == best.tolist(), name
        else:
            wanted = expected["queries" if kind.endswith("queries") else "documents"]
            np.testing.assert_allclose(found[name], wanted, atol=1e-6, err_msg=name)
