"""MemorizingTransformer: tokens to logits, segment by segment; memories and other state are passed in."""
