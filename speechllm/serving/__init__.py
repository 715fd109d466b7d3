"""A speech language model behind HTTP: recordings come in, texts, codes and sounds go out.

`engine` answers many callers in batches, `app` speaks OpenAI's protocol, `answers` has its forms, `door` keeps limits.
"""
