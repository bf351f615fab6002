"""A look at all machines before training: are they alike, do they compute and send what they should, and how fast.

`check` does it; `measure` has what is measured, `blame` finds the one to name, `judge` has the sentences.
"""
