"""The speech codec: a waveform float [B, N] comes in, codes long [B, Q, T] go out, and the other way round.

SEANet or log-mel front end, residual quantiser, streaming, and converters of published checkpoints.
"""
