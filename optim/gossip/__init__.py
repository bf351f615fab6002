"""Decentralised exchange: who talks to whom, what a message holds, what is done with it, and how it travels."""
