"""Long memory in other people's models: diffusers' `WanTransformer3DModel`, and attention of the Self-Forcing kind.

`memflow_ops.integrations.diffusers` and `memflow_ops.integrations.self_forcing`; neither imports the other project.
"""
