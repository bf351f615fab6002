"""From small models to a large one: sweeps at several widths, and what they say of the width that is wanted.

`sweep` says which runs there are, `probe` what is measured in each, `conduct` runs them, `analysis` reads them, `page`
tells. ``launch/transfer.py`` puts them together.
"""
