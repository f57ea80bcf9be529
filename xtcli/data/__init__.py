"""From text to batches: sources, tokenizers, the token store, the order of samples, the loader.

source (text) -> tokenizer (ids) -> store (memory-mapped, cached by content) -> split -> objective -> loader
"""
