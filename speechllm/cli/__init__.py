"""The `speechllm` command: words of the command line come in, texts, codes and files go out."""
