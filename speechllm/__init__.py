"""Speech as input for language models. Users import everything from here; each name is loaded on first use.

The modules of this folder are the speech language model itself (vocabulary, prompt, model, decoding, adapters,
export). `data` makes training examples, `training` fits models to them, `evaluation` scores results, `runs` is what
recipes share, `reports` writes pages, `cli` is the command-line interface.
"""

import lazy_loader

from speechllm import _guard as _guard  # checks that `tokenizer` is ours

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
