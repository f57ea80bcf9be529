"""Presets: the YAML file, its types, and every way in which a value gets there."""
