"""What a language model learns from: a corpus and an audio tokenizer come in, packed batches of examples go out.

Encoded speech lies in Parquet shards on the way, so that audio is encoded once.
"""
