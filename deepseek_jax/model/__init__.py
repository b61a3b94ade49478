"""The decoder in Flax NNX: token ids go in, hidden states and routing statistics come out.

It knows nothing of losses. Read transformer.py first; layers.py has the legend of all shape
letters. attention/ and moe.py are what a layer is made of, stages.py is the same model over the
stages of a pipeline.
"""
