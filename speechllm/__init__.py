"""speechllm: let a language model hear. Everything a user needs is imported from here, when it is first used.

Inside: the ground floor is the speech language model itself (vocabulary, prompt, model, decoding, adapters, export);
`data` makes examples, `training` learns from them, `evaluation` scores, `runs` holds recipes together, `reports` shows,
`cli` is the command.
"""

import lazy_loader

from speechllm import _guard as _guard  # the right `tokenizer`?

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
