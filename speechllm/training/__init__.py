"""How a language model learns: examples come in, a loss and updated weights go out.

Loss, optimiser and schedule, resumable state, the plan printed before a training, and the emotion classifier.
"""
