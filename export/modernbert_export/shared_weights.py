"""One file of weights for several graphs: every tensor is stored once, whoever reads it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

# Smaller constants, such as axes and shapes, stay in the graph's own file, where shape inference looks at them.
SMALLEST = 256
ALIGNMENT = 64


class SharedWeights:
    """A file of external data. Graphs that are saved with it lie in the same directory."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._places: dict[bytes, tuple[int, int]] = {}

    def save(self, model: ir.Model, file: Path) -> None:
        """Writes a graph whose large constants are in the shared file, and puts there what is not there yet."""
        assert file.parent == self.file.parent
        with open(self.file, "ab") as data:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                assert tensor is not None
                if tensor.nbytes > SMALLEST:
                    content = tensor.tobytes()
                    digest = hashlib.sha256(content).digest()
                    if digest not in self._places:
                        data.write(bytes(-data.tell() % ALIGNMENT))
                        self._places[digest] = data.tell(), len(content)
                        data.write(content)
                    offset, length = self._places[digest]
                    value.const_value = ir.ExternalTensor(
                        self.file.name,
                        offset,
                        length,
                        tensor.dtype,
                        shape=tensor.shape,  # type: ignore[arg-type]
                        name=tensor.name or str(value.name),
                        base_dir=self.file.parent,
                    )
        ir.save(model, file)
