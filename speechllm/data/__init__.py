"""Training data of a language model: from a corpus and an audio tokenizer to packed batches of examples.

Encoded speech is stored in Arrow shards, so that audio is encoded only once, and is read from there when it is needed.
"""
