"""Versions of the libraries that encodings depend on."""

import PIL
import torch
import transformers

import diffusers


LIBRARIES = {module.__name__: module.__version__ for module in (diffusers, PIL, torch, transformers)}
