"""Training of the codec, from crops of a corpus and frozen teachers to gradients and validation metrics.

Reconstruction and adversarial losses, distillation, the training step, and small teachers for use without a network.
"""
