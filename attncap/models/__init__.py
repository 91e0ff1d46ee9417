"""The networks: encoder and decoder. Start reading in decoder.py."""
