"""Measuring models: needle recall by distance (`needle`), perplexity by position (`perplexity`)."""
