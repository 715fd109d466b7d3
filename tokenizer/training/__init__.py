"""How a codec learns: crops of a corpus and frozen teachers come in, gradients and validation figures go out.

Reconstruction and adversarial losses, distillation, the training step, and small teachers for machines without network.
"""
