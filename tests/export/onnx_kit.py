"""What the tests of exports share: random weights for any specification, and sessions that run exported graphs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from families.harness import COMMON, Case

from dymoe_compile.export.matrices import Format, Rows, rounded, values_of
from dymoe_compile.export.onnx.decoder import DecoderGraph
from dymoe_compile.export.onnx.graph import Graph, WeightsFile, model_of
from dymoe_compile.export.source import Expert, Source
from dymoe_compile.families import family_of, text_config
from dymoe_compile.families.parts.config import Config
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.kernels.reference import _gated as gated
from dymoe_runtime.model.decoder import Decoder
from dymoe_runtime.model.routing import PromptRouting, Routing
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.spec import ModelSpec

FLOAT, EIGHT, FOUR = Format(32), Format(8, 32), Format(4, 32)
KERNELS = load_kernels("numpy")


def spec_of(case: Case, **changes: Any) -> ModelSpec:
    """The specification of a case of a family."""
    values = json.loads(case.config({**COMMON, **changes}).to_json_string(use_diff=False))
    return family_of(values).spec(Config(text_config(values)))


class RandomModel:
    """Random weights of a specification: a `Source` of exports, and the `Dense` and `Experts` of a `Decoder`.

    Both see the same values, those of the format.
    """

    pause = None

    def __init__(self, spec: ModelSpec, form: Format = FLOAT, seed: int = 0) -> None:
        self.spec, self.expert_form = spec, form
        random = np.random.default_rng(seed)

        def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
            size = 0.3 if "expert" in name or "router" in name else 0.15 if len(shape) == 2 else 0.1
            values = random.normal(0, size, shape)
            is_norm = "norm" in name and not name.endswith("_bias")
            return np.float32(values + (1 if is_norm or name.endswith(("scalar", "router_scale")) else 0))

        self.tensors = {name: tensor(name, shape) for name, shape in spec.each_tensor()}
        shapes: dict[str, tuple[int, ...]] = {**spec.expert_shapes}
        shapes |= {name: (length,) for name, length in spec.expert_vectors.items()}
        self._experts = [
            [{name: tensor(f"expert.{name}", shape) for name, shape in shapes.items()} for _ in range(spec.num_experts)]
            for _ in range(spec.num_layers)
        ]

    # Of a Source.

    def vector(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def dense_form(self, name: str) -> Format:
        return EIGHT if self.expert_form.is_whole else FLOAT

    def dense(self, name: str) -> Iterator[Rows]:
        yield self._rows(self.tensors[name], self.dense_form(name))

    def experts(self, layer: int) -> Iterator[Expert]:
        for tensors in self._experts[layer]:
            matrices = {name: self._rows(t, self.expert_form) for name, t in tensors.items() if t.ndim == 2}
            yield Expert(matrices, {name: t for name, t in tensors.items() if t.ndim == 1})

    @staticmethod
    def _rows(matrix: np.ndarray, form: Format) -> Rows:
        return rounded(matrix, form) if form.is_whole else matrix

    # Of a Dense.

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self._seen(self.tensors["embed"], self.dense_form("embed"))[ids]

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        matrix = self.tensors[name]
        exact = name.endswith((".router", "_exact"))
        y = x @ (matrix if exact else self._seen(matrix, self.dense_form(name))).T
        return np.float32(y + self.tensors.get(f"{name}_bias", np.float32(0)))

    @staticmethod
    def _seen(matrix: np.ndarray, form: Format) -> np.ndarray:
        return values_of(rounded(matrix, form), form) if form.is_whole else matrix

    # Of Experts.

    def decode(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        y = np.zeros_like(h)
        for token, rank in np.ndindex(*routing.experts.shape):
            tensors = self._experts[layer][routing.experts[token, rank]]
            y[token] += routing.weights[token, rank] * self._ffn(tensors, h[token : token + 1])[0]
        return y

    def prefill(self, layer: int, h: np.ndarray, routing: PromptRouting) -> np.ndarray:
        raise NotImplementedError

    def _ffn(self, tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        def product(name: str, x: np.ndarray) -> np.ndarray:
            y = x @ self._seen(tensors[name], self.expert_form).T
            return np.float32(y + tensors.get(f"{name}_bias", np.float32(0)))

        return product("down", gated(self.spec.activation, product("gate", x), product("up", x)))

    def logits(self, ids: np.ndarray, context: int) -> np.ndarray:
        """The logits [T, vocab] of ids [T], by our decoder."""
        decoder = Decoder(self.spec, self, self, KERNELS)
        return decoder.logits(decoder.forward(ids, SequenceState(self.spec, context, 32)))


def export_graph(source: Source, directory: Path, context: int, portable: bool) -> Path:
    """Write the graph of `source`, and check it; return the file of the model."""
    weights = WeightsFile(directory / "model.onnx.data")
    graph = DecoderGraph(Graph(weights), source, context, portable).build()
    weights.close()
    path = directory / "model.onnx"
    path.write_bytes(model_of(graph, portable, "tests", "0").SerializeToString())
    onnx.checker.check_model(str(path))
    return path


class Runner:
    """A session of onnxruntime on one thread, and the sequence that it has seen."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._caches = [each for each in self.session.get_inputs() if each.name.startswith("past")]
        self.reset()

    def reset(self) -> None:
        """Begin a new sequence."""
        self.length = 0
        self._past = {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for each in self._caches}

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """The logits [T, vocab] of ids [T], which continue the sequence."""
        self.length += len(ids)
        mask = np.ones((1, self.length), np.int64)
        logits, *caches = self.session.run(None, {"input_ids": ids[None], "attention_mask": mask, **self._past})
        self._past = dict(zip(self._past, caches, strict=True))
        return np.asarray(logits)[0]


def operators_of(path: Path) -> set[str]:
    """The operators of a model as domain.name, those in bodies of loops included."""
    found = set()

    def walk(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            found.add(f"{node.domain}.{node.op_type}" if node.domain else node.op_type)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    walk(attribute.g)

    walk(onnx.load(str(path), load_external_data=False).graph)
    return found
