"""What a model makes of text: perplexity, multiple choice."""
