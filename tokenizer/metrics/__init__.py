"""How good codes and decoded speech are: waveforms or codes come in, figures with a stated definition go out.

Speech quality, prosody, use and content of codes, and voice conversion with its baseline.
"""
