"""Runs the graph with an engine and nothing else: BUNDLE TEXTS.json OUT.npy onnxruntime|openvino OUTPUT.

The output `sentence_embedding` gives a row for each text, `last_hidden_state` a row for each token of each text.
"""

import json
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

bundle, texts, out, engine, output = sys.argv[1:]
graph = Path(bundle) / "onnx" / "model.onnx"

stated = json.loads((Path(bundle) / "tokenizer_config.json").read_text())
tokenizer = Tokenizer.from_file(str(Path(bundle) / "tokenizer.json"))
tokenizer.enable_truncation(stated["model_max_length"])
tokenizer.enable_padding(pad_token=stated["pad_token"], pad_id=tokenizer.token_to_id(stated["pad_token"]))
encodings = tokenizer.encode_batch(json.loads(Path(texts).read_text()))
inputs = {
    "input_ids": np.array([encoding.ids for encoding in encodings]),
    "attention_mask": np.array([encoding.attention_mask for encoding in encodings]),
}

if engine == "onnxruntime":
    import onnxruntime

    (result,) = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run([output], inputs)
else:
    import openvino

    # Where the CPU has bf16, OpenVINO computes in it unless told otherwise.
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled(inputs)[output]

np.save(out, result[inputs["attention_mask"] == 1] if output == "last_hidden_state" else result)
