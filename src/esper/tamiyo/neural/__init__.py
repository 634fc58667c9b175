"""The neural controller. It imports torch, so nothing outside imports it before it is asked for."""
