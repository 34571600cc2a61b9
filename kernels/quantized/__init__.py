"""Packed arrays of few bits: formats, the array type, quantizing and dequantizing, named arrays for files."""

from .formats import FORMATS, FP8_E4M3, INT2, INT4, INT8, MXFP4, NF4, Format
from .named import from_arrays, to_arrays
from .packed import Quantized, check_shards
from .quantize import QuantizedRows, dequantize, quantize, quantize_rows

__all__ = [
    "FORMATS",
    "FP8_E4M3",
    "INT2",
    "INT4",
    "INT8",
    "MXFP4",
    "NF4",
    "Format",
    "Quantized",
    "QuantizedRows",
    "check_shards",
    "dequantize",
    "from_arrays",
    "quantize",
    "quantize_rows",
    "to_arrays",
]
