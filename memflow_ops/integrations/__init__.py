"""Long memory in the models of other projects.

- `memflow_ops.integrations.diffusers`: a frame cache and retrieval for diffusers' `WanTransformer3DModel`.
- `memflow_ops.integrations.self_forcing`: block selection over the own cache of models of the Self-Forcing kind.

Neither imports the other project.
"""
