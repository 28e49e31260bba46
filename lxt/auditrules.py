"""The auditor's rules: what happens to the gradient at each node of an autograd graph.

Nodes are decided operands first, so that it is known which values the rules have made constants: a factor that is
one does not count among the n factors of a product. A product of more than two factors is read as it was computed,
operation by operation: in (a * b) * c the share of c is 1/2, of a and b 1/4 each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from torch import Tensor
from torch.autograd.graph import Node

from lxt.auditdeclared import Call
from lxt.auditgradients import glu_gradient, norm_gradient, running_norm_gradient, slope, softmax_gradient, times
from lxt.auditgraph import (
    ACTIVATIONS,
    CONSTANT,
    HOMOGENEOUS,
    LINEAR,
    MATMULS,
    PRODUCTS,
    SOFT,
    SOFTMAX,
    STATISTICS,
    Graph,
    Slot,
    kind,
)
from lxt.composites import Composite

__all__ = ["Treatment", "treatments"]

_NORMS = frozenset({"FusedRmsNorm", "NativeBatchNorm", "NativeGroupNorm", "NativeLayerNorm"})
# What an activation plus a number stays one behind, where all that goes in is one.
_SHIFT_CARRIERS = frozenset({"Cat", "ConstantPadNd", "Cumsum", "Mean", "Stack", "Sum", "Where"})
_SOLVES = frozenset({"LinalgSolveEx", "LinalgSolveTriangular"})
_SAMPLERS = frozenset({"CudnnGridSampler", "GridSampler2D", "GridSampler3D"})
_ATTENTION = frozenset({"CudnnAttention", "EfficientAttention", "FlashAttention"})
# Attention that a model has its own autograd function for -> which edge is the query's; key and value follow.
_ATTENTION_FUNCTIONS = {"YosoCumulationBackward": 2, "YosoLSHCumulationBackward": 2}


@dataclass(frozen=True)
class Treatment:
    """What one node does to its gradients.

    Attributes:
        rule: the rule's name, for the count.
        factors: edge -> what its gradient is multiplied with; 0 stops it.
        replace: gradient of the output -> gradient of edge 0, where a factor doesn't express the rule.
        stopped_output: an output whose gradient is dropped before the node runs.
        known: whether the node's operation has a rule.
    """

    rule: str
    factors: dict[int, float] | None = None
    replace: Callable[[Tensor], Tensor] | None = None
    stopped_output: int | None = None
    known: bool = True


def treatments(graph: Graph, composite: Composite) -> dict[Node, Treatment]:
    """The treatment of every node.

    Raises:
        ValueError: the composite asks for something that the graph can't provide.
    """
    rules = _Rules(graph, composite)
    for node in graph.nodes:
        treatment = _cut(rules.decide(node), graph.cut.get(node, ()))
        factors = treatment.factors or {}
        rules.treatments[node] = treatment
        # what only constants flow into is a constant, and so is what passes nothing on
        if all(factors.get(edge, 1) == 0 or operand in rules.constant for edge, operand in graph.operands(node)):
            rules.constant.add(node)
    return rules.treatments


class _Rules:
    def __init__(self, graph: Graph, composite: Composite) -> None:
        self.graph, self.composite = graph, composite
        self.constant: set[Node] = set()
        self.treatments: dict[Node, Treatment] = {}
        self.scaled: dict[Node, int] = {}  # products with a shifted factor -> the edge of the other one

    def decide(self, node: Node) -> Treatment:
        name, composite, calls = kind(node), self.composite, self.graph.calls
        if node in calls.entrances:
            return Treatment("declared", {0: 0.0} if calls.stops(node, composite) else None)
        if node in calls.exits:
            return self._declared(calls.exits[node])
        if calls.inside(node):
            return Treatment("declared")
        if name in calls.linear:
            return Treatment("linear")
        if node in self.graph.activations:
            return self._written_activation(node)
        if node in self.graph.primitives and composite.activation == "gradient":
            return Treatment("gradient")
        if node in self.graph.statistics and composite.norm == "gradient":
            return Treatment("gradient")
        if name in PRODUCTS:
            return self._product(node)
        if name in ACTIVATIONS:
            return self._activation(node)
        if name in SOFT | SOFTMAX:
            return self._softmax(node) if name in SOFTMAX or self.graph.weighs(node) else self._constant(node)
        if name == "Logsumexp" and self.graph.normalises(node):
            if composite.softmax_temperature != 1 and composite.attention != "value_only":
                raise ValueError(
                    f"softmax_temperature={composite.softmax_temperature} needs the softmax in the graph, but it is "
                    "written as exp(x - logsumexp(x)); use 1.0"
                )
            return self._softmax(node)
        if name.startswith("ScaledDotProduct") or name in _ATTENTION or name in _ATTENTION_FUNCTIONS:
            return self._fused_attention(node)
        if name in {"Div", "Pow", "Addcdiv", "Glu", "VarMean", "StdMean", "Lerp", *_SOLVES}:
            return self._solve() if name in _SOLVES else getattr(self, f"_{name.lower()}")(node)
        if name in _NORMS:
            return self._norm(node)
        if name in _SAMPLERS:  # of an image, linear, at places that are constants
            return Treatment("gradient") if composite.product == "gradient" else Treatment("linear", {1: 0.0})
        if name in CONSTANT | STATISTICS or (name == "ScatterReduce" and node._saved_reduce == "prod"):  # type: ignore[attr-defined]
            return self._constant(node)
        # whatever it is, no relevance comes to it if only constants go into it
        known = name in LINEAR or all(operand in self.constant for _, operand in self.graph.operands(node))
        return Treatment("linear" if known else "unknown", known=known)

    def _declared(self, call: Call) -> Treatment:
        """The end of a declared call, where it is known which of its inputs are constants."""
        live = {node for node in call.entrances if node in self.treatments and node not in self.constant}
        for node, share in self.graph.calls.shares(call, self.composite, live).items():
            treatment = Treatment("declared", replace=share) if callable(share) else Treatment("declared", {0: share})
            self.treatments[node] = treatment
        return Treatment("declared", replace=call.keep)

    # products

    def _product(self, node: Node) -> Treatment:
        graph, composite, name = self.graph, self.composite, kind(node)
        operands = {edge: operand for edge, operand in graph.operands(node) if edge in PRODUCTS[name]}
        live = [edge for edge, operand in operands.items() if operand not in self.constant]
        if len(operands) < 2:
            return Treatment("linear")
        if len(live) < 2:
            return Treatment("gate")
        if name in MATMULS and composite.attention == "gradient":
            return Treatment("gradient")  # attention is what multiplies matrices of activations
        stopped = [e for e in live if composite.product != "gradient" and self._shifts(graph.edges(node)[e])]
        if 0 < len(stopped) < len(live):
            if name == "Mul":
                self.scaled[node] = next(edge for edge in live if edge not in stopped)
            return Treatment("gate", {edge: float(edge not in stopped) for edge in live})
        if name in MATMULS and composite.attention != "value_only":
            weights = [edge for edge in live if graph.softmax_behind(operands[edge])]
            if len(weights) == 1:
                return self._attention(live, weights[0], self._qkv()[0])
            if node in graph.scores:
                return self._attention(live, live[0], self._qkv()[1])
        origins = {edge: self._origin(graph.edges(node)[edge]) for edge in live}
        if composite.norm == "gradient" and any(graph.is_statistic(origin) for origin in origins.values()):
            return Treatment("gradient")
        if name == "Mul" and composite.router == "stop":
            weights = [edge for edge in live if graph.softmax_behind(operands[edge])]
            if 0 < len(weights) < len(live):
                return Treatment("gate", {edge: float(edge not in weights) for edge in live})
        if composite.product == "gradient":
            return Treatment("gradient")
        # a gate gates element by element
        gates = [edge for edge in live if name == "Mul" and graph.is_gate(origins[edge])]
        if composite.product == "stop_gate" and 0 < len(gates) < len(live):
            return Treatment("gate", {edge: float(edge not in gates) for edge in live})
        return Treatment("uniform", dict.fromkeys(live, 1 / len(live)))

    def _origin(self, slot: Slot) -> Node:
        """Where a factor comes from, behind what the rules have made constant factors, powers and bounds."""
        while True:
            slot = self.graph.origin(slot)
            edges = self.graph.edges(slot[0])
            if slot[0] in self.scaled:
                slot = edges[self.scaled[slot[0]]]
                continue
            live = [
                following
                for following in (edges[:1] if kind(slot[0]) == "Div" else edges)  # what divides is a constant
                if following[0] is not None and following[0] not in self.constant
            ]
            scaled = kind(slot[0]) in {"Mul", "Div"} and slot[0] not in self.graph.activations
            power = kind(slot[0]) == "Pow" and not self.graph.is_statistic(slot[0])
            bounded = kind(slot[0]) in {"Clamp", "ClampMax", "ClampMin"}
            if len(live) != 1 or not (scaled or power or bounded):
                return slot[0]
            slot = live[0]

    def _shifts(self, slot: Slot) -> bool:
        """Whether a value is an activation plus a number, or made of such values and constants alone."""
        stack, seen = [slot], set[Node]()
        while stack:
            node = self._origin(stack.pop())
            if node in seen or self.graph.is_scalar_sum(node):
                continue
            seen.add(node)
            live = [edge for edge, operand in self.graph.operands(node) if operand not in self.constant]
            factors = [edge for edge in live if edge in PRODUCTS.get(kind(node), ())]
            made = kind(node) in _SHIFT_CARRIERS or (len(factors) > 1 and self._is_shared(node))
            if not live or not made or node in self.graph.calls.exits:
                return False
            stack += [self.graph.edges(node)[edge] for edge in live]
        return True

    def _is_shared(self, node: Node) -> bool:
        """Whether a product has a rule: as a matrix product it is attention, which may be differentiated."""
        return kind(node) not in MATMULS or self.composite.attention != "gradient"

    def _qkv(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(weights, value) and (query, key) factors of the two products whose combination is `qkv`."""
        query, key, value = self.composite.qkv
        share = query + key
        return (share, value), ((query / share, key / share) if share else (0.0, 0.0))

    def _attention(self, live: list[int], first: int, factors: tuple[float, float]) -> Treatment:
        if self.composite.attention == "gradient":
            return Treatment("gradient")
        return Treatment("attention", {edge: factors[edge != first] for edge in live})

    def _fused_attention(self, node: Node) -> Treatment:
        first = _ATTENTION_FUNCTIONS.get(kind(node), 0)  # the query's edge
        live = {edge - first for edge, operand in self.graph.operands(node) if operand not in self.constant}
        query, key, value = (edge in live for edge in range(3))
        if self.composite.attention == "value_only":
            return Treatment("attention", {first: 0.0, first + 1: 0.0, first + 2: 1.0, first + 3: 0.0})
        if self.composite.softmax_temperature != 1:
            raise ValueError(
                f"softmax_temperature={self.composite.softmax_temperature} needs the softmax in the graph, but "
                f"{node.name()} doesn't show it; load the model with attn_implementation='eager'"
            )
        if self.composite.attention == "gradient":
            return Treatment("gradient")
        # as in the eager products: where one factor is a constant, the other takes all
        (weights, values), (queries, keys) = self._qkv()
        weights, values = (weights if value else 1.0), (values if query or key or 3 in live else 1.0)
        queries, keys = (queries if key else 1.0), (keys if query else 1.0)
        shares = (weights * queries, weights * keys, values, weights)
        return Treatment("attention", {first + edge: share for edge, share in enumerate(shares)})

    # functions

    def _constant(self, node: Node) -> Treatment:
        field = self.composite.norm if self.graph.is_statistic(node) else self.composite.product
        return Treatment("gradient") if field == "gradient" else Treatment("constant", _all_edges(node, 0.0))

    def _activation(self, node: Node) -> Treatment:
        if self._is_shifted(node):
            return Treatment("constant", _all_edges(node, 0.0))
        if self.composite.activation == "gradient" or kind(node) in HOMOGENEOUS:  # there f'(x) is f(x)/x
            return Treatment(self.composite.activation)
        return Treatment("identity", replace=lambda gradient: times(gradient, slope(node, self.graph.input_of(node))))

    def _is_shifted(self, node: Node) -> bool:
        """Whether a function is applied to an activation plus a number, and so isn't 0 where the activation is."""
        bound = kind(node) in {"Clamp", "ClampMax", "ClampMin"}
        return not bound and self.composite.product != "gradient" and self._shifts(self.graph.edges(node)[0])

    def _written_activation(self, node: Node) -> Treatment:
        """For x * g(x), g element-wise, f(x)/x is g(x), which is the product's own gradient with g a constant."""
        if self.composite.activation == "gradient":
            return Treatment("gradient")
        return Treatment("identity", {self.graph.activations[node]: 0.0})

    def _softmax(self, node: Node) -> Treatment:
        if self.composite.attention == "value_only":
            return Treatment("constant", _all_edges(node, 0.0))
        temperature = self.composite.softmax_temperature
        if temperature == 1 or kind(node) not in SOFTMAX or not self.graph.weighs(node):
            return Treatment("softmax")
        return Treatment("softmax", replace=lambda gradient: softmax_gradient(gradient, node, temperature))

    def _pow(self, node: Node) -> Treatment:
        exponent = getattr(node, "_saved_exponent", None)
        if self.composite.product == "gradient":
            return Treatment("gradient")
        constant = self._is_shifted(node) or self.graph.is_statistic(node)
        of_number = isinstance(getattr(node, "_saved_self", None), (int, float))
        if exponent is None or of_number or constant or 1 in dict(self.graph.operands(node)):
            # a number to the power of an activation, a power below 1 or of a shifted sum, a power that is an activation
            return Treatment("constant", _all_edges(node, 0.0))
        if isinstance(exponent, Tensor) and exponent.numel() > 1:
            return Treatment("unknown", known=False)
        if self.composite.activation == "gradient" and self.graph.is_gate(self._origin(self.graph.edges(node)[0])):
            return Treatment("gradient")  # relu(x)^2 is one activation function
        return Treatment("power", {0: 1 / float(exponent)})

    def _div(self, node: Node) -> Treatment:
        if not self.graph.denominator(node) or self.composite.norm == "gradient":
            return Treatment("gradient" if self.graph.denominator(node) else "linear")
        return Treatment("constant", {1: 0.0})

    def _solve(self) -> Treatment:
        """The matrix is a denominator; the solution is linear in the right-hand side, which comes second."""
        return Treatment("gradient") if self.composite.product == "gradient" else Treatment("constant", {0: 0.0})

    def _addcdiv(self, node: Node) -> Treatment:
        return Treatment("gradient") if self.composite.norm == "gradient" else Treatment("constant", {2: 0.0})

    def _lerp(self, node: Node) -> Treatment:
        live = {edge for edge, operand in self.graph.operands(node) if operand not in self.constant}
        return Treatment("unknown", known=False) if 2 in live else Treatment("linear")

    def _glu(self, node: Node) -> Treatment:
        if self.composite.product == "gradient":
            return Treatment("gradient")
        return Treatment("gate", replace=lambda gradient: glu_gradient(gradient, node))

    # normalisation

    def _varmean(self, node: Node) -> Treatment:
        return Treatment("gradient") if self.composite.norm == "gradient" else Treatment("norm", stopped_output=0)

    _stdmean = _varmean

    def _norm(self, node: Node) -> Treatment:
        if self.composite.norm == "gradient" and getattr(node, "_saved_training", True):
            return Treatment("gradient")
        if kind(node) == "NativeBatchNorm" and not node._saved_training:  # type: ignore[attr-defined]
            # linear, but torch's own backward is wrong on the CPU for one sample and another memory format
            return Treatment("linear", replace=lambda gradient: running_norm_gradient(gradient, node))
        return Treatment("norm", replace=lambda gradient: norm_gradient(gradient, node))


def _cut(treatment: Treatment, edges: Collection[int]) -> Treatment:
    """The treatment, with nothing going through `edges`."""
    if not edges:
        return treatment
    factors = {**(treatment.factors or {}), **dict.fromkeys(edges, 0.0)}
    return replace(treatment, factors=factors, replace=None if 0 in edges else treatment.replace)


def _all_edges(node: Node, factor: float) -> dict[int, float]:
    return dict.fromkeys(range(len(node.next_functions)), factor)
