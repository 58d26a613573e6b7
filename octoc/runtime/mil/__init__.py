"""Core ML's model intermediate language (MIL), read and evaluated without Core ML.

`reader` turns a package into plain data, `evaluate` runs that data in torch, and each other module
is a table from operation name to function. Semantics follow the operation reference of coremltools 9.
"""
