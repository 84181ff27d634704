"""The command `memflow`, as `python -m memflow_ops.cli`."""

from memflow_ops.cli.main import main

if __name__ == "__main__":
    main()
