"""Speech to codes and back, independent of language models.

The modules at this level are shared by all subpackages (`interface`, `audio`, `frames`, `corpus`, files and pretrained
models), except `loading`, which loads any audio tokenizer by its name. `codec` is the network, `training` trains it,
`schemes` holds the other ways to turn speech into tokens, and `metrics` evaluates them all.
Users import from `speechllm`.
"""
