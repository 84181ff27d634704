"""The public operators: each states its contract, checks its arguments and calls its registered operator."""
