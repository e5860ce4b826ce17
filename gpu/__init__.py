"""Everything that needs an NVIDIA GPU: engines, writers of engine files, and the visit that measures a card.

No card has run any of it yet, so all of it is experimental. It registers itself by entry points, as a package from
elsewhere would; nothing below imports it.
"""
