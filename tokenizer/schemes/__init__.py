"""The other ways to turn speech into tokens, behind the codec's interface: waveforms come in, tokens go out.

Published codecs give codes, k-means units codes of one layer, encoders continuous features, recognisers text.
"""
