"""The rates that everything here shares, free of torch: 16 kHz speech in 50 frames a second."""

SAMPLE_RATE = 16_000  # Hz
HOP_LENGTH = 320  # samples per codec frame
