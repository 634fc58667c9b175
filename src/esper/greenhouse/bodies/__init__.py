"""Kinds of hosts: what an MLP, a convolutional network and a transformer are made of."""
