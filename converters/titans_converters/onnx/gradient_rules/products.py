"""Derivatives of products and convolutions."""

from __future__ import annotations

from onnx import NodeProto

from titans_converters.onnx.autodiff import Tape, rule
from titans_converters.onnx.gradient_rules.common import Gradients, attributes, only


@rule("MatMul")
def _matmul(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, (a, b), y = only(gradients), node.input, node.output[0]
    result: Gradients = [None, None]
    if tape.rank(a) < 2 or tape.rank(b) < 2:
        raise ValueError("gradient: MatMul with a vector; give it a second axis")
    if tape.wants(a):
        product = tape.op("MatMul", g, tape.transposed(b, tape.rank(b)))
        result[0] = tape.summed_to(product, a, y, inner=2)
    if tape.wants(b):
        product = tape.op("MatMul", tape.transposed(a, tape.rank(a)), g)
        result[1] = tape.summed_to(product, b, y, inner=2)
    return result


@rule("Gemm")
def _gemm(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, given = only(gradients), attributes(node)
    if given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        raise ValueError("gradient: Gemm with factors is not supported")
    a, b, *rest = node.input
    result: Gradients = [None] * len(node.input)
    if tape.wants(a):
        turned = b if given.get("transB") else tape.transposed(b, 2)
        product = tape.op("MatMul", g, turned)
        result[0] = tape.transposed(product, 2) if given.get("transA") else product
    if tape.wants(b):
        turned = a if given.get("transA") else tape.transposed(a, 2)
        product = tape.op("MatMul", turned, g)
        result[1] = tape.transposed(product, 2) if given.get("transB") else product
    for index, bias in enumerate(rest, 2):
        if tape.wants(bias):
            result[index] = tape.summed_to(g, bias, node.output[0])
    return result


@rule("Einsum")
def _einsum(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """By one factor: the same sum with the gradient in its place."""
    g, terms, result = only(gradients), *_terms(tape, node)
    found: Gradients = []
    for place, (own, name) in enumerate(zip(terms, node.input, strict=True)):
        if not tape.wants(name):
            found.append(None)
            continue
        others = [*terms[:place], *terms[place + 1 :]]
        factors = [*node.input[:place], *node.input[place + 1 :]]
        found.append(_einsum_part(tape, own, name, [result, *others], [g, *factors]))
    return found


def _einsum_part(tape: Tape, own: str, name: str, terms: list[str], factors: list[str]) -> str:
    """An axis that no other term has was summed over alone: the gradient is the same all along it."""
    kept = "".join(axis for axis in own if any(axis in term for term in terms))
    part = tape.op("Einsum", *factors, equation=f"{','.join(terms)}->{kept}")
    alone = [place for place, axis in enumerate(own) if axis not in kept]
    if not alone:
        return part
    return tape.op("Expand", tape.op("Unsqueeze", part, tape.ints(*alone)), tape.op("Shape", name))


def _terms(tape: Tape, node: NodeProto) -> tuple[list[str], str]:
    """The axes of every factor, and of the result.

    Raises:
        ValueError: the equation repeats an axis within a factor, leaves axes out, or spreads one.
    """
    equation = attributes(node)["equation"].decode().replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    plain = arrow and "." not in equation and all(len(set(term)) == len(term) for term in terms)
    sizes: dict[str, int | str | None] = {}
    for term, name in zip(terms, node.input, strict=True):
        for axis, size in zip(term, tape.types.shapes.get(name, [None] * len(term)), strict=False):
            plain = plain and sizes.setdefault(axis, size) == size
    if not plain:
        raise ValueError(f"gradient: Einsum {equation} is not differentiated; write it with matmul")
    return terms, result


@rule("Conv")
def _conv(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """By its input: a depthwise one with turned taps over a padded gradient; others transposed."""
    g, (_, weight, *bias), given = only(gradients), node.input, attributes(node)
    if any(tape.wants(name) for name in (weight, *bias)):
        raise ValueError("gradient: Conv is differentiated by its input alone")
    taps = tape.types.shapes[weight][2:]
    plain = all(
        set(given.get(name, [value])) == {value}
        for name, value in (("strides", 1), ("dilations", 1), ("pads", 0))
    )
    if plain and tape.types.shapes[weight][1] == 1 and tape.types.shapes[weight][0] == given.get("group", 1):
        axes = range(2, 2 + len(taps))
        count = len(taps)
        turned = tape.op(
            "Slice",
            weight,
            tape.ints(*[-1] * count),
            tape.ints(*[-(2**62)] * count),
            tape.ints(*axes),
            tape.ints(*[-1] * count),
        )
        pads = [int(size) - 1 for size in taps if isinstance(size, int)] * 2
        return [tape.op("Conv", g, turned, group=given.get("group", 1), pads=pads), *[None] * (1 + len(bias))]
    kept = {name: given[name] for name in ("strides", "dilations", "pads", "group") if name in given}
    return [tape.op("ConvTranspose", g, weight, **kept), *[None] * (1 + len(bias))]
