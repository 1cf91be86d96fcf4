"""The derivative of every operator that memories and networks around them are made of.

Importing the package registers all rules with :mod:`titans_converters.onnx.autodiff`.
"""

from titans_converters.onnx.gradient_rules import control_flow, elementwise, norms, products, shapes

__all__ = ["control_flow", "elementwise", "norms", "products", "shapes"]
