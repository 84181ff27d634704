"""The implementations of the operators. `impl="NAME"` of an operator runs the module `memflow_ops.impl.NAME`."""
