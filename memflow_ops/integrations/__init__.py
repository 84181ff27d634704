"""Long memory in the models of other projects.

- `memflow_ops.integrations.diffusers`: a frame cache and retrieval for diffusers' `WanTransformer3DModel`.
- `memflow_ops.integrations.self_forcing`: block selection over the own cache of models of the Self-Forcing kind.
- `memflow_ops.integrations.transformers`: block selection under a name for models of transformers, which it imports.

The others do not import the project that they are for.
"""
