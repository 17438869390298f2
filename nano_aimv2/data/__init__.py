"""Data: from tar shards, tokenizers and image files to the batch of a step. Feeds the method."""
