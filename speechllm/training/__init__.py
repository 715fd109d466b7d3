"""Training of language models: from examples to a loss and updated weights.

Loss, optimizer, schedule, resumable state, the plan printed before a training, and the emotion classifier.
"""
