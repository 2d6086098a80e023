"""How the documentation becomes a site; `hooks.py` is what mkdocs calls. See README.md."""
