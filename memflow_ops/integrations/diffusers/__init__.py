"""Long memory for diffusers' `WanTransformer3DModel`: a frame cache and retrieval behind its self-attention.

    memory = attach_memory(pipe.transformer, height=60, width=104)    # the size of its latents
    video = memory.generate(pipe, prompts)                            # a prompt for each chunk of 3 latent frames

or, with a loop of one's own,

    for text in prompts:                                         # text embeddings, for a chunk each
        memory.begin_chunk(text)                                 # retrieves the past frames that the prompt asks for
        for t in timesteps:
            velocity = transformer(latents, t, text).sample      # then a step of the sampler
        with memory.clean():
            transformer(latents, torch.zeros(1), text)           # leaves the keys that later chunks see
        memory.commit()

The transformer must have been trained to generate causally, chunk by chunk, as by Self-Forcing: memory does not make a
bidirectional model causal. Between `commit` and `begin_chunk` the transformer behaves as without memory.

A pass over an open chunk may be trained through, with gradient checkpointing or without: gradients reach the chunk's
own queries, keys and values and end at the past, as in MemFlow's rollout.
"""

from memflow_ops.integrations.diffusers.attach import attach_memory
from memflow_ops.integrations.diffusers.memory import WanMemory
from memflow_ops.integrations.diffusers.processor import WanMemoryProcessor

__all__ = ["WanMemory", "WanMemoryProcessor", "attach_memory"]
