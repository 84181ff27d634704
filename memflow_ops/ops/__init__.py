"""The public operators: contracts in docstrings, checks of arguments, dispatch to the registered operators."""
