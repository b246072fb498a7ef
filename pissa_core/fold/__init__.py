"""pissa-to-base: an adapter goes back into its residual model, shard by shard.

`adapter` reads it, `belonging` asks whether the two belong together, `planning` makes the plan,
`arithmetic` is W = R + scaling · B · A, `work` does it to one matrix, `result` says what comes out.
Nothing is imported here: some of it needs torch, some transformers, some neither.
"""
