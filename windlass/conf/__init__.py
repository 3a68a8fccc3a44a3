"""The configuration tree: dataclasses (`schema.py`) and YAML presets, a folder a group, composed by Hydra."""
