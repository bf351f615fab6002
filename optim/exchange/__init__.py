"""Moves matrices between the layout they are stored in and the layout they are computed in."""
