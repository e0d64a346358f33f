"""The paper: encoder, group merging, LSA, decoder. Imports nothing of gmsa but config and errors."""
