"""The DeepSeek decoder in Flax NNX. It returns hidden states and routing statistics and knows nothing of losses."""
