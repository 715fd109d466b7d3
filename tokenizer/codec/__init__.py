"""The speech codec: encodes waveforms float [B, N] to codes long [B, Q, T] and decodes them.

SEANet or log-mel front end, residual quantiser, streaming, and converters of published checkpoints.
"""
