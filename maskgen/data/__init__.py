"""Data: sources, preprocessing ops and the input pipeline.

The submodules import TensorFlow, this file does not: `from maskgen.data.pipeline import Data`.
"""
