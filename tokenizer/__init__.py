"""Speech to codes and back; knows nothing of language models.

Waveforms come in, codes go out, and back. The ground floor holds what every room stands on (`interface`, `audio`,
`frames`, `corpus`, files and pretrained models) and the door to all tokenizers (`loading`); `codec` is the network,
`training` what teaches it, `schemes` the other ways to turn speech into tokens, `metrics` what measures them.
Users import from `speechllm`.
"""
