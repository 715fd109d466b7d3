"""The rates shared by the whole package: 16 kHz speech, 50 frames a second. Does not import torch."""

SAMPLE_RATE = 16_000  # Hz
HOP_LENGTH = 320  # samples per codec frame
