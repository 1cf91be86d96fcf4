"""Which execution provider runs which node: ONNX Runtime's own record, and what is made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from titans_runtime.errors import EnvironmentProblem

RECORD: Final = "session.record_ep_graph_assignment_info"
CPU: Final = "CPUExecutionProvider"

Placement = Mapping[str, Mapping[str, int]]
"""Provider → operator → nodes, subgraphs included."""

# Sizes and indices: ONNX Runtime computes them on the CPU on purpose, beside a device, since the host needs
# them. The recurrences' control flow is the host's, too; what stands in it is counted by itself.
_BESIDE_A_DEVICE = frozenset(
    """
    Add And Cast Concat Constant ConstantOfShape Div Equal Expand Gather GatherND Greater GreaterOrEqual
    Identity If Less LessOrEqual Loop Max Min Mod Mul Neg Not Or Pad Range ReduceMax ReduceProd Reshape Scan
    Shape Size
    Slice Split Squeeze Sub Transpose Unsqueeze Where
    """.split()  # noqa: SIM905 - names in quotes say no more
)


def read_placement(session: Any) -> Placement | None:  # noqa: ANN401 - onnxruntime.InferenceSession
    """What the session recorded as it was loaded; None where ONNX Runtime is too old to say."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    found: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return found


def check_placement(placement: Placement | None, wanted: Sequence[str], graph: str) -> None:
    """Refuse what ONNX Runtime does in silence: nodes that a provider could not take, run on the CPU.

    Args:
        placement: of :func:`read_placement`.
        wanted: the providers that were asked for. The CPU among them may run anything.
        graph: name, for the message.

    Raises:
        EnvironmentProblem: work was left to the CPU, a provider runs nothing, or nothing is known.
    """
    if CPU in wanted and len(wanted) == 1:
        return
    if placement is None:
        raise EnvironmentProblem(
            f"this onnxruntime cannot say which provider runs what, so {wanted[0]} cannot be relied on; "
            "install onnxruntime 1.27 or newer"
        )
    idle = wanted[0] not in placement
    if idle:
        ran = ", ".join(placement)
        raise EnvironmentProblem(f"{wanted[0]} runs no node of {graph}, only {ran}; choose another provider")
    if CPU in wanted:
        return
    left = {name: count for name, count in placement.get(CPU, {}).items() if name not in _BESIDE_A_DEVICE}
    if left:
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(left.items()))
        raise EnvironmentProblem(
            f"{', '.join(wanted)} left operators of {graph} to the CPU: {listed}; "
            f"add {CPU} if that is meant, or choose another provider"
        )


def placement_lines(placement: Placement | None, graph: str) -> list[str]:
    """For people: which provider runs how many nodes."""
    return [f"· {graph}: {sum(nodes.values())} nodes on {name}" for name, nodes in (placement or {}).items()]
