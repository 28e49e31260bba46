"""What the auditor reads off an autograd graph: what a node computes, and where its operands come from.

A node of the graph is known by its name (`MulBackward0`), its saved values and its edges. Parameters are constants
while the auditor runs, so an edge that leads somewhere leads to an activation. Two facts that rules need are not in
the graph, a Python number added to an activation and the input of tanh (its node saves the rounded output, from
which a saturated input can't be recovered); `Observer` writes them down during the forward, below autograd, filed
under the sequence number that the node gets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

from lxt.auditdeclared import Calls

__all__ = ["Graph", "Observer", "Slot", "kind"]

SCALAR_GATE = 1e-2  # a smaller number added to an activation is an epsilon, not a share of the sum

_VIEWS = frozenset(
    """Alias AsStrided Clone CopyBackwards Expand LazyClone Lift LiftFresh NativeDropout Neg Permute
    PinMemory Repeat ReshapeAlias ReshapeCopy Squeeze T ToCopy Transpose UnsafeView Unsqueeze View ViewAsComplex
    ViewAsReal""".split()
)
CARRIERS = _VIEWS | frozenset(
    """Chunk ConstantPadNd Diagonal Flip Gather Index IndexSelect MaskedFill MaskedSelect NanToNum NarrowCopy Roll
    Select Slice Split SplitWithSizes Take Tril Triu Unbind Unfold UnsafeIndex UnsafeSplit
    UnsafeSplitWithSizes""".split()
)
_WEIGHT_CARRIERS = CARRIERS | {"Amax", "Cat", "IndexPut", "Max", "Scatter", "Sort", "Stack", "Sum", "Topk", "Where"}
_SCORE_CARRIERS = CARRIERS | {"Add", "Cat", "Clamp", "ClampMax", "ClampMin", "Sub", "Tanh", "Where"}
LINEAR = _WEIGHT_CARRIERS | frozenset(
    """AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Add Amax Amin Aminmax AsStridedScatter
        AvgPool2D AvgPool3D BlockDiag ChannelShuffle Col2Im Complex Conj ConjPhysical CopySlices Cummax Cummin Cumsum
        DiagEmbed DiagonalScatter Embedding EmbeddingBag FftC2C FftC2R FftR2C Fmax Fmin Frac FusedDropout Im2Col
        IndexAdd IndexCopy IndexFill IndexPutImpl Kthvalue MaskedScatter Max MaxPool2D
        MaxPool2DWithIndices MaxPool3DWithIndices MaxUnpool2D MaxUnpool3D Maximum Mean Median Min Minimum Mode Nansum
        NegView PackPaddedSequence PixelShuffle PixelUnshuffle Put ReflectionPad1D ReflectionPad2D ReflectionPad3D
        ReplicationPad1D ReplicationPad2D ReplicationPad3D Rot90 Rsub ScatterAdd ScatterReduce SelectScatter
        SliceScatter Sub ToDense Trace UpsampleBicubic2D UpsampleBicubic2DAa UpsampleBilinear2D UpsampleBilinear2DAa
        UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D
        UpsampleNearestExact2D UpsampleNearestExact3D UpsampleTrilinear3D""".split()
)
# Edges that are factors of one product; an edge before them is a summand.
PRODUCTS = {name: (0, 1) for name in "Bmm Convolution Dot GroupedMm LinalgCross Linear Mm Mul Mv Vdot".split()}
PRODUCTS |= {name: (1, 2) for name in "Addbmm Addcmul Addmm Addmv Addr Baddbmm".split()} | {"Trilinear": (0, 1, 2)}
MATMULS = frozenset("Addbmm Addmm Baddbmm Bmm Mm Mv".split())
SOFTMAX = frozenset({"LogSoftmax", "MaskedSoftmax", "SafeSoftmax", "Softmax", "XSoftmaxBackward"})
SOFT = frozenset({"Exp", "LogSigmoid", "Sigmoid", "Softplus"})  # attention weights in some models, gates in others
STATISTICS = frozenset({"LinalgVectorNorm", "Norm", "Reciprocal", "Rsqrt", "Sqrt", "Std", "Var"})
CONSTANT = frozenset(
    """Ceil Cos Cosh Cumprod Erfc Exp2 Floor Hardsigmoid LinalgInvEx LinalgPinv Log Log10 Log2 Logaddexp Logcumsumexp
    Logsumexp Prod Round Sgn Sign Sin Trunc""".split()
)
HOMOGENEOUS = frozenset({"Abs", "Hardshrink", "LeakyRelu", "PreluKernel", "Relu", "RreluWithNoise", "Threshold"})
ACTIVATIONS = HOMOGENEOUS | frozenset(
    """Asin Asinh Atan Atanh Celu Clamp ClampMax ClampMin Elu Erf Expm1 Gelu Hardswish Hardtanh Log1P Mish Silu Sinh
    Softshrink Tan Tanh GeLUFunctionBackward""".split()
)
FUNCTIONS = frozenset({"GeLUFunctionBackward"})  # activations that a model brings its own autograd function for
GATES = ACTIVATIONS - {"Abs", "Clamp", "ClampMax", "ClampMin"} | {"Sigmoid"}
_CURVED = ACTIVATIONS | SOFT | {"Hardsigmoid"}
_ELEMENTWISE = _CURVED | _VIEWS | {"Add", "Div", "Mul", "Pow", "Rsub", "Sub"}

Slot = tuple[Any, int]  # a node and which of its outputs, as in Node.next_functions


def kind(node: Node) -> str:
    """`Mul` for a MulBackward0; the full name for a node that isn't one of torch's generated ones."""
    name = node.name().rsplit("::", 1)[-1]
    match = re.fullmatch(r"(\w+?)Backward\d+(?:_copy)?", name)
    return match[1] if match else name


class Observer(TorchDispatchMode):
    """Writes down the numbers added to activations and the inputs of functions whose node doesn't save them."""

    _INPUTS = frozenset({"tanh", "tanh_", "expm1", "expm1_", "hardtanh_", "elu_", "celu_"})
    _SUMS = frozenset({"add", "add_", "sub", "sub_", "rsub"})

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, float] = {}
        self.inputs: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if args and isinstance(args[0], torch.Tensor) and args[0].requires_grad and torch.is_grad_enabled():
            # autograd made the operation's node just before
            number = torch.autograd._get_sequence_nr() - 1  # pyright: ignore[reportPrivateImportUsage]
            if name in self._SUMS and len(args) > 1 and isinstance(args[1], (int, float)):
                self.numbers[number] = float(args[1])
            elif name in self._INPUTS:
                self.inputs[number] = args[0].detach().clone()  # an in-place operation overwrites it
        return func(*args, **kwargs)


class Graph:
    """The part of an autograd graph that lies in a model's forward, with what the rules ask about its nodes.

    Attributes:
        nodes: operands before their users, without the leaves.
        primitives: nodes inside an activation function that was written as a product x * g(x).
        activations: the products x * g(x) themselves -> the edge of the factor g(x).
        statistics: squares and means that only serve a normalisation.
        scores: matrix products of queries and keys, under an attention's softmax.
        calls: what users declared; patterns end at their entrances and exits.
        cut: node -> its edges that lead to an activation which the composite takes as a constant there.
    """

    def __init__(
        self,
        value: Node,
        outputs: Iterable[Node],
        observer: Observer,
        calls: Calls | None = None,
        is_cut: Callable[[Node, int], bool] = lambda node, edge: False,
    ) -> None:
        self._numbers, self._inputs = observer.numbers, observer.inputs
        self.calls = Calls() if calls is None else calls
        inside, seen = set(_reach(outputs)), list(_reach([value]))
        self.nodes = [node for node in seen if node in inside and kind(node) != "AccumulateGrad"]
        self.cut: dict[Node, list[int]] = {}
        for node in self.nodes:
            cut = [edge for edge, (operand, _) in enumerate(node.next_functions) if operand and is_cut(node, edge)]
            if cut:
                self.cut[node] = cut
        self.users: dict[Node, list[tuple[Node, int]]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for edge, operand in self.operands(node):
                if operand in self.users:
                    self.users[operand].append((node, edge))
        self.primitives: set[Node] = set()
        self.activations: dict[Node, int] = {}
        for node in self.nodes:
            self._find_activation(node)
        self.statistics = self._find_statistics()
        self.scores = self._find_scores()

    def edges(self, node: Node) -> Sequence[Slot]:
        """As Node.next_functions, with nothing behind a cut edge."""
        cut = self.cut.get(node)
        if cut is None:
            return node.next_functions
        return [(None, 0) if edge in cut else slot for edge, slot in enumerate(node.next_functions)]

    def operands(self, node: Node) -> list[tuple[int, Node]]:
        """The edges that lead to activations."""
        return [(edge, operand) for edge, (operand, _) in enumerate(self.edges(node)) if operand is not None]

    def input_of(self, node: Node) -> torch.Tensor:
        """The value that an element-wise function was applied to."""
        observed = self._inputs.get(node._sequence_nr())
        if observed is None and kind(node) in FUNCTIONS:
            return node.saved_tensors[0]  # type: ignore[attr-defined]
        return node._saved_self if observed is None else observed  # type: ignore[attr-defined]

    def origin(self, slot: Slot, through: frozenset[str] = CARRIERS) -> Slot:
        """Where a value comes from, behind views, casts, copies, dropout and constant factors."""
        while True:
            behind = [following for following in self.edges(slot[0]) if following[0] is not None]
            carries = kind(slot[0]) in through or self._scales(slot[0])
            if len(behind) != 1 or not carries or slot[0] in self.calls.exits:
                return slot
            slot = behind[0]

    def is_scalar_sum(self, node: Node) -> bool:
        """Whether a node adds a Python number to an activation."""
        sums = kind(node) in {"Add", "Sub", "Rsub"} and len(self.operands(node)) == 1
        return sums and abs(self._numbers.get(node._sequence_nr(), 0.0)) > SCALAR_GATE

    def is_gate(self, node: Node) -> bool:
        """Whether a node is an activation function, or the product that ends a written one."""
        call = self.calls.exits.get(node)
        return kind(node) in GATES or node in self.activations or (call is not None and call.makes_gates)

    def softmax_behind(self, node: Node) -> bool:
        """Whether a value is made of softmax weights: selected, masked, renormalised, but not combined otherwise."""
        return any(
            kind(found) in SOFTMAX | SOFT or (kind(found) in {"Add", "Sub"} and self._sums_weights(found))
            for found in self._search(node, _WEIGHT_CARRIERS)
        )

    def _sums_weights(self, node: Node) -> bool:
        operands = [operand for _, operand in self.operands(node)]
        return len(operands) > 1 and all(map(self.softmax_behind, operands))

    def weighs(self, node: Node) -> bool:
        """Whether the values are the weights in a matrix product of two activations, as in attention."""
        stack, seen = [node], {node}
        while stack:
            for user, edge in self.users.get(stack.pop(), ()):
                if kind(user) in MATMULS and len(self.operands(user)) > 1 and edge in PRODUCTS[kind(user)]:
                    return True
                numerator = kind(user) == "Div" and edge == 0
                if (
                    user not in seen
                    and user not in self.calls.entrances
                    and (kind(user) in _WEIGHT_CARRIERS or self._scales(user) or numerator)
                ):
                    seen.add(user)
                    stack.append(user)
        return False

    def normalises(self, node: Node) -> bool:
        """Whether a logsumexp is only subtracted from its own input, for an exponential to be attention's softmax."""
        users, source = self.users.get(node, ()), node.next_functions[0]
        return bool(users) and all(
            kind(user) == "Sub"
            and edge == 1
            and user.next_functions[0] == source
            and any(kind(after) == "Exp" and self.weighs(after) for after, _ in self.users[user])
            for user, edge in users
        )

    def _scales(self, node: Node) -> bool:
        """Whether a node multiplies or divides by a constant."""
        (first, _), *rest = self.edges(node) or ((None, 0),)
        active = [following for following in rest if following[0] is not None]
        return (kind(node) == "Mul" and (first is None) != (not active)) or (
            kind(node) == "Div" and first is not None and not active
        )

    def _search(self, node: Node, through: frozenset[str]) -> Iterator[Node]:
        """Nodes met on the way back, each path ending at the first node that isn't a carrier."""
        stack, seen = [node], {node}
        while stack:
            node = stack.pop()
            yield node
            if node in self.calls.exits:
                continue
            division = kind(node) == "Div"
            if kind(node) in through or self._scales(node) or division:
                behind = [operand for edge, operand in self.operands(node) if not (division and edge)]
                stack += [operand for operand in behind if operand not in seen]
                seen.update(behind)

    def _find_activation(self, node: Node) -> None:
        """Recognise x * g(x), g element-wise: GELU, SiLU and others written in primitive operations."""
        if kind(node) != "Mul" or len(self.operands(node)) != 2:
            return
        for edge in (0, 1):
            inside = self._between(self.edges(node)[edge], self.origin(self.edges(node)[1 - edge], _VIEWS))
            if any(kind(member) in _CURVED for member in inside):
                self.activations[node] = edge
                self.primitives |= inside
                return

    def _between(self, start: Slot, source: Slot) -> set[Node]:
        """The element-wise nodes from `start` back to `source`; empty if any path leads elsewhere."""
        stack, inside = [start], set[Node]()
        while stack:
            slot = stack.pop()
            if slot == source or slot[0] in inside:
                continue
            if (
                kind(slot[0]) not in _ELEMENTWISE or slot[0] in self.calls.exits or len(inside) > 24
            ):  # more nodes than any activation function has
                return set()
            inside.add(slot[0])
            stack += [following for following in self.edges(slot[0]) if following[0] is not None]
        return inside

    def _find_statistics(self) -> set[Node]:
        through = CARRIERS | {"Add", "ClampMin", "Mean", "Sum", "Sub"}
        starts = [operand for node in self.nodes if self.is_statistic(node) for _, operand in self.operands(node)]
        starts += [self.edges(node)[1][0] for node in self.nodes if kind(node) == "Div" and self.denominator(node)]
        found = {member for start in starts if start is not None for member in self._search(start, through)}
        return {node for node in found if kind(node) in {"Pow", "Mul"} | STATISTICS}

    def _find_scores(self) -> set[Node]:
        weights = [node for node in self.nodes if kind(node) in SOFTMAX | SOFT and self.weighs(node)]
        logits = [operand for node in weights for _, operand in self.operands(node)]
        found = {member for operand in logits for member in self._search(operand, _SCORE_CARRIERS)}
        return {node for node in found if kind(node) in MATMULS and len(self.operands(node)) > 1}

    def denominator(self, node: Node) -> bool:
        """Whether a division's denominator is an activation."""
        return len(self.edges(node)) > 1 and self.edges(node)[1][0] is not None

    @staticmethod
    def is_statistic(node: Node) -> bool:
        """Whether a node computes a normalisation's divisor or factor: a root, a norm, a deviation."""
        return kind(node) in STATISTICS or (kind(node) == "Pow" and _exponent_below_one(node))


def _exponent_below_one(node: Node) -> bool:
    exponent = getattr(node, "_saved_exponent", None)
    return exponent is not None and bool((torch.as_tensor(exponent) < 1).all())


def _reach(starts: Iterable[Node]) -> list[Node]:
    """All nodes behind `starts`, operands before their users."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(node, False) for node in starts]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(operand, False) for operand, _ in node.next_functions if operand is not None]
    return order
