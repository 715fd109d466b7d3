"""The other ways to turn speech into tokens, with the same interface as the codec.

Published codecs return codes, k-means units codes of one layer, encoders continuous features, recognisers text.
"""
