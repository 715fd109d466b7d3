"""The README.md of a shared codec: the facts known from the codec itself, without any claim about its quality."""

# Jinja2 template, filled in by SpeechCodec.generate_model_card.
CODEC_CARD = """---
{{ card_data }}
---

# Speech codec

Turns speech into {{ "%g" | format(codec.frame_rate) }} frames of discrete codes a second, and codes into speech.

| | |
|---|---|
| sample rate | {{ codec.sample_rate }} Hz, mono |
| frame rate | {{ "%g" | format(codec.frame_rate) }} frames/s (hop of {{ codec.hop_length }} samples) |
| codebooks | {{ codec.num_codebooks }} of {{ codec.codebook_size }} vectors, dimension {{ codec.codebooks.shape[2] }} |
| bit rate | {{ "%g" | format(bit_rate * codec.num_codebooks) }} bit/s, \
{{ "%g" | format(bit_rate) }} bit/s with the first codebook alone |
| parameters | {{ "{:,}".format(parameters) }}, and {{ "{:,}".format(codec.codebooks.numel()) }} in the codebooks |
| causal | {{ "yes" if codec.config.causal else "no" }} |
| fingerprint | `{{ codec.fingerprint }}` |

## How to use it

```python
from speechllm import load_audio, load_tokenizer

codec = load_tokenizer("this/repository")  # or a folder with these files
assert codec.fingerprint == "{{ codec.fingerprint }}"  # otherwise this card belongs to other weights
waveform = load_audio("speech.flac", codec.sample_rate)
codes = codec.encode(waveform[None])  # codes.ids: long [1, {{ codec.num_codebooks }}, frames]
speech = codec.decode(codes)  # float [1, samples]
```

A language model trained on the codes of this codec cannot be used with those of another: compare the fingerprint.

## What this card does not cover

It was generated from the configuration and the weights alone. How well the codec works depends on its training: how
long, on which speakers, in which language. Measure it on your own recordings before you rely on it. Whoever shares the
codec should add its training data, measured results and the licence of the weights.
"""
