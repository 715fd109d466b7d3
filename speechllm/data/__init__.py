"""Training data of a language model: from a corpus and an audio tokenizer to packed batches of examples.

Encoded speech is stored in Parquet shards, so that audio is encoded only once.
"""
