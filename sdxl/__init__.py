"""Stable Diffusion XL on MindSpore: tensors, and nothing of jobs, manifests or files.

Letters used in shape comments throughout the package:

    B  images in a batch (2B in the graph when guided: the unconditional half first)
    C  channels          H, W  height and width of the array at hand
    L  tokens (77)       D     width of a transformer or of an embedding

Importing this package imports nothing heavy: MindSpore is loaded by the networks only.
"""
