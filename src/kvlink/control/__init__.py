"""The control plane: one authenticated TCP connection per peer pair, in Python, used by the core only.

Read in this order: ``wire`` (bytes before authentication), ``auth`` (who proves what), ``messages`` (what is said
afterwards), ``connection`` (frames, their authentication and flow control), ``handshake`` (one connection from its
first byte to two known channels), ``linkup`` (from there to an open link), ``session`` (an open link's life),
``listener`` and ``hub`` (all of one channel's connections).
"""
