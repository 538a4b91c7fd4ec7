"""Operations: for each a plain PyTorch reference, a compiled twin, and the choice between them.

Importing this package loads neither torch nor the compiled extension; `native.status()` says whether the extension is
there.
"""
